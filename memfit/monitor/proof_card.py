"""The card of a proof for a terminal: the verdict, what failed, memory by phase, the largest tensors, time, a sample.

It reads proof.json's values, so that a report of an old run prints what the run itself printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfit.monitor.proof_tables import groups_table, memory_table, tensors_table, verdict
from memfit.monitor.report_text import table_text
from memfit.units import duration

Row = Mapping[str, Any]
SHOWN_TEXT = 900  # signs of the decoded sample


def card(proof: Row) -> str:
    """The whole card of one proof."""
    blocks = [verdict(proof), *_failed(proof), *_unread(proof)]
    blocks += [table_text(table) for table in (memory_table(proof), groups_table(proof), tensors_table(proof)) if table]
    blocks.append("\n".join(_facts(proof)))
    if proof["text"]:
        blocks.append(_sample(str(proof["text"])))
    return "\n\n".join(blocks)


def _failed(proof: Row) -> list[str]:
    blocks = []
    for check in proof["checks"]:
        if check["ok"] is False:
            lines = [f"FAILED {check['lever']}", f"  asked     {check['asked']}", f"  found     {check['found']}"]
            lines += [f"  evidence  {check['evidence']}", f"  fix       {check['fix'] or '-'}"]
            blocks.append("\n".join(lines))
    return blocks


def _unread(proof: Row) -> list[str]:
    lines = [f"  {check['lever']}: {check['evidence']}" for check in proof["checks"] if check["ok"] is None]
    return ["\n".join([f"not read back ({len(lines)}):", *lines])] if lines else []


def _facts(proof: Row) -> list[str]:
    lines = []
    for batch in proof["batches"]:
        lines.append(
            f"worst batch, {batch['reason']}: {len(batch['samples'])} samples, {batch['tokens']:,} tokens, "
            f"{batch['trained_tokens']:,} trained, {batch['images']} pictures, {batch['crops']} crops"
        )
    step, expected, run = proof["step_seconds"], proof["forecast_step_seconds"], proof["run_seconds"]
    if step is not None:
        told = f"{duration(expected)} forecast" if expected is not None else "no forecast"
        lines.append(f"time: {duration(step)} a step of worst batches ({told}); the run about {duration(run)}")
    lines += [f"note: {note}" for note in proof["notes"]]
    lines.append(f"the proof took {duration(proof['seconds'])} ({proof['kind']}, {proof['hardware']})")
    return lines


def _sample(text: str) -> str:
    cut = text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + f" ... ({len(text) - SHOWN_TEXT:,} signs more)"
    return "one sample as it is trained, what carries loss in [[ ]]:\n" + "\n".join(
        f"  {line}" for line in cut.splitlines()
    )
