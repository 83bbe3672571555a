"""A model's parameters as numbers, read from the meta device: no weights, no memory, no remote code.

torch is imported only when a profile is not in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family
from memfit.inputs import cache
from memfit.specs.profile import ParameterRow, Profile
from memfit.trace.collection import no_collection


def profile_of(config: Mapping[str, Any], family: Family, folder: Path | None = None) -> Profile:
    """The profile of a config.json's content, from the cache in `folder` if it is there."""
    key = cache.profile_key(config, family.name)
    found = cache.load_profile(key, folder)
    if found is None:
        with no_collection():
            found = read_profile(config, family)
        cache.store_profile(found, folder)
    return found


def read_profile(config: Mapping[str, Any], family: Family) -> Profile:
    """All parameters of the model that `build` would make from this config.

    Raises UserError when transformers refuses the config or a parameter belongs to no part of the family.
    """
    from memfit.build.load import empty_model

    model = empty_model(family, config)
    owners = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    rows = []
    unreached = family.unreached(config) if family.unreached else ()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied_to = first.get(id(parameter))
        first.setdefault(id(parameter), name)
        module = name.rpartition(".")[0]
        part = _part(family, name)
        rows.append(
            ParameterRow(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                part=part,
                module=module,
                kind=_kind(owners[module]),
                block=_block(family, part, name),
                tied_to=tied_to,
                reached=not name.startswith(unreached),
            )
        )
    return Profile(
        model_type=str(config["model_type"]),
        key=cache.profile_key(config, family.name),
        parameters=tuple(rows),
        buffers_bytes=_buffers_bytes(model),
        versions=cache.installed_versions(),
    )


def _part(family: Family, parameter: str) -> str:
    try:
        return family.part_of(parameter)
    except KeyError:
        raise UserError(
            f"parameter {parameter} belongs to no part of the {family.name} family",
            "report it with the model's config.json; a prefix is missing in the family's file",
        ) from None


def _block(family: Family, part: str, parameter: str) -> int | None:
    prefix = family.blocks.get(part)
    if prefix is None or not parameter.startswith(prefix):
        return None
    number = parameter.removeprefix(prefix).lstrip(".").partition(".")[0]
    return int(number) if number.isdigit() else None


def _kind(module: Any) -> str:
    """The kind of layer that owns a parameter, as `specs.profile.ParameterRow` names it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "linear-transposed"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return "norm" if "Norm" in type(module).__name__ else "other"


def _buffers_bytes(model: Any) -> int:
    """Bytes of the buffers, each storage once."""
    sizes = {id(buffer): buffer.numel() * buffer.element_size() for buffer in model.buffers()}
    return sum(sizes.values())
