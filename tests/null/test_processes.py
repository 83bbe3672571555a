"""What a process finds in its environment before torch and DeepSpeed are imported."""

from __future__ import annotations

import os

import pytest

from memfit.inputs.processes import (
    prepare_allocator,
    prepare_environment,
    rank_facts,
    with_segments,
    without_peer_access,
)

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "DS_ACCELERATOR", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_a_run_on_the_cpu_leaves_nothing_to_a_run_on_gpus() -> None:
    prepare_environment(cpu=True)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    prepare_environment(cpu=False)
    assert "DS_ACCELERATOR" not in os.environ


def test_the_users_own_accelerator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    prepare_environment(cpu=False)
    assert os.environ["DS_ACCELERATOR"] == "cuda"


@pytest.mark.parametrize(
    ("setting", "expandable", "wanted"),
    [
        ("", True, "expandable_segments:True"),
        ("", False, ""),
        ("max_split_size_mb:128", False, "max_split_size_mb:128"),
        ("max_split_size_mb:128", True, "max_split_size_mb:128,expandable_segments:True"),
        ("expandable_segments:True,max_split_size_mb:64", False, "max_split_size_mb:64,expandable_segments:False"),
        ("expandable_segments:False", True, "expandable_segments:True"),
        (
            "roundup_power2_divisions:[64:8,256:4]",
            True,
            "roundup_power2_divisions:[64:8,256:4],expandable_segments:True",
        ),
    ],
)
def test_one_key_changes_and_the_others_stay(setting: str, expandable: bool, wanted: str) -> None:
    assert with_segments(setting, expandable) == wanted


def test_the_allocators_setting_goes_where_torch_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare_allocator(expandable=False) == ""
    assert not any(name in os.environ for name in NAMES)
    assert prepare_allocator(expandable=True) == "expandable_segments:True"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    # A default run after it, or against what the user has set, is not left with it.
    assert prepare_allocator(expandable=False) == "expandable_segments:False"


def test_the_older_name_is_kept_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's two parsers read the two names in opposite orders."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    assert prepare_allocator(expandable=True) == "max_split_size_mb:128,expandable_segments:True"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:128,expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_cards_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")  # the user's word stands
    without_peer_access()
    assert (os.environ["NCCL_P2P_DISABLE"], os.environ["NCCL_IB_DISABLE"]) == ("1", "0")


def test_a_process_that_nobody_started_is_the_first_of_one() -> None:
    facts = rank_facts()
    assert (facts.rank, facts.local_rank, facts.ranks) == (0, 0, 1)
