"""One cell on the device: build it as training does, with random weights, and take a few steps.

Shares `memfit.build` with training and no code with the trace. On a GPU the figures are torch's own statistics and what
nvidia-smi shows; on a CPU (the rehearsal) there are none but the process's high-water mark.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy_gpu.cells import Cell, batch_of, facts_of, prepared_of
from benchmarks.accuracy_gpu.records import write_record
from memfit.build.arrange import arrange, autocast_dtype
from memfit.build.load import quiet_upstream, random_model
from memfit.inputs.cache import installed_versions
from memfit.planner.parts import resolve_parts
from memfit.specs.recipe import Recipe
from memfit.trace.batch import make_batch

WARM_STEPS, TIMED_STEPS = 2, 5
MIB = 1 << 20


def measure(cell: Cell, gpus: str, rehearse: bool, folder: Path) -> None:
    """Write `<id>.measured.json`. Out of memory is a result; any other error is written and raised."""
    device = torch.device("cpu" if rehearse else "cuda")
    record: dict[str, Any] = {
        "cell": {"id": cell.id},
        "device": _device(device),
        "versions": dict(installed_versions()),
    }
    meter = _Meter(device)
    try:
        prepared, recipe = prepared_of(cell, gpus, rehearse)
        record["cell"] = facts_of(cell, prepared)
        record |= {"result": "ran", **_run(cell, prepared, recipe, meter)}
    except torch.OutOfMemoryError as error:
        record |= {"result": "out of memory", "error": str(error).splitlines()[0]}
    except Exception as error:
        record |= {"result": "failed", "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        write_record(folder / f"{cell.id}.measured.json", record | meter.figures())


def _run(cell: Cell, prepared: Any, recipe: Recipe, meter: _Meter) -> dict[str, Any]:
    """Build, warm up, time, then one step phase by phase."""
    torch.manual_seed(0)
    quiet_upstream()
    start = time.monotonic()
    config, family = prepared.source.config, prepared.family
    with torch.device(meter.device):
        model = random_model(family, config, str(recipe.levers.attention))
    parts = resolve_parts(recipe, family, prepared.profile)
    arranged = arrange(model, recipe, parts, family)
    model = arranged.model.to(meter.device).train()
    built = time.monotonic() - start
    batch = {
        name: _filled(value, meter.device)
        for name, value in make_batch(family, config, batch_of(cell, prepared)).items()
    }
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, weight_decay=0.0, fused=meter.device.type == "cuda")
    step = _Step(model, arranged.loss, optimizer, autocast_dtype(recipe), meter)
    meter.phase("load")
    for _ in range(WARM_STEPS):
        step(batch)
    meter.wait()
    times = []
    for _ in range(TIMED_STEPS):
        begin = time.perf_counter()
        step(batch)
        meter.wait()
        times.append(time.perf_counter() - begin)
    meter.by_phase = True
    loss = step(batch)
    return {
        "build_seconds": built,
        "step_seconds": sorted(times)[len(times) // 2],
        "step_seconds_all": times,
        "loss": loss,
        "trainable": sum(parameter.numel() for parameter in learning),
        "checkpointed": dict(arranged.checkpointed),
    }


class _Step:
    """One training step as the training loop takes it: forward, loss, backward, clip, AdamW, gradients dropped."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None,
        meter: _Meter,
    ) -> None:
        self.model, self.loss, self.optimizer, self.autocast, self.meter = model, loss, optimizer, autocast, meter

    def __call__(self, batch: Mapping[str, Any]) -> float:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        casting = torch.autocast(self.meter.device.type, self.autocast) if self.autocast else nullcontext()
        self.meter.begin()
        with casting:
            outputs = self.model(**inputs)
            self.meter.phase("forward")
            loss = self.loss(outputs, labels)
        # Trainer.compute_loss hands the loss on alone: the logits die before backward.
        del outputs
        self.meter.phase("loss")
        loss.backward()
        self.meter.phase("backward")
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.phase("step")
        return float(loss.detach())


class _Meter:
    """Peaks of the device, whole and by phase. `by_phase` resets torch's peak at every phase: it costs the whole one,
    which is therefore kept beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.by_phase = device, False
        self.on_gpu = device.type == "cuda"
        self.phases: dict[str, int] = {}
        self.allocated = self.reserved = 0

    def begin(self) -> None:
        """A step begins."""
        if self.on_gpu and self.by_phase:
            self._keep()
            torch.cuda.reset_peak_memory_stats()

    def phase(self, name: str) -> None:
        """The phase `name` has ended."""
        if self.on_gpu and (self.by_phase or name == "load"):
            self.wait()
            self.phases[name] = torch.cuda.max_memory_allocated()
            self._keep()
            if self.by_phase:
                torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _keep(self) -> None:
        self.allocated = max(self.allocated, torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())

    def figures(self) -> dict[str, Any]:
        """What a record keeps; None where this device has no such figure."""
        gpu = None
        if self.on_gpu:
            self._keep()
            free, total = torch.cuda.mem_get_info()
            gpu = {
                "peak_allocated_bytes": self.allocated,
                "peak_reserved_bytes": self.reserved,
                "phases": self.phases,
                "process_bytes": _smi_bytes(),
                "device_used_bytes": total - free,
                "capacity_bytes": total,
                "retries": torch.cuda.memory_stats().get("num_alloc_retries"),
            }
        return {"gpu": gpu, "host": {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}


def _smi_bytes() -> int | None:
    """What nvidia-smi says of this process; None where it shows no process (as inside most containers)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    own = [int(used) for pid, used in rows if pid.strip() == str(os.getpid()) and used.strip().isdigit()]
    return own[0] * MIB if own else None


def _filled(value: Any, device: torch.device) -> Any:
    """A tensor of the batch on the device; pixels, which nobody has filled in, become noise."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.randn_like(value, device=device) if value.is_floating_point() else value.to(device)


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"kind": "cpu", "name": platform.processor() or platform.machine()}
    found = torch.cuda.get_device_properties(0)
    return {"kind": "gpu", "name": found.name, "compute": f"{found.major}.{found.minor}", "cuda": torch.version.cuda}
