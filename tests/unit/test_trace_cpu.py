"""What CPU kernels take beside their results, against torch.profiler's record of the real operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memfit.trace.cpu import workspace_bytes

aten = torch.ops.aten
BF16, FP32, LONG = torch.bfloat16, torch.float32, torch.long


def _most(run: Callable[[], object]) -> int:
    """The largest sum of bytes that `run` allocates, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        kept = run()
    del kept
    sizes = []
    waiting = list(records.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = most = 0
    for _, size in sorted(sizes):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("left", "right", "shape"),
    [
        (BF16, FP32, (64, 32)),
        (FP32, BF16, (64, 32)),
        (BF16, FP32, (32,)),
        (LONG, FP32, (64, 32)),
        (BF16, BF16, (64, 32)),
    ],
)
@pytest.mark.parametrize("func", [aten.add.Tensor, aten.mul.Tensor])
def test_operands_of_two_dtypes_are_copied(
    func: Callable[..., torch.Tensor], left: torch.dtype, right: torch.dtype, shape: tuple[int, ...]
) -> None:
    args = torch.ones(64, 32, dtype=left), torch.ones(*shape, dtype=right)
    result = func(*args)
    assert _most(lambda: func(*args)) == result.untyped_storage().nbytes() + workspace_bytes(func, args)


def test_a_result_in_place_is_made_in_the_common_dtype() -> None:
    args = torch.ones(64, 32, dtype=BF16), torch.ones(64, 32)
    assert workspace_bytes(aten.add_.Tensor, args) == 2 * 64 * 32 * 4
    assert _most(lambda: aten.add_.Tensor(*args)) == 2 * 64 * 32 * 4


def test_a_number_is_no_operand() -> None:
    assert workspace_bytes(aten.mul.Tensor, (torch.ones(8, dtype=BF16), 2.0)) == 0
