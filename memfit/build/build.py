"""The one path from a plan to live objects: load -> freeze -> adapters -> dtypes -> checkpointing -> collate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from memfit.build.adapters import add_adapters, base_name, is_adapter, load_adapters
from memfit.build.checkpointing import set_checkpointing
from memfit.build.data import Collator
from memfit.build.device import device_for
from memfit.build.freeze import DTYPES, set_dtypes, set_learning, trainable_by_part
from memfit.build.load import load_tensors, loaded_model
from memfit.build.pixels import PixelReader
from memfit.build.supported import refuse_what_is_not_built
from memfit.catalog.precisions import PRECISIONS
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import ModelSource
from memfit.planner.parts import resolve_parts
from memfit.specs.plan import Plan
from memfit.specs.profile import Profile
from memfit.specs.recipe import Recipe

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_PARTS = "trained_parts.safetensors"


@dataclass(frozen=True)
class Materials:
    """What a plan is built from: the model's files and what is known of its parameters."""

    source: ModelSource
    family: Family
    profile: Profile


@dataclass(frozen=True)
class Built:
    """Live objects of one plan. `trainable` is read back from the model: parameters that learn, by part.

    `autocast` is the dtype that matrix products run in, None without autocast. `saved_dtype` is the checkpoint's.
    """

    model: nn.Module
    family: Family
    encoder: Encoder
    pixels: PixelReader | None
    collator: Collator
    part_of: Callable[[str], str]
    trainable: Mapping[str, int]
    checkpointed: Mapping[str, int]
    source_folder: Path
    saved_dtype: torch.dtype
    adapted: bool
    autocast: torch.dtype | None


def build(plan: Plan, materials: Materials, trained: Path | None = None) -> Built:
    """Live objects for training, or, with the weights that a run saved in `trained`, for evaluating that run.

    Raises UserError for what the plan asks and memfit cannot build, and for weights that do not match.
    """
    recipe = plan.recipe
    refuse_what_is_not_built(recipe)
    source, family = materials.source, materials.family
    if source.folder is None:
        raise UserError(
            f"{source.name} is a config without weights", "give a model folder, or a hub id, to train or evaluate"
        )
    device = device_for(plan.forecast.hardware)
    whole = trained is not None and not (trained / ADAPTER_WEIGHTS).exists()
    folder = trained if trained is not None and whole else source.folder
    model = loaded_model(family, folder, source.config, _attention(recipe))
    saved_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    part_of = _part_of(family)
    parts = resolve_parts(recipe, family, materials.profile)
    if parts.lora_modules:
        model = add_adapters(model, recipe.lora, parts.lora_modules)
        if trained is not None and not whole:
            load_adapters(model, trained / ADAPTER_WEIGHTS)
    if trained is not None and (trained / TRAINED_PARTS).exists():
        load_tensors(model, trained / TRAINED_PARTS, base_name)
    set_learning(model, lambda name: is_adapter(name) or base_name(name) in parts.learning)
    precision = PRECISIONS[recipe.levers.precision]
    set_dtypes(model, precision.learning, precision.frozen, keep=is_adapter)
    checkpointed = set_checkpointing(model, part_of, _checkpointing(recipe))
    encoder = Encoder(source, recipe.image)
    extra = family.forward_kwargs(source.config, encoder.processor_settings) if family.forward_kwargs else {}
    pixels = PixelReader(family, encoder.processor_settings) if family.images else None
    return Built(
        model=model.to(device),
        family=family,
        encoder=encoder,
        pixels=pixels,
        collator=Collator(family, encoder.pad_id, extra, encoder.image_token_id),
        autocast=DTYPES[precision.compute] if recipe.levers.autocast is True else None,
        part_of=part_of,
        trainable=trainable_by_part(model, part_of),
        checkpointed=checkpointed,
        source_folder=source.folder,
        saved_dtype=saved_dtype if saved_dtype in DTYPES.values() else torch.float32,
        adapted=bool(parts.lora_modules),
    )


def _part_of(family: Family) -> Callable[[str], str]:
    return lambda name: family.part_of(base_name(name))


def _attention(recipe: Recipe) -> str:
    return {"flash": "flash_attention_2"}.get(recipe.levers.attention, recipe.levers.attention)


def _checkpointing(recipe: Recipe) -> Mapping[str, str]:
    chosen = recipe.levers.checkpointing
    if isinstance(chosen, Mapping):
        return chosen
    return dict.fromkeys(("vision", "connector", "language"), chosen)
