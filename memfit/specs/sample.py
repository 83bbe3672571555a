"""A training sample in memfit's own form, whatever file format it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message. `pieces` are texts, and integers where the picture with that index of `Sample.images` stands."""

    role: Role
    pieces: tuple[str | int, ...]

    @property
    def text(self) -> str:
        """The words alone, without pictures."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))


@dataclass(frozen=True)
class Sample:
    """One conversation with its pictures. `row` is the 0-based position in the user's file, for messages."""

    id: str
    row: int
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]

    @property
    def picture_order(self) -> tuple[int, ...]:
        """Indices of `images` in the order in which the conversation shows them."""
        return tuple(piece for turn in self.turns for piece in turn.pieces if isinstance(piece, int))

    @property
    def answer(self) -> str:
        """The text of the last assistant turn: what evaluation compares with. Empty when there is none."""
        for turn in reversed(self.turns):
            if turn.role == "assistant":
                return turn.text
        return ""
