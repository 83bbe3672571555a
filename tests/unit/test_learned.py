"""What decides what is learned: written from live objects, and told where two runs differ in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import memfit
from memfit.engine.learned import fingerprint
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.inputs.recipe_file import override
from memfit.monitor.learned import SAME, learning_differences
from memfit.monitor.run_records import read_runs
from memfit.specs.recipe import Recipe
from memfit.testing import make_dummy

Make = Callable[..., Recipe]
LORA = ("method=lora", "schedule.steps=1", "lora.rank=4", "lora.alpha=8", "schedule.weight_decay=0.01")


def trained(recipe: Recipe, folder: Path) -> Path:
    return memfit.train(override(recipe, [f"run.folder={folder}"]), say=lambda text: None).folder


def written(folder: Path) -> Mapping[str, Any]:
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    (start,) = (row for row in rows if row["event"] == "start")
    found: Mapping[str, Any] = start["learning"]
    return found


@pytest.mark.long
def test_a_run_says_what_it_learns_by(recipe: Make, tmp_path: Path) -> None:
    found = written(trained(recipe("minicpmv4_6", *LORA), tmp_path / "a"))
    assert found["samples_per_step"] == 4
    assert found["split_of_step"] == "1 ranks x 2 micro-batches x 2"
    adapters = found["adapters"]
    assert (adapters["alpha_over_r"], adapters["rank"], adapters["init"]) == (2.0, 4, "default")
    assert adapters["dtype"] == "float32"
    # Adapters are matrices, and all of them decay; nothing else learns.
    assert found["decay"]["value"] == 0.01
    assert (found["decay"]["tensors"], found["decay"]["spared"]) == (2 * adapters["modules"], 0)
    assert found["dtypes"].keys() == {"float32"}
    assert (found["betas"], found["eps"], found["clip"]) == ([0.9, 0.999], 1e-8, 1.0)
    assert found["image"]["max_slice_nums"] >= 1
    assert len(found["template"]) == 12


def test_runs_that_should_be_the_same_and_are_not(recipe: Make, tmp_path: Path) -> None:
    """The recipe says rank and alpha; what is learned by follows from both, and from much that no recipe says."""
    one = trained(recipe("minicpmv4_6", *LORA), tmp_path / "one")
    again = trained(
        recipe("minicpmv4_6", *LORA, "levers.micro_batch=4", "levers.checkpointing=full"), tmp_path / "again"
    )
    other = trained(
        recipe("minicpmv4_6", *LORA, "lora.rank=8", "lora.variant=rslora", "image.max_slices=1",
               "schedule.betas=[0.9, 0.95]"),
        tmp_path / "other",
    )  # fmt: skip
    same = learning_differences(read_runs([one, again]))
    assert [what for what, _ in same] == ["a step is"]
    told = dict(learning_differences(read_runs([one, other])))
    assert told["adapters' scale (alpha / r)"] == ["2", "2.82843"]
    assert told["adapters' rank"] == ["4", "8"]
    assert told["betas"] == ["[0.9, 0.999]", "[0.9, 0.95]"]
    assert any(what.startswith("image budget") for what in told)
    assert "template and labels (digest)" not in told
    text, page = memfit.report([one, other], out=tmp_path / "page.html")
    assert "adapters' scale (alpha / r)" in text
    assert "What differs in what decides what is learned" in page.read_text()
    text, _ = memfit.report([one, one], out=tmp_path / "same.html")
    assert SAME in text


def test_another_template_has_another_digest(tmp_path: Path) -> None:
    """Also one that differs only in what carries loss, or in a space."""
    plain, changed = make_dummy("qwen3", tmp_path / "a"), make_dummy("qwen3", tmp_path / "b")
    first = fingerprint(Encoder(find_model(str(plain))))
    assert first == fingerprint(Encoder(find_model(str(changed))))
    file = changed / "tokenizer_config.json"
    values = json.loads(file.read_text()) if file.exists() else {}
    template = find_model(str(changed)).chat_template or ""
    assert "<|im_end|>" in template
    file.write_text(json.dumps(values | {"chat_template": template.replace("<|im_end|>", " <|im_end|>", 1)}))
    for other in changed.glob("chat_template*"):
        other.unlink()
    assert fingerprint(Encoder(find_model(str(changed)))) != first


def test_runs_of_before_are_compared_by_what_they_wrote(tmp_path: Path) -> None:
    from memfit.testing.runs import make_run

    one, two = (make_run(tmp_path / name, 0, steps=5, documents=8) for name in ("one", "two"))
    assert learning_differences(read_runs([one, two])) == []
    text, _ = memfit.report([one, two], out=tmp_path / "page.html")
    assert SAME not in text
