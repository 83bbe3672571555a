"""Tapes in files: of one step, all that were made. Written with short words and a table of texts, since they ship."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from memfit.inputs.cache import cache_folder, write_cached
from memfit.inputs.shipped import shipped
from memfit.specs.tape import Domain, Loop, Reference, SizeTerm, Slot, Tape

FOLDER = "tapes"


def load_tapes(key: str) -> tuple[Tape, ...]:
    """Cached or shipped tapes; none where there are none that can be read."""
    try:
        value = json.loads((cache_folder() / FOLDER / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = shipped(FOLDER, key)
    try:
        return tuple(map(_read, value["tapes"])) if value else ()
    except (KeyError, TypeError, ValueError, IndexError):
        return ()


def store_tapes(key: str, tapes: Sequence[Tape]) -> None:
    """Keep the tapes of one step."""
    write_cached(cache_folder() / FOLDER / f"{key}.json", {"tapes": [_written(tape) for tape in tapes]})


def _written(tape: Tape) -> dict[str, Any]:
    texts: dict[str, int] = {}

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    columns = [
        [number(slot.kind) for slot in tape.slots],
        [number(slot.phase) for slot in tape.slots],
        [number(slot.path) for slot in tape.slots],
        [number(slot.op) for slot in tape.slots],
        [-1 if slot.size is None else slot.size for slot in tape.slots],
    ]
    # Most events are about what stands a little before them: how far, rather than which.
    about = [
        [[at - one.slot, number(one.way), one.by] for one in slot.about]
        for at, slot in enumerate(tape.slots)
        if slot.about
    ]
    return {
        "domain": [tape.domain.rows, tape.domain.tokens, tape.domain.padded],
        "device": tape.device,
        "substitutions": tape.substitutions,
        "parameters": tape.parameters,
        "functions": tape.functions,
        "columns": columns,
        "about": about,
        "loops": tape.loops,
        "inputs": tape.inputs,
        "flops": [[number(phase), number(path), size] for phase, path, size in tape.flops],
        "folds": tape.folds,
        "held_out": tape.held_out,
        "texts": list(texts),
    }


def _read(value: dict[str, Any]) -> Tape:
    texts = value["texts"]
    rows, tokens, padded = value["domain"]
    about = iter(value["about"])
    made, free = ("alloc", "host"), ("free", "host-free", "gradient")
    slots = []
    for at, (kind, phase, path, op, size) in enumerate(zip(*value["columns"], strict=True)):
        word = texts[kind]
        found = next(about) if word in free else ()
        references = tuple(Reference(at - slot, texts[way], by) for slot, way, by in found)
        slots.append(Slot(word, texts[phase], texts[path], texts[op], size if word in made else None, references))
    return Tape(
        domain=Domain(tuple(rows), tuple(tokens), padded),
        device=value["device"],
        substitutions=tuple(value["substitutions"]),
        parameters=value["parameters"],
        functions=tuple(tuple(SizeTerm(*term) for term in function) for function in value["functions"]),
        slots=tuple(slots),
        loops=tuple(Loop(*loop) for loop in value["loops"]),
        inputs=value["inputs"],
        flops=tuple((texts[phase], texts[path], size) for phase, path, size in value["flops"]),
        folds=tuple((part, tuple(kinds), tuple(stands)) for part, kinds, stands in value["folds"]),
        held_out=tuple(map(tuple, value["held_out"])),
    )
