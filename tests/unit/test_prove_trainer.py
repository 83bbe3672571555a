"""`memfit.prove`: a trainer that somebody else built is proved, and left as it was to the bit."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import memfit
from memfit.engine.foreign.kept import Kept, Shelf
from memfit.engine.foreign.worst import worst_of
from memfit.errors import ProofFailed, UserError
from memfit.specs.proof import Check, Proof
from tests.unit import foreign_rank
from tests.unit.foreign_sft import as_trl

Change = Callable[[Any], None]


def trainer_of(folder: Path, model: Path, case: str = "checkpointed") -> Trainer:
    return foreign_rank.make(str(model), str(folder / "out"), case)


def proved(trainer: Any) -> Proof:
    return memfit.prove(trainer, say=lambda text: None)


def found(proof: Proof, lever: str) -> Check:
    return next(check for check in proof.checks if check.lever.startswith(lever))


def chance() -> tuple[Any, ...]:
    return torch.rand(2).tolist(), random.random(), float(np.random.rand())


def state(trainer: Any) -> dict[str, Any]:
    """All that is to stay, as values and identities."""
    model = trainer.model
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "learns": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "args": dict(vars(trainer.args)),
        "callbacks": list(trainer.callback_handler.callbacks),
        "own": {name: id(value) for name, value in vars(trainer).items()},
        "accelerator": sorted(vars(trainer.accelerator)),
        "config": model.config.to_dict(),
        "chance": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[name], two[name]) for name in one)
    return bool(one == two)


def test_a_proof_leaves_everything_as_it_was_and_its_forecast_holds(
    dummies: Callable[[str], Path], tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, dummies("llama"), "lora-checkpointed")
    trainer.model.eval()
    before = state(trainer)
    said: list[str] = []
    proof = memfit.prove(trainer, folder=tmp_path / "proof", say=said.append)
    after = state(trainer)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert [(check.lever, check.found, check.evidence) for check in proof.failed] == []
    assert found(proof, "args.gradient_checkpointing").ok is True
    assert found(proof, "peft: target_modules").ok is True
    # The longest rows of the data, and bytes that the recipe's own ledger names.
    longest = sorted(len(row["input_ids"]) for row in trainer.train_dataset)[-2:]
    assert proof.batches[0].tokens in (sum(longest), longest[-1] + longest[-1] - 1, 2 * longest[-1])
    assert proof.peak_measured_bytes == pytest.approx(proof.peak_forecast_bytes, rel=1e-3)
    assert said[0].startswith("proof: ")
    assert "asked by the script, and what is in effect" in said[0]
    assert json.loads((tmp_path / "proof/proof.json").read_text())["failed"] == []


def test_a_shelf_puts_containers_back_in_place() -> None:
    class Thing:
        def __init__(self) -> None:
            self.rows = [{"a": 1}, {"b": {2}}]

    thing = Thing()
    rows = thing.rows
    shelf = Shelf(thing)
    thing.rows[0]["a"] = 5
    thing.rows[1]["b"].add(7)
    thing.rows.append({})
    thing.other = 3  # type: ignore[attr-defined]
    shelf.restore()
    assert thing.rows is rows
    assert vars(thing) == {"rows": [{"a": 1}, {"b": {2}}]}


class _Stubbed:
    """As much of a trainer as the scan of its data asks for."""

    _train_batch_size = 2
    data_collator = foreign_rank.Padding()

    def _get_collator_with_removed_columns(self, collate: Any) -> Any:
        return collate


def test_the_worst_batch_of_a_list_and_of_a_stream() -> None:
    rows = foreign_rank.samples(24)
    lengths = [len(row["input_ids"]) for row in rows]
    whole = worst_of(_Stubbed(), rows, lambda what, done, total: None)
    assert whole.longest == max(lengths)
    assert whole.batches[0]["input_ids"].shape == (2, max(lengths))
    assert whole.note == ""
    stream = worst_of(_Stubbed(), iter(rows), lambda what, done, total: None)
    assert stream.longest == max(lengths)
    assert "stream" in stream.note
    with pytest.raises(UserError, match="no sample"):
        worst_of(_Stubbed(), [], lambda what, done, total: None)


# ---- bit for bit, and what is found: a minute --------------------------------------------------------------------


def example(name: str, project: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, project / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(make: Callable[[Path], Any], folder: Path, prove: bool) -> tuple[Any, ...]:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    trainer = make(folder)
    proof = proved(trainer) if prove else None
    outcome = trainer.train()
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return proof, outcome.training_loss, [row.get("loss") for row in trainer.state.log_history], weights, chance()


@pytest.mark.long
@pytest.mark.parametrize("name", ["prove_trainer", "prove_sft"])
def test_examples_train_as_without_a_proof(
    name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("trl") is None:
        monkeypatch.setitem(sys.modules, "trl", as_trl())
    module = example(name, project)
    plain, after = (trained(module.make_trainer, tmp_path / word, word == "b") for word in ("a", "b"))
    assert after[0].failed == ()
    assert same(list(plain[1:3]), list(after[1:3]))
    assert same(plain[3], after[3])
    assert plain[4] == after[4]


@pytest.mark.long
def test_an_optimizer_of_the_users_own_is_given_back_without_states(
    dummies: Callable[[str], Path], tmp_path: Path
) -> None:
    base = trainer_of(tmp_path, dummies("llama"))
    optimizer = torch.optim.SGD(base.model.parameters(), lr=0.5, momentum=0.9)
    trainer = Trainer(
        model=base.model,
        args=base.args,
        train_dataset=base.train_dataset,
        data_collator=base.data_collator,
        optimizers=(optimizer, None),
    )
    keys = set(vars(optimizer))
    proof = proved(trainer)
    assert trainer.optimizer is optimizer
    assert not optimizer.state
    assert set(vars(optimizer)) == keys
    failed = {check.lever: check for check in proof.failed}
    assert failed["args.learning_rate"].found == "0.5"
    assert any(check.found == "SGD" for lever, check in failed.items() if lever.startswith("args.optim"))


def no_checkpointing(trainer: Any) -> None:
    """What a wrapper without `activation_checkpointing_enable` comes to."""
    trainer.model.activation_checkpointing_enable = lambda *args, **kwargs: None


def no_loss(trainer: Any) -> None:
    for row in trainer.train_dataset:
        row["labels"] = [-100] * len(row["labels"])


def shifted(trainer: Any) -> None:
    for row in trainer.train_dataset:
        row["labels"] = [*row["labels"][1:], -100]


def released(trainer: Any) -> None:
    next(iter(trainer.model.parameters())).requires_grad_(True)


def merged(trainer: Any) -> None:
    trainer.model.merge_adapter()


def nothing(trainer: Any) -> None:
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(False)


def broken(trainer: Any) -> None:
    def collate(rows: Any) -> Any:
        batch = foreign_rank.Padding()(rows)
        batch["input_ids"] = batch["input_ids"] + 10_000  # beyond the embeddings
        return batch

    trainer.data_collator = collate


PLANTED: dict[str, tuple[str, Change]] = {
    "args.gradient_checkpointing": ("checkpointed", no_checkpointing),
    "labels": ("full", no_loss),
    "labels are the tokens": ("full", shifted),
    "peft: what learns": ("lora", released),
    "peft: r, lora_alpha": ("lora", merged),
    "requires_grad": ("full", nothing),
    "worst batch": ("full", broken),
}


@pytest.mark.long
@pytest.mark.parametrize("lever", list(PLANTED))
def test_what_is_not_in_effect_is_named(lever: str, dummies: Callable[[str], Path], tmp_path: Path) -> None:
    case, change = PLANTED[lever]
    trainer = trainer_of(tmp_path, dummies("llama"), case)
    change(trainer)
    proof = proved(trainer)
    assert any(check.lever.startswith(lever) for check in proof.failed), [check.lever for check in proof.failed]


@pytest.mark.long
def test_a_target_without_a_match_and_a_dtype_that_costs(dummies: Callable[[str], Path], tmp_path: Path) -> None:
    base = trainer_of(tmp_path, dummies("llama"), "bf16")
    config = LoraConfig(r=4, target_modules=["q_proj", "query_key_value"])
    trainer = Trainer(
        model=get_peft_model(base.model, config),
        args=base.args,
        train_dataset=base.train_dataset,
        data_collator=base.data_collator,
    )
    proof = proved(trainer)
    assert [check.lever for check in proof.failed] == ["peft: target_modules"]
    assert "query_key_value matched nothing" in proof.failed[0].found
    assert next(check for check in proof.checks if check.lever == "args.bf16").ok is True
    assert "float32" in found(proof, "args.bf16 (weights)").found
    assert any("not forecast" in note for note in proof.notes)
    with pytest.raises(ProofFailed, match="query_key_value"):
        memfit.prove(trainer, strict=True, say=lambda text: None)


@pytest.mark.long
def test_a_trainer_that_has_trained_is_refused(dummies: Callable[[str], Path], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, dummies("llama"))
    trainer.state.global_step = 3
    with pytest.raises(UserError, match="3 steps"):
        proved(trainer)


@pytest.mark.long
def test_what_is_kept_is_copied_once(dummies: Callable[[str], Path], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, dummies("llama"), "lora")
    learning = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    buffers = sum(buffer.nbytes for buffer in trainer.model.buffers())
    assert Kept(trainer).bytes == learning + buffers


RANKS = ("ddp", "ddp-lora-checkpointed", "zero2", "zero2-lora-bf16", "zero3", "zero3-lora", "zero2-bf16-offload")


@pytest.mark.long
@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_train_as_without_a_proof(
    case: str, dummies: Callable[[str], Path], project: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    script = str(project / "tests/unit/foreign_rank.py")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words, str(dummies("llama")), str(out), case],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())[case]
    assert result["kept"]
    assert result["same"], result["losses"]
    assert result["proof"]["failed"] == []
    assert result["proof"]["peak_measured_bytes"] == pytest.approx(result["proof"]["peak_forecast_bytes"], rel=0.02)
