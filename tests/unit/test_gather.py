"""Weights in pieces become one model on the first rank, without a second model in host memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memfit.engine import gather
from memfit.engine.gather import is_split, whole_state

WIDTH = 1500  # a layer of 9 MB


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def sharded(layers: int = 10) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    model.register_buffer("steps", torch.arange(3))
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def own_bytes() -> int:
    """Memory of this process that no file stands behind, without what the allocator holds free from earlier tests."""
    ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.usefixtures("one_rank")
def test_the_whole_lies_in_files_and_is_the_same(tmp_path: Path) -> None:
    model = sharded()
    assert is_split(model)
    size = sum(p.numel() * 4 for p in model.parameters())
    before = own_bytes()
    state = whole_state(model, folder=tmp_path / "run")
    grown = own_bytes() - before
    assert grown < 0.35 * size, (grown, size)  # one gathered layer at a time
    assert os.listdir(tmp_path / "run") == []
    plain = whole_state(model)
    assert own_bytes() - before > 0.8 * size  # the check can tell: without files it is a second model
    assert state.keys() == plain.keys() == {*model.state_dict()}
    assert all(torch.equal(state[name], plain[name]) for name in plain)


@pytest.mark.usefixtures("one_rank")
def test_floating_tensors_are_cast_as_they_come(tmp_path: Path) -> None:
    model = sharded(2)
    narrow = whole_state(model, dtype=torch.bfloat16, folder=tmp_path)
    wide = whole_state(model)
    assert narrow["steps"].dtype == torch.int64
    assert all(torch.equal(narrow[name], wide[name].to(torch.bfloat16)) for name in wide if name != "steps")


@pytest.mark.usefixtures("one_rank")
def test_a_disk_without_room_costs_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gather.os, "posix_fallocate", full)
    model = sharded(2)
    state, plain = whole_state(model, folder=tmp_path), whole_state(model)
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_model_in_one_piece_is_not_copied(tmp_path: Path) -> None:
    model = nn.Linear(1000, 1000)
    state = whole_state(model, folder=tmp_path)
    assert state["weight"].data_ptr() == model.weight.data_ptr()
