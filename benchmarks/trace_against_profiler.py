"""Compare traced steps with real ones on the CPU: what is kept for backward, and the peak of every phase.

The real step runs the real model; its allocations are read from torch.profiler's memory records, and what autograd
saves from torch.autograd.graph.saved_tensors_hooks. Nothing here uses the tracker or fake tensors.

    python -m benchmarks.trace_against_profiler            # a table over families and levers, each above 64 MB
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from memfit.build.arrange import Arranged, arrange, autocast_dtype
from memfit.build.load import random_model
from memfit.catalog.gpus import parse_hardware
from memfit.families import family_for
from memfit.inputs.recipe_file import load_recipe
from memfit.planner.defaults import resolve
from memfit.planner.parts import resolve_parts
from memfit.specs.trace import StepTrace, TraceBatch
from memfit.specs.workload import ImageCost
from memfit.trace.batch import make_batch
from memfit.trace.model import attention_name
from memfit.trace.parameters import read_profile
from memfit.trace.step import TraceRequest, trace_step

PHASES = ("forward", "loss", "backward")
QUICK = {
    "levers.precision": "fp32",
    "levers.checkpointing": "none",
    "levers.micro_batch": "1",
    "lora.rank": "8",
    "lora.dropout": "0",
}
LEVERS: dict[str, tuple[str, ...]] = {
    "full": (),
    "checkpointed": ("levers.checkpointing=full",),
    "every second": ("levers.checkpointing=every-2",),
    "frozen vision": ("parts.vision=frozen",),
    "lora, dropout": ("method=lora", "lora.dropout=0.05"),
    "lora, amp": ("method=lora", "levers.precision=bf16-amp"),
    "pure bf16": ("levers.precision=pure-bf16",),
    "amp, checkpointed": ("levers.precision=bf16-amp", "levers.checkpointing=full"),
    "eager": ("levers.attention=eager",),
    "selective": ("levers.checkpointing=selective",),
    "selective, lora, amp": ("levers.checkpointing=selective", "method=lora", "levers.precision=bf16-amp"),
    "vision only": ("levers.checkpointing={vision: full, language: none}",),
    "each its own": ("levers.checkpointing={vision: every-2, language: selective}",),
    "offloaded": ("levers.checkpointing=full", "levers.activation_offload=true"),
    "offloaded, selective": ("levers.checkpointing=selective", "levers.activation_offload=true"),
    "packed": ("levers.packing=true",),
    "packed, eager, checkpointed": ("levers.packing=true", "levers.attention=eager", "levers.checkpointing=full"),
    "chunked": ("levers.loss=chunked",),
    "chunked, amp, checkpointed": ("levers.loss=chunked", "levers.precision=bf16-amp", "levers.checkpointing=full"),
}


def request_for(
    config: Mapping[str, Any], batch: TraceBatch, *sets: str, device: Any = "cpu", accumulated: bool = False
) -> TraceRequest:
    """A request on `config` with the quick defaults, changed by `sets` ("levers.precision=pure-bf16")."""
    family, gpus = family_for(dict(config)), "1xcpu" if device == "cpu" else "1xA100-80G"
    values = QUICK | {"hardware.gpus": gpus} | dict(item.split("=", 1) for item in sets)
    recipe = load_recipe(None, [f"{key}={value}" for key, value in values.items()], model="model")
    profile_ = read_profile(config, family)
    effective, _ = resolve(recipe, parse_hardware(gpus, None, None), family, profile_, None)
    parts = resolve_parts(effective, family, profile_)
    return TraceRequest(family, config, effective, parts, batch, device, accumulated)


@dataclass(frozen=True)
class Measured:
    """Bytes beside weights and inputs: held when backward begins, saved by hooks, and the peak of each phase."""

    held: int
    hooked: int
    peaks: Mapping[str, int]


def measure(request: TraceRequest) -> Measured:
    """Run the real step twice on the CPU: once under hooks (which also warms up), once under the profiler."""
    real, batch = _real_model(request), _real_batch(request)
    hooked = _hooked_bytes(request, real, batch)
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        _step(request, real, batch, record_function)
    real.model.zero_grad(set_to_none=True)
    return _read(records, hooked)


def _real_model(request: TraceRequest) -> Arranged:
    """The model of `build`, with random weights instead of a checkpoint."""
    model = random_model(request.family, request.config, attention_name(request.recipe))
    arranged = arrange(model, request.recipe, request.parts, request.family)
    arranged.model.train()
    return arranged


def _real_batch(request: TraceRequest) -> dict[str, Any]:
    batch = make_batch(request.family, request.config, request.batch, request.recipe.levers.packing)
    return {
        name: torch.rand_like(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _forward(request: TraceRequest, model: nn.Module) -> Callable[..., Any]:
    dtype = autocast_dtype(request.recipe)
    if dtype is None:
        return model
    from accelerate.utils.operations import convert_outputs_to_fp32

    def forward(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return model(**inputs)

    return convert_outputs_to_fp32(forward)


def _step(request: TraceRequest, real: Arranged, batch: Mapping[str, Any], mark: Any) -> None:
    inputs = dict(batch)
    labels = inputs.pop("labels")
    with mark("forward#"):
        outputs = _forward(request, real.model)(**inputs)
    with mark("loss#"):
        loss = real.loss(outputs, labels)
        del outputs
    with mark("backward#"):
        loss.backward()


def _hooked_bytes(request: TraceRequest, real: Arranged, batch: Mapping[str, Any]) -> int:
    """Bytes of the unique storages that autograd saves, those of weights, buffers and inputs excepted."""
    known = {t.untyped_storage()._cdata for t in (*real.model.parameters(), *real.model.buffers())}
    known |= {value.untyped_storage()._cdata for value in batch.values() if isinstance(value, torch.Tensor)}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place in memory
        return tensor

    inputs = dict(batch)
    labels = inputs.pop("labels")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real.loss(_forward(request, real.model)(**inputs), labels)
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    real.model.zero_grad(set_to_none=True)
    return size


def _read(records: Any, hooked: int) -> Measured:
    """Add up the profiler's allocations (+) and frees (-) in the order of time."""
    allocations: list[tuple[int, int]] = []
    spans: dict[str, tuple[int, int]] = {}
    waiting = list(records.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
        if event.name.endswith("#"):
            spans[event.name[:-1]] = (event.start_time_ns, event.end_time_ns)
    now, held, peaks = 0, 0, dict.fromkeys(PHASES, 0)
    for time, size in sorted(allocations):
        now += size
        if time <= spans["loss"][1]:
            held = now
        for phase, (start, end) in spans.items():
            if start <= time <= end:
                peaks[phase] = max(peaks[phase], now)
    return Measured(held, hooked, peaks)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def traced_peak(trace: StepTrace, phase: str) -> int:
    """The traced peak as the profiler sees it: the batch was allocated before it looked."""
    row = trace.peak(phase)
    return row.bytes - row.inputs


def cases() -> Iterator[tuple[str, dict[str, Any], TraceBatch]]:
    """(name, config, batch) of models small enough for the CPU that move more than 64 MB."""
    text = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8000}
    yield "llama", {"model_type": "llama", **text}, TraceBatch((512,))
    yield "llama padded", {"model_type": "llama", **text}, TraceBatch((512, 300))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision = {"depth": 4, "hidden_size": 320, "intermediate_size": 854, "num_heads": 4, "out_hidden_size": 512}
    qwen = {
        "model_type": "qwen2_5_vl",
        "text_config": text | {"rope_parameters": rope},
        "vision_config": vision | {"fullatt_block_indexes": [3]},
        "image_token_id": 5,
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
    }
    yield "qwen2_5_vl", qwen, TraceBatch((512,), ((ImageCost(((32, 44),), (352,)),),))
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    linear = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    linear |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    minicpm = {
        "model_type": "minicpmv4_6",
        "text_config": {"model_type": "qwen3_5_text", **text, **linear, "layer_types": kinds},
        "vision_config": {"hidden_size": 288, "intermediate_size": 1024, "num_hidden_layers": 4}
        | {"num_attention_heads": 4, "image_size": 448, "patch_size": 14},
        "insert_layer_id": 1,
        "tie_word_embeddings": True,
        "image_token_id": 5,
    }
    crops = ImageCost(((32, 32),) * 3, (64,) * 3, (1, 2))
    yield "minicpmv4_6", minicpm, TraceBatch((512,), ((crops,),))


def main() -> None:
    """Print one line a case; exit 1 when a figure is more than 2% off."""
    torch.set_num_threads(1)
    worst = 0.0
    for name, config, batch in cases():
        for lever, sets in LEVERS.items():
            if "vision_config" not in config and any("vision" in item for item in sets):
                continue
            if "levers.packing=true" in sets and len(batch.rows) == 1:
                continue
            request = request_for(config, batch, *sets)
            trace, real = trace_step(request), measure(request)
            off = {"held": trace.saved_bytes / real.held - 1}
            off |= {phase: traced_peak(trace, phase) / real.peaks[phase] - 1 for phase in PHASES}
            worst = max(worst, *map(abs, off.values()))
            figures = "  ".join(f"{key} {value:+.3%}" for key, value in off.items())
            print(f"{name:14s} {lever:18s} held {real.held / 2**20:8.2f} MiB  {figures}", flush=True)
    print(f"worst {worst:.3%}")
    sys.exit(worst > 0.02)


if __name__ == "__main__":
    main()
