"""The rows in which a CUDA device differs: what each keeps, in which dtype, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.trace_against_profiler import request_for
from memfit.errors import UserError
from memfit.specs.trace import TraceBatch
from memfit.trace.cuda import FP32_RESULT, ROWS, UPCAST, CudaKernels, workspace_bytes
from memfit.trace.step import trace_step

B, N, K, T, H = 2, 8, 2, 100, 64


def kept(compute: Callable[[], torch.Tensor]) -> tuple[dict[str, int], set[str]]:
    """Bytes of the unique storages that autograd saves, by dtype, and the rows that were used."""
    found: dict[int, tuple[torch.Tensor, str]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = (tensor, str(tensor.dtype).removeprefix("torch."))
        return tensor

    mode = CudaKernels()
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mode:
        compute()
    sizes: dict[str, int] = {}
    for tensor, dtype in found.values():
        sizes[dtype] = sizes.get(dtype, 0) + tensor.untyped_storage().nbytes()
    return sizes, mode.used


def heads(number: int, dtype: torch.dtype, size: int = H) -> torch.Tensor:
    return torch.empty(B, number, T, size, dtype=dtype, requires_grad=True)


def attention(*tensors: Any, **options: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*tensors, **options)


def test_flash_keeps_grouped_heads_as_they_are() -> None:
    def compute() -> torch.Tensor:
        keys = heads(K, torch.bfloat16), heads(K, torch.bfloat16)
        return attention(heads(N, torch.bfloat16), *keys, is_causal=True, enable_gqa=True)

    sizes, used = kept(compute)
    assert used == {"sdpa-flash"}
    assert sizes.pop("bfloat16") == 2 * B * T * H * (2 * N + 2 * K)  # q and out, k and v
    assert sizes.pop("float32") == 4 * B * N * T  # logsumexp
    assert sum(sizes.values()) <= 32  # the generator's seed and offset


def test_flash_pads_heads_to_a_multiple_of_8() -> None:
    sizes, used = kept(lambda: attention(*(heads(N, torch.float16, 60) for _ in range(3))))
    assert used == {"sdpa-flash"}
    assert sizes["float16"] == 2 * B * T * 64 * 4 * N


def test_a_mask_is_kept_in_the_dtype_of_q_with_padded_rows() -> None:
    def compute() -> torch.Tensor:
        mask = torch.empty(B, 1, T, T, dtype=torch.bool)
        return attention(*(heads(N, torch.bfloat16) for _ in range(3)), attn_mask=mask)

    sizes, used = kept(compute)
    assert used == {"sdpa-efficient"}
    assert sizes["bfloat16"] == 2 * B * T * H * 4 * N + 2 * B * T * 112  # 100 keys become 112
    assert sizes["float32"] == 4 * B * N * 128  # logsumexp, 100 queries become 128


def test_fp32_takes_the_efficient_kernel_and_grouped_fp32_none() -> None:
    sizes, used = kept(lambda: attention(*(heads(N, torch.float32) for _ in range(3)), is_causal=True))
    assert used == {"sdpa-efficient"}
    assert sizes["float32"] == 4 * B * T * H * 4 * N + 4 * B * N * 128

    def grouped() -> torch.Tensor:
        keys = heads(K, torch.float32), heads(K, torch.float32)
        return attention(heads(N, torch.float32), *keys, is_causal=True, enable_gqa=True)

    sizes, used = kept(grouped)
    assert used == {"sdpa-math"}
    assert sizes["float32"] >= 4 * B * N * T * T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_one_byte_an_element(dtype: torch.dtype) -> None:
    layer = torch.nn.Dropout(0.05)
    sizes, used = kept(lambda: layer(torch.empty(50, 30, dtype=dtype, requires_grad=True)))
    assert used == {"dropout-mask"}
    assert sizes == {"bool": 50 * 30}
    _, used = kept(lambda: layer.eval()(torch.empty(50, 30, requires_grad=True)))
    assert not used


def test_autocast_widens_layer_norm_and_softmax() -> None:
    def compute() -> torch.Tensor:
        x = torch.empty(10, 16, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.nn.functional.layer_norm(x, (16,), torch.empty(16, dtype=torch.bfloat16))
            assert y.dtype == torch.float32
            low = y.to(torch.bfloat16)
            assert torch.softmax(low, -1).dtype == low.sum(-1).dtype == (low**2).dtype == torch.float32
            assert (low * low).dtype == torch.nn.functional.silu(low).dtype == torch.bfloat16
        return torch.nn.functional.layer_norm(x, (16,))

    sizes, used = kept(compute)
    assert used == {"autocast-fp32"}
    assert sizes["float32"] >= 4 * 10 * 16


def test_the_names_are_those_that_this_torch_treats_apart() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    cuda, cpu = (
        {name.removeprefix("aten::").partition(".")[0] for name in registered(key)}
        for key in ("AutocastCUDA", "AutocastCPU")
    )
    assert cuda - cpu >= (UPCAST | FP32_RESULT)
    # What is left runs in low precision, promotes, or is no part of a transformer's step.
    left = {name for name in cuda - cpu - UPCAST - FP32_RESULT if not name.startswith(("_", "upsample", "cudnn"))}
    assert left == {
        *("addcdiv", "addcmul", "addmv", "addr", "atan2", "bilinear", "chain_matmul", "convolution", "cross", "dot"),
        *("einsum", "frobenius_norm", "gru_cell", "index_put", "linalg_matrix_norm", "linalg_multi_dot"),
        *("linalg_vector_norm", "lstm_cell", "mv", "norm", "nuclear_norm", "rnn_relu_cell", "rnn_tanh_cell"),
        *("scatter_add", "tensordot", "vdot"),
    }


def test_the_workspace_of_flash_backward_by_hand() -> None:
    with FakeTensorMode():
        query, key = heads(N, torch.bfloat16, 80), heads(K, torch.bfloat16, 80)
    func = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    rows = 4 * B * N * 128 + 4 * B * 128 * N * 96  # 100 queries become 128, heads of 80 become 96
    assert workspace_bytes(func, (query, query, key)) == rows + 2 * 2 * B * T * N * 80
    assert workspace_bytes(func, (query, query, query)) == rows
    assert workspace_bytes(torch.ops.aten.mm.default, (query, key)) == 0


def test_fused_linear_attention_is_refused_not_replaced(dummies: Callable[[str], Path]) -> None:
    config = json.loads((dummies("llama") / "config.json").read_text(encoding="utf-8"))
    request = request_for(config, TraceBatch((30,)), "levers.linear_attention=fla", device="gpu")
    with pytest.raises(UserError, match="fla cannot be traced"):
        trace_step(request)


def test_the_flash_package_is_named_as_a_stand_in(dummies: Callable[[str], Path]) -> None:
    config = json.loads((dummies("llama") / "config.json").read_text(encoding="utf-8"))
    sets = ("levers.attention=flash", "levers.precision=pure-bf16")
    trace = trace_step(request_for(config, TraceBatch((30,)), *sets, device="gpu"))
    assert trace.device == "gpu"
    assert set(trace.substitutions) == {"flash-as-sdpa", "sdpa-flash"} <= set(ROWS)


def test_every_row_names_its_source() -> None:
    assert all(name == row.name and row.source and row.verified for name, row in ROWS.items())
