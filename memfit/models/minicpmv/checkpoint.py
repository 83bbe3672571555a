"""What lies in a checkpoint folder: names and shapes against the model's, and the parts that stay on disk."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file, logging

from memfit.errors import UserError
from memfit.families.minicpmv2 import KEPT_ON_DISK
from memfit.inputs.model_source import FORMS, weight_names

logger = logging.get_logger(__name__)

_SINGLE, _INDEX = FORMS[0]
_SHOWN = 12
# Bytes of a number by its name in a safetensors header.
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WIDTHS |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
Shapes = Mapping[str, tuple[int, ...]]


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it; empty without weights. Names are the files' own, not only the index's."""
    return {name: path for path in stored_files(folder) for name in _tensors_in(path)}


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, without reading a weight and without running code of a pickle."""
    return {name: shape for path in stored_files(folder) for name, (shape, _) in _tensors_in(path).items()}


def stored_files(folder: Path) -> list[Path]:
    """The weight files that transformers would read: safetensors before pickles, a single file before an index.

    UserError that counts the files which an index names and the folder lacks.
    """
    names = weight_names(folder)
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise UserError(
            f"{folder}: {len(gone)} of {len(names)} weight files that its index names are not there: {gone[0]}{more}",
            "fetch the model again, or name the folder that is whole",
        )
    return [folder / name for name in names]


def _tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name -> (shape, bytes) of a file's tensors, from a safetensors header or a pickle's own list of tensors."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (tuple(part.get_shape()), WIDTHS[part.get_dtype()]) for name, part in parts.items()}
        return {name: (shape, math.prod(shape) * width) for name, (shape, width) in shapes.items()}
    found = _unpickled(path, "meta")
    return {name: (tuple(value.shape), value.numel() * value.element_size()) for name, value in found.items()}


def _unpickled(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a torch pickle, on "meta" without their numbers. Anything but tensors and plain values is refused
    by torch's own restricted reader, and no code of the file is run."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file, or one that wants to run code
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{path}: not read as plain tensors ({first[:160]})",
            "save the checkpoint as safetensors where you trust its source: model.save_pretrained(folder)",
        ) from error
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def is_kept_on_disk(name: str) -> bool:
    """Whether a tensor belongs to a part that is neither loaded nor trained (audio and speech of -o)."""
    return any(name.startswith(prefixes) for prefixes in KEPT_ON_DISK.values())


def differences(wanted: Shapes, found: Shapes) -> list[str]:
    """One line for each tensor that the model wants and the checkpoint lacks, the reverse, or of another shape."""
    lines = [f"{name} {list(wanted[name])}: not in the checkpoint" for name in wanted if name not in found]
    lines += [f"{name} {list(found[name])}: no place in the model" for name in found if name not in wanted]
    lines += [
        f"{name}: {list(found[name])} in the checkpoint, {list(wanted[name])} by config.json"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    return sorted(lines)


def hint_for(lines: list[str], drops_last: bool) -> str:
    """The most likely wrong field of config.json."""
    layers = [line for line in lines if line.startswith("vpm.encoder.layers.")]
    if layers and len(layers) == len(lines):
        value = "false" if drops_last else "true"
        return f"config.json: drop_vision_last_layer: {value}, or vision_config.num_hidden_layers"
    if any("q_norm" in line or "self_attn.q_proj.bias" in line for line in lines):
        return "config.json: version: it says which language model this is"
    return "use the config.json that came with these weights"


def require_match(model_class: Any, source: Any, options: Mapping[str, Any]) -> None:
    """UserError with the list of differences when a folder's weights are not those that its config describes.

    Nothing is compared where there are no weights: transformers then says what is missing.
    """
    folder = folder_of(source, options)
    if folder is None or options.get("state_dict") is not None:
        return
    found = shapes_in(folder)
    if not found:
        return
    config = options.get("config")
    if not isinstance(config, model_class.config_class):
        config = model_class.config_class.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = model_class(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected]
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    found = {name: shape for name, shape in found.items() if not any(pattern.search(name) for pattern in ignored)}
    lines = differences({name: shape for name, shape in wanted.items() if name in found or name not in tied}, found)
    if lines:
        shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(
            f"{folder}: {len(lines)} tensors do not match config.json:{shown}{more}",
            hint_for(lines, bool(config.drop_vision_last_layer)),
        )


def folder_of(source: Any, options: Mapping[str, Any]) -> Path | None:
    """The folder of a local model, or of a hub id with the files that transformers would read (fetched or cached)."""
    if Path(str(source)).is_dir():
        return Path(str(source))
    passed = {k: options[k] for k in ("revision", "token", "cache_dir", "local_files_only") if options.get(k)}
    for name in (name for single, index in FORMS for name in (index, single)):
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **passed)
        if found is not None:
            break
    else:
        return None
    if name.endswith(".index.json"):
        index = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"]
        for file in sorted(set(index.values())):
            cached_file(str(source), file, **passed)
    cached_file(str(source), "config.json", **passed)
    return Path(found).parent


def other_parts(folder: Path) -> dict[str, Path]:
    """The tensors of a checkpoint that memfit leaves on disk: name -> file."""
    return {name: path for name, path in weight_files(folder).items() if is_kept_on_disk(name)}


def other_parts_bytes(folder: Path) -> dict[str, tuple[int, int]]:
    """Part (audio, tts) -> (tensors, bytes on disk) of what is left there."""
    sizes: dict[str, tuple[int, int]] = {}
    tensors = {name: size for path in stored_files(folder) for name, (_, size) in _tensors_in(path).items()}
    for part, prefixes in KEPT_ON_DISK.items():
        own = [size for name, size in tensors.items() if name.startswith(prefixes)]
        if own:
            sizes[part] = (len(own), sum(own))
    return sizes


@contextmanager
def keep_other_parts(model: Any, target: Any, is_main_process: bool) -> Iterator[None]:
    """Around a save: afterwards what was never loaded lies beside what is saved, so that the folder is whole again.

    That is audio and speech of -o, same names and bytes, and the code and assets that config.json's auto_map names.
    When the source no longer has audio or speech, config.json is written so that it does not claim them either, with a
    warning.
    """
    source = str(model.name_or_path or "")
    folder = folder_of(source, {"local_files_only": True}) if source else None
    parts = other_parts(folder) if folder is not None else {}
    if model.config.model_type == "minicpmo":
        _claim_only(model.config, parts, source)
    into_source = folder is not None and folder.resolve() == Path(target).resolve()
    # A save replaces the files of its folder: what would go with them is read first.
    held = tensors_of(parts) if parts and into_source and is_main_process else {}
    yield
    if folder is None or not is_main_process:
        return
    if parts:
        write_beside(held or tensors_of(parts), Path(target))
    if getattr(model.config, "auto_map", None) and not into_source:
        copy_code(folder, Path(target))


def _claim_only(config: Any, parts: Mapping[str, Path], source: str) -> None:
    """`init_audio` and `init_tts` are false for a part whose weights are not there."""
    for part, flag in (("audio", "init_audio"), ("tts", "init_tts")):
        if any(name.startswith(KEPT_ON_DISK[part]) for name in parts):
            continue
        if source and config.to_dict().get(flag, True):
            logger.warning(f"{source}: no {part} weights there to write back; {flag} is saved as false")
        setattr(config, flag, False)


def copy_code(source: Path, target: Path) -> None:
    """Copies the checkpoint's own Python files and its assets, unread: other programs run on them, memfit does not."""
    for file in sorted(source.glob("*.py")):
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    if (source / "assets").is_dir():
        shutil.copytree(source / "assets", target / "assets", dirs_exist_ok=True)


def tensors_of(parts: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """The tensors that lie in some files, in host memory."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(set(parts.values())):
        wanted = [name for name, where in parts.items() if where == path]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        else:
            found = _unpickled(path, "cpu")
            tensors |= {name: found[name].contiguous().clone() for name in wanted}
    return tensors


def write_beside(tensors: Mapping[str, torch.Tensor], target: Path) -> None:
    """Adds tensors to a saved model as one more file, and renames the others and the index to count it."""
    if (target / _SINGLE).is_file():
        (target / _INDEX).unlink(missing_ok=True)  # an earlier save's: transformers leaves it behind
    saved = weight_files(target)
    files = sorted(set(saved.values()))
    total = len(files) + 1
    numbered = {path: target / f"model-{n:05d}-of-{total:05d}.safetensors" for n, path in enumerate(files, 1)}
    extra = target / f"model-{total:05d}-of-{total:05d}.safetensors"
    save_file(dict(tensors), extra, metadata={"format": "pt"})
    for path, name in numbered.items():
        path.rename(name)
    size = sum(path.stat().st_size for path in (*numbered.values(), extra))
    index = {name: numbered[path].name for name, path in saved.items()} | dict.fromkeys(tensors, extra.name)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}, indent=2)
    (target / _INDEX).write_text(text + "\n", encoding="utf-8")
