"""Gradients as they came: their dtype, and what learns without ever getting one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from memfit.build.adapters import is_adapter
from memfit.build.everywhere import PICTURE_PARTS
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.parameters import wanted_dtypes
from memfit.engine.readback.reading import Reading, stated
from memfit.engine.readback.seen import Seen
from memfit.engine.readback.watch import learning_parameters

# softmax cancels what is added to all keys alike: their bias has a gradient of rounding only, and none in few bits.
ROUNDING_ONLY = (".k_proj.bias", ".key.bias")


def read(live: Live, asked: Asked, seen: Seen) -> Iterator[Reading]:
    """Dtypes of gradients, and dead parameters by name."""
    yield _dtypes(asked, seen)
    yield _dead(live, seen)


def _dtypes(asked: Asked, seen: Seen) -> Reading:
    found = Counter((dtype, is_adapter(name)) for name, (dtype, _) in seen.gradients.items())
    text = ", ".join(sorted({dtype for dtype, _ in found})) or "none"
    devices = ", ".join(sorted({device for _, device in seen.gradients.values()}))
    evidence = f"gradients of {len(seen.gradients)} tensors during backward, on {devices or 'no device'}"
    if asked.plan is None:
        return stated("gradients' dtype", text, evidence)
    row, adapter = wanted_dtypes(asked.plan)
    wanted = {adapter if is_one else row.gradients for _, is_one in found} or {row.gradients}
    strange = [dtype for dtype, is_one in found if dtype != (adapter if is_one else row.gradients)]
    return Reading(
        "gradients' dtype",
        ", ".join(sorted(wanted)),
        text,
        not strange and bool(found),
        evidence,
        "a gradient has its parameter's dtype: load the weights in the dtype of levers.precision",
    )


def _dead(live: Live, seen: Seen) -> Reading:
    """What learns and got no gradient, or only zeros, in every watched step."""
    learning = {name: part for name, _, part in learning_parameters(live)}
    blind = frozenset() if seen.pictures else PICTURE_PARTS
    judged = [name for name, part in learning.items() if part not in blind and not name.endswith(ROUNDING_ONLY)]
    none = [name for name in judged if name not in seen.gradients]
    # A rank's share of a small tensor may be empty; another rank has it.
    # One half of an adapter begins at zero; the other has no gradient until that has moved, and a warm-up begins at 0.
    moving = {_pair(name) for name in seen.moving}
    zero = [n for n in judged if n in seen.gradients and _pair(n) not in moving and not _empty(live, n)]
    dead = none + zero
    found = "none" if not dead else f"{len(dead)} tensors: {', '.join(dead[:3])}{' ...' if len(dead) > 3 else ''}"
    evidence = (
        f"{len(seen.gradients)} of {len(learning)} tensors that learn got a gradient in {seen.steps} steps, "
        f"{len(seen.moving)} another than zero"
    )
    if blind & set(learning.values()):
        evidence += "; no picture in the watched batches, so that vision and connector are not judged"
    return Reading(
        "dead parameters",
        "none",
        found,
        not dead if seen.steps else None,
        evidence,
        "freeze what the loss cannot reach (parts.<part>: frozen or last-N), or look for a detach or a no_grad",
        same=False,
    )


def _pair(name: str) -> str:
    """The adapter that a parameter is half of; its own name for any other."""
    return name.partition(".lora_")[0] if is_adapter(name) else name


def _empty(live: Live, name: str) -> bool:
    parameter = live.model.get_parameter(name)
    local = getattr(parameter, "to_local", lambda: parameter)()
    return hasattr(parameter, "to_local") and local.numel() == 0
