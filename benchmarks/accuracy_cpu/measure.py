"""Measure one cell: build it, run its steps, read off what the last allocated. One fresh process a rank.

python -m benchmarks.accuracy_cpu.measure c07 --work FOLDER --out FILE [--rank 0]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy_cpu.engines import Engine, deepspeed_values, make_engine, start_group
from benchmarks.accuracy_cpu.events import Known, Profiler, Snapshot, Watch, read_course
from benchmarks.accuracy_cpu.grid import Cell, read_cells
from benchmarks.accuracy_cpu.recorder import Recorder
from benchmarks.accuracy_cpu.runs import prepared_of, samples_of
from memfit.build.build import Built, Materials, build
from memfit.build.data import SampleDataset
from memfit.inputs.model_source import require_weights

STEPS = 2  # the first makes the optimizer's states; the second is what every later step is
STEPS_DDP = 3  # its reducer makes its buckets anew when the second step begins


def measure(cell: Cell, work: Path, rank: int = 0, watch: Watch | None = None) -> dict[str, Any]:
    """The figures of one rank, in bytes. Raises UserError where memfit refuses to build the cell."""
    watch = watch or Profiler()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if cell.ranks > 1:
        start_group(rank, cell.ranks, work / f"{cell.id}.meeting")
    # transformers reads weights in threads, whose frees the profiler does not see: weights are counted as tensors.
    built = _built(cell, work)
    rows = SampleDataset(samples_of(cell, work), built.encoder, built.pixels)
    batch = built.collator([rows[place] for place in range(len(rows))])
    values = deepspeed_values(cell) if cell.parallel.startswith("zero") else {}
    with _no_collection(), watch:
        engine = make_engine(cell, built.model, built.autocast, values)
        _mark_gradients(built, watch)
        for _ in range(STEPS_DDP if cell.parallel == "ddp" else STEPS):
            gc.collect()
            before = _snapshot(engine, built, batch)
            with watch.mark("before"):
                pass
            gathered, gradients = _step(engine, built, batch, watch)
    memory, marks = watch.read()
    known = Known(before, gathered, gradients, _bucket(values, built))
    course = read_course(memory, marks, known)
    return {
        **dataclasses.asdict(course),
        "tensors": _by_role(before),
        "gradient_tensors": sum(size for _, size in gradients.roles.values()),
        "tokens": [int(batch["input_ids"].shape[0]), int(batch["input_ids"].shape[1])],
    }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Cyclic garbage would be freed at moments of its own."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _bucket(values: dict[str, Any], built: Built) -> int:
    """Bytes of DeepSpeed's reduce bucket, 0 without one."""
    zero = values.get("zero_optimization", {})
    width = next(p.element_size() for p in built.model.parameters() if p.requires_grad)
    return int(zero.get("reduce_bucket_size", 0)) * width


def _built(cell: Cell, work: Path) -> Built:
    """What memfit's build makes of the cell. The engines are this benchmark's own, so build sees one process."""
    engine_only = cell.precision.endswith("-mixed")
    alone = dataclasses.replace(
        cell,
        parallel="none",
        offload="none",
        ranks=1,
        reduce_bucket=0,
        # 16-bit weights and fp32 copies that the engine makes: to build, it is pure-bf16.
        precision="pure-bf16" if engine_only else cell.precision,
        # memfit's build gives adapters the engine's dtype; ZeRO in fp32 would leave 16-bit ones as they are.
        lora_dtype="fp32" if cell.parallel.startswith("zero") and cell.precision == "fp32" else cell.lora_dtype,
    )
    prepared = prepared_of(alone, work)
    built = build(prepared.plan(), Materials(require_weights(prepared.source), prepared.family, prepared.profile))
    built.model.train()
    return built


def _step(engine: Engine, built: Built, batch: Mapping[str, Any], watch: Watch) -> tuple[Snapshot, Snapshot]:
    """One step as Trainer takes it: labels aside, outputs dropped before backward.

    Returns what is gathered when backward begins, and the gradients when it has ended.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    trained = (labels[:, 1:] != -100).sum()
    with watch.mark("forward"):
        outputs = engine.forward(**inputs)
    with watch.mark("loss"):
        loss = built.loss(outputs, labels, trained)
        del outputs
    gathered = Snapshot({address: ("transient", size) for address, size in _storages(engine.gathered())})
    with watch.mark("backward"):
        engine.backward(loss)
    gradients = _of_roles(engine.states(), ("gradients",))
    with watch.mark("step"):
        engine.step()
    return gathered, gradients


def _mark_gradients(built: Built, watch: Watch) -> None:
    """A mark whenever a gradient is there, with its address."""

    def arrived(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            local = getattr(parameter.grad, "_local_tensor", parameter.grad)
            with watch.mark(f"grad:{local.untyped_storage().data_ptr()}"):
                pass

    for parameter in built.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)


def _snapshot(engine: Engine, built: Built, batch: Mapping[str, Any]) -> Snapshot:
    states = engine.states()
    found = dict(_of_roles(states, tuple(states)).roles)
    for role, tensors in (("buffers", built.model.buffers()), ("batch", batch.values())):
        for address, size in _storages(tensors):
            found.setdefault(address, (role, size))
    return Snapshot(found)


def _of_roles(states: Mapping[str, list[torch.Tensor]], roles: Iterable[str]) -> Snapshot:
    """Storages by address; one that has several roles counts in the first."""
    found: dict[int, tuple[str, int]] = {}
    for role in roles:
        for address, size in _storages(states[role]):
            found.setdefault(address, (role, size))
    return Snapshot(found)


def _storages(tensors: Iterable[Any]) -> Iterable[tuple[int, int]]:
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                yield storage.data_ptr(), storage.nbytes()


def _by_role(snapshot: Snapshot) -> dict[str, int]:
    found: dict[str, int] = {}
    for role, size in snapshot.roles.values():
        found[role] = found.get(role, 0) + size
    return found


def main() -> None:
    """Write one rank's figures to --out as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cell")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--records", type=Path, help="the file of recorder.py; without it torch.profiler watches")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cell = read_cells()[options.cell]
    watch = Recorder(options.records) if options.records else None
    figures = measure(cell, options.work, options.rank, watch)
    options.out.write_text(json.dumps(figures), encoding="utf-8")
    # The process group's and DeepSpeed's exit handlers have nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main()
