"""The forecast of a trainer that somebody else built: everything where a recipe says it, else its states alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.integrations import deepspeed as upstream

from memfit.catalog.optimizers import OPTIMIZERS
from memfit.engine.foreign.described import Described, deepspeed_of, learning_bytes
from memfit.engine.foreign.worst import Batch
from memfit.engine.readback.live import Live
from memfit.errors import UserError
from memfit.families.names import base_name
from memfit.inputs.model_source import ModelSource
from memfit.planner.estimate import states_place
from memfit.planner.host_terms import PROCESS_PART
from memfit.planner.interval import interval_of
from memfit.planner.plan import plan_of
from memfit.planner.user_engine import with_users_deepspeed
from memfit.specs.hardware import Hardware
from memfit.specs.ledger import PHASES, Ledger, Term
from memfit.specs.plan import Forecast, Layout, Plan
from memfit.specs.profile import Profile
from memfit.specs.recipe import Recipe
from memfit.specs.trace import Row
from memfit.trace.forecast import forecast_plan
from memfit.trace.parameters import profile_of
from memfit.trace.prepare import Prepared

PICTURES = "pixel_values"
STATES_ONLY = "activations, temporaries and engine buffers are not forecast: {}"
LIVE = "counted from the live parameters"


def forecast_of(live: Live, described: Described, hardware: Hardware) -> Plan:
    """The plan of a trainer. Where it cannot be forecast whole, its states, and `ledger.missing` says why."""
    why = list(described.unsaid)
    if live.batches and PICTURES in live.batches[0]:
        why.append("the pictures of the batch came through the script's own processor")
    recipe = described.recipe
    if recipe is not None and live.family is not None and not why:
        try:
            return _whole(live, recipe, hardware)
        except UserError as error:
            why.append(error.problem)
    return plan_of(_states(live, recipe, hardware, why))


def _whole(live: Live, recipe: Recipe, hardware: Hardware) -> Plan:
    """States, activations and engine, as for a recipe of memfit's own. UserError where it does not go together."""
    assert live.family is not None
    config = live.model.config.to_dict()
    with _no_zero_init():
        profile = profile_of(config, live.family)
        strange = _differences(live, profile)
        if strange:
            raise UserError(f"the live model is not what its config makes: {strange}", "save and load it again")
        source = ModelSource(recipe.model, None, config)
        recipe = with_users_deepspeed(recipe, hardware)
        plan = forecast_plan(Prepared(recipe, source, live.family, profile, hardware), rows_of(live.batches[0]))
    forecast = plan.forecast
    if forecast.interval is not None and hardware.gpu is None:
        # Their own code runs, not the one that was traced: as wide as for a trace of another device.
        terms = [term for term in forecast.ledger.at(states_place(hardware)) if term.part != PROCESS_PART]
        peak = max(PHASES, key=lambda phase: sum(term.bytes for term in terms if phase in term.alive))
        interval = interval_of([term for term in terms if peak in term.alive])
        forecast = dataclasses.replace(forecast, interval=interval)
    return dataclasses.replace(plan, forecast=forecast)


def rows_of(batch: Batch) -> tuple[Row, ...]:
    """The rows of a collated batch: tokens without padding, the widest as wide as the batch."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return tuple(Row(int(ids.shape[1])) for _ in range(ids.shape[0]))
    return tuple(Row(int(tokens)) for tokens in mask.sum(1))


def _differences(live: Live, profile: Profile) -> str:
    """The first parameter of the live model that its config does not make; "" where all are alike."""
    wanted = {row.name: row.shape for row in profile.parameters}
    for name, parameter in live.model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        base, shape = base_name(name), tuple(getattr(parameter, "ds_shape", parameter.shape))
        if getattr(parameter, "quant_state", None) is not None:
            continue
        if wanted.get(base) != shape:
            return f"{base} is {shape}, by the config {wanted.get(base, 'not there')}"
    return ""


@contextlib.contextmanager
def _no_zero_init() -> Iterator[None]:
    """While a model is made on no device, transformers must not split it: under ZeRO-3 it would, by this setting."""
    held = upstream._hf_deepspeed_config_weak_ref
    config = held() if held is not None else None
    upstream.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            upstream.set_hf_deepspeed_config(config)


def _states(live: Live, recipe: Recipe | None, hardware: Hardware, why: Sequence[str]) -> Forecast:
    """Weights, gradients and moments of the live parameters, as they are kept before an engine takes them."""
    place: Any = states_place(hardware)
    stage = _stage(live)
    moments = _moments(live)
    ranks = hardware.ranks
    each = hardware.gpus_per_node if hardware.gpu is None else 1  # a node's host memory holds all its ranks
    terms: list[Term] = []
    for part, (whole, learning) in learning_bytes(live).items():
        sizes: Mapping[str, tuple[int, int, tuple[str, ...]]] = {
            "weights": (whole, ranks if stage == 3 else 1, PHASES),
            "gradients": (learning, ranks if stage >= 2 else 1, ("backward", "step")),
            "optimizer": (learning * moments, ranks if stage >= 1 else 1, PHASES[1:]),
        }
        for name, (size, ways, alive) in sizes.items():
            if size:
                terms.append(Term(f"{name}.{part}", name, part, place, alive, -(-size // ways) * each, LIVE))
    buffers = sum(buffer.nbytes for buffer in live.model.buffers())
    if buffers:
        terms.append(Term("buffers", "buffers", "model", place, PHASES, buffers * each, LIVE))
    return Forecast(
        verdict="unknown",
        fits=None,
        ledger=Ledger(tuple(terms), (STATES_ONLY.format("; ".join(why)),)),
        recipe=recipe or Recipe(model=str(getattr(getattr(live.model, "config", None), "model_type", "model"))),
        defaults=(),
        hardware=hardware,
        workload=None,
        layout=Layout(name=f"zero{stage}" if stage else "ddp" if ranks > 1 else "none", source=LIVE),
    )


def _stage(live: Live) -> int:
    return int((deepspeed_of(live.trainer).get("zero_optimization") or {}).get("stage", 0))


def _moments(live: Live) -> int:
    """Moments as large as the parameters that the optimizer keeps; of an unknown one, two."""
    name = str(live.trainer.args.optim.value)
    row = next((row for row in OPTIMIZERS.values() if row.engine_name == name), None)
    return 2 if row is None else int(row.moments)
