"""What was found in a user's own DeepSpeed configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# error: the run is refused. no-effect: stands there and does nothing. note: how it was read.
Kind = Literal["error", "no-effect", "note"]


@dataclass(frozen=True)
class Finding:
    """One line about one key: what is found there, and the smallest change that mends it."""

    kind: Kind
    key: str
    problem: str
    hint: str = ""

    @property
    def line(self) -> str:
        """As a person reads it."""
        return f"{self.key}: {self.problem}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True)
class DeepSpeedCheck:
    """A file, what was found in it, and what it fixes.

    `values`: recipe keys that the file decides. `zero`: the numbers that are priced, as in `engine: {zero: ...}`.
    `keys`: the DeepSpeed version whose keys it was held against. `price`: the first line of the forecast with it, None
    without a recipe.
    """

    file: str
    findings: tuple[Finding, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    keys: str = ""
    price: str | None = None

    def of(self, kind: Kind) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    @property
    def verdict(self) -> str:
        """ "refused" where a run with this file would be refused, else "ok"."""
        return "refused" if self.of("error") else "ok"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"verdict": self.verdict, **dataclasses.asdict(self)}

    def text(self) -> str:
        """As a person reads it."""
        words = {"error": "must be mended", "no-effect": "has no effect", "note": "as it was read"}
        lines = [f"{self.file}: {self.verdict}, held against the keys of DeepSpeed {self.keys}"]
        for kind, title in words.items():
            found = [finding for finding in self.findings if finding.kind == kind]
            lines += [f"\n{title}"] * bool(found) + [f"  {finding.line}" for finding in found]
        for title, values in (("decides", self.values), ("priced", self.zero)):
            lines += [f"\n{title}"] * bool(values) + [f"  {key}: {value}" for key, value in values.items()]
        return "\n".join([*lines, *([f"\n{self.price}"] if self.price else [])])
