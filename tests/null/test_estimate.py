"""The ledger of states against sums done by hand, and the contract of its JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memfit.catalog.gpus import parse_hardware
from memfit.errors import UserError
from memfit.planner.estimate import estimate_states
from memfit.planner.estimate_text import estimate_text, why
from memfit.planner.forecast_json import forecast_json
from memfit.specs.ledger import PHASES
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Levers, Lora, Recipe
from memfit.units import parse_bytes
from tests.null.hand_model import BUFFERS, FAMILY, NUMEL, profile

ALL = sum(NUMEL.values())


def estimate(gpus: str, tied: bool = False, host_memory: str | None = None, **keys: Any) -> Forecast:
    hardware = parse_hardware(gpus, host_memory=host_memory)
    return estimate_states(Recipe(model="m", **keys), profile(tied), FAMILY, hardware)


def by_id(forecast: Forecast) -> dict[str, int]:
    return {term.id: term.bytes for term in forecast.ledger.terms}


def by_kind(forecast: Forecast) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for term in forecast.ledger.terms:
        kind = term.id.removeprefix("adapter.").removeprefix("saved.").split(".")[0]
        kinds[kind] = kinds.get(kind, 0) + term.bytes
    return kinds


def test_full_under_amp() -> None:
    """fp32 weights, gradients and two moments: 16 bytes a parameter, and a 4-byte step scalar a tensor."""
    terms = by_id(estimate("1xRTX3090"))
    tensors = {"vision": 5, "connector": 1, "language": 5, "head": 1}
    for part, count in NUMEL.items():
        assert terms[f"weights.{part}"] == terms[f"gradients.{part}"] == 4 * count
        assert terms[f"optimizer.{part}"] == 8 * count + 4 * tensors[part]
    assert terms["buffers"] == BUFFERS
    assert sum(terms.values()) == 16 * ALL + 4 * 12 + BUFFERS


def test_pure_bf16_is_half() -> None:
    kinds = by_kind(estimate("1xRTX3090", levers=Levers(precision="pure-bf16")))
    # Its largest tensor has 1,600 elements, which take 16 bytes each while they are stepped in fp32.
    step = {"step": 16 * 1600}
    assert kinds == {"weights": 2 * ALL, "gradients": 2 * ALL, "optimizer": 4 * ALL + 48, "buffers": BUFFERS} | step


def test_a_tied_head_counts_once() -> None:
    forecast = estimate("1xRTX3090", tied=True)
    assert by_kind(forecast)["weights"] == 4 * (ALL - NUMEL["head"])
    assert set(forecast.trainable) == {"vision", "connector", "language"}


def test_frozen_parts_and_last_n() -> None:
    """Frozen ones are 16 bit; of the language part one block of 256 + 16 learns in fp32."""
    parts: Any = {"vision": "frozen", "connector": "frozen", "head": "frozen", "language": "last-1"}
    forecast = estimate("1xRTX3090", parts=parts)
    terms = by_id(forecast)
    assert terms["weights.vision"] == 2 * 144
    assert terms["weights.language"] == 2 * (2144 - 272) + 4 * 272
    assert terms["gradients.language"] == 4 * 272
    assert terms["optimizer.language"] == 8 * 272 + 4 * 2
    assert (forecast.trainable["language"], forecast.frozen["language"]) == (272, 1872)
    assert "gradients.vision" not in terms


def test_lora_adapters_are_fp32_beside_a_16_bit_base() -> None:
    """Two q_proj of 16 x 16: 2 x 3 x (16 + 16) = 192 adapter parameters in 4 tensors."""
    forecast = estimate("1xRTX3090", method="lora", lora=Lora(rank=3))
    terms = by_id(forecast)
    assert terms["weights.language"] == 2 * 2144
    assert terms["adapter.weights.language"] == terms["adapter.gradients.language"] == 4 * 192
    assert terms["adapter.optimizer.language"] == 8 * 192 + 4 * 4
    assert forecast.trainable == {"vision": 0, "connector": 0, "language": 192, "head": 0}
    bf16 = by_id(estimate("1xRTX3090", method="lora", lora=Lora(rank=3, dtype="bf16")))
    assert bf16["adapter.weights.language"] == 2 * 192
    assert bf16["adapter.optimizer.language"] == 4 * 192 + 4 * 4
    dora = estimate("1xRTX3090", method="lora", lora=Lora(rank=3, variant="dora"))
    assert dora.trainable["language"] == 192 + 2 * 16


def test_saved_modules_are_copies() -> None:
    forecast = estimate("1xRTX3090", method="lora", lora=Lora(rank=3, modules_to_save=("bridge",)))
    terms = by_id(forecast)
    assert terms["weights.connector"] == 2 * 128
    assert terms["saved.weights.connector"] == 2 * 128
    assert (forecast.trainable["connector"], forecast.frozen["connector"]) == (128, 128)


def test_qlora_blocks() -> None:
    """The two q_proj hold 256 weights each in 128 B and 4 scales of 4 B; embeddings and norms stay 16 bit."""
    terms = by_id(estimate("1xRTX3090", method="qlora", lora=Lora(rank=3)))
    assert terms["weights.language"] == 2 * 128 + 2 * (2144 - 512)
    assert terms["quant.absmax"] == 2 * 4 * 4
    assert terms["quant.code"] == 2 * 64
    assert terms["weights.vision"] == 2 * 144


def test_kbit_upcast_widens_what_is_not_packed() -> None:
    """PEFT's preparation makes fp32 of embeddings, norms and the whole vision tower; packed weights stay."""
    terms = by_id(estimate("1xRTX3090", method="qlora", lora=Lora(rank=3, kbit_upcast=True)))
    assert terms["weights.language"] == 2 * 128 + 4 * (2144 - 512)
    assert terms["weights.vision"] == 4 * 144


def test_ddp_holds_the_gradients_twice() -> None:
    forecast = estimate("2xRTX3090")
    kinds = by_kind(forecast)
    assert kinds["gradient_copies"] == kinds["gradients"] == 4 * ALL
    copies = next(term for term in forecast.ledger.terms if term.id == "gradient_copies.language")
    assert copies.alive == PHASES


# 4 ranks, 4,016 elements end to end, 1,004 a rank. The third rank's share [2008, 3012) touches q_proj 0, norm 0, q_proj
# 1, norm 1 and the head, which it keeps whole while they are reduced: 256 + 16 + 256 + 16 + 1600.
TOUCHED = 2144


@pytest.mark.parametrize(
    ("parallel", "weights", "gradients", "copies"),
    [("zero1", 2 * ALL, 2 * ALL, 2 * TOUCHED), ("zero2", 2 * ALL, 2 * TOUCHED, 0), ("zero3", ALL // 2, ALL // 2, 0)],
)
def test_zero_steady_states(parallel: Any, weights: int, gradients: int, copies: int) -> None:
    """bf16 weights and gradients, and fp32 master weights and moments of the own quarter: 12 T / N."""
    kinds = by_kind(estimate("4xA100-40G", levers=Levers(parallel=parallel)))
    assert kinds["weights"] == weights
    assert kinds["gradients"] == gradients
    assert kinds.get("gradient_copies", 0) == copies
    assert kinds["master"] == 4 * ALL // 4
    # One flat group, one step scalar: rates do not differ by part.
    assert kinds["optimizer"] == 8 * ALL // 4 + 4


def test_zero_splits_what_is_frozen_only_at_stage_3() -> None:
    parts: Any = {"vision": "frozen"}
    weights = {
        name: by_id(estimate("4xA100-40G", parts=parts, levers=Levers(parallel=name)))["weights.vision"]  # type: ignore[arg-type]
        for name in ("zero2", "zero3", "fsdp")
    }
    assert weights == {"zero2": 2 * 144, "zero3": 2 * 36, "fsdp": 2 * 36}


def test_fsdp_rounds_rows_up() -> None:
    """3 ranks: a weight of 16 rows gives 6 of them to the first rank, one of 8 gives 3, one of 100 gives 34."""
    terms = by_id(estimate("3xA100-40G", levers=Levers(parallel="fsdp")))
    assert terms["weights.connector"] == 4 * 6 * 8
    assert terms["weights.vision"] == 4 * (2 * (3 * 4 + 3) + 3 * 8)
    assert terms["weights.head"] == 4 * 34 * 16
    assert terms["optimizer.head"] == 8 * 34 * 16 + 4


def test_foreach_adds_one_moment_at_the_step() -> None:
    forecast = estimate("1xRTX3090", levers=Levers(optimizer="adamw-foreach"))
    term = next(term for term in forecast.ledger.terms if term.id == "step.foreach")
    assert (term.bytes, term.alive, term.part) == (4 * NUMEL["language"], ("step",), "language")
    # Its step scalars stay on the host.
    assert by_id(forecast)["optimizer.language"] == 8 * NUMEL["language"]


def test_paged_states_are_in_host_memory() -> None:
    terms = estimate("1xRTX3090", levers=Levers(optimizer="paged-adamw-8bit")).ledger.terms
    # No tensor of the hand model is large enough to be paged.
    assert not [term for term in terms if term.place == "host"]


def test_gradients_live_through_forward_only_when_they_accumulate() -> None:
    one = estimate("1xRTX3090", batch=1).ledger.phase_bytes()
    many = estimate("1xRTX3090", batch=4).ledger.phase_bytes()
    assert many["forward"] - one["forward"] == 4 * ALL
    assert many["step"] == one["step"] == max(one.values())
    assert one["load"] == 4 * ALL + BUFFERS
    assert one["evaluate"] == one["step"] - 4 * ALL


def test_cpu_ranks_share_the_node() -> None:
    one, two = estimate("1xcpu"), estimate("2xcpu", levers=Levers(parallel="ddp"))
    assert {term.place for term in one.ledger.terms} == {"host"}
    assert by_kind(two)["weights"] == 2 * by_kind(one)["weights"]
    data = forecast_json(two)
    assert data["gpu"] is None
    assert data["host"]["states_bytes"]["step"] == sum(term["bytes"] for term in data["host"]["terms"])


def test_verdict_rests_on_the_states_alone() -> None:
    assert (estimate("1xRTX3090").verdict, estimate("1xRTX3090").fits) == ("unknown", None)
    small = estimate("1xcpu", host_memory=f"{16 * ALL} B")
    assert (small.verdict, small.fits) == ("does-not-fit", False)
    enough = estimate("1xcpu", host_memory=f"{16 * ALL + 4 * 12 + BUFFERS} B")
    assert enough.verdict == "unknown"
    assert estimate_text(small).startswith("does not fit: states alone take")


CONTRACT = {
    "schema": int,
    "verdict": str,
    "fits": type(None),
    "gpu": {
        "peak_allocated_bytes": type(None),
        "peak_reserved_bytes": type(None),
        "process_bytes": type(None),
        "capacity_bytes": int,
        "peak_phase": type(None),
        "phases": dict,
        "terms": list,
    },
    "host": {"peak_bytes": type(None), "pinned_bytes": type(None), "capacity_bytes": int, "terms": list},
    "disk": {"checkpoint_bytes": type(None), "nvme_bytes": type(None)},
    "interval": {"low_bytes": type(None), "high_bytes": type(None)},
    "speed": type(None),
    "recipe": dict,
    "defaults": list,
    "hardware": dict,
}


def test_json_contract() -> None:
    data = forecast_json(estimate("2xRTX3090", host_memory="64GiB", lora=Lora(dropout=0.0)))

    def check(wanted: dict[str, Any], found: dict[str, Any]) -> None:
        for key, kind in wanted.items():
            if isinstance(kind, dict):
                check(kind, found[key])
            else:
                assert isinstance(found[key], kind), key

    check(CONTRACT, data)
    assert data["host"]["capacity_bytes"] == parse_bytes("64GiB")
    assert data["schema"] == 1
    assert set(data["gpu"]["phases"]) == set(PHASES)
    assert set(data["gpu"]["phases"].values()) == {None}
    assert "activations" in data["missing"]
    for term in data["gpu"]["terms"]:
        assert set(term) >= {"id", "name", "part", "place", "alive", "bytes", "source"}
        assert term["source"]
        assert term["formula"]
        assert set(term["alive"]) <= set(PHASES)
    for phase, size in data["gpu"]["states_bytes"].items():
        assert size == sum(term["bytes"] for term in data["gpu"]["terms"] if phase in term["alive"])
    assert len({term["id"] for term in data["gpu"]["terms"]}) == len(data["gpu"]["terms"])
    assert data["recipe"]["levers"]["precision"] == "bf16-amp"
    assert data["hardware"]["text"] == "2xRTX3090"
    assert json.loads(json.dumps(data)) == data


def test_text() -> None:
    forecast = estimate("2xRTX3090")
    lines = estimate_text(forecast).splitlines()
    assert lines[0].startswith("unknown: states alone take ")
    assert f"{len(forecast.defaults)} values were defaults, nothing was searched" in lines[0]
    text = "\n".join(lines)
    assert "\x1b" not in text
    for words in (*NUMEL, "activations", "speed", "levers.optimizer", "bf16-amp", "2xRTX3090"):
        assert words in text
    language = next(line for line in lines if line.startswith("language"))
    assert language.split()[1:4] == ["full", "2,144", "2,144"]
    nominal = estimate_text(estimate("1xTitanRTX", levers=Levers(precision="fp32")))
    assert "capacity of TitanRTX is nominal" in nominal


def test_why_gives_formula_numbers_and_source() -> None:
    forecast = estimate("1xRTX3090")
    text = why(forecast, "optimizer.language")
    assert "17,172 B" in text  # 8 x 2144 + 4 x 5
    assert "2 states of 2,144 parameters, 4 B each + 5 scalars x 4 B" in text
    assert "torch.optim:AdamW" in text
    with pytest.raises(UserError, match=r"did you mean optimizer.language"):
        why(forecast, "optimiser.language")


def test_a_planted_error_is_seen() -> None:
    """The hand sums are no tautology: a tenth more of any term breaks the total."""
    total = 16 * ALL + 4 * 12 + BUFFERS
    terms = estimate("1xRTX3090").ledger.terms
    for planted in terms:
        assert sum(int(term.bytes * (1.1 if term is planted else 1)) for term in terms) != total
