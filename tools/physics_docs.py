"""Write the textbook's table into docs/physics.md from memfit/physics/textbook.py; `--check` compares instead."""

from __future__ import annotations

import sys
from pathlib import Path

from memfit.physics.textbook import CLAIMS

PAGE = Path(__file__).parents[1] / "docs" / "physics.md"
BEGIN, END = "<!-- textbook: begin -->", "<!-- textbook: end -->"


def table() -> str:
    """The claims as a Markdown table."""
    lines = ["| what | taught | memfit | formula | left out |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        lines.append(f"| {claim.what} | {claim.taught} | {claim.text()} | {claim.formula} | {claim.leaves_out} |")
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """The page with what stands between the two marks replaced."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{PAGE}: the marks {BEGIN} and {END} are gone")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    wanted = page_with_table(text)
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
