"""The engine that really runs: which one, over how many ranks, what it splits, and where it puts what it moves away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import distributed

from memfit.engine.readback import ddp, fsdp, zero
from memfit.engine.readback.handles import engine_of_deepspeed, fsdp_groups, parallel_of, stage_of, zero_of
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, compared, stated

DETAILS: Mapping[str, Callable[[Live, Asked], Iterator[Reading]]] = {
    "ddp": ddp.read,
    "zero1": zero.read_12,
    "zero2": zero.read_12,
    "zero3": zero.read_3,
    "fsdp": fsdp.read,
}


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """The engine, its ranks, its offload; and what only that engine has."""
    found = parallel_of(live)
    wrapped = type(live.wrapped)
    yield compared(
        "levers.parallel",
        asked.lever("parallel"),
        found,
        f"the model is wrapped in {wrapped.__module__}.{wrapped.__qualname__}, ZeRO stage {stage_of(live)}"
        if engine_of_deepspeed(live) is not None
        else f"the model is a {wrapped.__module__}.{wrapped.__qualname__}",
        "zero_optimization.stage of the engine's configuration, and the launcher, must follow levers.parallel",
    )
    yield _ranks(live, asked)
    yield _offload(live, asked)
    yield _pinned(live, asked)
    if found in DETAILS:
        # What was asked is told of the engine that was asked for, not of another one.
        yield from DETAILS[found](live, asked if asked.lever("parallel") == found else Asked(None, asked.facts))


def _ranks(live: Live, asked: Asked) -> Reading:
    group = distributed.get_world_size() if distributed.is_initialized() else 1
    engine = engine_of_deepspeed(live)
    own = int(engine.dp_world_size) if engine is not None else int(live.trainer.args.world_size)
    wanted = None if asked.plan is None else asked.plan.forecast.hardware.ranks
    text = str(group) if group == own else f"{group} in the group, {own} for the engine"
    return compared(
        "hardware (ranks)",
        None if wanted is None else str(wanted),
        text,
        "torch.distributed.get_world_size and the engine's own count",
        "start as many processes as hardware has GPUs: memfit train does, or torchrun --nproc-per-node",
    )


def offload_of(live: Live) -> tuple[str, str, bool]:
    """(levers.offload, levers.offload_to, pinned) as the live engine has them."""
    optimizer = zero_of(live)
    if optimizer is not None and stage_of(live) == 3:
        what = "params+optimizer" if optimizer.offload_param else "optimizer" if optimizer.offload_optimizer else "none"
        if optimizer.offload_param and not optimizer.offload_optimizer:
            what = "params"
        nvme = optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu
        pinned = optimizer.offload_optimizer_pin_memory or optimizer.offload_param_pin_memory
        return what, "nvme" if nvme else "host", bool(pinned)
    if optimizer is not None:
        return "optimizer" if optimizer.cpu_offload else "none", "host", bool(optimizer.cpu_offload_pin_memory)
    policies = [group.offload_policy for _, group in fsdp_groups(live)]
    if policies and all(hasattr(policy, "pin_memory") for policy in policies):
        return "params+optimizer", "host", all(policy.pin_memory for policy in policies)
    if any(hasattr(policy, "pin_memory") for policy in policies):
        return "params+optimizer of some units", "host", False
    return "none", "host", False


def _offload(live: Live, asked: Asked) -> Reading:
    what, where, _ = offload_of(live)
    wanted = asked.lever("offload")
    # FSDP2 moves both or nothing, whichever word stands in the recipe: the layout says what was priced.
    if wanted is not None and asked.plan is not None and asked.plan.layout.name == "fsdp" and wanted != "none":
        wanted = "params+optimizer"
    if wanted not in (None, "none"):
        wanted = f"{wanted} to {asked.lever('offload_to') or 'host'}"
    found = what if what == "none" else f"{what} to {where}"
    devices = sorted({share.device.type for share in zero.kept_shares(live)})
    return compared(
        "levers.offload",
        wanted,
        found,
        f"flags of {type(zero_of(live) or live.wrapped).__name__}; shares are on {', '.join(devices) or 'none'}",
        "offload_optimizer and offload_param of the engine's configuration: device cpu where the recipe offloads",
    )


def _pinned(live: Live, asked: Asked) -> Reading:
    what, _, pinned = offload_of(live)
    if what == "none":
        return stated("levers.pin_memory", "nothing is offloaded", "no state of the run lies in host memory for a GPU")
    wanted = None if asked.plan is None else asked.plan.layout.pinned
    # torch can pin only beside an accelerator: on CPU ranks the engine's word is all there is. Not all that DeepSpeed
    # keeps in host memory is pinned by it, so that one tensor proves the word.
    kept = [share for share in zero.host_tensors(live) if live.device.type != "cpu"]
    held = sum(share.is_pinned() for share in kept)
    found = _yes(pinned) if not kept or bool(held) == pinned else f"{_yes(pinned)} by its word, {held} tensors are"
    return compared(
        "levers.pin_memory",
        None if wanted is None else _yes(wanted),
        found,
        f"pin_memory of the engine; {held} of {len(kept)} tensors in host memory are pinned",
        "pin_memory in offload_optimizer and offload_param must be levers.pin_memory",
    )


def _yes(value: bool) -> str:
    return "pinned" if value else "not pinned"
