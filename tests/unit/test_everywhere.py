"""The same modules run in the same order whatever pictures a batch brings, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trace_against_profiler import request_for
from memfit.build.build import Built
from memfit.build.everywhere import LOOPING, MergerAtOnce, merge_at_once
from memfit.build.load import random_model
from memfit.families import family_for
from memfit.inputs.run_folder import read_json
from memfit.specs.recipe import Recipe
from memfit.specs.trace import TraceBatch
from memfit.trace.step import trace_step
from tests.invariant.mixed import make_mixed
from tests.unit.conftest import VISION_KINDS
from tests.unit.test_build import batch_of, built_from, loss_of, samples_of

Make = Callable[..., Recipe]
ALL = "parts={vision: full, connector: full, language: full, head: full}"
FROZEN = "parts={vision: frozen, connector: frozen, language: full, head: full}"
TWO = ("hardware.gpus=2xcpu", "batch=4", "levers.pin_memory=false")
TEXT, MANY, FEW = 0, 1, 2  # what `make_mixed` makes of the first three samples


def order(built: Built, batch: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the modules that own parameters, as they run in forward, and as gradients reach them in backward."""
    forward: list[str] = []
    backward: list[str] = []
    handles = []
    for name, module in built.model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: forward.append(name)))
            handles.append(module.register_full_backward_pre_hook(lambda *_, name=name: backward.append(name)))
    loss_of(built, batch).backward()
    for handle in handles:
        handle.remove()
    return forward, backward


def built_on(recipe: Make, root: Path, kind: str, *sets: str) -> tuple[Built, list[dict[str, Any]]]:
    """A model in training and three batches of one sample: text only, one of many crops, one of few."""
    asked = recipe(kind, f"data.train={make_mixed(root / 'samples', 3)}", *sets)
    built = built_from(asked)
    built.model.train()
    samples = sorted(samples_of(asked), key=lambda sample: sample.id)
    return built, [batch_of(built, samples, index) for index in (TEXT, MANY, FEW)]


@pytest.mark.parametrize("parts", [ALL, FROZEN], ids=["all parts", "tower frozen"])
@pytest.mark.parametrize("kind", VISION_KINDS)
def test_order_does_not_depend_on_pictures(recipe: Make, tmp_path: Path, kind: str, parts: str) -> None:
    built, batches = built_on(recipe, tmp_path, kind, "levers.parallel=zero3", parts, *TWO)
    assert "pixel_values" not in batches[0]
    orders = [order(built, batch) for batch in batches]
    assert orders[0][0] == orders[1][0] == orders[2][0]
    assert orders[0][1] == orders[1][1] == orders[2][1]
    assert len(set(orders[0][0])) == len(orders[0][0])


def test_without_it_the_order_does_depend_on_them(recipe: Make, tmp_path: Path) -> None:
    """The error looked for: no grey picture where nothing needs one, and the merger as it comes."""
    built, batches = built_on(recipe, tmp_path, "minicpmv4_6", FROZEN)
    text, many, few = (order(built, batch)[0] for batch in batches)
    assert len(text) < len(few) < len(many)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_grey_picture_adds_nothing(recipe: Make, tmp_path: Path, kind: str) -> None:
    built, (text, _, _) = built_on(recipe, tmp_path, kind, ALL)
    loss = loss_of(built, text)
    loss.backward()
    gradients = {name: p.grad for name, p in built.model.named_parameters() if p.requires_grad}
    of_pictures = [name for name in gradients if built.part_of(name) in {"vision", "connector"}]
    assert of_pictures
    for name in of_pictures:
        assert gradients[name] is not None, name
        assert not gradients[name].any(), name
    built.model.eval()  # here nothing is shown: in evaluation alone, only split weights need it
    assert torch.equal(loss_of(built, text), loss)


def test_weights_that_give_no_numbers_are_told(recipe: Make, tmp_path: Path) -> None:
    built, (text, _, _) = built_on(recipe, tmp_path, "qwen2_5_vl", ALL)
    with torch.no_grad():
        next(p for name, p in built.model.named_parameters() if built.part_of(name) == "vision").fill_(float("nan"))
    with pytest.raises(RuntimeError, match="grey picture"):
        loss_of(built, text)


@pytest.mark.parametrize("times", [1, 2])
def test_merging_at_once_is_merging_one_by_one(dummies: Callable[[str], Path], times: int) -> None:
    config = read_json(dummies("minicpmv4_6") / "config.json") | {"merger_times": times}
    model = random_model(family_for(config), config)
    merger = next(module for module in model.modules() if type(module).__name__ in LOOPING)
    at_once = MergerAtOnce(merger)
    side = 2**times
    sizes_N2 = torch.tensor([[side, 2 * side], [3 * side, side], [side, side]], dtype=torch.int32)
    rows_1PD = torch.randn(1, int(sizes_N2.prod(1).sum()), model.config.vision_config.hidden_size)
    for own, upstream in zip(at_once(rows_1PD, sizes_N2), merger(rows_1PD, sizes_N2), strict=True):
        assert torch.allclose(own, upstream, atol=1e-6)
    before = [name for name, _ in model.named_parameters()]
    assert merge_at_once(model) == 1
    assert [name for name, _ in model.named_parameters()] == before
    with pytest.raises(ValueError, match="cannot be merged"):
        at_once(rows_1PD[:, :3], torch.tensor([[1, 3]]))


def test_the_mergers_that_loop_are_upstreams(dummies: Callable[[str], Path]) -> None:
    """Whether upstream still calls its layers once a crop; where it no longer does, `MergerAtOnce` can go."""
    import inspect

    for kind in ("minicpmv4_6", "minicpmv4_7"):
        config = read_json(dummies(kind) / "config.json")
        model = random_model(family_for(config), config)
        (merger,) = [module for module in model.modules() if type(module).__name__ in LOOPING]
        assert "for batch_idx in range(len(target_sizes))" in inspect.getsource(type(merger).forward)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_the_trace_prices_the_grey_picture(dummies: Callable[[str], Path], kind: str) -> None:
    """A forecast of text alone counts the gradients that every step makes of the tower."""
    config = read_json(dummies(kind) / "config.json")
    text = TraceBatch((24,))
    whole = trace_step(request_for(config, text, ALL))
    assert whole.gradients["vision"] > 0
    assert whole.gradients["connector"] > 0
    assert "vision" not in trace_step(request_for(config, text, FROZEN)).gradients
