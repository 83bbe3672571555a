"""Host memory and disk of one node: processes, loading, batches on their way, saving, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memfit.catalog.precisions import ZERO
from memfit.catalog.process import CUDA, DEEPSPEED, LAUNCHER, LIBRARIES, PROCESS, WORKER
from memfit.physics.loader import BATCH_COPIES, SAMPLE_COPIES, making_bytes
from memfit.physics.memory import ALWAYS, FROM_FIRST_STEP, numel
from memfit.physics.pinned import pinned_bytes
from memfit.planner.counting import Counting, roles_of
from memfit.planner.engine_terms import pinned_total
from memfit.planner.interval import interval_of
from memfit.planner.parts import PartGroup, shapes
from memfit.specs.ledger import Ledger, Place, Term
from memfit.specs.plan import NodeFigures
from memfit.specs.trace import StepTrace
from memfit.specs.workload import LoaderLoad
from memfit.units import DTYPE_BYTES

# Part of the terms that are a process's own and no states; the first piece of their ids.
PROCESS_PART = "host"
LOADER = "torch.utils.data:DataLoader(num_workers, prefetch_factor, pin_memory)"
SAVE = "memfit.engine.save:save_weights; safetensors writes tensors that are in host memory"


def host_terms(counting: Counting, trace: StepTrace, load: LoaderLoad | None = None) -> list[Term]:
    """The terms of the fullest node that are no states, and the bytes of one checkpoint."""
    made = [
        *_processes(counting),
        *_loading(counting),
        *_batches(counting, load or LoaderLoad(0, trace.inputs, trace.inputs)),
        *_saving(counting),
    ]
    made += _offloaded(counting, trace)
    return [term for term in made if term.bytes]


def node_figures(counting: Counting, ledger: Ledger) -> NodeFigures:
    """The sums of a whole ledger for the fullest node."""
    sizes = ledger.phase_bytes("host")
    # Among equals the step, where everything that trains is alive.
    peak = max(sizes, key=lambda name: (sizes[name], name == "step"))
    alive = [term for term in ledger.at("host") if peak in term.alive]
    batches = sum(term.bytes for term in ledger.terms if term.id in ("host.pinned_batches", "host.pinned_activations"))
    written = sum(term.bytes for term in ledger.terms if term.id.startswith("disk.checkpoint."))
    return NodeFigures(
        peak_bytes=sizes[peak],
        peak_phase=peak,
        high_bytes=interval_of(alive, here=counting.hardware.gpu is None).high_bytes,
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
    on_gpu, alone = counting.hardware.gpu is not None, counting.layout.name == "none"
    each = [("host.process", "interpreter and libraries", PROCESS, True)]
    each.append(("host.deepspeed", "DeepSpeed's engine and operators", DEEPSPEED, counting.layout.name in ZERO))
    each.append(("host.cuda", "CUDA's driver and libraries", CUDA, on_gpu))
    for name_id, name, (size, source), counts in each:
        if counts:
            words = _Words(name, f"{size:,} B x {ranks} process{'es' if ranks > 1 else ''}", source)
            yield _term(name_id, ALWAYS, ranks * size, words)
    once = [("host.libraries", "pages of libraries that all processes share", LIBRARIES, True)]
    once.append(("host.launcher", "the command that started the ranks", LAUNCHER, not alone))
    for name_id, name, (size, source), counts in once:
        if counts:
            yield _term(name_id, ALWAYS, size, _Words(name, f"{size:,} B once a node", source))


def _loading(counting: Counting) -> Iterator[Term]:
    """One rank of the node reads the checkpoint into host memory and moves it; the others get theirs from its device,
    or take their turn after it. On CPU ranks the weights stay there."""
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
    yield _term(
        "host.load",
        ("load",),
        max(stored, trained),
        _Words(
            "the model before it moves to the GPU",
            f"max({stored:,} B as stored, {trained:,} B as trained) x 1 copy",
            "memfit.build.shell; transformers.integrations.deepspeed:_load_state_dict_into_zero3_model"
            if counting.layout.name != "none"
            else "memfit.build.load:loaded_model loads on the CPU, then the model moves",
        ),
    )


def _batches(counting: Counting, load: LoaderLoad) -> Iterator[Term]:
    """The loader's processes and batches; upper bounds, because one too low kills the run hours later."""
    loader, ranks = counting.recipe.loader, counting.hardware.gpus_per_node
    workers = loader.workers if isinstance(loader.workers, int) else 0
    ahead = workers * loader.prefetch
    # Trainer.get_batch_samples takes the micro-batches of a whole step from the loader, and the loader is one ahead.
    taken = counting.micro_batches + 1
    pins = counting.hardware.gpu is not None and loader.pin is not False
    if workers:
        size, source = WORKER
        # Workers stay, and evaluation has its own (TrainingArguments.dataloader_persistent_workers).
        loaders = 2 if counting.recipe.data.eval else 1
        yield _term(
            "host.workers",
            ALWAYS,
            ranks * loaders * workers * size,
            _Words(
                "data-loader workers", f"{size:,} B x {workers} workers x {loaders} loaders x {ranks} ranks", source
            ),
        )
        yield _term(
            "host.prefetched",
            FROM_FIRST_STEP,
            ranks * ahead * load.batch,
            _Words(
                "batches that the workers have ready",
                f"{load.batch:,} B x {workers} workers x {loader.prefetch} ahead x {ranks} ranks",
                LOADER,
            ),
        )
    makers = max(1, workers)
    yield _term(
        "host.decoded",
        FROM_FIRST_STEP,
        ranks * makers * making_bytes(load),
        _Words(
            "one picture being read by each maker of batches, and the tensors made of a sample and a batch",
            f"({load.reading:,} B + {SAMPLE_COPIES} x {load.sample:,} B + {BATCH_COPIES} x {load.batch:,} B) "
            f"x {makers} x {ranks} ranks",
            "measured, memfit.physics.loader; memfit.build.data:SampleDataset reads pictures one at a time",
        ),
    )
    if not pins:
        yield _term(
            "host.waiting_batches",
            FROM_FIRST_STEP,
            ranks * taken * load.batch,
            _Words(
                "micro-batches of the step and the next one",
                f"{load.batch:,} B x ({counting.micro_batches} + 1) x {ranks} ranks",
                "transformers.Trainer:get_batch_samples; accelerate.data_loader:DataLoaderShard.__iter__",
            ),
        )
        return
    size, held = int(pinned_bytes(load.batch)), ahead + taken
    yield _term(
        "host.pinned_batches",
        FROM_FIRST_STEP,
        ranks * held * size,
        _Words(
            "page-locked batches: those ready, those of the step and the next one",
            f"{load.batch:,} B, page-locked {size:,} B, x {held} x {ranks} ranks",
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
