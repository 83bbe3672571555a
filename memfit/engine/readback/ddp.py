"""DistributedDataParallel, read from the wrapper: buckets, their size, and what it waits for."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.parallel import DistributedDataParallel

from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.strategies.ddp import engine_config

MIB = 1 << 20


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """The arguments that DDP was made with, and that its copies started equal."""
    wrapped = live.wrapped
    if not isinstance(wrapped, DistributedDataParallel):
        raise TypeError(f"{type(wrapped).__name__} is not DistributedDataParallel")
    found = {
        "gradient_as_bucket_view": bool(wrapped.gradient_as_bucket_view),
        "bucket_cap_mb": round(wrapped.bucket_bytes_cap / MIB),
        "find_unused_parameters": bool(wrapped.find_unused_parameters),
        "broadcast_buffers": bool(wrapped.broadcast_buffers),
        "static_graph": bool(wrapped.static_graph),
    }
    wanted = engine_config(asked.plan) if asked.plan is not None else None
    for name, value in found.items():
        where = f"attributes of the live wrapper over {wrapped.process_group.size()} ranks"
        if wanted is None:
            yield stated(f"engine.ddp.{name}", str(value), where)
            continue
        fix = "ddp_* of TrainingArguments and accelerate's DDP handler follow engine: {ddp: ...}"
        yield compared(f"engine.ddp.{name}", str(wanted[name]), str(value), where, fix)
    ignored = sorted(wrapped.parameters_to_ignore)
    yield Reading(
        "summed gradients",
        "all",
        "all" if not ignored else f"all but {len(ignored)} ({ignored[0]})",
        not ignored,
        "parameters_to_ignore of the wrapper",
        "no parameter may be kept from DDP: its copies would drift apart",
    )
