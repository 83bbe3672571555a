"""The one path from plan to live objects: what is counted is what is built, and nothing is dropped on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memfit.build.adapters import is_adapter
from memfit.build.arrange import arrange
from memfit.build.build import Built, Materials, build
from memfit.build.data import SampleDataset
from memfit.build.load import empty_model
from memfit.build.loss import causal_loss
from memfit.errors import UserError
from memfit.inputs.data.load import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.recipe_file import override
from memfit.planner.parts import resolve_parts
from memfit.specs.recipe import Recipe
from memfit.specs.sample import Sample
from memfit.trace.prepare import prepare
from tests.unit.conftest import VISION_KINDS

Make = Callable[..., Recipe]

METHODS = {
    "full": (),
    "frozen vision": ("parts.vision=frozen", "parts.connector=frozen"),
    "last blocks": ("parts.vision=last-1", "parts.language=last-1"),
    "lora": ("method=lora",),
    "dora beside a full connector": ("method=lora", "lora.variant=dora", "parts.connector=full"),
    "lora everywhere": ("method=lora", "parts.vision=lora", "lora.targets=all-linear"),
}


def built_from(recipe: Recipe, trained: Path | None = None) -> Built:
    found = prepare(recipe)
    return build(found.plan(), Materials(found.source, found.family, found.profile), trained)


def samples_of(recipe: Recipe) -> tuple[Sample, ...]:
    return load_samples(recipe.data, check_options(recipe)).train


def batch_of(built: Built, samples: tuple[Sample, ...], *indices: int) -> dict:
    dataset = SampleDataset(samples, built.encoder, built.pixels)
    return built.collator([dataset[index] for index in indices])


def loss_of(built: Built, batch: dict) -> torch.Tensor:
    inputs = dict(batch)
    labels = inputs.pop("labels")
    return causal_loss(built.model(**inputs), labels)


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_forecast_is_what_learns(recipe: Make, kind: str, method: str) -> None:
    wanted = recipe(kind, *METHODS[method])
    built = built_from(wanted)
    forecast = prepare(wanted).plan().forecast
    assert dict(built.trainable) == {part: count for part, count in forecast.trainable.items() if count}
    everything = sum(parameter.numel() for parameter in built.model.parameters())
    assert everything == sum(forecast.trainable.values()) + sum(forecast.frozen.values())


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_every_part_that_learns_gets_a_gradient_and_no_other(recipe: Make, kind: str) -> None:
    wanted = recipe(kind, "parts.vision=frozen")
    built = built_from(wanted)
    loss_of(built, batch_of(built, samples_of(wanted), 0, 1)).backward()
    with_gradient = {built.part_of(n) for n, p in built.model.named_parameters() if p.grad is not None}
    assert with_gradient == set(built.trainable)
    assert "vision" not in with_gradient


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_batch_answers_as_its_samples_do_alone(recipe: Make, kind: str) -> None:
    """Padding and joining change nothing: a collator that drops or mixes pictures fails here."""
    wanted = recipe(kind)
    built = built_from(wanted)
    built.model.eval()
    samples = samples_of(wanted)
    together = batch_of(built, samples, 0, 1, 2)
    with torch.no_grad():
        logits_BTV = built.model(**{k: v for k, v in together.items() if k != "labels"}).logits
        for row in range(3):
            alone = batch_of(built, samples, row)
            alone.pop("labels")
            length = alone["input_ids"].shape[1]
            single_TV = built.model(**alone).logits[0]
            assert torch.allclose(logits_BTV[row, :length], single_TV, atol=2e-5), f"row {row}"


def test_another_picture_gives_another_answer(recipe: Make) -> None:
    wanted = recipe("minicpmv4_6")
    built = built_from(wanted)
    batch = batch_of(built, samples_of(wanted), 0)
    first = loss_of(built, batch)
    batch["pixel_values"] = batch["pixel_values"].flip(-1)
    assert not torch.isclose(first, loss_of(built, batch), atol=1e-6)


def test_a_mask_is_there_only_where_something_is_padded(recipe: Make) -> None:
    wanted = recipe("minicpmv4_6")
    built = built_from(wanted)
    samples = samples_of(wanted)
    assert "attention_mask" not in batch_of(built, samples, 0)
    lengths = [len(SampleDataset(samples, built.encoder, built.pixels)[i]["input_ids"]) for i in range(len(samples))]
    other = next(i for i, length in enumerate(lengths) if length != lengths[0])
    assert batch_of(built, samples, 0, other)["attention_mask"].sum() == lengths[0] + lengths[other]


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_frozen_tower_keeps_no_graph_under_checkpointing(recipe: Make, kind: str, method: str) -> None:
    """transformers' and PEFT's own switches re-arm it; memfit's must not."""
    built = built_from(recipe(kind, f"method={method}", "parts.vision=frozen", "levers.checkpointing=full"))
    built.model.train()
    seen: list[bool] = []
    tower = next(m for n, m in built.model.named_modules() if n.endswith((".vision_tower", ".visual", "vpm")))
    tower.register_forward_hook(
        lambda module, args, output: seen.append(
            any(t.requires_grad for t in _tensors(output)) and not any(p.requires_grad for p in module.parameters())
        )
    )
    loss_of(built, batch_of(built, samples_of(recipe(kind)), 0)).backward()
    assert seen == [False]
    assert built.checkpointed["language"] == 2


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else []
    return [tensor for value in values for tensor in _tensors(value)]


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize("mode", ["full", "every-2"])
def test_checkpointing_changes_no_gradient(recipe: Make, kind: str, mode: str) -> None:
    gradients = []
    for setting in ("none", mode):
        wanted = recipe(kind, f"levers.checkpointing={setting}")
        built = built_from(wanted)
        built.model.train()
        loss_of(built, batch_of(built, samples_of(wanted), 0, 1)).backward()
        gradients.append({n: p.grad for n, p in built.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    assert sum(built.checkpointed.values()) >= (4 if mode == "full" else 2)


def test_precisions_are_those_of_the_row(recipe: Make) -> None:
    built = built_from(recipe("minicpmv4_6", "levers.precision=bf16-amp", "parts.vision=frozen"))
    kinds = {(built.part_of(n), p.dtype) for n, p in built.model.named_parameters()}
    assert kinds == {
        ("vision", torch.bfloat16),
        ("connector", torch.float32),
        ("language", torch.float32),
    }
    assert built.autocast is torch.bfloat16


@pytest.mark.parametrize(
    ("parallel", "precision", "wanted"),
    [
        ("none", "fp32", torch.bfloat16),
        ("zero3", "fp32", torch.float32),
        ("zero2", "bf16-mixed", torch.bfloat16),
        ("fsdp", "bf16-mixed", torch.float32),
    ],
)
def test_adapters_have_the_dtype_that_the_forecast_counts(
    recipe: Make, parallel: str, precision: str, wanted: torch.dtype
) -> None:
    """lora.dtype alone; under an engine that casts adapters, what it makes of them (ZeRO in fp32 casts nothing)."""
    dtype = "bf16" if precision == "fp32" else "fp32"
    hardware = "hardware.gpus=1xcpu" if parallel == "none" else "hardware.gpus=2xcpu"
    sets = ("method=lora", f"lora.dtype={dtype}", f"levers.parallel={parallel}", f"levers.precision={precision}")
    found = prepare(recipe("minicpmv4_6", *sets, hardware, "batch=4"))
    effective = found.plan().recipe
    parts = resolve_parts(effective, found.family, found.profile)
    model = arrange(empty_model(found.family, found.source.config), effective, parts, found.family).model
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {wanted}


def test_missing_or_foreign_weights_stop_the_build(
    recipe: Make, dummies: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(dummies("minicpmv4_6"), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "language_model.layers.0" in key)
    for change in ("missing", "foreign"):
        state = dict(weights)
        if change == "missing":
            del state[name]
        else:
            state["model.language_model.layers.99.nothing"] = torch.zeros(2)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="does not match its config"):
            built_from(override(recipe("minicpmv4_6"), model=str(folder)))


@pytest.mark.parametrize(
    "pinned",
    ["levers.optimizer=lion", "run.on_oom=tighten"],
)
def test_a_lever_that_is_not_built_is_refused_not_ignored(recipe: Make, pinned: str) -> None:
    with pytest.raises(UserError, match=pinned.split("=")[0].replace(".", r"\.")):
        built_from(recipe("minicpmv4_6", pinned))


def test_a_missing_package_for_linear_attention_is_told(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from memfit.build import supported

    monkeypatch.setattr(supported.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package flash-linear-attention"):
        supported.refuse_what_is_not_built(recipe("minicpmv4_6", "levers.linear_attention=fla"))
