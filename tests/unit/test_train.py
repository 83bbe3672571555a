"""Training: the right loss, the right rates, everything saved, nothing lost."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
from memfit.api import TrainResult
from memfit.engine import save
from memfit.engine.train import count_steps, learning_rates
from memfit.errors import RunFailed, UserError
from memfit.inputs.recipe_file import override
from memfit.specs.recipe import Recipe
from memfit.trace.prepare import prepare
from tests.supported import LIKE_ANOTHER, SHOWN
from tests.unit.conftest import VISION_KINDS
from tests.unit.test_build import batch_of, built_from, loss_of, samples_of

Make = Callable[..., Recipe]


def trained(recipe: Recipe, folder: Path, **options: Any) -> TrainResult:
    return memfit.train(override(recipe, [f"run.folder={folder}"]), say=lambda text: None, **options)


def events(result: TrainResult, kind: str) -> list[Mapping[str, Any]]:
    rows = [json.loads(line) for line in (result.folder / "run.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_accumulation_gives_the_loss_and_the_step_of_one_large_batch(recipe: Make, tmp_path: Path, kind: str) -> None:
    """Samples differ in trained tokens, so a mean of micro-batch means would differ."""
    runs = []
    for micro in (4, 1):
        wanted = recipe(kind, f"levers.micro_batch={micro}", "levers.optimizer=sgd", "schedule.clip=0")
        runs.append(trained(wanted, tmp_path / str(micro)))
    one, four = (events(run, "step") for run in runs)
    assert [row["tokens"] for row in one] == [row["tokens"] for row in four]
    assert [row["trained_tokens"] for row in one] == [row["trained_tokens"] for row in four]
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_logged_loss_is_the_mean_over_trained_tokens(recipe: Make, tmp_path: Path) -> None:
    """Against a loss computed here by hand from the untrained model."""
    wanted = recipe("minicpmv4_6", "batch=12", "levers.micro_batch=3", "schedule.steps=1")
    result = trained(wanted, tmp_path / "run")
    built = built_from(wanted)
    total, count = 0.0, 0
    for index, _ in enumerate(samples_of(wanted)):
        batch = batch_of(built, samples_of(wanted), index)
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            log_probabilities = built.model.eval()(**batch).logits[0].double().log_softmax(-1)
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= float(log_probabilities[place - 1, labels[place]])
                count += 1
    (row,) = events(result, "step")
    assert row["trained_tokens"] == count
    assert row["loss"] == pytest.approx(total / count, abs=1e-4)


def test_every_part_has_its_own_rate(recipe: Make, tmp_path: Path) -> None:
    rates = {"vision": 1e-5, "connector": 1e-3, "language": 0.0}
    sets = [f"schedule.learning_rate={json.dumps(rates)}", "schedule.kind=constant", "schedule.warmup=0"]
    wanted = recipe("minicpmv4_6", *sets)
    before = {n: p.clone() for n, p in built_from(wanted).model.named_parameters()}
    result = trained(wanted, tmp_path / "run")
    assert events(result, "step")[0]["learning_rate"] == rates
    built = built_from(wanted, result.model)
    moved = {built.part_of(n) for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"vision", "connector"}
    with pytest.raises(UserError, match="names no rate for language"):
        learning_rates(override(wanted, ['schedule.learning_rate={"vision": 1.0e-5}']), ["language", "vision"])


def shown(column: str) -> list[Any]:
    """The models of a column of docs/models.md; one whose classes another one has waits for the long tests."""
    return [pytest.param(k, marks=[pytest.mark.long] if k in LIKE_ANOTHER else []) for k in SHOWN[column].kinds]


@pytest.mark.parametrize("kind", shown("full"))
def test_what_was_saved_answers_as_what_was_trained(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    saved_answers_as_trained(recipe(kind, "method=full"), tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", shown("lora"))
def test_adapters_that_were_saved_answer_as_what_was_trained(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    saved_answers_as_trained(recipe(kind, "method=lora"), tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_adapters_and_trained_parts_answer_as_what_was_trained(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sets = ("method=lora", "parts.connector=full", "parts.vision=last-1")
    saved_answers_as_trained(recipe(kind, *sets), tmp_path, monkeypatch)


def saved_answers_as_trained(wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run saves, loaded again, gives the logits that the model gave when it was saved, and no others."""
    seen: dict[str, torch.Tensor] = {}
    write = save.save_weights

    def spy(model: torch.nn.Module, folder: Path, *rest: Any, **named: Any) -> None:
        if folder.name == "model":
            live = built_from(wanted)
            inputs = {k: v for k, v in batch_of(live, samples_of(wanted), 0, 1).items() if k != "labels"}
            seen["live"] = model.eval()(**inputs).logits.detach()
        write(model, folder, *rest, **named)

    monkeypatch.setattr("memfit.engine.train.save_weights", spy)
    result = trained(wanted, tmp_path / "run")
    built = built_from(wanted, result.model)
    inputs = {k: v for k, v in batch_of(built, samples_of(wanted), 0, 1).items() if k != "labels"}
    again = built.model.eval()(**inputs).logits.detach()
    fresh = built_from(wanted).model.eval()(**inputs).logits.detach()
    assert torch.equal(again, seen["live"])
    assert not torch.allclose(again, fresh, atol=1e-6)


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(recipe: Make, tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = trained(recipe("minicpmv4_6", f"seed={seed}"), tmp_path / name)
        losses.append([row["loss"] for row in events(result, "step")])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_training_learns(recipe: Make, tmp_path: Path) -> None:
    result = trained(recipe("minicpmv4_6", "schedule.steps=12", "schedule.learning_rate=5e-3"), tmp_path / "run")
    losses = [row["loss"] for row in events(result, "step")]
    assert losses[-1] < 0.6 * losses[0]


def test_the_run_folder_holds_what_a_reader_needs(recipe: Make, tmp_path: Path) -> None:
    result = trained(recipe("minicpmv4_6", "data.eval=0.25"), tmp_path / "run")
    names = {path.name for path in result.folder.iterdir()}
    assert {"plan.json", "data.json", "run.jsonl", "model", "checkpoints"} <= names
    step = events(result, "step")[0]
    assert {"loss", "learning_rate", "tokens", "trained_tokens", "seconds", "peak_bytes", "rss_bytes"} <= step.keys()
    assert step["rss_bytes"] > 1 << 20
    assert events(result, "eval")
    data = json.loads((result.folder / "data.json").read_text())
    assert data["train"] + data["eval"] == 12
    assert not set(data["split"]["train"]) & set(data["split"]["eval"])
    saved = {path.name for path in result.model.iterdir()} if result.model else set()
    assert {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"} <= saved
    assert not [name for name in saved if name.endswith((".bin", ".pt"))]


def test_a_run_folder_in_use_is_never_written_to(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        trained(recipe("minicpmv4_6"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_pilot_runs_a_share_of_the_whole_schedule_and_projects_it(recipe: Make, tmp_path: Path) -> None:
    wanted = recipe("minicpmv4_6", "schedule.steps=40", "schedule.kind=linear", "schedule.warmup=0")
    result = trained(wanted, tmp_path / "run", pilot=True)
    assert (result.steps, result.total_steps, result.model) == (10, 40, None)
    assert result.folder == tmp_path / "run-pilot"
    assert result.projected_seconds is not None
    assert result.projected_seconds > result.seconds / 4
    # The schedule is the whole run's: after 10 of 40 linear steps three quarters of the rate are left.
    assert events(result, "step")[-1]["learning_rate"]["language"] == pytest.approx(0.75e-3, rel=0.05)
    assert not (result.folder / "model").exists()
    assert not list((result.folder / "checkpoints").glob("*"))
    assert "memfit train r.yaml" in result.text("memfit train r.yaml")


def test_a_full_disk_at_the_end_loses_nothing(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = save.save_weights

    def full_disk(model: torch.nn.Module, folder: Path, *rest: Any, **named: Any) -> None:
        if folder.name == "model":
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half a")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(model, folder, *rest, **named)

    monkeypatch.setattr("memfit.engine.train.save_weights", full_disk)
    with pytest.raises(RunFailed) as caught:
        trained(recipe("minicpmv4_6"), tmp_path / "run")
    assert "were saved to" in caught.value.problem
    rescued = Path(caught.value.hint.split("move ")[1].split(" to ")[0])
    assert (rescued / "model.safetensors").stat().st_size > 1000
    assert not (tmp_path / "run" / "model").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_a_full_disk_at_a_checkpoint_leaves_whole_checkpoints_only(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = save.save_weights

    def full_disk(model: torch.nn.Module, folder: Path, *rest: Any, **named: Any) -> None:
        if folder.name == "checkpoint-2":
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"half a")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(model, folder, *rest, **named)

    monkeypatch.setattr("memfit.engine.train.save_weights", full_disk)
    with pytest.raises(RunFailed, match="a checkpoint could not be written"):
        trained(recipe("minicpmv4_6", "run.save_every=1"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "run/model-at-full-disk/model.safetensors").stat().st_size > 1000


def test_an_earlier_rescue_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert save.free_name(tmp_path / "a") == tmp_path / "a-3"


def test_a_disk_too_small_is_told_before_training(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfit.engine.train.free_bytes", lambda path: 100_000)
    with pytest.raises(UserError, match="saving needs"):
        trained(recipe("minicpmv4_6"), tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "memfit.build.loss.causal_loss", lambda out, labels, num_items_in_batch=None: out.logits.sum() * float("nan")
    )
    with pytest.raises(RunFailed, match="the loss became nan at step 1"):
        trained(recipe("minicpmv4_6"), tmp_path / "run")


@pytest.mark.parametrize(
    ("samples", "batch", "micro", "ranks", "epochs", "expected"),
    [(100, 8, 2, 1, 1, 13), (100, 8, 2, 2, 3, 39), (7, 8, 8, 1, 2, 2), (64, 32, 1, 2, 0.5, 1)],
)
def test_steps_are_counted(
    recipe: Make, samples: int, batch: int, micro: int, ranks: int, epochs: float, expected: int
) -> None:
    sets = (f"batch={batch}", f"levers.micro_batch={micro}", f"schedule.epochs={epochs}", "schedule.steps=null")
    assert count_steps(recipe("llama", *sets), samples, ranks).total == expected


def test_the_trainer_is_one_class_with_few_overrides() -> None:
    from transformers import Trainer

    from memfit.engine.trainer import MemfitTrainer

    own = {name for name in vars(MemfitTrainer) if callable(getattr(MemfitTrainer, name)) and hasattr(Trainer, name)}
    own -= {"__init__", "__doc__"}
    assert len(own) <= 5
    assert all(f"`{name}`" in (MemfitTrainer.__doc__ or "") for name in own), own


def test_text_models_train_too(recipe: Make, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n) * 3}]}
        for n in range(8)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for kind in ("llama", "qwen3"):
        wanted = recipe(kind, f"data.train={data}", "method=lora")
        assert prepare(wanted).family.images is None
        result = trained(wanted, tmp_path / kind)
        assert result.steps == 2
        assert loss_of(built_from(wanted, result.model), batch_of(built_from(wanted), samples_of(wanted), 0)) > 0
