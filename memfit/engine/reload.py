"""Whether what was saved gives back what was trained: the same tensors, and the same answer to one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memfit.build.build import Built, Materials, build
from memfit.catalog.precisions import PRECISIONS
from memfit.engine.save import saved_state
from memfit.specs.plan import Plan
from memfit.specs.proof import Check

# Steps of the last place by which a loss may differ: the same numbers summed in another order, split over ranks or not.
# 2 ** -8 is bf16's own spacing (8 bits), 2 ** -20 leaves fp32 three bits.
CLOSE_16, CLOSE_32 = 2.0**-8, 2.0**-20
FIX = "the checkpoint does not hold what was trained: report this with proof.json; do not start the run"


@dataclass(frozen=True)
class Answer:
    """What a live model said before it was let go. `digests`: of every tensor that learns and is saved, by name."""

    batch: Mapping[str, Any]
    loss: float
    digests: Mapping[str, str]


def answer_of(model: nn.Module, built: Built, run: Any, batch: Mapping[str, Any], folder: Path) -> Answer:
    """Ask the live model; every rank must call. `run` is what is called: the model as its engine wrapped it."""
    loss = loss_of(run, built, batch)
    state = saved_state(model, None, folder)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    digests = {name: digest(tensor) for name, tensor in state.items() if name in learning}
    return Answer({key: _on_host(value) for key, value in batch.items()}, loss, digests)


def compare_reloaded(plan: Plan, materials: Materials, folder: Path, before: Answer) -> tuple[Check, ...]:
    """Build anew from `folder` and ask again: one check for the tensors, one for the answer."""
    built = build(plan, materials, folder)
    device = next(built.model.parameters()).device
    after = {name: parameter for name, parameter in built.model.named_parameters() if name in before.digests}
    wrong = [name for name, value in before.digests.items() if name not in after or digest(after[name]) != value]
    shown = f"{len(before.digests) - len(wrong)} of {len(before.digests)} tensors that learn are equal"
    first = f"; the first that is not: {wrong[0]}" if wrong else ""
    tensors = Check("save", "every tensor that learns, as it was", shown, not wrong, f"{folder.name}{first}", FIX)
    loss = loss_of(built.model, built, {key: _to(value, device) for key, value in before.batch.items()})
    # An engine may compute in 16 bit over fp32 weights, as FSDP2's policy does; the model built here does not.
    wide = PRECISIONS[str(plan.recipe.levers.precision)].compute == "float32"
    close = abs(loss - before.loss) <= (CLOSE_32 if wide else CLOSE_16) * max(1.0, abs(before.loss))
    found = f"{loss:.6f}"
    outputs = Check(
        "reload",
        f"the loss of one batch, {before.loss:.6f}",
        found,
        close,
        "a model built from the saved files against the live one, in evaluation mode",
        "" if close else FIX,
    )
    return (tensors if wrong else _mended(tensors), outputs)


def _mended(check: Check) -> Check:
    return Check(check.lever, check.asked, check.found, check.ok, check.evidence)


def loss_of(run: Any, built: Built, batch: Mapping[str, Any]) -> float:
    """The mean loss of a batch in evaluation mode. The model is left in the mode that it had."""
    training = run.training
    run.eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    device = next((v.device for v in inputs.values() if isinstance(v, torch.Tensor)), torch.device("cpu"))
    with torch.no_grad(), torch.autocast(device.type, built.autocast, enabled=built.autocast is not None):
        loss = built.loss(run(**inputs), batch["labels"])
    run.train(training)
    return float(loss)


def digest(tensor: torch.Tensor) -> str:
    """A fingerprint of a tensor's bits, shape and dtype."""
    plain = tensor.detach().to("cpu").contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.blake2b(head + plain.view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu") if isinstance(value, torch.Tensor) else value


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
