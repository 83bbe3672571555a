"""`image.downsample_mode` of MiniCPM-V 4.6 and 4.7: one for the text, pixels, model, forecast and saved files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import memfit
from memfit.errors import UserError
from memfit.inputs.data.workload import cut_by_image, scan_workload
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.inputs.recipe_file import override
from memfit.specs.recipe import ImageBudget, Recipe
from memfit.specs.workload_scan import WorkloadScan
from memfit.trace.prepare import prepare
from tests.supported import SHOWN
from tests.unit.test_build import batch_of, built_from, samples_of
from tests.unit.test_gradients_reach import without_gradient
from tests.unit.test_train import trained

Make = Callable[..., Recipe]
KINDS = SHOWN["downsample"].kinds
MERGER = "model.vision_tower.vit_merger."
FOUR = "image.downsample_mode=4x"


def image_tokens(recipe: Recipe) -> int:
    """Places of the first sample's picture, as the batch that training sees has them."""
    built = built_from(recipe)
    batch = batch_of(built, samples_of(recipe), 0)
    assert batch["downsample_mode"] == built.encoder.processor_settings["downsample_mode"]
    count = int((batch["input_ids"] == built.encoder.image_token_id).sum())
    batch.pop("labels")
    with torch.no_grad():  # upstream raises where the model's own count differs
        built.model.eval()(**batch)
    return count


@pytest.mark.parametrize("kind", SHOWN["downsample"].kinds)
def test_text_pixels_and_model_follow_one_mode(recipe: Make, kind: str) -> None:
    assert image_tokens(recipe(kind, FOUR)) == 4 * image_tokens(recipe(kind))


def test_the_model_of_the_other_mode_refuses_such_a_batch(recipe: Make) -> None:
    wanted = recipe("minicpmv4_6", FOUR)
    built = built_from(wanted)
    batch = batch_of(built, samples_of(wanted), 0) | {"downsample_mode": "16x"}
    with pytest.raises(Exception, match="do not match"):
        built.model(**batch)


@pytest.mark.parametrize("method", [("method=full",), ("method=lora", "parts.vision=lora", "lora.targets=all-linear")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_passed_by_does_not_learn(recipe: Make, dummies, slips: Path, kind: str, method: tuple) -> None:  # type: ignore[no-untyped-def]
    """In 4x mode the tower's window merger gets no gradient: it is frozen and counted so."""
    missed, learning, others = without_gradient(dummies(kind), slips, [*method, FOUR])
    assert missed == set()
    assert not any("vit_merger" in name for name in learning)
    assert any("vit_merger" in name for name in others)
    assert any("vit_merger" in name for name in without_gradient(dummies(kind), slips, list(method))[1])
    forecast = memfit.estimate(recipe(kind, *method, FOUR))
    assert forecast.trainable["vision"] == built_from(recipe(kind, *method, FOUR)).trainable["vision"]


def test_the_forecast_is_that_of_a_checkpoint_with_this_mode(recipe: Make, dummies, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Pinned in the recipe or written in config.json: the same bytes; and more of them than in 16x mode."""
    sets = ("hardware.gpus=1xRTX3090", "data.train=null", "workload.tokens=400", "workload.image_size=300x200")
    own = tmp_path / "own"
    own.mkdir()
    for file in dummies("minicpmv4_6").iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "downsample_mode": "4x"}))
    pinned = memfit.estimate(recipe("minicpmv4_6", *sets, FOUR))
    written = memfit.estimate(override(recipe("minicpmv4_6", *sets), model=str(own)))
    plain = memfit.estimate(recipe("minicpmv4_6", *sets))
    assert [(t.id, t.bytes) for t in pinned.ledger.terms] == [(t.id, t.bytes) for t in written.ledger.terms]
    assert pinned.trace is not None
    assert plain.trace is not None
    # The last layer stands behind the window merger: it sees every patch instead of a quarter of them.
    four, sixteen = (
        {row.block: row.bytes for row in trace.saved if row.part == "vision"} for trace in (pinned.trace, plain.trace)
    )
    assert four[0] < 1.1 * sixteen[0]
    assert four[2] > 3 * sixteen[2]
    assert pinned.trace.saved_by_part()["connector"] > 2 * plain.trace.saved_by_part()["connector"]


def test_what_is_saved_says_so_to_everyone(recipe: Make, tmp_path: Path) -> None:
    """config.json and preprocessor_config.json of the saved model agree, and plain transformers answers as trained."""
    wanted = recipe("minicpmv4_6", FOUR)
    for method in ("full", "lora"):
        result = trained(override(wanted, [f"method={method}"]), tmp_path / method)
        assert result.model is not None
        for name in ("config.json", "preprocessor_config.json"):
            assert json.loads((result.model / name).read_text())["downsample_mode"] == "4x", (method, name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "full" / "model")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "full" / "model", backend="pil")
    assert model.config.downsample_mode == processor.downsample_mode == "4x"
    built = built_from(wanted, tmp_path / "full" / "model")
    batch = {k: v for k, v in batch_of(built, samples_of(wanted), 0).items() if k not in ("labels", "downsample_mode")}
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, built.model.eval()(**batch).logits)
    again = find_model(str(tmp_path / "full" / "model"))
    assert Encoder(again).processor_settings["downsample_mode"] == "4x"


def test_the_worst_batch_of_the_data_is_counted_in_this_mode(recipe: Make, dummies, slips: Path) -> None:  # type: ignore[no-untyped-def]
    wanted = recipe("minicpmv4_6")
    encoder = Encoder(find_model(str(dummies("minicpmv4_6"))))
    scan: WorkloadScan = scan_workload(wanted, encoder)
    cut = cut_by_image(scan, wanted, encoder, ImageBudget(downsample_mode="4x"))
    assert cut.budget == "image.downsample_mode: 4x"
    four = dataclasses.replace(wanted, image=ImageBudget(downsample_mode="4x"))
    more = scan_workload(four, Encoder(encoder.source, four.image))
    for counted, patches in ((scan, 16), (more, 4)):
        assert (counted.figures["patches"] == patches * counted.figures["image_tokens"]).all()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "minicpmv2_6", "llama"])
def test_every_command_refuses_it_for_models_without_one(recipe: Make, kind: str) -> None:
    wanted = recipe(kind, FOUR)
    for command in (lambda: prepare(wanted), lambda: memfit.estimate(wanted), lambda: memfit.check(wanted)):
        with pytest.raises(UserError, match=r"image\.downsample_mode: 4x has no effect"):
            command()
