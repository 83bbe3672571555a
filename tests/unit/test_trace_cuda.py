"""The rows in which a CUDA device differs: what each keeps, in which dtype, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.trace_against_profiler import request_for
from memfit.specs.trace import StepTrace, TraceBatch
from memfit.specs.workload import ImageCost
from memfit.trace.cuda import FP32_RESULT, ROWS, UPCAST, CudaKernels, workspace_bytes
from memfit.trace.delta import _GatedDeltaRule
from memfit.trace.step import trace_step

aten = torch.ops.aten
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
        *("lstm_cell", "mv", "norm", "nuclear_norm", "rnn_relu_cell", "rnn_tanh_cell"),
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


def flash_config(**more: Any) -> dict[str, Any]:
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return {"model_type": "llama", **text, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, **more}


def attention_bytes(trace: StepTrace) -> dict[str, list[int]]:
    """Bytes of what the flash kernel makes and does not free before backward, by phase."""
    return {
        phase: [e.bytes for e in trace.events if e.kind == "alloc" and e.phase == phase and "_flash_attention" in e.op]
        for phase in ("forward", "backward")
    }


FLASH = ("levers.attention=flash", "levers.precision=pure-bf16")


def test_the_flash_package_keeps_what_sdpa_flash_keeps_of_whole_rows() -> None:
    package, sdpa = (
        trace_step(request_for(flash_config(), TraceBatch((90,)), *sets, device="gpu"))
        for sets in (FLASH, ("levers.precision=pure-bf16",))
    )
    assert set(package.substitutions) == {"flash-package"} <= set(ROWS)
    assert package.saved_bytes == sdpa.saved_bytes
    assert package.flops == sdpa.flops
    out, sums = 2 * 90 * 64, 4 * 4 * 90
    assert attention_bytes(package)["forward"][:2] == [out, sums]


def test_the_flash_package_leaves_padding_out_of_attention() -> None:
    """No mask is made, grouped heads stay grouped, and what the kernel keeps has real tokens only."""
    batch = TraceBatch((90, 50))
    trace = trace_step(request_for(flash_config(), batch, *FLASH, device="gpu"))
    real = 90 + 50
    assert attention_bytes(trace)["forward"][:2] == [2 * real * 64, 4 * 4 * real]
    assert sorted(attention_bytes(trace)["backward"])[-3:].count(2 * real * 64) == 1  # dq; k and v have half the heads
    # q, k and v without padding are copies, kept beside nothing else: the padded ones are dropped.
    copies = [
        e.bytes for e in trace.events if e.kind == "alloc" and e.phase == "forward" and e.op == "aten::index_select"
    ]
    assert copies == [2 * real * 64, 2 * real * 32, 2 * real * 32]


def test_packed_rows_and_windows_are_one_call_with_bounds() -> None:
    packed = trace_step(request_for(flash_config(), TraceBatch((90, 50)), *FLASH, "levers.packing=true", device="gpu"))
    assert attention_bytes(packed)["forward"][:2] == [2 * 140 * 64, 4 * 4 * 140]
    # Only pairs inside a sample are counted: 4 x heads x size x (90^2 + 50^2) forward.
    padded = trace_step(request_for(flash_config(), TraceBatch((90, 50)), *FLASH, device="gpu"))
    dense = sum(row.flops for row in padded.flops if row.phase == "forward" and row.part == "language")
    tight = sum(row.flops for row in packed.flops if row.phase == "forward" and row.part == "language")
    matrices = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 64)
    assert tight == 4 * 64 * (90 * 90 + 50 * 50) + 140 * matrices
    assert dense == tight + 40 * matrices


def test_windows_of_a_tower_go_in_one_call(dummies: Callable[[str], Path]) -> None:
    config = json.loads((dummies("qwen2_5_vl") / "config.json").read_text(encoding="utf-8"))
    batch = TraceBatch((200,), ((ImageCost(((16, 20),), (80,)),),))
    one, many = (
        trace_step(request_for(config, batch, f"levers.attention={name}", "levers.precision=pure-bf16", device="gpu"))
        for name in ("flash", "sdpa")
    )

    def calls(trace: StepTrace) -> int:
        """Calls in the tower: each makes one fp32 tensor of row sums."""
        return len(
            {
                e.storage
                for e in trace.events
                if "flash_attention" in e.op and ".attn" in e.path and e.phase == "forward"
            }
        )

    depth = config["vision_config"]["depth"]
    assert calls(one) < calls(many)
    heads, patches = config["vision_config"]["num_heads"], 16 * 20
    sums = [e.bytes for e in one.events if e.bytes == 4 * heads * patches and "_flash_attention_forward" in e.op]
    assert len(sums) == depth


def test_the_workspace_of_the_package_by_hand() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(140, 4, 80, dtype=torch.bfloat16)
        key = torch.empty(140, 2, 80, dtype=torch.bfloat16)
        dense = torch.empty(2, 100, 4, 80, dtype=torch.bfloat16)
    func = torch.ops.aten._flash_attention_backward.default
    starts = torch.tensor([0, 90, 140], dtype=torch.int32)
    rows = 140 + 2 * 128  # 128 more for each sequence; heads of 80 become 96
    assert workspace_bytes(func, (query, query, key, key, query, query, starts)) == (
        4 * rows * 4 + 4 * rows * 4 * 96 + 2 * 2 * 140 * 4 * 80
    )
    rows = 2 * 128  # 100 become 128
    assert workspace_bytes(func, (dense, dense, dense, dense, dense, dense, None)) == 4 * rows * 4 + 4 * rows * 4 * 96


def test_a_mask_expands_grouped_keys_and_values() -> None:
    """transformers.integrations.sdpa_attention:use_gqa_in_sdpa: with padding every query head gets its own copy."""
    alone, padded = (
        trace_step(request_for(flash_config(), TraceBatch(rows), "levers.precision=pure-bf16", device="gpu"))
        for rows in ((128, 128), (128, 127))
    )
    assert (alone.substitutions, padded.substitutions) == (("sdpa-flash",), ("sdpa-efficient",))

    def kept(trace: StepTrace) -> int:
        return sum(row.bytes for row in trace.saved if row.block == 0)

    tokens = 2 * 128
    # k after rope and v: from 2 heads to 4; row sums need no padding here.
    expanded = 2 * 2 * tokens * (64 - 32)
    spread = kept(padded) - kept(alone) - expanded
    # The block's own mask in the dtype of q; the two kernels' seeds differ by a few bytes.
    assert abs(spread - 2 * 2 * 128 * 128) <= 32


def test_dora_takes_norms_in_fp32_under_autocast() -> None:
    """PEFT's DoraLinearLayer.get_weight_norm: torch.linalg.norm of a 16-bit weight; CUDA's autocast widens it."""
    sets = (
        "method=lora",
        "lora.variant=dora",
        "levers.precision=bf16-amp",
        "lora.dtype=bf16",
        "lora.targets=[down_proj]",
    )
    trace = trace_step(request_for(flash_config(intermediate_size=320), TraceBatch((30,)), *sets, device="gpu"))
    wide = [e for e in trace.events if e.kind == "alloc" and e.bytes == 4 * 64 * 320 and "down_proj" in e.path]
    assert "aten::_to_copy" in {event.op for event in wide}
    assert {event.phase for event in wide} >= {"forward"}
    assert "autocast-fp32" in trace.substitutions


def test_the_gated_delta_rule_keeps_its_inputs_and_the_solved_matrix() -> None:
    """By hand, for 2 key heads of 16, 4 value heads of 8 and 100 tokens: 2 chunks."""
    tokens, keys, values, k, v = 100, 2, 4, 16, 8
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(1, tokens, *shape, dtype=dtype, requires_grad=True)

    made: list[int] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (
                aten.empty.memory_format,
                aten.empty_like.default,
                aten.new_empty.default,
                aten.new_zeros.default,
            ):
                made.append(out.untyped_storage().nbytes())
            return out

    with FakeTensorMode():
        inputs = (make(keys, k), make(keys, k), make(values, v), make(values, dtype=torch.float32), make(values))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = _GatedDeltaRule.apply(*inputs)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
        q_and_k = 2 * (2 * tokens * keys * k + 4 * tokens * keys)
        v_g_beta = 2 * tokens * values * v + 4 * tokens * values + 2 * tokens * values
        assert kept == q_and_k + v_g_beta + 2 * tokens * values * 64
        assert out.shape == inputs[2].shape
        with Made():
            torch.autograd.grad(out, inputs, torch.empty_like(out))
    wide, deep, states = 2 * tokens * values * k, 2 * tokens * values * v, 2 * 2 * values * k * v
    gates, key_like = 4 * tokens * values, 2 * tokens * keys * k
    # w u h v_new | dv dh dv | dq dk dg dw | dk2 dv dg2 db | dg | dq dk of the norms
    expected = [wide, deep, states, deep, deep, states, deep, wide, wide, gates, wide]
    expected += [wide, deep, gates, 2 * tokens * values, gates, key_like, key_like]
    assert made[1:] == expected  # the first is the incoming gradient


def test_fla_takes_the_place_of_every_linear_attention_layer(dummies: Callable[[str], Path]) -> None:
    config = json.loads((dummies("minicpmv4_6") / "config.json").read_text(encoding="utf-8"))
    for checkpointing in ("none", "full"):
        sets = ("levers.precision=pure-bf16", f"levers.checkpointing={checkpointing}")
        reference, fla = (
            trace_step(request_for(config, TraceBatch((300,)), *sets, f"levers.linear_attention={name}", device="gpu"))
            for name in ("reference", "fla")
        )
        assert "fla-delta-rule" in fla.substitutions
        assert fla.peak("backward").bytes < reference.peak("backward").bytes
        assert fla.gradients == reference.gradients
    assert fla.saved_bytes == reference.saved_bytes  # checkpointed: inputs of layers, whatever runs inside


def test_every_row_names_its_source() -> None:
    assert all(name == row.name and row.source and row.verified for name, row in ROWS.items())
