"""Equal blocks are traced once: what is written in for the others is what a trace of the whole model gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace_against_profiler import request_for
from memfit.specs.trace import Event, StepTrace, TraceBatch
from memfit.specs.workload import ImageCost
from memfit.trace import step
from memfit.trace.folds import Fold
from memfit.trace.recording import step_of
from memfit.trace.step import record_step, trace_step
from memfit.trace.stretches import stretches
from memfit.trace.unfold import _balanced, moved_path

Folder = Callable[[str], Path]
CROPS = {
    "minicpmv4_6": ImageCost(((8, 8),), (4,)),
    "minicpmv4_7": ImageCost(((8, 8),), (4,)),
    "qwen2_5_vl": ImageCost(((8, 16),), (32,)),
    "llava": ImageCost(((4, 4),), (16,)),
}


def deep(folder: Path, kind: str) -> tuple[dict[str, Any], TraceBatch]:
    """A tiny model with blocks enough to leave some out, and a batch with one picture where it takes any."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    text["num_hidden_layers"] = 8
    text.pop("layer_types", None)
    if kind.startswith("minicpm"):
        text["layer_types"] = ["linear_attention", "full_attention"] * 4
        config["vision_config"]["num_hidden_layers"], config["insert_layer_id"] = 10, 4
    elif kind == "qwen2_5_vl":
        config["vision_config"] |= {"depth": 12, "fullatt_block_indexes": [5, 11]}
    elif kind == "llava":
        config["vision_config"]["num_hidden_layers"] = 6
    return config, TraceBatch((70,), ((CROPS[kind],),) if kind in CROPS else ())


def figures(trace: StepTrace) -> dict[str, Any]:
    return {
        "saved": {(row.part, row.block): row.bytes for row in trace.saved},
        "peaks": trace.peaks,
        "activation peaks": trace.activation_peaks,
        "parts": {(row.phase, row.part, row.block): row.transient for row in trace.parts},
        "gradients": trace.gradients,
        "flops": {(row.phase, row.part): row.flops for row in trace.flops},
        "stretches": stretches(trace.events, lambda path: ("", None)),
        "timeline": trace.timeline,
        "events": trace.events,
    }


RECIPES = {
    "llama": ("method=lora", "lora.dropout=0.05", "levers.precision=bf16-amp", "levers.checkpointing=full"),
    "qwen3": ("parts.language=last-4",),
    "minicpmv4_6": ("levers.precision=pure-bf16",),
    "minicpmv4_7": ("levers.checkpointing=full",),
    "qwen2_5_vl": ("levers.precision=bf16-amp", "levers.checkpointing=full"),
    "llava": ("levers.checkpointing=every-2",),
}
ODD = ("llava",)
ACCUMULATED = ("minicpmv4_6", "qwen2_5_vl")  # with gradients of an earlier micro-batch


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        *(("llama", "cpu"), ("llama", "gpu"), ("qwen3", "gpu"), ("minicpmv4_6", "gpu"), ("minicpmv4_7", "cpu")),
        *(("qwen2_5_vl", "cpu"), ("qwen2_5_vl", "gpu"), ("llava", "gpu")),
    ],
)
def test_blocks_compose_to_the_whole_model(dummies: Folder, kind: str, device: str) -> None:
    config, batch = deep(dummies(kind), kind)
    request = request_for(config, batch, *RECIPES[kind], device=device, accumulated=kind in ACCUMULATED)
    composed = step_of(record_step(request), request.family)
    assert (composed is None) == (kind in ODD), "traced whole where blocks of one kind are not alike"
    short, whole = figures(composed or trace_step(request)), figures(trace_step(request, whole=True))
    for name, value in whole.items():
        assert short[name] == value, name


def test_blocks_are_left_out(dummies: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above proves nothing if every block runs."""
    taken: list[tuple[Fold, ...]] = []
    plan = step.plan_skips

    def noted(*args: Any) -> tuple[Fold, ...]:
        taken.append(plan(*args))
        return taken[-1]

    monkeypatch.setattr(step, "plan_skips", noted)
    config, batch = deep(dummies("qwen2_5_vl"), "qwen2_5_vl")
    trace_step(request_for(config, batch))
    assert len(taken) == 1, "the first way serves"
    kept = {fold.part: fold.kept for fold in taken[0]}
    assert kept == {"vision": (0, 1, 4, 5, 6, 10, 11), "language": (0, 1, 7)}
    assert taken[0][0].stands == (0, 1, 1, 1, 4, 5, 6, 1, 1, 1, 10, 11)


def test_a_tower_that_gives_an_inner_layer_runs_whole(dummies: Folder) -> None:
    """LLaVA takes the last layer but one: the last one's backward never runs, so the repeats are not alike."""
    config, batch = deep(dummies("llava"), "llava")
    request = request_for(config, batch)
    assert figures(trace_step(request)) == figures(trace_step(request, whole=True))


def test_a_path_is_moved_to_its_own_block() -> None:
    assert (
        moved_path("base_model.model.model.layers.3.mlp", "model.layers.", 4) == "base_model.model.model.layers.7.mlp"
    )
    assert moved_path("model.layers.3", "model.layers.", 4) == "model.layers.7"
    assert moved_path("model.norm", "model.layers.", 4) == "model.norm"


def test_a_tape_that_frees_twice_is_not_taken() -> None:
    made, freed = Event("alloc", 1, 8, "forward", "", ""), Event("free", 1, 8, "forward", "", "")
    assert _balanced([made, freed])
    assert not _balanced([made, freed, freed])
    assert not _balanced([freed])


STAND_INS = {
    "minicpmv4_6": ("levers.linear_attention=fla", "levers.attention=flash", "levers.activation_offload=true"),
    "qwen2_5_vl": ("levers.attention=flash", "levers.loss=fused", "levers.checkpointing=selective"),
    "llama": ("method=qlora", "levers.loss=chunked", "levers.checkpointing=every-2"),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_stand_ins_and_levers_compose_too(dummies: Folder, kind: str) -> None:
    config, batch = deep(dummies(kind), kind)
    sets = ("levers.checkpointing=full", "levers.precision=bf16-amp", *STAND_INS[kind])
    request = request_for(config, batch, *sets, device="gpu")
    composed, whole = trace_step(request), trace_step(request, whole=True)
    assert figures(composed) == figures(whole)
    assert composed.pinned == whole.pinned
