"""Host memory and disk of one node: processes, loading, batches on their way, saving, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memfit.catalog.process import PROCESS, WORKER
from memfit.physics.memory import ALWAYS, FROM_FIRST_STEP, numel
from memfit.physics.pinned import pinned_bytes
from memfit.planner.counting import Counting, roles_of
from memfit.planner.engine_terms import pinned_total
from memfit.planner.parts import PartGroup, shapes
from memfit.specs.ledger import Ledger, Place, Term
from memfit.specs.plan import NodeFigures
from memfit.specs.recipe import WorkloadKeys
from memfit.specs.trace import StepTrace
from memfit.units import DTYPE_BYTES

# Part of the terms that are a process's own and no states; the first piece of their ids.
PROCESS_PART = "host"
LOADER = "torch.utils.data:DataLoader(num_workers, prefetch_factor, pin_memory)"
SAVE = "memfit.engine.save:save_weights; safetensors writes tensors that are in host memory"


def host_terms(counting: Counting, trace: StepTrace) -> list[Term]:
    """The terms of the fullest node that are no states, and the bytes of one checkpoint."""
    made = [*_processes(counting), *_loading(counting), *_batches(counting, trace), *_saving(counting)]
    made += _offloaded(counting, trace)
    return [term for term in made if term.bytes]


def node_figures(counting: Counting, ledger: Ledger) -> NodeFigures:
    """The sums of a whole ledger for the fullest node."""
    batches = sum(term.bytes for term in ledger.terms if term.id in ("host.pinned_batches", "host.pinned_activations"))
    written = sum(term.bytes for term in ledger.terms if term.id.startswith("disk.checkpoint."))
    return NodeFigures(
        peak_bytes=max(ledger.phase_bytes("host").values()),
        pinned_bytes=batches + pinned_total(counting, ledger.terms),
        checkpoint_bytes=written,
        nvme_bytes=sum(term.bytes for term in ledger.at("disk")) - written,
    )


@dataclass(frozen=True)
class _Words:
    """What is said of a term: its name, the sum with its numbers, and the source."""

    name: str
    formula: str
    source: str


def _term(name_id: str, alive: Sequence[str], size: int, words: _Words) -> Term:
    place: Place = "disk" if name_id.startswith("disk.") else "host"
    return Term(name_id, words.name, PROCESS_PART, place, tuple(alive), size, words.source, words.formula)


def _processes(counting: Counting) -> Iterator[Term]:
    ranks = counting.hardware.gpus_per_node
    size, source = PROCESS
    yield _term(
        "host.process",
        ALWAYS,
        ranks * size,
        _Words("interpreter and libraries", f"{size:,} B x {ranks} processes", source),
    )


def _loading(counting: Counting) -> Iterator[Term]:
    """Every rank reads the whole checkpoint into host memory, then moves it; on CPU ranks the weights stay there."""
    if counting.hardware.gpu is None:
        return
    stored = sum(
        row.numel * int(DTYPE_BYTES.get(row.dtype, 4))
        for group in counting.groups
        for rows in (group.learning, group.frozen, group.quantised, group.idle)
        for row in rows
    )
    trained = 0
    for group in counting.groups:
        trained += sum(numel(shapes(rows)) * counting.width(role) for role, rows in roles_of(group))
        trained += _unpacked(counting, group)
    size, ranks = max(stored, trained), counting.hardware.gpus_per_node
    yield _term(
        "host.load",
        ("load",),
        size * ranks,
        _Words(
            "the model before it moves to the GPU",
            f"max({stored:,} B as stored, {trained:,} B as trained) x {ranks} ranks",
            "memfit.build.load:loaded_model loads on the CPU, one copy a rank, then the model moves",
        ),
    )


def _batches(counting: Counting, trace: StepTrace) -> Iterator[Term]:
    loader, ranks = counting.recipe.loader, counting.hardware.gpus_per_node
    workers = loader.workers if isinstance(loader.workers, int) else 0
    ahead = workers * loader.prefetch
    batch, decoded = trace.inputs, _decoded(counting)
    if workers:
        size, source = WORKER
        yield _term(
            "host.workers",
            ALWAYS,
            ranks * workers * size,
            _Words("data-loader workers", f"{size:,} B x {workers} workers x {ranks} ranks", source),
        )
        yield _term(
            "host.prefetched",
            FROM_FIRST_STEP,
            ranks * ahead * batch,
            _Words(
                "batches that the workers have ready",
                f"{batch:,} B x {workers} workers x {loader.prefetch} ahead x {ranks} ranks",
                LOADER,
            ),
        )
    makers = max(1, workers)
    yield _term(
        "host.decoded",
        FROM_FIRST_STEP,
        ranks * makers * (decoded + batch),
        _Words(
            "pictures being decoded and the float tensors made of them",
            f"({decoded:,} B of pictures + {batch:,} B of tensors) x {makers} x {ranks} ranks",
            "PIL decodes to 3 bytes a pixel; the collator joins float tensors into the batch",
        ),
    )
    pins = counting.hardware.gpu is not None and loader.pin is not False
    if pins:
        held = max(1, ahead)
        size = int(pinned_bytes(batch))
        yield _term(
            "host.pinned_batches",
            FROM_FIRST_STEP,
            ranks * held * size,
            _Words(
                "page-locked batches on their way to the GPU",
                f"{batch:,} B, page-locked {size:,} B, x {held} x {ranks} ranks",
                f"{LOADER}; ATen/core/CachingHostAllocator.h: sizes become powers of two",
            ),
        )


def _offloaded(counting: Counting, trace: StepTrace) -> Iterator[Term]:
    """Inputs of checkpointed layers that wait in host memory; torch keeps page-locked memory once it has it."""
    ranks = counting.hardware.gpus_per_node
    yield _term(
        "host.pinned_activations",
        FROM_FIRST_STEP,
        ranks * trace.pinned,
        _Words(
            "inputs of checkpointed layers, page-locked",
            f"{trace.pinned:,} B, every tensor rounded up to a power of two, x {ranks} ranks",
            "memfit.physics.pinned over the trace; torch.autograd.graph:save_on_cpu(pin_memory=True)",
        ),
    )


def _decoded(counting: Counting) -> int:
    """Bytes of one sample's decoded pictures where the recipe says how large they are; else those of none."""
    keys = counting.recipe.workload
    if not isinstance(keys, WorkloadKeys) or not keys.image_size:
        return 0
    width, height = map(int, keys.image_size.split("x"))
    images = 1 if keys.images is None else keys.images
    return 3 * width * height * images


def _unpacked(counting: Counting, group: PartGroup) -> int:
    """Bytes of what does not learn in a part, before anything is packed."""
    frozen = numel(shapes(group.frozen)) * counting.frozen_width
    frozen += numel(shapes(group.quantised)) * int(DTYPE_BYTES[counting.precision.frozen])
    return frozen + numel(shapes(group.idle)) * counting.idle_width


def _saving(counting: Counting) -> Iterator[Term]:
    """Rank 0 holds what it writes: the whole model, or adapters and what is trained beside them."""
    adapted = any(group.adapters for group in counting.groups)
    learning = sum(
        numel(shapes(rows)) * counting.width(role) for group in counting.groups for role, rows in roles_of(group)
    )
    frozen = sum(_unpacked(counting, group) for group in counting.groups)
    weights = learning if adapted else learning + frozen
    what = "adapters and trained parts" if adapted else "all weights"
    if counting.hardware.gpu is not None:
        yield _term("host.save", ("save",), weights, _Words(f"{what} in host memory of rank 0", f"{weights:,} B", SAVE))
    yield _term(
        "disk.checkpoint.weights", ("save",), weights, _Words(f"one checkpoint: {what}", f"{weights:,} B", SAVE)
    )
    steps = sum(
        size
        for group in counting.groups
        for role, rows in roles_of(group)
        for size in counting.whole_optimizer(role, rows)
    )
    yield _term(
        "disk.checkpoint.optimizer",
        ("save",),
        steps,
        _Words(
            "one checkpoint: optimizer states and master weights of all ranks",
            f"{steps:,} B",
            f"transformers.Trainer._save_optimizer_and_scheduler; {counting.optimizer.source}",
        ),
    )
