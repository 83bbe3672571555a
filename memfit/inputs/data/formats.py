"""The data formats that memfit reads. To add one: a function from row to Draft, a test for its look, and its key.

| key | rows look like |
|---|---|
| openbmb | {"image": path or {"<image_00>": path}, "conversations": [{"role", "content"}]} |
| llava | {"image": path, "conversations": [{"from": human or gpt, "value"}]} |
| sharegpt | the same with "images": [paths], "system", or no picture at all |
| openai | {"messages": [{"role", "content": text or [{"type": "text"}, {"type": "image_url"}]}]} |
| swift | {"messages": [{"role", "content"}], "images": [paths]}, or query, response, history, system |

Where the formats' own tools leave a choice, this is what memfit does:
- A picture stands exactly where its placeholder stands; nothing is added around it. (OpenBMB's script joins the pieces
  around `<image_NN>` with newlines.)
- openbmb, one picture, no `<image>` in the text: the picture and a newline come before the first turn, as in
  OpenBMB's script.
- swift, pictures but no `<image>` at all: they come before the first turn that is not the system's, as in ms-swift.
  (ms-swift also fills up a part of the tags; memfit calls that row broken, because it is most often a mistake.)
- Keys that a format does not know are ignored, counted and reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from memfit.errors import UserError
from memfit.inputs.data.draft import (
    NUMBERED,
    PLACEHOLDER,
    Draft,
    RowError,
    Said,
    check_keys,
    check_turns,
    kind,
    message_list,
    nearest,
    picture_first,
    picture_list,
    picture_path,
    place_by_name,
    place_in_order,
    plain_text,
    role_of,
    turn_value,
)
from memfit.specs.sample import Turn

_PICTURES = ("image", "images")


class Format(NamedTuple):
    """`looks_like` answers from one row whether the file may have this format; `read` raises RowError."""

    looks_like: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Draft]


def _finish(row: Mapping[str, Any], turns: tuple[Turn, ...], images: list[str], ignored: tuple[str, ...]) -> Draft:
    check_turns(turns)
    name = row.get("id")
    return Draft(None if name is None else str(name), turns, tuple(images), ignored)


def _read_turns(turns: list[Any], role_key: str, text_key: str) -> list[Said]:
    said = []
    for index, turn in enumerate(turns):
        role = role_of(turn_value(turn, index, role_key), index)
        said.append(Said(role, plain_text(turn_value(turn, index, text_key), index, text_key)))
    return said


def _system(row: Mapping[str, Any], said: list[Said]) -> list[Said]:
    """`said` with the row's own `system` text in front."""
    if not row.get("system"):
        return said
    if said and said[0].role == "system":
        raise RowError("bad-row", "both a 'system' key and a system turn are given; keep one")
    return [Said("system", plain_text(row["system"], 0, "system")), *said]


def read_openbmb(row: Mapping[str, Any]) -> Draft:
    """OpenBMB conversations. Source of the rules: `finetune/dataset.py` of OpenBMB/MiniCPM-o."""
    ignored = check_keys(row, ("id", "conversations", "system", *_PICTURES), ("conversations", *_PICTURES))
    said = _system(row, _read_turns(message_list(row, "conversations"), "role", "content"))
    named = row.get("image")
    if isinstance(named, dict) and named:
        if row.get("images"):
            raise RowError("bad-row", "both 'image' and 'images' are given; keep one")
        names = [str(name) for name in named]
        images = [picture_path(path, f"'image' {name}") for name, path in named.items()]
        if names == ["<image>"]:
            return _finish(row, _place_single(said), images, ignored)
        return _finish(row, place_by_name(said, names), images, ignored)
    images = picture_list({**row, "image": None} if named == {} else row)
    stray = [word for turn in said for word in NUMBERED.findall(turn.text)]
    if stray:
        raise RowError("placeholder-count", f"{stray[0]} in the text, but 'image' does not name it")
    turns = _place_single(said) if len(images) == 1 else place_in_order(said, len(images))
    return _finish(row, turns, images, ignored)


def _place_single(said: list[Said]) -> tuple[Turn, ...]:
    if not any(PLACEHOLDER.search(turn.text) for turn in said):
        said = picture_first(said, 1, "\n")
    return place_in_order(said, 1)


def _read_from_value(row: Mapping[str, Any]) -> Draft:
    known = ("id", "conversations", "system", *_PICTURES)
    ignored = check_keys(row, known, ("conversations", *_PICTURES))
    said = _system(row, _read_turns(message_list(row, "conversations"), "from", "value"))
    images = picture_list(row)
    return _finish(row, place_in_order(said, len(images)), images, ignored)


def read_llava(row: Mapping[str, Any]) -> Draft:
    """LLaVA: one placeholder for each picture, in order; a row without a picture is text."""
    return _read_from_value(row)


def read_sharegpt(row: Mapping[str, Any]) -> Draft:
    """ShareGPT, as LLaMA-Factory reads it: LLaVA's turns with `images` and an optional `system` text."""
    return _read_from_value(row)


def read_openai(row: Mapping[str, Any]) -> Draft:
    """OpenAI messages. Pictures are content parts; a part of type image without a path takes the next of `images`."""
    ignored = check_keys(row, ("id", "messages", *_PICTURES), ("messages", *_PICTURES))
    waiting = picture_list(row)
    messages = message_list(row, "messages")
    if waiting and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise RowError("bad-row", "'images' beside plain texts is ms-swift's format; set data.format: swift")
    images: list[str] = []
    turns = [_parts_turn(message, index, images, waiting) for index, message in enumerate(messages)]
    if waiting:
        raise RowError("placeholder-count", f"{len(waiting)} of 'images' have no image part in the messages")
    return _finish(row, tuple(turns), images, ignored)


def _parts_turn(message: Any, index: int, images: list[str], waiting: list[str]) -> Turn:
    """One message; adds its pictures to `images` and takes from `waiting` where a part names none."""
    role = role_of(turn_value(message, index, "role"), index)
    content = turn_value(message, index, "content")
    if content is None and role == "assistant":
        raise RowError("empty-answer", f"turn {index} (assistant) has no text")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    pieces: list[str | int] = []
    for part in parts:
        what = turn_value(part, index, "type")
        if what in ("text", "input_text", "output_text"):
            pieces.append(plain_text(turn_value(part, index, "text"), index, "text"))
        elif what in ("image_url", "image", "input_image"):
            images.append(_part_path(part, index, waiting))
            pieces.append(len(images) - 1)
        else:
            raise RowError("bad-row", f"turn {index}: content of type {what!r} is not supported")
    return Turn(role, tuple(piece for piece in pieces if piece != ""))


def _part_path(part: Mapping[str, Any], index: int, waiting: list[str]) -> str:
    for key in ("image_url", "image", "url", "path"):
        value = part.get(key)
        if value is not None:
            value = value.get("url") if key == "image_url" and isinstance(value, dict) else value
            return picture_path(value, f"turn {index}: {key!r}")
    if not waiting:
        raise RowError("placeholder-count", f"turn {index}: an image part without a path, and no more 'images'")
    return waiting.pop(0)


def read_swift(row: Mapping[str, Any]) -> Draft:
    """ms-swift: `messages` with `<image>` tags and `images`, or the older query, response, history, system."""
    if "messages" not in row and ("query" in row or "response" in row):
        return _read_query(row)
    ignored = check_keys(row, ("id", "messages", "system", *_PICTURES), ("messages", *_PICTURES))
    messages = message_list(row, "messages")
    if any(isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages):
        return read_openai({key: value for key, value in row.items() if key not in ignored})
    said = _system(row, _read_turns(messages, "role", "content"))
    return _place_swift(row, said, ignored)


def _read_query(row: Mapping[str, Any]) -> Draft:
    needed = ("query", "response", "system", *_PICTURES)
    ignored = check_keys(row, ("id", "history", *needed), needed)
    said: list[Said] = []
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise RowError("bad-row", "'history' must be a list of [question, answer] pairs")
    for question, answer in [*history, [row.get("query"), row.get("response")]]:
        said.append(Said("user", plain_text(question, len(said), "query")))
        said.append(Said("assistant", plain_text(answer, len(said), "response")))
    return _place_swift(row, _system(row, said), ignored)


def _place_swift(row: Mapping[str, Any], said: list[Said], ignored: tuple[str, ...]) -> Draft:
    images = picture_list(row)
    if images and not any(PLACEHOLDER.search(turn.text) for turn in said):
        said = picture_first(said, len(images), "")
    return _finish(row, place_in_order(said, len(images)), images, ignored)


def _turn_has(row: Mapping[str, Any], key: str) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and key in turns[0]


def _looks_like_swift(row: Mapping[str, Any]) -> bool:
    messages = row.get("messages")
    if not isinstance(messages, list):
        return "query" in row and "response" in row
    texts = [m.get("content") for m in messages if isinstance(m, dict)]
    plain = [text for text in texts if isinstance(text, str)]
    return len(plain) == len(texts) and (any(row.get(k) for k in _PICTURES) or any("<image>" in text for text in plain))


READERS: dict[str, Format] = {
    "openbmb": Format(lambda row: _turn_has(row, "role"), read_openbmb),
    "llava": Format(lambda row: _turn_has(row, "from") and "image" in row, read_llava),
    "sharegpt": Format(lambda row: _turn_has(row, "from"), read_sharegpt),
    "swift": Format(_looks_like_swift, read_swift),
    "openai": Format(lambda row: isinstance(row.get("messages"), list), read_openai),
}
# A file whose rows look partly like the left and partly like the right format is read as the right, which reads both.
_COVERS = {"openai": "swift", "sharegpt": "llava"}


def detect_format(rows: Iterable[Any], name: str = "the data file") -> str:
    """The format that most of `rows` look like. UserError, with the keys that were found, when none fits."""
    votes: Counter[str] = Counter()
    seen: list[Any] = []
    for row in rows:
        seen.append(row)
        found = next((key for key, form in READERS.items() if isinstance(row, dict) and form.looks_like(row)), None)
        if found:
            votes[found] += 1
    if not votes:
        raise _unknown_format(seen, name)
    best = votes.most_common(1)[0][0]
    wider = _COVERS.get(best)
    return wider if wider and votes[wider] else best


def _unknown_format(rows: list[Any], name: str) -> UserError:
    formats = ", ".join(READERS)
    first = next((row for row in rows if isinstance(row, dict)), None)
    if first is None:
        what = kind(rows[0]) if rows else "nothing"
        return UserError(f"{name}: rows must be objects, the first is {what}", f"formats that are read: {formats}")
    keys = ", ".join(map(str, first)) or "none"
    problem = f"{name}: no known data format; the first row has the keys {keys}"
    for key in first:
        meant = nearest(str(key), ("conversations", "messages"))
        if meant and meant not in first:
            return UserError(problem, f"did you mean {meant!r} by {key!r}?")
    inner = next((key for key, value in first.items() if isinstance(value, list) and len(first) <= 3), None)
    if inner is not None and len(rows) == 1:
        return UserError(problem, f"make the file the list that stands under {inner!r}")
    return UserError(problem, f"formats that are read: {formats}; see the table in memfit/inputs/data/formats.py")


def file_path(reference: str) -> str:
    """A picture reference as a path: `file://` addresses are unwrapped. RowError for what is not a file."""
    start = reference[:16].lower()
    if start.startswith("data:"):
        raise RowError("remote-image", "inline data: pictures are not read; write the picture to a file")
    if start.startswith("file:"):
        parts = urlsplit(reference)
        host = "" if parts.netloc == "localhost" else parts.netloc
        return unquote(host + parts.path)
    if "://" in start:
        raise RowError("remote-image", f"{reference[:80]} is not fetched; download the picture and give its path")
    return reference
