"""What docs/models.md says of each model, one test a column; the models are those of `tests.supported`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import memfit
from memfit.build.adapters import is_adapter
from memfit.build.loss import causal_loss
from memfit.errors import UserError
from memfit.families import family_for
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import ModelSource, find_model
from memfit.specs.plan import Forecast
from memfit.specs.recipe import ImageBudget, Recipe
from memfit.trace.prepare import prepare
from tests.supported import PARTS, SHOWN, TIED
from tests.unit.test_build import batch_of, built_from, samples_of

Make = Callable[..., Recipe]
# Wide, tall, tiny, and larger than any dummy's slices.
SIZES = ((300, 200), (80, 340), (20, 20), (500, 480))
BUDGETS = {"max_slices": 2, "max_tokens": 40, "max_pixels": 40 * 56 * 56}


@pytest.mark.parametrize("kind", SHOWN["parts"].kinds)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_each_part_learns_alone(recipe: Make, kind: str, mode: str) -> None:
    """With all others frozen, gradients come to the part and to nothing else; a tied head goes with the language."""
    able = [part for part in PARTS[kind] if not (part == "head" and kind in TIED)]
    for part in able:
        modes = ", ".join(f"{name}: {mode if name == part else 'frozen'}" for name in able)
        targets = "[lm_head]" if part == "head" else "all-linear"
        adapters = ("method=lora", f"lora.targets={targets}") if mode == "lora" else ()
        wanted = recipe(kind, f"parts={{{modes}}}", "levers.checkpointing=full", *adapters)
        built = built_from(wanted)
        batch = batch_of(built, samples_of(wanted), 0)
        labels = batch.pop("labels")
        causal_loss(built.model(**batch), labels).backward()
        named = dict(built.model.named_parameters())
        learning = {name for name, parameter in named.items() if parameter.requires_grad}
        assert {built.part_of(name) for name in learning} == {part}
        assert all(is_adapter(name) == (mode == "lora") for name in learning)
        assert {name for name, parameter in named.items() if parameter.grad is not None} == learning


def language_weights(forecast: Forecast) -> int:
    """Bytes of weights of the language part, adapters included."""
    terms = (term for term in forecast.ledger.terms if term.part == "language")
    return sum(term.bytes for term in terms if "weights" in term.id.split("."))


@pytest.mark.parametrize("kind", SHOWN["qlora"].kinds)
def test_four_bits_are_forecast(recipe: Make, kind: str) -> None:
    """A whole forecast, with less weight than LoRA's."""
    sets = ("hardware.gpus=1xRTX3090", "data.train=null", "workload.tokens=300", "workload.image_size=120x90")
    forecast = memfit.estimate(recipe(kind, "method=qlora", "levers.precision=auto", *sets))
    assert forecast.trace is not None
    lora = prepare(recipe(kind, "method=lora", "levers.precision=auto", *sets)).plan().forecast
    assert language_weights(forecast) < language_weights(lora)


def keeps(source: ModelSource, budget: ImageBudget) -> bool:
    """Whether the model's processor can be told this budget."""
    try:
        Encoder(source, budget)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("kind", SHOWN["image"].kinds)
def test_an_image_budget_holds(dummies: Callable[[str], Path], kind: str) -> None:
    """Each knob is kept by every picture, or refused with what can be kept; it never does nothing in silence."""
    source = find_model(str(dummies(kind)))
    family = family_for(source.config)
    assert family.images is not None
    kept = []
    for knob, value in BUDGETS.items():
        budget = ImageBudget(**{knob: value})
        if not keeps(source, budget):
            with pytest.raises(UserError, match=f"image.{knob}: {value}") as caught:
                Encoder(source, budget)
            assert caught.value.hint
            continue
        encoder = Encoder(source, budget)
        kept.append(knob)
        costs = [encoder.cost(*size) for size in SIZES]
        if knob == "max_slices":
            assert all(len(cost.crops) - 1 <= value for cost in costs)
        elif knob == "max_tokens":
            assert all(cost.tokens <= value for cost in costs)
    assert "max_tokens" in kept


def test_all_kinds_are_there() -> None:
    """A dummy that is added comes into the lists, and so into the page."""
    from memfit.testing import KINDS, NATIVE_KINDS
    from tests.supported import ALL

    assert set(ALL) == {*KINDS, *NATIVE_KINDS}
