"""What docs/models.md says of ZeRO-3 and FSDP2: two ranks of each model learn what one process learns.

Samples differ in pictures and crops, and some have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from memfit.testing import make_dummy
from tests.invariant.mixed import make_mixed
from tests.invariant.ready import deepspeed_is_ready
from tests.invariant.test_trajectories import COMMON, LAYOUTS, TWO
from tests.invariant.trajectories import Case, Common, follows, run_alone, run_in_ranks
from tests.supported import READING, SHOWN

SHORT = ("schedule.steps=3", "levers.micro_batch=1", "batch=2")
METHODS = {"full": ("method=full",), "lora": ("method=lora",)}


def without_pictures(data: Path) -> Path:
    """The same rows for models that see none."""
    rows = json.loads(data.read_text())
    for row in rows:
        row.pop("image", None)
        row["conversations"][0]["content"] = row["conversations"][0]["content"].replace("<image>\n", "")
    path = data.with_name("words.json")
    path.write_text(json.dumps(rows))
    return path


def follow(kinds: Sequence[str], layout: str, root: Path) -> None:
    """Each of the models, in full and with adapters: one process, then all of them in one group of two ranks."""
    data = make_mixed(root / "samples", 12)
    words = without_pictures(data)
    wanted, alone = [], []
    for kind in kinds:
        folder = make_dummy(kind, root / "models" / kind)
        for name, sets in METHODS.items():
            recipe = Common(folder, words if kind in READING else data, (*COMMON, *SHORT, *sets))
            alone.append(run_alone(recipe, Case("none", ("hardware.gpus=1xcpu",)), root / f"{kind}-{name}"))
            wanted.append((recipe, [Case(layout, (TWO, *LAYOUTS[layout]))]))
    names = [(kind, name) for kind in kinds for name in METHODS]
    for name, one, several in zip(names, alone, run_in_ranks(wanted, root / "ranks", 2), strict=True):
        follows(f"{', '.join(name)}, unlike samples", layout, one, several[layout])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fsdp_learns_what_one_process_learns(tmp_path: Path) -> None:
    follow(SHOWN["fsdp"].kinds, "fsdp", tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not deepspeed_is_ready(), reason="DeepSpeed's operators are not compiled here: make ops")
def test_zero3_learns_what_one_process_learns(tmp_path: Path) -> None:
    follow(SHOWN["zero3"].kinds, "zero3", tmp_path)
