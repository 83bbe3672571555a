"""The card of a proof of somebody's own script: what was asked and found, then the card of every proof."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memfit.monitor.proof_card import card
from memfit.monitor.report_text import table_text
from memfit.monitor.tables import Cell, Table
from memfit.specs.proof import Check, Proof

LONGEST = 64  # signs of a cell


def foreign_card(proof: Proof) -> str:
    """The card with a table of all that was asked; what nobody asked for is told below it, a line each."""
    plain: dict[str, Any] = proof.to_json()
    checked = [check for check in proof.checks if check.ok is not None]
    told = [check for check in proof.checks if check.ok is None]
    shown = card({**plain, "checks": [check for check in plain["checks"] if check["ok"] is not None]})
    head, _, rest = shown.partition("\n\n")
    blocks = [head, *_blocks(checked, told)]
    return "\n\n".join([*blocks, rest] if rest else blocks)


def _blocks(checked: list[Check], told: list[Check]) -> Iterator[str]:
    rows = tuple(
        (Cell(check.lever), Cell(_cut(check.asked)), Cell(_cut(check.found)), Cell("yes" if check.ok else "NO"))
        for check in checked
    )
    if rows:
        yield table_text(
            Table("asked by the script, and what is in effect", ("lever", "asked", "found", "holds"), rows)
        )
    if told:
        yield "\n".join(["found, and asked by nobody:", *(f"  {c.lever}: {_cut(c.found)}; {c.evidence}" for c in told)])


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
