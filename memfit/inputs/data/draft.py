"""What every format's reader shares: turns, placeholders, misspelt keys. Pure functions of one row, no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz import fuzz, process

from memfit.specs.sample import Role, Turn

PLACEHOLDER = re.compile("<image>")
NUMBERED = re.compile(r"<image_\d+>")

# Spellings of the roles, over all formats that are read.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
# 0 to 100, rapidfuzz's ratio (share of characters in common): "img" for "image" has 75, "page" for "image" 67.
_NEAR = 75
# Names that people give to the picture's key and that are no slip of the finger.
_ALIASES = {"image_path": "image", "img_path": "image", "image_file": "image", "picture": "image", "photo": "image"}
# Keys of the peers' formats whose content memfit cannot honour: dropping them would change what is learned.
_UNSUPPORTED = ("videos", "video", "audios", "audio", "tools", "functions", "rejected_response", "objects")


class RowError(Exception):
    """This row cannot be used; `reason` is a key of `specs.check.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Draft:
    """A row that has been understood; its pictures are not looked for yet: `images` are as the user wrote them."""

    id: str | None
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """One message before its placeholders are resolved."""

    role: Role
    text: str


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is probably meant to be, or None."""
    if word in _ALIASES and _ALIASES[word] in known:
        return _ALIASES[word]
    found = process.extractOne(word.lower(), list(known), scorer=fuzz.ratio, score_cutoff=_NEAR)
    return found[0] if found else None


def check_keys(row: Mapping[str, Any], known: Sequence[str], needed: Sequence[str]) -> tuple[str, ...]:
    """The keys of `row` that the format does not know. RowError when one is a misspelt `needed` key, or unsupported.

    A key is taken for a slip only where the key it resembles is absent, so that notes of the user's own stay allowed.
    """
    for key in _UNSUPPORTED:
        if row.get(key):
            raise RowError("bad-row", f"{key!r} is not supported: remove it, or leave the row out")
    ignored = tuple(str(key) for key in row if key not in known)
    for key in ignored:
        meant = nearest(key, needed)
        if meant is not None and meant not in row:
            raise RowError("unknown-key", f"unknown key {key!r}; did you mean {meant!r}?")
    return ignored


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def role_of(value: Any, index: int) -> Role:
    """Raises RowError for a role that is not read (tools, functions, observations) or misspelt."""
    if isinstance(value, str) and value.lower() in ROLES:
        return ROLES[value.lower()]
    guess = nearest(value, ROLES) if isinstance(value, str) else None
    hint = f"; did you mean {guess!r}?" if guess else "; roles are system, user and assistant"
    raise RowError("bad-row", f"turn {index}: role {value!r} is not known{hint}")


def message_list(row: Mapping[str, Any], key: str) -> list[Any]:
    """The list under `key`. RowError when it is missing, empty or not a list."""
    if key not in row:
        meant = next((k for k in row if nearest(str(k), [key])), None)
        detail = f"unknown key {meant!r}; did you mean {key!r}?" if meant else f"no key {key!r}; it has {_keys(row)}"
        raise RowError("unknown-key" if meant else "bad-row", detail)
    value = row[key]
    if not isinstance(value, list) or not value:
        raise RowError(
            "bad-row", f"{key!r} must be a list of turns, it is {'an empty list' if value == [] else kind(value)}"
        )
    return value


def _keys(row: Mapping[str, Any]) -> str:
    names = [str(key) for key in row]
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no keys"


def turn_value(turn: Any, index: int, key: str) -> Any:
    """`turn[key]`. RowError when the turn is no object or lacks the key, naming the key it may be misspelt as."""
    if not isinstance(turn, dict):
        raise RowError("bad-row", f"turn {index} must be an object, it is {kind(turn)}")
    if key not in turn:
        meant = next((k for k in turn if nearest(str(k), [key])), None)
        detail = f"unknown key {meant!r}; did you mean {key!r}?" if meant else f"no key {key!r}; it has {_keys(turn)}"
        raise RowError("unknown-key" if meant else "bad-row", f"turn {index}: {detail}")
    return turn[key]


def plain_text(value: Any, index: int, key: str) -> str:
    """`value` as text that a tokenizer can take."""
    if not isinstance(value, str):
        more = "; write the answer as a JSON string" if isinstance(value, dict | list) else ""
        raise RowError("bad-row", f"turn {index}: {key!r} must be text, it is {kind(value)}{more}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("bad-row", f"turn {index}: {key!r} holds half of a surrogate pair at {error.start}") from error
    return value


def picture_list(row: Mapping[str, Any]) -> list[str]:
    """The pictures under `image` or `images`: a string, a list of strings, or of objects with a `path`."""
    given = [key for key in ("image", "images") if row.get(key) not in (None, [])]
    if len(given) > 1:
        raise RowError("bad-row", "both 'image' and 'images' are given; keep one")
    if not given:
        return []
    value = row[given[0]]
    entries = value if isinstance(value, list) else [value]
    return [picture_path(entry, f"{given[0]!r}") for entry in entries]


def picture_path(entry: Any, where: str) -> str:
    """The path in one entry, which is a string or an object with a `path`."""
    if isinstance(entry, dict):
        if entry.get("bytes"):
            raise RowError("remote-image", f"{where} holds the picture itself; write it to a file and give its path")
        entry = entry.get("path", entry.get("image"))
    if not isinstance(entry, str):
        raise RowError("bad-row", f"{where} must be a path, it is {kind(entry)}")
    if not entry.strip():
        raise RowError("missing-image", f"{where} is an empty path")
    return entry


def place_in_order(said: Sequence[Said], pictures: int, mark: re.Pattern[str] = PLACEHOLDER) -> tuple[Turn, ...]:
    """Turns in which the n-th placeholder is the n-th picture. RowError when their numbers differ.

    What surrounds a placeholder stays as it is, newlines included.
    """
    found = sum(len(mark.findall(turn.text)) for turn in said)
    if found != pictures:
        raise RowError("placeholder-count", f"{_count(found, 'placeholder')} for {_count(pictures, 'picture')}")
    turns, upcoming = [], 0
    for turn in said:
        pieces: list[str | int] = []
        last = 0
        for match in mark.finditer(turn.text):
            pieces += [turn.text[last : match.start()], upcoming]
            upcoming += 1
            last = match.end()
        pieces.append(turn.text[last:])
        turns.append(Turn(turn.role, tuple(piece for piece in pieces if piece != "")))
    return tuple(turns)


def place_by_name(said: Sequence[Said], names: Sequence[str]) -> tuple[Turn, ...]:
    """Turns in which each of `names` (`<image_00>`) is its picture. Each must stand in the text exactly once."""
    mark = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    seen = [name for turn in said for name in mark.findall(turn.text)]
    stray = sorted({word for turn in said for word in NUMBERED.findall(turn.text)} - set(names))
    missing = sorted(set(names) - set(seen))
    twice = sorted({name for name in seen if seen.count(name) > 1})
    for words, what in (
        (stray, "without a picture"),
        (missing, "not in the text"),
        (twice, "more than once in the text"),
    ):
        if words:
            raise RowError("placeholder-count", f"{', '.join(words[:4])} {what}")
    turns = []
    for turn in said:
        pieces = [names.index(part) if part in names else part for part in re.split(f"({mark.pattern})", turn.text)]
        turns.append(Turn(turn.role, tuple(piece for piece in pieces if piece != "")))
    return tuple(turns)


def picture_first(said: Sequence[Said], pictures: int, separator: str) -> list[Said]:
    """Put `pictures` placeholders before the first turn that is not the system's."""
    at = next((index for index, turn in enumerate(said) if turn.role != "system"), 0)
    front = Said(said[at].role, "<image>" * pictures + separator + said[at].text)
    return [*said[:at], front, *said[at + 1 :]]


def check_turns(turns: Sequence[Turn]) -> None:
    """The rules that hold for every format. RowError for the first that is broken."""
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no-assistant-turn", f"{_count(len(turns), 'turn')}, none of them the assistant's")
    talk = [(index, turn) for index, turn in enumerate(turns) if turn.role != "system"]
    if talk[0][1].role != "user":
        raise RowError("turn-order", f"turn {talk[0][0]} is the assistant's; the user must speak first")
    if talk[-1][1].role != "assistant":
        raise RowError("turn-order", f"the last turn ({talk[-1][0]}) is the user's; nothing answers it")
    for index, turn in talk:
        if turn.role == "assistant" and any(isinstance(piece, int) for piece in turn.pieces):
            raise RowError("placeholder-count", f"turn {index}: a picture stands in an assistant turn")
        if turn.role == "assistant" and not turn.text.strip():
            raise RowError("empty-answer", f"turn {index} (assistant) has no text")
        if turn.role == "user" and not turn.text.strip() and not any(isinstance(p, int) for p in turn.pieces):
            raise RowError("bad-row", f"turn {index} (user) has neither text nor picture")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
