"""FSDP2, read from the state that `fully_shard` leaves on each module: units, shards, dtypes, resharding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import distributed
from torch.distributed.tensor import DTensor, Shard
from transformers.modeling_layers import GradientCheckpointingLayer

from memfit.engine.readback.handles import fsdp_groups, fsdp_modules
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, stated
from memfit.strategies.fsdp import engine_config

FIX = "fsdp_config decides it: let memfit write it, or set it by engine: {fsdp: ...}"


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """Shards, units, mixed precision and resharding."""
    yield _shards(live)
    yield _units(live)
    yield _dtypes(live, asked)
    yield _reshards(live, asked)


def _shards(live: Live) -> Reading:
    ranks, own = distributed.get_world_size(), distributed.get_rank()
    whole, uneven = [], []
    for name, parameter in live.model.named_parameters():
        if not isinstance(parameter, DTensor):
            whole.append(name)
            continue
        rows = parameter.shape[0] if parameter.dim() else 1
        each = -(-rows // ranks)  # chunks of dimension 0: the last ranks may have less
        wanted = max(0, min(each, rows - each * own))
        if parameter.placements != (Shard(0),) or parameter.to_local().shape[0] != wanted:
            uneven.append(name)
    told = [
        f"{len(n)} {what} ({n[0]})" for n, what in ((whole, "whole on every rank"), (uneven, "split otherwise")) if n
    ]
    count = sum(1 for _ in live.model.parameters())
    return Reading(
        "split of the parameters",
        f"{count} parameters by rows",
        f"{count} parameters by rows" if not told else "; ".join(told),
        not told,
        f"placements and local shapes of DTensors over {ranks} ranks",
        "fully_shard must reach the root module; no parameter may be ignored",
    )


def _units(live: Live) -> Reading:
    """Every block is gathered by itself: else the whole model would be gathered at once."""
    blocks = {name for name, module in live.model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    units = {name for name, _ in fsdp_modules(live)}
    missing = sorted(blocks - units)
    return Reading(
        "units of FSDP2",
        f"{len(blocks)} blocks each by itself",
        f"{len(blocks & units)} of {len(blocks)} blocks" if missing else f"{len(blocks)} blocks each by itself",
        not missing,
        f"{len(units)} modules carry FSDP2's state" + (f"; {missing[0]} does not" if missing else ""),
        "transformer_cls_names_to_wrap must name the classes of all blocks, the vision tower's too",
    )


def _dtypes(live: Live, asked: Asked) -> Reading:
    found = {
        (_name(group.mp_policy.param_dtype), _name(group.mp_policy.reduce_dtype)) for _, group in fsdp_groups(live)
    }
    text = "; ".join(sorted(f"computes in {a}, sums in {b}" for a, b in found))
    evidence = f"mp_policy of {sum(1 for _ in fsdp_groups(live))} groups of parameters"
    if asked.plan is None:
        return stated("FSDP2's dtypes", text, evidence)
    config = engine_config(asked.plan)
    wanted = f"computes in {config['param_dtype'] or 'its own'}, sums in {config['reduce_dtype'] or 'its own'}"
    return Reading(
        "FSDP2's dtypes",
        wanted,
        text,
        wanted == text,
        evidence,
        "levers.precision decides both; mixed_precision of accelerate's environment must not",
    )


def _reshards(live: Live, asked: Asked) -> Reading:
    """Blocks let their parameters go after forward; the root keeps them."""
    units = {name: group.post_forward_mesh_info is not None for name, group in fsdp_groups(live)}
    keeping = sorted(name for name, reshards in units.items() if not reshards and name in _blocks(live))
    text = "every block lets go" if not keeping else f"{len(keeping)} blocks stay gathered ({keeping[0]})"
    wanted = None if asked.plan is None else "every block lets go"
    return Reading(
        "engine.fsdp.reshard_after_forward",
        wanted,
        text,
        None if wanted is None else not keeping,
        f"post_forward_mesh_info of {len(units)} units",
        FIX,
    )


def _blocks(live: Live) -> set[str]:
    return {name for name, module in live.model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


def _name(dtype: Any) -> str:
    return "its own" if dtype is None else str(dtype).removeprefix("torch.")
