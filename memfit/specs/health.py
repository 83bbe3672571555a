"""What `memfit doctor` finds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

# ok: nothing to do. warn: some runs will suffer. fail: training is impossible until it is mended.
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class HealthFinding:
    """One thing that was looked at: its status, what was found with its number, and the fix in one line ("" for none).

    `value` is the number by itself, bytes where it is a size; None where there is none.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
    value: float | int | str | None = None


@dataclass(frozen=True)
class Health:
    """All findings, in the order in which a person mends them."""

    findings: tuple[HealthFinding, ...]
    seconds: float

    @property
    def verdict(self) -> Status:
        """The worst status."""
        found = {finding.status for finding in self.findings}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"verdict": self.verdict, **dataclasses.asdict(self)}

    def text(self) -> str:
        """As a person reads it; fixes below what they mend."""
        wide = max(len(finding.name) for finding in self.findings)
        lines = []
        for one in self.findings:
            lines.append(f"{one.status:4}  {one.name:{wide}}  {one.found}")
            lines += [f"{'':{wide + 8}}fix: {one.fix}"] if one.fix else []
        words = {"ok": "nothing stands in the way", "warn": "training is possible", "fail": "training is not possible"}
        return "\n".join([*lines, "", f"{words[self.verdict]} ({self.seconds:.1f} s)"])
