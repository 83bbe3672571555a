"""What stepping bf16 weights in fp32 takes, chunk by chunk: by hand, for tensors one by one and for ZeRO's flat one."""

from __future__ import annotations

import pytest

from memfit.specs.recipe import Levers, Lora
from tests.null.test_estimate import ALL, by_kind, estimate


@pytest.mark.parametrize(
    ("hardware", "levers", "elements"),
    [
        ("1xRTX3090", {}, 1600),  # the largest tensor
        ("2xRTX3090", {"parallel": "fsdp"}, 800),  # this rank's rows of it
        ("1xRTX3090", {"optimizer": "adamw-foreach"}, 0),
        ("1xRTX3090", {"precision": "bf16-amp"}, 0),
        ("2xRTX3090", {"parallel": "zero1"}, 1072),  # the share of the largest part, 2,144 elements in one tensor
    ],
)
def test_elements_that_are_stepped_at_once(hardware: str, levers: dict[str, str], elements: int) -> None:
    given = {"precision": "pure-bf16"} | levers
    forecast = estimate(hardware, levers=Levers(**given))  # type: ignore[arg-type]
    assert sum(term.bytes for term in forecast.ledger.terms if term.id == "step.chance") == 16 * elements


def test_a_chunk_is_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    from memfit.planner import counting

    monkeypatch.setattr(counting, "CHANCE_CHUNK", 100)
    assert by_kind(estimate("1xRTX3090", levers=Levers(precision="pure-bf16")))["step"] == 1600
    assert ALL > 1600


def test_fp32_adapters_are_not_rounded() -> None:
    levers = Levers(precision="pure-bf16")
    assert "step" not in by_kind(estimate("1xRTX3090", levers=levers, method="lora", lora=Lora(dtype="fp32")))
    assert "step" in by_kind(estimate("1xRTX3090", levers=levers, method="lora", lora=Lora(dtype="bf16")))
