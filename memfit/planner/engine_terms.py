"""What an engine holds whatever the micro-batch: resident buckets, copies at load, step and save, offload buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from memfit.physics.memory import numel, share
from memfit.physics.pinned import pinned_bytes
from memfit.planner.counting import Counting, roles_of
from memfit.planner.parts import shapes
from memfit.specs.engine_numbers import EngineNumbers
from memfit.specs.ledger import PHASES, Term
from memfit.specs.profile import ParameterRow
from memfit.units import DTYPE_BYTES

NORM_WIDTH = 8  # fp64
# Swap pools of NVMe offload, where the recipe says nothing.
# Source: deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig and DeepSpeedZeroOffloadParamConfig.
OPTIMIZER_BUFFERS, PARAMETER_BUFFERS, PARAMETER_BUFFER_ELEMENTS = 4, 5, int(1e8)


def engine_terms(counting: Counting) -> list[Term]:
    """The terms of this engine that are not zero, beside what a traced micro-batch adds."""
    made = [*_buffers(counting), *_load(counting), *_step(counting), *_save(counting), *_offload(counting)]
    return [term for term in made if term.bytes]


def whole_rows(counting: Counting) -> Iterator[tuple[ParameterRow, int, bool]]:
    """Every parameter with bytes an element as the engine keeps it whole, and whether it learns."""
    for group in counting.groups:
        for role, rows in roles_of(group):
            width = gathered_width(counting, role) if rows else 0
            for row in rows:
                yield row, width, True
        frozen, idle = counting.frozen_width, counting.idle_width
        for row in group.frozen:
            yield row, frozen, False
        for row in group.idle:
            yield row, idle, False
        for row in group.quantised:
            yield row, 0, False


def gathered_width(counting: Counting, role: str) -> int:
    """Bytes of an element that learns while it is whole: block-wise engines gather in the dtype of computation."""
    compute = int(DTYPE_BYTES[counting.precision.compute])
    return min(compute, counting.width(role)) if counting.layout.engine.gather == "block" else counting.width(role)


def bucket_bytes(engine: EngineNumbers) -> int:
    """Bytes of all reduce buckets of one rank."""
    return engine.buckets * engine.bucket_elements * engine.bucket_width


def _named(counting: Counting, ending: str, name: str, size: int, alive: Sequence[str] = ()) -> Term:
    part = "engine"
    term = counting.term(f"{counting.layout.name}.{ending}", name, part, size, counting.layout.source)
    return dataclasses.replace(term, alive=tuple(alive)) if alive else term


def _told(term: Term, formula: str) -> Term:
    """The term with the sum behind its bytes; how many ranks share the place stays at the end."""
    _, times, ranks = term.formula.partition(" x ")
    return dataclasses.replace(term, formula=f"({formula}){times}{ranks}" if times else formula)


def _buffers(counting: Counting) -> Iterator[Term]:
    engine = counting.layout.engine
    if engine.bucket_stays:
        size = bucket_bytes(engine)
        term = _named(counting, "reduce_bucket", "reduce bucket", size)
        yield _told(term, f"{engine.buckets} x {engine.bucket_elements:,} elements x {engine.bucket_width} B")
    if engine.gather == "module":
        small = [
            (row.numel, width) for row, width, _ in whole_rows(counting) if row.numel <= engine.persistent_elements
        ]
        size = sum(count * width for count, width in small)
        elements = {one: sum(count for count, own in small if own == one) for one in dict.fromkeys(w for _, w in small)}
        words = " + ".join(f"{count:,} elements x {width} B" for width, count in elements.items())
        words += f", the {len(small):,} parameters of at most {engine.persistent_elements:,} elements"
        # Split for the step, and gathered again after it (stage3: _partition_all_parameters, _post_step).
        alive = [phase for phase in PHASES if phase != "step"]
        term = _named(counting, "weights.persistent", "parameters never split", size, alive)
        yield _told(term, words)
    if engine.largest_gradient_buffers:
        largest, words = _largest(counting, learning=True)
        size = engine.largest_gradient_buffers * largest
        term = _named(counting, "offload_gradient_buffer", "the largest gradient on its way to the host", size)
        yield _told(term, f"{engine.largest_gradient_buffers} x {words}")


def _load(counting: Counting) -> Iterator[Term]:
    """Stages 1 and 2 flatten each group beside its tensors; its master copy comes after that, so the larger counts."""
    engine = counting.layout.engine
    if engine.load_copies:
        sizes, words = [0], ["0 B"]
        for group in counting.groups:
            whole = sum(numel(shapes(rows)) * counting.width(role) for role, rows in roles_of(group))
            own = sum(
                numel(counting.local(shapes(rows), counting.layout.split_optimizer)) * _copied(counting, role)
                for role, rows in roles_of(group)
            )
            sizes.append(engine.load_copies * whole - own)
            words.append(f"{engine.load_copies} x {whole:,} B - {own:,} B")
        size = max(0, sum(sizes) if counting.one_group else max(sizes))
        told = [text for text, part in zip(words, sizes, strict=True) if part]
        formula = " + ".join(told) if counting.one_group else words[sizes.index(max(sizes))]
        yield _told(_named(counting, "flatten", "what learns, flattened beside itself", size, ("load",)), formula)
    if engine.gather_at_load:
        size, formula = _largest(counting)
        yield _told(_named(counting, "load_gather", "the largest tensor before it is split", size, ("load",)), formula)


def _copied(counting: Counting, role: str) -> int:
    on_device = "master" not in counting.site.homes
    return counting.stepped_width(role) if on_device and counting.has_master else 0


def _step(counting: Counting) -> Iterator[Term]:
    layout = counting.layout
    if not layout.engine.step_copy_widths:
        return
    count = _stepped_at_once(counting)
    names = ("the own gradients, flattened", "the own gradients in the master weights' dtype")
    for (ending, name), width in zip(
        (("step_flat", names[0]), ("step_wide", names[1])), layout.engine.step_copy_widths, strict=False
    ):
        term = _named(counting, ending, name, count * width, ("step",))
        yield _told(term, f"{count:,} elements x {width} B")
    norm, copies = _norm_copy(counting), count * sum(layout.engine.step_copy_widths)
    words = "what a gradient in fp64, for its norm, takes beyond the copies that follow"
    term = _named(counting, "step_norm", words, max(0, norm - copies), ("step",))
    yield _told(term, f"{norm // NORM_WIDTH:,} elements x {NORM_WIDTH} B - {copies:,} B")


def _norm_copy(counting: Counting) -> int:
    """Bytes of the largest own gradient in fp64, of which its norm is taken before the step's copies are made.

    Source: deepspeed.runtime.zero.utils:get_norm_dtype; get_grad_norm_direct of both optimizers.
    """
    local = counting.local(shapes([row for rows in counting.learning_groups() for row in rows]), 1)
    own = max((numel([shape]) for shape in local), default=0)
    if counting.layout.split_unit == "tensor":
        return NORM_WIDTH * share(own, counting.hardware.ranks)
    return NORM_WIDTH * min(own, _stepped_at_once(counting))


def _stepped_at_once(counting: Counting) -> int:
    """Elements of the largest group that is stepped at once."""
    return max(counting.sub_groups(counting.layout.engine.step_elements), default=0)


def _save(counting: Counting) -> Iterator[Term]:
    if counting.layout.engine.gather_at_save:
        size, formula = _largest(counting, learning=any(group.adapters for group in counting.groups))
        yield _told(
            _named(counting, "save_gather", "the largest tensor that is saved, whole", size, ("save",)), formula
        )


def _largest(counting: Counting, learning: bool = False) -> tuple[int, str]:
    """Bytes of the largest whole tensor, or of the largest that learns, and the sum behind them."""
    rows = ((row.numel, width, row.name) for row, width, learns in whole_rows(counting) if learns or not learning)
    count, width, name = max(rows, key=lambda row: row[0] * row[1], default=(0, 0, "none"))
    return count * width, f"{count:,} elements x {width} B, {name}"


# ---- offload -----------------------------------------------------------------------------------------------------


def _offload(counting: Counting) -> Iterator[Term]:
    """Buffers in host memory beside offloaded states, and what page-locking rounds up."""
    layout = counting.layout
    if layout.home_optimizer == "gpu" or layout.engine.gather == "block":
        yield from _pinned(counting, _own_sizes(counting) if layout.pinned else [])
        return
    name, width = layout.name, int(DTYPE_BYTES[counting.precision.learning])
    stepped = _parts_own(counting)
    pinned: list[int] = []
    if layout.split_unit == "part":
        # stage_1_and_2: param_buffer_of_bit16_for_cpu_offload_groups, temp_grad_buffer_for_cpu_offload.
        copies = [count * width for count in stepped]
        largest, words = _largest(counting, learning=True)
        term = counting.at("host", f"{name}.offload_weights", "new weights on their way back", "engine", sum(copies))
        yield _told(term, f"{sum(stepped):,} elements x {width} B")
        term = counting.at("host", f"{name}.offload_largest", "the largest gradient, in host memory", "engine", largest)
        yield _told(term, words)
        master = 4 if counting.precision.master == "float32" else width
        pinned = [*copies, largest, *(count * master for count in stepped), *(count * master for count in stepped)]
        if counting.micro_batches > 1:
            # stage_1_and_2: async_accumulate_grad_in_cpu_via_gpu keeps one buffer for each parameter it owns.
            sizes = _accumulated(counting)
            term = counting.at("host", f"{name}.offload_sums", "gradients summed on the host", "engine", sum(sizes))
            yield _told(term, f"{sum(sizes):,} B, the {len(sizes)} tensors of the own share")
            pinned += sizes
    else:
        # stage3: grad_partitions_flat_buffer follows the optimizer; the fp32 gradients are states.
        own = sum(stepped) * width
        term = counting.at("host", f"{name}.gradients.partitions", "gradient partitions", "engine", own)
        yield _told(term, f"{sum(stepped):,} elements x {width} B")
        pinned = [own, *(count * 4 for count in stepped)]
        if layout.home_parameters == "host":
            pinned += [count * width for count in stepped]
        yield from _swap_pools(counting)
    yield from _pinned(counting, pinned if layout.pinned else [])


def _parts_own(counting: Counting) -> list[int]:
    """Elements of the own share of every part that learns."""
    counts = []
    for group in counting.groups:
        rows = [row for _, rows in roles_of(group) for row in rows]
        counts.append(numel(counting.local(shapes(rows), counting.layout.split_optimizer)))
    return [count for count in counts if count]


def _accumulated(counting: Counting) -> list[int]:
    """Whole tensors up to this rank's share of all that learns."""
    rows = [(row.numel, width) for row, width, learns in whole_rows(counting) if learns]
    room, sizes = share(sum(count for count, _ in rows), counting.hardware.ranks), []
    for count, width in rows:
        if room <= 0:
            break
        sizes.append(count * width)
        room -= count
    return sizes


def _own_sizes(counting: Counting) -> list[int]:
    """Bytes of every shard of a block-wise engine, weights and gradients."""
    sizes = []
    for group in counting.groups:
        for role, rows in roles_of(group):
            sizes += 2 * [
                numel([s]) * counting.width(role) for s in counting.local(shapes(rows), counting.hardware.ranks)
            ]
        frozen = counting.frozen_width
        for rows, width in ((group.frozen, frozen), (group.idle, counting.idle_width)):
            sizes += [numel([s]) * width for s in counting.local(shapes(rows), counting.hardware.ranks)]
    return sizes


def _swap_pools(counting: Counting) -> Iterator[Term]:
    layout = counting.layout
    if layout.home_optimizer == "nvme":
        each = pinned_bytes(4 * _stepped_at_once(counting))
        size = OPTIMIZER_BUFFERS * each
        term = counting.at("host", f"{layout.name}.swap_optimizer", "swap buffers of the optimizer", "engine", size)
        yield _told(term, f"{OPTIMIZER_BUFFERS} x {each:,} B")
    if layout.home_parameters == "nvme":
        each = pinned_bytes(2 * PARAMETER_BUFFER_ELEMENTS)
        size = PARAMETER_BUFFERS * each
        term = counting.at("host", f"{layout.name}.swap_parameters", "swap buffers of the parameters", "engine", size)
        yield _told(term, f"{PARAMETER_BUFFERS} x {each:,} B")


def _pinned(counting: Counting, sizes: Iterable[int]) -> Iterator[Term]:
    """What torch's allocator of page-locked memory adds: every size becomes a power of two."""
    sizes = list(sizes)
    whole, rounded = sum(sizes), sum(int(pinned_bytes(size)) for size in sizes)
    extra = rounded - whole
    if extra:
        term = counting.at("host", "pinned.rounding", "page-locked memory above its tensors", "engine", extra)
        term = _told(term, f"{rounded:,} B in powers of two - {whole:,} B asked for")
        yield dataclasses.replace(term, source="ATen/core/CachingHostAllocator.h: sizes become powers of two")


def pinned_total(counting: Counting, terms: Sequence[Term]) -> int:
    """Bytes of page-locked memory of offload on one node, rounding included."""
    if not counting.layout.pinned:
        return 0
    rounding = sum(term.bytes for term in terms if term.id == "pinned.rounding")
    kinds = {"offload_weights", "offload_largest", "offload_sums", "swap_optimizer", "swap_parameters"}
    buffers = sum(term.bytes for term in terms if term.place == "host" and term.id.rpartition(".")[2] in kinds)
    states = {"gradients", "master", "weights"} if counting.layout.split_unit != "tensor" else {"gradients", "weights"}
    held = sum(
        term.bytes
        for term in terms
        if term.place == "host" and set(term.id.split(".")) & states and "pinned" not in term.id
    )
    return rounding + buffers + held
