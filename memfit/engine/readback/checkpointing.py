"""Activation checkpointing as it happened: which blocks ran twice, which cannot, and what frozen parts kept."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from memfit.build.checkpointing import checkpointing_modes, saved_on_host, selective_contexts
from memfit.engine.readback.adapters import unreached
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, stated
from memfit.engine.readback.seen import Seen
from memfit.engine.readback.watch import learning_modules, part_or_none
from memfit.families.names import base_name


def read(live: Live, asked: Asked, seen: Seen) -> Iterator[Reading]:
    """Recomputing by part, what stands outside every block, the inputs' home, and frozen parts."""
    blocks = blocks_by_part(live)
    skipped = unreached(live)
    modes = dict(checkpointing_modes(asked.plan.recipe)) if asked.plan is not None else {}
    for part, members in blocks.items():
        # A block whose output the loss never sees is not computed again: backward does not come there.
        reached = {name for name, _ in members if not base_name(f"{name}.").startswith(skipped)}
        mode = modes.get(part) if asked.plan is not None else None
        yield _part(part, members, mode, dataclasses.replace(seen, graph=seen.graph & reached))
    yield _outside(live, seen)
    yield _offloaded(live, asked)
    yield _frozen(live, seen)


def blocks_by_part(live: Live) -> dict[str, list[tuple[str, nn.Module]]]:
    """The layers that can be checkpointed, by part, in the model's order."""
    found: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in live.model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            found[part_or_none(live.part_of, name) or "outside every part"].append((name, module))
    return dict(found)


def _part(part: str, blocks: list[tuple[str, nn.Module]], mode: str | None, seen: Seen) -> Reading:
    graph = [name for name, _ in blocks if name in seen.graph]
    # What is computed again is a layer's forward: of its hooks those of its children run again, not always its own.
    ran_twice = {name for name in graph if any(n == name or n.startswith(f"{name}.") for n in seen.again)}
    lever = f"levers.checkpointing ({part})"
    text = f"{len(ran_twice)} of {len(blocks)} blocks computed twice"
    idle = len(blocks) - len(graph)
    evidence = f"calls of each block in {seen.forwards} forwards and their backwards"
    evidence += f"; {idle} blocks have no graph, which is cheaper than checkpointing" if idle else ""
    if mode is None:
        return stated(lever, text, evidence)
    wanted = {name for place, (name, _) in enumerate(blocks) if _on(mode, place)}
    missed, extra = [n for n in graph if n in wanted - ran_twice], [n for n in graph if n in ran_twice - wanted]
    kind, right_kind = _kind(part, mode, ran_twice, seen)
    wrong = [
        f"{len(n)} {what} ({n[0]})"
        for n, what in ((missed, "kept all they compute"), (extra, "ran again unasked"))
        if n
    ]
    return Reading(
        lever,
        mode,
        text + kind + "".join(f"; {each}" for each in wrong),
        not wrong and right_kind,
        evidence,
        "gradient_checkpointing must be on for the layers of this part, the vision tower's too, and set by memfit only",
    )


def _on(mode: str, place: int) -> bool:
    if mode == "none":
        return False
    return place % int(mode.removeprefix("every-")) == 0 if mode.startswith("every-") else True


def _kind(part: str, mode: str, ran_twice: set[str], seen: Seen) -> tuple[str, bool]:
    """Whether products with weights ran again: under selective checkpointing they are kept."""
    if not ran_twice:
        return "", True
    again = seen.products_again[part]
    text = f", products with weights {'again' if again else 'kept'}"
    return text, (again == 0) == (mode == "selective")


def _outside(live: Live, seen: Seen) -> Reading:
    """Modules with weights that no checkpointed layer holds: they keep what they compute whatever the lever says."""
    inside = {name for members in blocks_by_part(live).values() for name, _ in members}
    found: dict[str, int] = {}
    for name, parameter in live.model.named_parameters():
        owner = name.rpartition(".")[0]
        if not any(owner == block or owner.startswith(f"{block}.") for block in inside) and owner in seen.graph:
            found[owner] = found.get(owner, 0) + parameter.numel()
    largest = sorted(found, key=lambda name: -found[name])
    return stated(
        "cannot be checkpointed",
        f"{len(found)} modules: {', '.join(largest[:4])}" if found else "none",
        "modules with weights outside every checkpointable layer (embeddings, mergers, final norms, the head) keep "
        "what they compute, whatever levers.checkpointing says",
    )


def _offloaded(live: Live, asked: Asked) -> Reading:
    """Where the inputs of checkpointed layers wait, by what wraps them."""
    functions = [
        module._gradient_checkpointing_func
        for members in blocks_by_part(live).values()
        for _, module in members
        if getattr(module, "gradient_checkpointing", False)
    ]
    moved = sum(getattr(function, "around", None) is saved_on_host for function in functions)
    selective = sum(getattr(function, "contexts", None) is selective_contexts for function in functions)
    found = (
        "in host memory" if moved and moved == len(functions) else f"{moved} of {len(functions)}" if moved else "kept"
    )
    evidence = f"what {len(functions)} checkpointed layers are run with ({selective} keep their products)"
    wanted = asked.lever("activation_offload")
    if wanted is None or not functions:
        return stated("levers.activation_offload", found, evidence)
    asked_text = "in host memory" if wanted else "kept"
    fix = "levers.activation_offload acts on checkpointed layers: let memfit set both"
    return Reading("levers.activation_offload", asked_text, found, asked_text == found, evidence, fix)


def _frozen(live: Live, seen: Seen) -> Reading:
    """Parts before anything that learns must not have a graph, nor keep a byte for backward."""
    learning = {part_or_none(live.part_of, name) for name in learning_modules(live.model)}
    bytes_, graphs = _positive(seen.idle_bytes), {part: names for part, names in seen.idle_graph.items() if names}
    parts = sorted({*bytes_, *graphs})
    told = [
        f"{part}: {len(graphs.get(part, ()))} modules with a graph, {bytes_.get(part, 0):,} B kept for backward"
        for part in parts
    ]
    first = next((name for part in parts for name in sorted(graphs.get(part, ()), key=len)), "")
    return Reading(
        "graph of frozen parts",
        "none",
        "; ".join(told) or "none",
        not told,
        f"outputs that require grad, and tensors kept, before anything that learns ran: {_listed(learning)} learn"
        + (f"; outermost: {first}" if first else ""),
        "do not call gradient_checkpointing_enable or enable_input_require_grads: they hook the input embeddings of "
        "every nested model; let memfit set checkpointing, or run the frozen tower under torch.no_grad",
        same=False,
    )


def _positive(counts: Mapping[str, int]) -> dict[str, Any]:
    return {name: value for name, value in counts.items() if value}


def _listed(parts: set[str]) -> str:
    return ", ".join(sorted(part for part in parts if part))
