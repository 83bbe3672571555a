"""Ranks whose samples differ in pictures and crops, or bring none, run the same modules: none waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfit.testing import make_dummy
from tests.invariant.mixed import make_mixed
from tests.invariant.ready import deepspeed_is_ready
from tests.invariant.test_trajectories import COMMON, LAYOUTS, TWO
from tests.invariant.trajectories import Case, Common, follows, run_alone, run_in_ranks

FAMILIES = ("minicpmv4_6", "minicpmv4_7", "qwen2_5_vl", "llava")
ALL = "parts={vision: full, connector: full, language: full, head: full}"
FROZEN = "parts={vision: frozen, connector: frozen, language: full}"
SHORT = ("schedule.steps=3", "levers.micro_batch=1", "batch=2")


def follow(
    kinds: dict[str, tuple[str, ...]], names: tuple[str, ...], root: Path, *sets: str, loss: str = "full-logits"
) -> None:
    """Every layout of every model follows one process, with full logits, over the same unlike samples."""
    data = make_mixed(root / "samples", 12)
    able = [name for name in names if deepspeed_is_ready() or not name.startswith("zero")]
    wanted, alone = [], []
    for kind, own in kinds.items():
        recipe = Common(make_dummy(kind, root / kind), data, (*COMMON, *sets, *own))
        alone.append(run_alone(recipe, Case("none", ("hardware.gpus=1xcpu",)), root / f"{kind}-alone"))
        wanted.append((recipe, [Case(name, (TWO, *LAYOUTS[name], f"levers.loss={loss}")) for name in able]))
    outcomes = run_in_ranks(wanted, root / "ranks", 2)
    for kind, one, several in zip(kinds, alone, outcomes, strict=True):
        for name, found in several.items():
            follows(f"{kind}, unlike samples, {loss}", name, one, found)


def test_text_only_and_many_crops_side_by_side(tmp_path: Path) -> None:
    follow({"minicpmv4_6": (ALL,), "qwen2_5_vl": (FROZEN,)}, ("ddp", "fsdp", "zero3"), tmp_path, *SHORT)


@pytest.mark.long
def test_chunked_loss_of_unequal_answers(tmp_path: Path) -> None:
    """Ranks have different numbers of chunks, and one head: of its own, tied to the embeddings, and frozen."""
    kinds = {"qwen2_5_vl": (ALL,), "minicpmv4_6": (FROZEN,), "llava": ("method=lora",)}
    follow(kinds, ("fsdp", "zero3"), tmp_path, *SHORT, loss="chunked")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parts", [ALL, FROZEN], ids=["all parts", "tower frozen"])
def test_every_family_and_layout(tmp_path: Path, parts: str) -> None:
    kinds = dict.fromkeys(FAMILIES, (parts,))
    follow(kinds, ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3, all offloaded"), tmp_path, *SHORT)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parts", [ALL, "method=lora"], ids=["all parts", "lora"])
def test_chunked_loss_of_every_family_and_layout(tmp_path: Path, parts: str) -> None:
    kinds = dict.fromkeys((*FAMILIES, "minicpmv2_6"), (parts,))
    follow(kinds, tuple(LAYOUTS), tmp_path, *SHORT, loss="chunked")
