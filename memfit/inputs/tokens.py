"""The tokenizer's files: tokenizer.json, and the special tokens that tokenizer_config.json names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from memfit.errors import UserError
from memfit.inputs.model_source import ModelSource

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(source: ModelSource) -> Tokenizer:
    if source.folder is None:
        raise UserError(
            f"{source.name} is a config.json alone: it brings no tokenizer",
            "name a model folder or a hub id; workload keys need none",
        )
    path = source.folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{source.folder} holds no tokenizer.json",
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}", "fetch or save the tokenizer again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens of tokenizer_config.json: bos_token and the like, and extra_special_tokens by name."""
    named: dict[str, Any] = {name: settings.get(name) for name in _NAMED}
    # transformers 5 writes the second of these names when it saves a tokenizer that was read with the first.
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        extra = settings.get(key)
        named |= extra if isinstance(extra, dict) else {}
    # Older files name the model's own tokens at the top level ("image_token": "<image>").
    named |= {name: value for name, value in settings.items() if name.endswith("_token") and name not in named}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def add_missing_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Adds tokens that tokenizer_config.json names and tokenizer.json lacks, in the order transformers adds them."""
    decoder = settings.get("added_tokens_decoder") or {}
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(entry["content"]) is None:
            tokenizer.add_tokens([AddedToken(**entry)])
    missing = [token for token in names if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in missing])


def special_pattern(tokenizer: Tokenizer, names: Iterable[str]) -> re.Pattern[str]:
    """Matches any special token spelt out, the longest first."""
    added = tokenizer.get_added_tokens_decoder().values()
    tokens = {entry.content for entry in added if entry.special} | set(names)
    ordered = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def tokens_of(encoding: Any, span: tuple[int, int], length: int) -> tuple[int, int]:
    """Every token that holds a character of `span`, also one that began before it: the first, one past the last.

    `length`: characters of the text. The tokenizer is asked for both ends: a list of all offsets takes half as long as
    tokenizing.
    """
    (start, stop), count = span, len(encoding)
    first = encoding.char_to_token(start) if stop > start else None
    last = encoding.char_to_token(stop) if stop < length else count
    before = encoding.token_to_chars(first - 1) if first else (0, 0)
    if first is not None and last is not None and before is not None and before[1] <= start:
        # Of a character that is several tokens, and of a token that is several characters, all count.
        while last < count and (place := encoding.token_to_chars(last)) is not None and place[0] < stop:
            last += 1
        while last > first and (place := encoding.token_to_chars(last - 1)) is not None and place[0] >= stop:
            last -= 1
        return first, last
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, stops = np.maximum.accumulate(offsets, axis=0).T
    return int(np.searchsorted(stops, start, "right")), int(np.searchsorted(starts, stop, "left"))
