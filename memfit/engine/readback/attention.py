"""Attention as it ran: which kernel each part took, seen below autograd and not in a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.engine.readback.seen import Seen
from memfit.engine.readback.watch import DELTA, FLASH, SDPA
from memfit.planner.parts import ORDER

# Parts whose attention follows the lever; a resampler's or projector's own attention is told and not judged.
FOLLOWING = ("vision", "audio", "language")


def read(live: Live, asked: Asked, seen: Seen) -> Iterator[Reading]:
    """One reading a part with attention, and one for linear attention."""
    configured = implementations(live)
    for part in sorted({part for part, _ in seen.kernels if part}, key=_place):
        ran, kernels = kinds_of(part, seen)
        if not ran:
            continue
        lever = f"levers.attention ({part})"
        evidence = f"{', '.join(kernels)}; configurations say {', '.join(sorted(configured)) or 'nothing'}"
        wanted = asked.lever("attention") if part in FOLLOWING else None
        fix = (
            "attn_implementation must reach the sub-configurations too: give it to from_pretrained, not to one of them"
        )
        yield compared(lever, wanted, " and ".join(ran), evidence, fix)
    yield from _linear(asked, seen)


def kinds_of(part: str, seen: Seen) -> tuple[list[str], list[str]]:
    """(values of levers.attention that ran in a part, the kernels with their counts)."""
    counts = {name: times for (where, name), times in seen.kernels.items() if where == part and name != DELTA}
    sdpa, softmax = counts.get("sdpa", 0), counts.get("softmax", 0)
    named = {name: times for name, times in counts.items() if name.startswith(SDPA)}
    flash = {name: times for name, times in counts.items() if name in FLASH}
    # torch's math kernel is no operator of its own: it shows as a softmax inside a call of sdpa.
    math = max(0, sdpa - sum(named.values()))
    eager = max(0, softmax - math)
    ran = [
        name
        for name, times in (("eager", eager), ("sdpa", sdpa or sum(named.values())), ("flash", sum(flash.values())))
        if times
    ]
    kernels = [f"{name.removeprefix(SDPA)} x {times}" for name, times in (named | flash).items()]
    kernels += [f"math kernel x {math}"] if math else []
    kernels += [f"softmax outside a kernel x {eager}"] if eager else []
    return ran, kernels


def implementations(live: Live) -> set[str]:
    """What the configurations of the model and its sub-models say."""
    found: set[str] = set()
    for module in live.model.modules():
        config: Any = getattr(module, "config", None)
        value = getattr(config, "_attn_implementation", None)
        if isinstance(value, str):
            found.add(value)
    return found


def _linear(asked: Asked, seen: Seen) -> Iterator[Reading]:
    layers, reference = seen.delta_layers, sum(t for (_, name), t in seen.kernels.items() if name == DELTA)
    if not layers:
        return
    found = "reference" if reference >= layers else "fla" if not reference else "both"
    wanted = asked.lever("linear_attention")
    evidence = f"{layers} calls of gated delta layers in forward, {reference} cumulative sums by torch's own operator"
    if wanted is None:
        yield stated("levers.linear_attention", found, evidence)
        return
    fix = "pip install flash-linear-attention and causal-conv1d for fla, or levers.linear_attention: reference"
    yield compared("levers.linear_attention", wanted, found, evidence, fix)


def _place(part: str) -> int:
    return ORDER.index(part) if part in ORDER else len(ORDER)
