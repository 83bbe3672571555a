"""The one path from a plan to live objects: load -> freeze -> adapters -> dtypes -> checkpointing -> collate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from memfit.build.adapters import PeftModel, load_adapters
from memfit.build.arrange import Options, arrange, autocast_dtype, part_finder
from memfit.build.data import Collator, refuse_packing
from memfit.build.device import device_for, place_buffers, waits_for_engine
from memfit.build.freeze import DTYPES, trainable_by_part
from memfit.build.load import empty_model, load_tensors, loaded_model
from memfit.build.loss import Loss
from memfit.build.pixels import PixelReader
from memfit.build.quantise import pack_weights, packing_of
from memfit.build.shell import fill_shell, in_turn, is_shell, where_made
from memfit.build.supported import refuse_what_is_not_built
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.families.names import base_name
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

    `loss` takes the model's outputs and labels.
    `autocast` is the dtype that matrix products run in, None without autocast. `saved_dtype` is the checkpoint's.
    """

    model: nn.Module
    family: Family
    encoder: Encoder
    pixels: PixelReader | None
    collator: Collator
    loss: Loss
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
    if recipe.levers.packing:
        refuse_packing(family, source.config)
    device = device_for(plan.forecast.hardware)
    whole = trained is not None and not (trained / ADAPTER_WEIGHTS).exists()
    folder = trained if trained is not None and whole else source.folder
    parts = resolve_parts(recipe, family, materials.profile)
    load = functools.partial(_load_trained, trained=trained, whole=whole) if trained is not None else None
    packing = packing_of(recipe, parts, device)
    pack = functools.partial(pack_weights, packing=packing) if packing is not None else None
    with in_turn(recipe, plan.forecast.hardware.gpus_per_node):
        if is_shell(recipe):
            model = empty_model(family, source.config, _attention(recipe))
        else:
            model = loaded_model(family, folder, source.config, _attention(recipe))
        saved_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with where_made(recipe):
            options = Options(load=load, generates=trained is not None, pack=pack)
            arranged = arrange(model, recipe, parts, family, options)
        fill_shell(arranged.model, recipe, device)
        model, part_of = arranged.model, part_finder(family)
        if waits_for_engine(recipe):
            place_buffers(model, device)
        else:
            model.to(device)
    encoder = Encoder(source, recipe.image)
    extra = family.forward_kwargs(source.config, encoder.processor_settings) if family.forward_kwargs else {}
    pixels = PixelReader(family, encoder.processor_settings) if family.images else None
    return Built(
        model=model,
        family=family,
        encoder=encoder,
        pixels=pixels,
        collator=Collator(family, encoder.pad_id, extra, encoder.image_token_id, recipe.levers.packing),
        loss=arranged.loss,
        autocast=autocast_dtype(recipe),
        part_of=part_of,
        trainable=trainable_by_part(model, part_of),
        checkpointed=arranged.checkpointed,
        source_folder=source.folder,
        saved_dtype=saved_dtype if saved_dtype in DTYPES.values() else torch.float32,
        adapted=bool(parts.lora_modules),
    )


def _load_trained(model: nn.Module, trained: Path, whole: bool) -> None:
    """The weights that a run saved beside its adapters, and these."""
    if isinstance(model, PeftModel) and not whole:
        load_adapters(model, trained / ADAPTER_WEIGHTS)
    if (trained / TRAINED_PARTS).exists():
        load_tensors(model, trained / TRAINED_PARTS, base_name)


def _attention(recipe: Recipe) -> str:
    return {"flash": "flash_attention_2"}.get(recipe.levers.attention, recipe.levers.attention)
