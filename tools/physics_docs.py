"""Write the textbook's tables into docs/physics.md; `--check` compares instead, `--trace` traces what needs traces.

The rules of thumb are worked out by memfit/physics/textbook.py. What needs a traced step (what checkpointing saves,
where activations outgrow the states) takes minutes and is kept in docs/measured/textbook_traces.json, which `--trace`
writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from memfit.physics.textbook import CLAIMS
from memfit.units import gib

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "physics.md"
RECORDS = ROOT / "docs" / "measured" / "textbook_traces.json"

CHECKPOINTED = ("llama-3.1-8b", "qwen2.5-vl-7b", "minicpm-v-4.6")
OUTGROWN = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-vl-3b")
STEP, LONGEST = 256, 1 << 17  # tokens: how finely the length is sought, and how far


def claims_table() -> str:
    """The claims as a Markdown table."""
    lines = ["| what | taught | memfit | formula | left out |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        lines.append(f"| {claim.what} | {claim.taught} | {claim.text()} | {claim.formula} | {claim.leaves_out} |")
    return "\n".join(lines)


def checkpointing_table(records: dict[str, Any]) -> str:
    """What checkpointing every layer saves: of what autograd keeps, and of the whole peak."""
    lines = [
        "| model | method | kept for backward: none, full | saved | peak allocated: none, full | saved | taught |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in records["checkpointing"]:
        kept, peak = row["kept"], row["peak"]
        lines.append(
            f"| {row['model']} | {row['method']} | {gib(kept['none'])}, {gib(kept['full'])} | {saved(kept):.0%} "
            f"| {gib(peak['none'])}, {gib(peak['full'])} | {saved(peak):.0%} | 30 to 50% |"
        )
    return "\n".join(lines)


def outgrown_table(records: dict[str, Any]) -> str:
    """The length from which activations take more than the states."""
    lines = ["| model | states | checkpointing none | checkpointing full |", "|---|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in records["outgrown"]):
        rows = {row["checkpointing"]: row for row in records["outgrown"] if row["model"] == model}
        cells = [f"{rows[mode]['tokens']:,} tokens" if rows[mode]["tokens"] else "-" for mode in ("none", "full")]
        lines.append(f"| {model} | {gib(rows['none']['states'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def saved(sizes: dict[str, int]) -> float:
    """The share that checkpointing saves."""
    return 1 - sizes["full"] / sizes["none"]


def page_with_tables(text: str) -> str:
    """The page with what stands between its pairs of marks replaced."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    for name, table in (
        ("textbook", claims_table()),
        ("checkpointing", checkpointing_table(records)),
        ("outgrown", outgrown_table(records)),
    ):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{PAGE}: the marks {begin} and {end} are gone")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def trace_checkpointing(model: str, method: str) -> dict[str, Any]:
    """One row: the documented default workload on one GPU, with every layer checkpointed and with none."""
    kept, peak = {}, {}
    for mode in ("none", "full"):
        forecast = _estimate(model, f"method={method}", f"levers.checkpointing={mode}")
        kept[mode] = forecast.trace.saved_bytes
        peak[mode] = _peak(forecast)
    return {"model": model, "method": method, "kept": kept, "peak": peak}


def trace_outgrown(model: str, mode: str) -> dict[str, Any]:
    """One row: the least multiple of STEP tokens at which a full fine-tune's activations take more than its states."""
    states = 0

    def outgrown(tokens: int) -> bool:
        nonlocal states
        found = activations_and_states(model, mode, tokens)
        states = found[1]
        return found[0] > found[1]

    low, high = 0, LONGEST // STEP
    if not outgrown(LONGEST):
        return {"model": model, "checkpointing": mode, "tokens": None, "states": states}
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if outgrown(middle * STEP) else (middle, high)
    return {"model": model, "checkpointing": mode, "tokens": high * STEP, "states": states}


def activations_and_states(model: str, mode: str, tokens: int) -> tuple[int, int]:
    """(the most that batch, saved tensors and temporaries take together, the states at the step), in bytes."""
    from memfit.planner.groups import is_state

    sets = [f"levers.checkpointing={mode}", f"workload.tokens={tokens}", "workload.images=0", "batch=1"]
    forecast = _estimate(model, "method=full", *sets)
    most = max(row.bytes - row.gradients for row in forecast.trace.activation_peaks)
    terms = [term for term in forecast.ledger.at("gpu") if is_state(term) and "step" in term.alive]
    return most, sum(term.bytes for term in terms)


def _estimate(model: str, *sets: str) -> Any:
    from memfit import api

    forecast = api.estimate(model=model, sets=["hardware.gpus=1xH100", *sets])
    assert forecast.trace is not None, f"{model}: nothing was traced"
    return forecast


def _peak(forecast: Any) -> int:
    from memfit.planner.activations import peak_of

    found = peak_of(forecast)
    assert found is not None
    return int(found[1])


def trace() -> dict[str, Any]:
    """All rows anew."""
    from memfit.inputs.cache import installed_versions

    def told(row: dict[str, Any]) -> dict[str, Any]:
        print(row, file=sys.stderr, flush=True)
        return row

    return {
        "versions": dict(installed_versions()),
        "checkpointing": [told(trace_checkpointing(m, method)) for m in CHECKPOINTED for method in ("full", "lora")],
        "outgrown": [told(trace_outgrown(model, mode)) for model in OUTGROWN for mode in ("none", "full")],
    }


def main() -> int:
    if "--trace" in sys.argv[1:]:
        RECORDS.parent.mkdir(parents=True, exist_ok=True)
        RECORDS.write_text(json.dumps(trace(), indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    wanted = page_with_tables(text)
    if "--check" in sys.argv[1:]:
        if text != wanted:
            print(
                f"{PAGE.name} is behind memfit/physics/textbook.py: run python tools/physics_docs.py", file=sys.stderr
            )
        return int(text != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
