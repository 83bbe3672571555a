"""The card, the picture and the report of a proof, and how measured bytes are laid beside forecast ones. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from memfit.catalog.gpus import parse_hardware
from memfit.inputs.recipe_file import load_recipe
from memfit.monitor.proof_card import card
from memfit.monitor.proof_join import ALIGNMENT, RunFacts, group_of, joined
from memfit.monitor.proof_picture import picture
from memfit.monitor.proof_tables import difference, failed_line, phase_rows, verdict
from memfit.monitor.report import write_report
from memfit.specs.ledger import PHASES, Ledger, Term
from memfit.specs.plan import Forecast, Interval, Layout, Plan
from memfit.specs.proof import WorstBatch
from memfit.specs.trace import StepTrace
from memfit.testing.runs import make_run

MIB = 1 << 20
STATES = ("load", "forward", "loss", "backward", "step", "evaluate", "save")
BATCH = WorstBatch("most tokens", ("a", "b"), 300, 40, 2, 5)


def term(name: str, size: int, alive: tuple[str, ...] = STATES, place: Any = "host", part: str = "language") -> Term:
    return Term(name, name, part, place, alive, size, "by hand")


def plan(ranks: int = 1) -> Plan:
    """10 MiB of weights, 20 of moments, and a backward of 30 MiB saved and 4 MiB of temporaries, on every rank."""
    trace = StepTrace("cpu", (), 0, 0, {}, (), (), (), (), ())
    terms = (
        term("weights.language", 10 * MIB * ranks),
        term("optimizer.language", 20 * MIB * ranks),
        term("activations.backward", 30 * MIB * ranks, ("backward",), part="activations"),
        term("transient.backward", 4 * MIB * ranks, ("backward",), part="activations"),
        term("host.process", 300 * MIB * ranks, part="host"),
        term("disk.checkpoint.weights", 30 * MIB, ("save",), "disk", "host"),
    )
    hardware = parse_hardware(f"{ranks}xcpu", None, None)
    recipe = load_recipe(None, [], model="m")
    forecast = Forecast(
        verdict="fits",
        fits=True,
        ledger=Ledger(terms),
        recipe=recipe,
        defaults=(),
        hardware=hardware,
        workload=None,
        trace=trace,
        interval=Interval(63 * MIB * ranks, 65 * MIB * ranks, 0.9),
    )
    return Plan(recipe, Layout("none"), forecast, 1)


def seen(rank: int = 0, more: int = 0, **other: Any) -> dict[str, Any]:
    """What a rank saw: the forecast, and `more` bytes of saved tensors."""
    of = {"weights.language": 10 * MIB, "optimizer.language": 20 * MIB, "saved": 30 * MIB + more, "transient": 4 * MIB}
    large = {"shape": [3, 5], "dtype": "float32", "line": "m.py:7 aten::mm", "owner": ""}
    rows = [
        {"bytes": 9 * MIB, "module": "lm_head", "role": "saved", **large},
        {"bytes": 8 * MIB, "module": "", "role": "held", **large},
    ]
    course = {
        "batch": 0,
        "phases": {"backward": {"bytes": 64 * MIB + more, "tensors": 9, "of": of}},
        "peak_phase": "backward",
        "largest": rows,
        "kept": [],
        "kept_bytes": 0,
        "saved": {},
    }
    check = {
        "lever": "levers.optimizer",
        "asked": "adamw",
        "found": "AdamW",
        "ok": True,
        "evidence": "class",
        "fix": "",
    }
    values = {
        "rank": rank,
        "checks": [check],
        "text": "hello [[world]]",
        "courses": [course],
        "peaks": {},
        "seconds": {"micro": [2.0, 2.2], "step": [0.5]},
        "rss_bytes": 400 * MIB,
        "checkpoint_bytes": 31 * MIB,
        "process_bytes": None,
        "trouble": "",
        "hint": "",
    }
    return values | other


def facts(**other: Any) -> RunFacts:
    values: dict[str, Any] = {
        "kind": "full",
        "batches": (BATCH,),
        "accumulation": 4,
        "micros": 2,
        "total_steps": 100,
        "mean_share": 0.5,
        "free_disk": 1 << 40,
    }
    return RunFacts(**(values | other))


def proof(*ranks: dict[str, Any], **other: Any) -> dict[str, Any]:
    made = joined(plan(len(ranks)), ranks, facts(**other), (), 12.0)
    found: dict[str, Any] = json.loads(json.dumps(made.to_json()))
    return found


def test_a_healthy_proof_begins_with_its_verdict() -> None:
    found = proof(seen())
    assert verdict(found) == "proof: 3 checks hold, peak 64.00 MiB of 64.00 MiB forecast"
    text = card(found)
    assert text.startswith(verdict(found))
    assert "FAILED" not in text
    assert "hello [[world]]" in text
    assert "not in the ledger" in text
    assert failed_line(found) is None
    # 2.1 s a micro-batch, four of them, and half a second; the mean sample is half the worst one.
    assert found["step_seconds"] == pytest.approx(2.1 * 4 + 0.5)
    assert found["run_seconds"] == pytest.approx(8.9 * 50)


def test_what_the_interval_does_not_hold_names_the_group_and_its_terms() -> None:
    found = proof(seen(more=3 * MIB))
    assert found["failed"] == ["forecast"]
    problem, fix = failed_line(found) or ("", "")
    assert "asked at most 65.00 MiB, found 67.00 MiB" in problem
    assert fix
    (check,) = [check for check in found["checks"] if check["lever"] == "forecast"]
    assert "kept for backward (activations.backward) in backward on rank 0: 33.00 MiB measured" in check["evidence"]
    lines = card(found).splitlines()
    assert lines[0].startswith("proof: 2 of 3 checks hold")
    assert lines[2] == "FAILED forecast"


def test_alignment_is_no_failure_and_one_more_byte_is() -> None:
    rows = len(proof(seen())["compared"])
    assert proof(seen(more=MIB + ALIGNMENT * rows))["failed"] == []
    assert proof(seen(more=MIB + ALIGNMENT * rows + 1))["failed"] == ["forecast"]


def test_bytes_of_nobody_are_unexplained() -> None:
    rank = seen()
    rank["courses"][0]["phases"]["backward"]["bytes"] += 777
    (row,) = [row for row in proof(rank)["compared"] if row["name"] == "unexplained"]
    assert (row["ids"], row["forecast_bytes"], row["measured_bytes"]) == ([], 0, 777)


def test_of_several_ranks_the_one_with_the_most_is_shown() -> None:
    found = proof(seen(0), seen(1, more=MIB // 2))
    assert phase_rows(found) == [("backward", 64 * MIB, 64 * MIB + MIB // 2)]
    assert found["peak_measured_bytes"] == 64 * MIB + MIB // 2
    assert "at the peak of backward, rank 1" in card(found)


def test_a_disk_without_room_and_a_step_that_broke_fail() -> None:
    assert proof(seen(), free_disk=80 * MIB)["failed"] == ["run.keep"]
    broken = seen(courses=[], trouble="out of memory: 4.1 GiB", hint="less")
    found = proof(broken)
    assert found["failed"] == ["worst batch"]
    assert found["peak_measured_bytes"] is None
    assert "out of memory: 4.1 GiB" in card(found)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("weights.vision", "weights"),
        ("gradients.so_far.backward", "gradients"),
        ("zero2.gradient_partition.forward", "gradients"),
        ("fsdp.gathered.backward", "engine"),
        ("zero3.master.language", "master weights"),
        ("transient.evaluate", "temporaries"),
        ("something.new", "engine"),
    ],
)
def test_terms_have_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_differences_are_exact_where_they_are_small() -> None:
    assert difference(MIB, MIB) == "0"
    assert difference(MIB, MIB + 46) == "+46 B (+0.00%)"
    assert difference(2 * MIB, MIB) == "-1.00 MiB (-50.00%)"
    assert difference(0, MIB) == "+1.00 MiB"


def test_the_picture_and_the_report_show_it(tmp_path: Path) -> None:
    found = proof(seen())
    drawn = picture(found)
    assert drawn.count("measured</text>") == 1
    assert picture({**found, "compared": []}) == ""
    folder = make_run(tmp_path / "run", steps=5, documents=3)
    (folder / "proof.json").write_text(json.dumps(found))
    text, page = write_report([folder])
    assert verdict(found) in text
    html = page.read_text(encoding="utf-8")
    assert 'id="proof"' in html
    assert "m.py:7 aten::mm" in html


def test_phases_are_those_of_the_ledger() -> None:
    assert {row[0] for row in phase_rows(proof(seen()))} <= set(PHASES)
    assert dataclasses.asdict(BATCH)["crops"] == 5
