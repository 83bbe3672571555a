"""A user's DeepSpeed file against DeepSpeed and transformers themselves."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import memfit
from memfit.catalog.deepspeed_keys import shipped_keys
from memfit.cli import main
from memfit.engine import deepspeed_keys, host_ops
from memfit.engine.deepspeed_keys import _complaint, complaint, installed_keys
from memfit.engine.host_ops import prepare_operators
from memfit.errors import UserError
from memfit.inputs.recipe_file import override
from memfit.inputs.toolchain import CPU_ADAM, SHARED_MEMORY, Toolchain
from memfit.specs.plan import Plan
from memfit.specs.recipe import Recipe
from memfit.strategies import STRATEGIES
from memfit.strategies.user_deepspeed import read, zero_numbers
from memfit.strategies.user_deepspeed_findings import EPSILON, FILLED, SCHEDULES
from memfit.trace.prepare import prepare
from tests.invariant.ready import deepspeed_is_ready

pytest.importorskip("deepspeed")
Make = Callable[..., Recipe]
ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 12345,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": "auto",
    "sub_group_size": 1e9,
    "offload_optimizer": {"device": "cpu", "pin_memory": False},
}


def file(tmp_path: Path, zero: dict[str, Any], **top: Any) -> Path:
    path = tmp_path / "ds.json"
    auto = dict.fromkeys(FILLED, "auto")
    path.write_text(json.dumps({**auto, "bf16": {"enabled": False}, "zero_optimization": zero, **top}))
    return path


# ── against upstream ──


def test_the_shipped_list_is_what_the_installed_deepspeed_reads() -> None:
    """Another version than the list's is fine for a user; here the two must move together."""
    assert installed_keys() == shipped_keys()


def test_a_key_that_went_away_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime import config

    monkeypatch.setattr(config, "get_dump_state", lambda values: False)
    assert set(shipped_keys().sections[""]) - set(installed_keys().sections[""]) == {"dump_state"}


def test_auto_as_transformers_fills_it_in() -> None:
    """The priced numbers against HfTrainerDeepSpeedConfig's own, for every stage."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    from memfit.strategies.base import AUTOMATIC

    for stage in (1, 2, 3):
        section = {"stage": stage, **dict.fromkeys(AUTOMATIC, "auto")}
        theirs = HfTrainerDeepSpeedConfig({"zero_optimization": dict(section)})
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=48))
        arguments = SimpleNamespace(get_warmup_steps=lambda steps: 0)
        theirs.trainer_config_finalize(arguments, model, 10)
        ours = zero_numbers(read({"zero_optimization": section}).config)
        for key, worked_out in AUTOMATIC.items():
            value = theirs.config["zero_optimization"][key]
            assert ours.get(key, "auto") == "auto"
            assert value == (worked_out(48) if key in ours else "auto")
    unset_hf_deepspeed_config()


def test_what_is_filled_in_and_what_schedules_are_called() -> None:
    import inspect

    from deepspeed.runtime import lr_schedules
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    source = inspect.getsource(HfTrainerDeepSpeedConfig.trainer_config_process)
    assert all(f'"{key}"' in source for key in FILLED)
    assert all(hasattr(lr_schedules, name) for name in SCHEDULES)
    assert TrainingArguments.adam_epsilon == EPSILON


def test_deepspeed_takes_what_will_run_and_says_what_it_refuses(recipe: Make, tmp_path: Path) -> None:
    path = file(tmp_path, ZERO3, steps_per_print=7, nobody_reads_this=1)
    wanted = recipe("llama", "hardware.gpus=2xcpu", "levers.precision=auto", f"engine.deepspeed={path}", "batch=8")
    config = STRATEGIES["zero3"].engine_config(prepare(wanted).plan())
    assert _complaint(config) is None
    broken = {**config, "zero_optimization": {**config["zero_optimization"], "stage": "three"}}
    apart = complaint(broken)
    assert apart == _complaint(broken)
    assert (apart or "").startswith("stage: ")


# ── the commands ──


def test_check_prices_a_file_and_names_idle_keys(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_keys, "complaint", _complaint)
    path = file(tmp_path, ZERO3, offload_param={"device": "cpu"})
    wanted = recipe("llama", "hardware.gpus=2xcpu", "levers.precision=auto")
    found = memfit.check_deepspeed(path, wanted)
    assert found.verdict == "ok"
    assert found.price is not None
    assert found.price.startswith("fits")
    assert {finding.key for finding in found.of("no-effect")} == {"offload_param"}
    assert main(["check", "--deepspeed", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"]["levers.offload"] == "optimizer"
    path.write_text(path.read_text().replace('"reduce_bucket_size"', '"reduce_bucket_sise"'))
    assert main(["check", "--deepspeed", str(path)]) == 1
    assert "did you mean reduce_bucket_size?" in capsys.readouterr().out
    path.write_text(path.read_text().replace('"reduce_bucket_sise": 12345', '"load_from_fp32_weights": "perhaps"'))
    refused = memfit.check_deepspeed(path)
    assert [finding.key for finding in refused.of("error")] == ["zero_optimization.load_from_fp32_weights"]
    assert "'perhaps' is not true or false" in refused.of("error")[0].problem


def test_another_deepspeed_is_asked_for_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deepspeed_keys.keys_here() is None
    monkeypatch.setattr(deepspeed_keys, "version_of", lambda name: "0.20.0")
    assert deepspeed_keys.keys_here() == installed_keys()
    monkeypatch.setattr(deepspeed_keys, "version_of", lambda name: None)
    assert deepspeed_keys.keys_here() is None
    assert complaint({"zero_optimization": {"stage": "three"}}) is None


def test_the_forecast_takes_the_files_buckets(recipe: Make, tmp_path: Path) -> None:
    def estimated(size: int) -> dict[str, int]:
        path = file(tmp_path, {"stage": 2, "reduce_bucket_size": size})
        said: list[str] = []
        wanted = recipe("llama", "hardware.gpus=2xRTX3090", "levers.precision=auto", f"engine.deepspeed={path}")
        forecast = memfit.estimate(override(wanted, ["data.train=null"]), say=said.append)
        return {term.id: term.bytes for term in forecast.ledger.terms if "bucket" in term.id}

    small, large = estimated(1000), estimated(5000)
    assert small
    assert {key: 5 * size for key, size in small.items()} == large


# ── operators, before anything is loaded ──


def tools(**changed: Any) -> Toolchain:
    usual: dict[str, Any] = {
        "compiler": "/usr/bin/c++",
        "compiler_problem": None,
        "ninja": "/usr/bin/ninja",
        "nvcc": "",
        "torch_cuda": None,
        "needs_nvcc": False,
        "folder": Path("/nowhere"),
        "built": (),
    }
    return Toolchain(**{**usual, **changed})


@pytest.fixture
def offloading(recipe: Make) -> Callable[..., Plan]:
    def plan(*sets: str) -> Plan:
        levers = ("levers.parallel=zero2", "levers.offload=optimizer", "levers.pin_memory=false")
        return prepare(recipe("llama", "hardware.gpus=2xcpu", *levers, *sets)).plan()

    return plan


def test_operators_that_are_there_are_not_built(
    offloading: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_ops, "build_operator", lambda *words: pytest.fail("built"))
    monkeypatch.setattr(host_ops, "find_toolchain", lambda: tools(built=(CPU_ADAM, SHARED_MEMORY), compiler=None))
    assert prepare_operators(offloading(), pytest.fail) == ()
    monkeypatch.setattr(host_ops, "find_toolchain", lambda: tools(built=(SHARED_MEMORY,), compiler=None))
    assert prepare_operators(offloading("levers.offload=none"), pytest.fail) == ()


def test_operators_that_are_missing_are_built_and_said(
    offloading: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, bool]] = []
    monkeypatch.setattr(host_ops, "build_operator", lambda name, cpu: built.append((name, cpu)))
    monkeypatch.setattr(host_ops, "find_toolchain", tools)
    said: list[str] = []
    assert prepare_operators(offloading(), said.append) == (SHARED_MEMORY, CPU_ADAM)
    assert built == [(SHARED_MEMORY, True), (CPU_ADAM, True)]
    assert len(said) == 2
    assert "once" in said[0]


def test_without_a_compiler_torch_steps_in_host_memory_or_the_run_stops(
    offloading: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tools(compiler=None, built=(SHARED_MEMORY,))
    monkeypatch.setattr(host_ops, "find_toolchain", lambda: bare)
    said: list[str] = []
    assert prepare_operators(offloading(), said.append) == ()
    assert "torch's fused AdamW steps in host memory" in said[0]
    with pytest.raises(UserError, match="cannot be compiled: there is no C") as caught:
        prepare_operators(offloading("levers.optimizer=adamw-foreach"), said.append)
    assert "levers.optimizer: adamw" in caught.value.hint
    monkeypatch.setattr(host_ops, "find_toolchain", lambda: tools(compiler=None, built=(CPU_ADAM,)))
    with pytest.raises(UserError, match="which CPU ranks need"):
        prepare_operators(offloading(), said.append)


def test_a_lock_that_a_killed_build_left_is_told(
    offloading: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_ops, "find_toolchain", lambda: tools(locks=(Path("/nowhere/cpu_adam/lock"),)))
    with pytest.raises(UserError, match="nobody compiles behind it") as caught:
        prepare_operators(offloading(), pytest.fail)
    assert "rm /nowhere/cpu_adam/lock" in caught.value.hint
    monkeypatch.setattr(host_ops, "is_live", lambda lock: True)
    with pytest.raises(UserError, match="is being compiled by another run") as caught:
        prepare_operators(offloading(), pytest.fail)
    assert "rm" not in caught.value.hint.split()


def test_a_build_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, "", "Traceback\n  csrc/x.cpp:1:2: error: no such type\nRuntimeError: e\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: failed)
    assert host_ops.build_operator(CPU_ADAM, True) == "csrc/x.cpp:1:2: error: no such type"


def test_deepspeed_that_is_missing_is_told_first(
    offloading: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package deepspeed"):
        prepare_operators(offloading(), pytest.fail)


# ── training ──


@pytest.mark.skipif(not deepspeed_is_ready(), reason="DeepSpeed's operators are not compiled: make ops")
def test_training_runs_on_the_file(recipe: Make, tmp_path: Path) -> None:
    path = file(tmp_path, ZERO3, steps_per_print=1000, optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    wanted = recipe("llama", "hardware.gpus=2xcpu", "levers.precision=auto", f"engine.deepspeed={path}")
    data = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}" * 3}]}
        for n in range(8)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    said: list[str] = []
    result = memfit.train(override(wanted, [f"data.train={data}"]), say=said.append)
    assert result.steps == 2
    assert any("without effect: optimizer" in line for line in said)
    engine = json.loads((result.folder / "engine.json").read_text())
    assert engine["name"] == "zero3"
    section = engine["config"]["zero_optimization"]
    assert (section["reduce_bucket_size"], section["stage3_param_persistence_threshold"]) == (12345, 0)
    assert section["offload_optimizer"]["device"] == "cpu"
    assert engine["config"]["steps_per_print"] == 1000
    one = ["engine={}", "hardware.gpus=1xcpu", "levers.precision=fp32", f"run.folder={tmp_path / 'alone'}"]
    alone = memfit.train(override(wanted, [f"data.train={data}", *one]), say=said.append)
    losses = [losses_of(run.folder) for run in (result, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # What two ranks held in pieces is one model again, in the names and shapes of the one it began as.
    split, whole = (load_file(run.folder / "model" / "model.safetensors") for run in (result, alone))
    assert split.keys() == whole.keys()
    assert all(torch.allclose(split[name], whole[name], atol=1e-5) for name in whole)
    assert not list(result.folder.rglob(".gathered*"))


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def test_the_tool_that_writes_the_list_agrees(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = runpy.run_path(str(project / "tools" / "deepspeed_keys.py"))
    monkeypatch.setattr(sys, "argv", ["deepspeed_keys.py", "--check"])
    assert tool["main"]() == 0
    assert tool["PATH"] == project / "memfit" / "catalog" / "deepspeed_keys.json"
