"""What decides what a run learns, read from its live objects at the start: two runs that "should be the same" are
compared by it (`memfit report A B`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from memfit.build.adapters import is_adapter
from memfit.build.build import Built
from memfit.errors import UserError
from memfit.families.names import base_name
from memfit.inputs.encode import Encoder
from memfit.specs.plan import Plan
from memfit.specs.sample import Sample, Turn

# A conversation with a system prompt and two answers: where a template, a tokenizer or the choice of the tokens that
# carry loss differs, its ids or labels do.
TALK = (
    ("system", "Be brief."),
    ("user", "What is it?"),
    ("assistant", "Ink."),
    ("user", "Where?"),
    ("assistant", "Top."),
)


def learning_facts(plan: Plan, built: Built, decays: Iterable[str], arguments: Any) -> dict[str, Any]:
    """Plain JSON values. `decays`: names of the parameters with weight decay; `arguments`: the TrainingArguments."""
    model, recipe = built.model, plan.recipe
    ranks, micro = plan.forecast.hardware.ranks, int(recipe.levers.micro_batch)
    return {
        "samples_per_step": int(recipe.batch),
        "split_of_step": f"{ranks} ranks x {int(recipe.batch) // (ranks * micro)} micro-batches x {micro}",
        "loss": f"{type(built.loss).__name__}, mean over all trained tokens of the step"
        if callable(built.loss) and arguments.average_tokens_across_devices
        else "mean over the trained tokens of a rank",
        "betas": [arguments.adam_beta1, arguments.adam_beta2],
        "eps": arguments.adam_epsilon,
        "clip": arguments.max_grad_norm,
        "dtypes": _dtypes(model),
        "decay": _decay(model, set(decays), float(arguments.weight_decay)),
        "adapters": _adapters(model, recipe.lora.init),
        "image": _image(built.encoder),
        "template": fingerprint(built.encoder),
    }


def _dtypes(model: nn.Module) -> dict[str, int]:
    """Elements that learn by dtype. Where an engine has split them already, of the whole tensors."""
    found: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = str(parameter.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    return found


def _decay(model: nn.Module, decays: set[str], value: float) -> dict[str, Any]:
    """The decay, how many tensors that learn have it, and which have not: a digest of their names."""
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = sorted(base_name(name) for name in learning if name not in decays)
    return {"value": value, "tensors": len(learning) - len(spared), "spared": len(spared), "names": digest(spared)}


def _adapters(model: nn.Module, init: str) -> dict[str, Any] | None:
    """Scale (alpha / rank, or what a variant makes of it) and ranks of the live layers; None without adapters."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer) and hasattr(module, "scaling")]
    if not layers:
        return None
    scales = {round(float(value), 6) for layer in layers for value in layer.scaling.values()}
    ranks = {int(value) for layer in layers for value in layer.r.values()}
    dtypes = {str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters() if is_adapter(name)}
    names = sorted(base_name(name) for name, module in model.named_modules() if module in layers)
    return {
        "modules": len(layers),
        "names": digest(names),
        "alpha_over_r": _one(scales),
        "rank": _one(ranks),
        "init": init,
        "dtype": _one(dtypes),
    }


def _image(encoder: Encoder) -> Mapping[str, Any] | None:
    """What the image processor is told, the budget compiled in; None for models without pictures."""
    if encoder.family.images is None:
        return None
    settings = encoder.processor_settings
    return {key: settings[key] for key in sorted(settings) if isinstance(settings[key], bool | int | float | str)}


def fingerprint(encoder: Encoder) -> str:
    """A digest of the ids and labels of one fixed conversation."""
    for talk in (TALK, TALK[1:], TALK[1:3]):  # some templates take no system prompt, or one question only
        turns = tuple(Turn(role, (text,)) for role, text in talk)  # type: ignore[arg-type]
        try:
            encoded = encoder.encode(Sample("", 0, turns, ()), ())
        except UserError:
            continue
        return digest([len(talk), [int(i) for i in encoded.input_ids], [int(i) for i in encoded.labels]])
    return "no plain conversation fits the template"


def digest(value: Any) -> str:
    """Twelve letters that stand for a value."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:12]


def _one(values: set[Any]) -> Any:
    """The value, or all of them where layers differ."""
    return next(iter(values)) if len(values) == 1 else sorted(values)
