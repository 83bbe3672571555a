"""Train, save, load with plain transformers and PEFT, for every generation; batched answers are those one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

import memfit
from memfit import models
from memfit.build.build import Built
from memfit.evaluation.generate import GenerateOptions, generate_answers
from memfit.specs.recipe import Recipe
from memfit.testing import NATIVE_KINDS
from tests.unit.test_build import batch_of, built_from, samples_of

Make = Callable[..., Recipe]
Folder = Callable[[str], Path]
# Large enough that what was learned is far from what was there.
FAST = ("schedule.learning_rate=3e-2", "schedule.steps=3", "schedule.warmup=0")

SHORT = ("minicpmv2_6",)  # the other generations go the same way in test-long
EVERY = [kind if kind in SHORT else pytest.param(kind, marks=pytest.mark.long) for kind in NATIVE_KINDS]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    models.register()
    transformers.utils.logging.disable_progress_bar()


def trained(recipe: Recipe) -> Path:
    result = memfit.train(recipe, say=lambda text: None)
    assert result.model is not None
    return result.model


def inputs_of(built: Built, recipe: Recipe) -> dict[str, Any]:
    return {k: v for k, v in batch_of(built, samples_of(recipe), 0, 1, 2).items() if k != "labels"}


def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(**given).logits
    return out


@pytest.mark.parametrize("kind", EVERY)
def test_an_adapter_loads_in_plain_peft_and_merges(dummies: Folder, recipe: Make, tmp_path: Path, kind: str) -> None:
    wanted = recipe(kind, "method=lora", *FAST)
    folder = trained(wanted)
    built = built_from(wanted, folder)
    given = inputs_of(built, wanted)
    tuned = logits(built.model, given)
    base = transformers.AutoModelForImageTextToText.from_pretrained(dummies(kind))
    assert not torch.allclose(logits(base, given), tuned, atol=1e-2)
    # PEFT alone: the file names its modules as the checkpoint does.
    adapted = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(adapted, given), tuned)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged, given), tuned, atol=2e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, given), logits(merged, given))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == base.config.model_type
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert all(name.startswith("llm.") for name in config["target_modules"])
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("kind", EVERY)
def test_a_fully_tuned_model_is_a_whole_folder_and_answers_in_batches(recipe: Make, kind: str) -> None:
    wanted = recipe(kind, "method=full", *FAST)
    folder = trained(wanted)
    built = built_from(wanted, folder)
    given = inputs_of(built, wanted)
    model = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(logits(model, given), logits(built.model, given))
    assert not torch.allclose(logits(built_from(wanted).model, given), logits(model, given), atol=1e-2)
    # Everything that it takes to ask it stands beside the weights.
    processor = transformers.AutoProcessor.from_pretrained(folder)
    talk = [{"role": "user", "content": [Image.new("RGB", (150, 120), (40, 90, 200)), "How many?"]}]
    asked = dict(processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True))
    answer = model.generate(**asked, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape[1] > asked["input_ids"].shape[1]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= names
    answers_are_the_same_in_batches(built, wanted)


@pytest.mark.parametrize("kind", ["minicpmo2_6"])
def test_a_trained_connector_beside_an_adapter_comes_back(dummies: Folder, recipe: Make, kind: str) -> None:
    wanted = recipe(kind, "method=lora", "parts.connector=full", *FAST)
    folder = trained(wanted)
    given = inputs_of(built_from(wanted, folder), wanted)
    tuned = logits(built_from(wanted, folder).model, given)
    half = PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(dummies(kind)), folder)
    assert not torch.allclose(logits(half, given), tuned, atol=1e-3)  # the connector is a file of its own


def answers_are_the_same_in_batches(built: Built, wanted: Recipe) -> None:
    """Left padded, pictures of unequal crops; the trained model, whose answers are not those of chance."""
    samples = samples_of(wanted)[:5]
    runs = [
        generate_answers(built, samples, GenerateOptions(max_new_tokens=10, batch=batch), lambda done: None)
        for batch in (1, 2, 5)
    ]
    alone, two, all_at_once = ([(a.text, a.new_tokens, a.prompt_tokens, a.finished) for a in run] for run in runs)
    assert two == alone
    assert all_at_once == alone
    assert len({row[2] for row in alone}) > 1  # prompts of several lengths, so that rows were padded
    assert any(row[1] for row in alone)


@pytest.mark.parametrize("kind", ["minicpmv2_6", "minicpmv2_5"])
def test_a_dropped_mask_would_change_batched_answers(recipe: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: padding on the left that is attended to. Seen in the first token's logits."""
    wanted = recipe(kind, *FAST)
    built = built_from(wanted)
    given = built.collator.join([_row(built, wanted, index) for index in range(3)], left=True)
    given.pop("labels", None)
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    right = logits(built.model, {**given, "position_ids": positions})[:, -1]
    wrong = logits(built.model, {k: v for k, v in given.items() if k != "attention_mask"})[:, -1]
    alone = torch.cat(
        [
            logits(built.model, {k: v for k, v in _alone(built, wanted, i).items() if k != "labels"})[:, -1]
            for i in range(3)
        ]
    )
    assert torch.allclose(right, alone, atol=2e-5)
    assert not torch.allclose(wrong, alone, atol=1e-3)


def _row(built: Built, recipe: Recipe, index: int) -> dict[str, Any]:
    from memfit.build.data import SampleDataset

    return SampleDataset(samples_of(recipe), built.encoder, built.pixels)[index]


def _alone(built: Built, recipe: Recipe, index: int) -> dict[str, Any]:
    batch = built.collator.join([_row(built, recipe, index)], left=True)
    return {name: value for name, value in batch.items() if name != "labels"}
