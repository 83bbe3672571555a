"""The only place where memfit asks transformers for a model: empty from a config, or with a checkpoint's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging as upstream_logging

from memfit import models
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.inputs.model_source import weight_names


def config_object(config: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json's content. Raises UserError when transformers refuses it."""
    if config.get("model_type") in models.NATIVE:
        models.register()
    # A copy to the bottom: upstream writes into nested mappings (rope_scaling gets rope_theta); the config is a key.
    values = {key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"}
    try:
        return transformers.AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:  # upstream raises many kinds, with the key in the text
        first = _one_line(error)
        raise UserError(
            f"transformers {transformers.__version__} refuses this {config['model_type']} config: {first}",
            "mend config.json or the recipe's model_config",
        ) from error


def empty_model(family: Family, config: Mapping[str, Any], attention: str = "sdpa") -> nn.Module:
    """The model of a config on the meta device, in the config's own dtype: shapes without memory or weights."""
    quiet_upstream()
    with torch.device("meta"):
        return _from_nothing(family, config_object(config), attention)


def _one_line(error: Exception, limit: int = 400) -> str:
    """What upstream says, its reason below the first line included."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def random_model(family: Family, config: Mapping[str, Any], attention: str = "sdpa") -> nn.Module:
    """The model of a config with transformers' own random initialisation, on the CPU."""
    return _from_nothing(family, config_object(config), attention)


def loaded_model(family: Family, folder: Path, config: Mapping[str, Any], attention: str = "sdpa") -> nn.Module:
    """The model with the weights in `folder`, in the checkpoint's own dtype, on the CPU.

    Safetensors are read, or pickles where there are none, as plain tensors only (torch's `weights_only`): no code from
    the folder is run. Raises UserError when weights are missing, left over, or of another shape than the config says:
    silently fresh weights are the worst of bugs.
    """
    quiet_upstream()
    try:
        model, found = getattr(transformers, family.auto_class).from_pretrained(
            folder,
            config=config_object(config),
            dtype="auto",
            attn_implementation=attention,
            use_safetensors=all(name.endswith(".safetensors") for name in weight_names(folder)),
            local_files_only=True,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        first = _one_line(error)
        raise UserError(
            f"cannot load the weights in {folder}: {first}", "check that the folder is a whole safetensors checkpoint"
        ) from error
    wrong = [
        f"{len(found[kind])} {words} (first: {sorted(map(str, found[kind]))[0]})"
        for kind, words in (
            ("missing_keys", "weights are missing"),
            ("unexpected_keys", "weights have no place in the model"),
            ("mismatched_keys", "weights have another shape"),
        )
        if found.get(kind)
    ]
    if wrong:
        raise UserError(
            f"{folder}: the checkpoint does not match its config: {'; '.join(wrong)}",
            "use the config.json that came with these weights, and no model_config overrides when training",
        )
    _forget_unused_names(model)
    return model


def _forget_unused_names(model: Any) -> None:
    """Saving turns names back by the renamings that loading used, and by no other.

    Under ZeRO-3 transformers keeps all of them (integrations.deepspeed:_load_state_dict_into_zero3_model), and would
    save under names that no one can load; elsewhere this is a repetition. To go when upstream filters there too.
    """
    if getattr(model, "_weight_conversions", None):
        model._weight_conversions = [rule for rule in model._weight_conversions if rule.was_used()]


def load_tensors(model: nn.Module, file: Path, name_of: Callable[[str], str]) -> None:
    """Copy the tensors of a safetensors file into the model's parameters; `name_of` gives a parameter's saved name.

    Raises UserError when a saved tensor has no place in the model, or another shape.
    """
    saved = load_file(file)
    live = {name_of(name): parameter for name, parameter in model.named_parameters()}
    wrong = [name for name, value in saved.items() if name not in live or live[name].shape != value.shape]
    if wrong:
        raise UserError(
            f"{file}: {len(wrong)} tensors do not fit the model (first: {wrong[0]})", "use the run's own model"
        )
    with torch.no_grad():
        for name, value in saved.items():
            # Widened first: a part trained in fp32 must not be rounded to the 16 bits its base was stored in.
            live[name].data = value.to(live[name].device)


def quiet_upstream() -> None:
    """What transformers would print while loading and tracing, memfit tells itself: every mismatch stops the build."""
    upstream_logging.set_verbosity_error()
    upstream_logging.disable_progress_bar()


def _from_nothing(family: Family, config: Any, attention: str) -> nn.Module:
    auto_class = getattr(transformers, family.auto_class)
    return auto_class.from_config(config, attn_implementation=attention)
