"""Where weights are split, the ranks of a machine hold one whole copy between them while they load, not one each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memfit.build.load import random_model
from memfit.engine.launch import start
from memfit.families import family_for
from memfit.testing import make_dummy, make_samples
from tests.invariant.loading import peaks
from tests.invariant.ready import deepspeed_is_ready
from tests.invariant.test_trajectories import COMMON, LAYOUTS
from tests.invariant.trajectories import Case, Common, _job, follows, outcome, run_alone

# Code that is loaded on the way, and the largest tensor while it is whole.
BESIDE = 48 << 20


def large(root: Path) -> tuple[Common, int]:
    """A model of some 170 MiB, and its bytes in fp32."""
    folder = make_dummy("qwen2_5_vl", root / "model")
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    text.pop("layer_types", None)
    text |= {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 6, "num_attention_heads": 12}
    text |= {"num_key_value_heads": 4, "head_dim": 64}
    text["rope_parameters"]["mrope_section"] = [8, 12, 12]
    vision["out_hidden_size"] = 768
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = random_model(family_for(config), config)
    model.save_pretrained(folder)  # type: ignore[operator]
    sets = (*COMMON, "method=full", "schedule.steps=1")
    return Common(folder, make_samples(root / "samples", 4), sets), 4 * sum(p.numel() for p in model.parameters())


def measured(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, ranks: int = 2
) -> tuple[list[dict[str, int]], int]:
    """What `peaks` gives, and the bytes of the whole model."""
    # Freed tensors go back at once, as those of a real model do: glibc keeps what is smaller than 32 MiB.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    common, size = large(root)
    return peaks(common, Case(name, (f"hardware.gpus={ranks}xcpu", *LAYOUTS[name])), root / "run", ranks), size


@pytest.mark.long
def test_fsdp_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, other), size = measured(tmp_path, monkeypatch, "fsdp")
    assert other["peak"] <= size / 2 + BESIDE < 0.8 * size
    assert first["peak"] <= size + size / 2 + BESIDE
    assert max(first["after"], other["after"]) <= size / 2 + BESIDE


@pytest.mark.long
@pytest.mark.skipif(not deepspeed_is_ready(), reason="DeepSpeed or its compiled operators are missing: make ops")
def test_zero3_splits_as_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *others), size = measured(tmp_path, monkeypatch, "zero3", 4)
    assert all(other["built"] <= size / 4 + BESIDE for other in others)
    assert first["built"] <= size + size / 4 + BESIDE


@pytest.mark.long
def test_whole_copies_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error looked for, where it is none: under DDP every rank keeps the model."""
    (_, other), size = measured(tmp_path, monkeypatch, "ddp")
    assert other["peak"] > 0.9 * size


# The second rank fails if it touches the checkpoint's weights.
READS_NOT = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
from memfit.build import build as building
from memfit.engine import worker
if os.environ["RANK"] == "1":
    def refuses(*args, **kwargs):
        raise AssertionError("this rank reads the checkpoint")
    building.loaded_model = refuses
sys.exit(worker.main(pathlib.Path(sys.argv[1]), False))
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_ranks_that_keep_the_whole_model_get_it_from_the_first(tmp_path: Path, name: str) -> None:
    if name != "ddp" and not deepspeed_is_ready():
        pytest.skip("DeepSpeed or its compiled operators are missing: make ops")
    data = make_samples(tmp_path / "samples", 5)
    sets = (*COMMON, "method=lora", "parts.connector=full", "schedule.steps=2")
    common = Common(make_dummy("minicpmv4_6", tmp_path / "model"), data, sets)
    folder = _job(common, Case(name, ("hardware.gpus=2xcpu", *LAYOUTS[name])), tmp_path / "run").folder.path
    script = tmp_path / "rank.py"
    script.write_text(READS_NOT.format(root=str(Path(__file__).parents[2])))
    start([str(script), str(folder)], 2, folder / "logs")
    alone = run_alone(common, Case("none", ("hardware.gpus=1xcpu",)), tmp_path / "alone")
    follows("loading", name, alone, outcome(folder))
