"""Conversations as the checkpoints' own finetuning script encodes them, quirks included: for parity, not for training.

memfit trains by `memfit.inputs.encode.Encoder`: image numbers always written, no extra end target, labels that follow
the answers' characters, nothing cut. This file is the other side of that comparison.
Source: OpenBMB/MiniCPM-o, finetune/dataset.py (conversation_to_ids, preprocess).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from memfit.families.minicpmv2 import TOKENS, image_cost, placeholder
from memfit.inputs.chat import ChatTemplate

NO_LOSS = -100
_NAMED = re.compile(r"(<image_\d+>)")


@dataclass(frozen=True)
class Dialect:
    """What the script calls llm_type: the end mark, the tokens between the word `assistant` and its answer, the target
    behind an answer, and the thought that a template puts before the last answer."""

    end: str
    header: int
    thought: bool = False
    opens_always: bool = False


QWEN2, QWEN3 = Dialect("<|im_end|>", 2), Dialect("<|im_end|>", 2, thought=True)
LLAMA3 = Dialect("<|eot_id|>", 3, opens_always=True)
DIALECTS = {"2.5": LLAMA3, "2.6": QWEN2, "4.0": QWEN2, "4.5": QWEN3, "o-2.6": QWEN2, "o-4.5": QWEN3}

Pictures = Mapping[str, tuple[int, int]]  # name in the text -> (width, height)


@dataclass(frozen=True)
class ReferenceEncoder:
    """The script's rules with one tokenizer, template and the settings of `families.minicpmv2.processor_settings`."""

    tokenizer: Tokenizer
    template: ChatTemplate
    settings: Mapping[str, Any]
    dialect: Dialect
    max_length: int | None = None

    def encode(self, conversation: Sequence[Mapping[str, str]], pictures: Pictures) -> dict[str, list[Any]]:
        """input_ids, labels (not shifted) and image_bound. ValueError where the script raises."""
        ids = self._ids(self._text(self._placed(conversation, pictures)))
        learns = self._learns(ids)
        limit = len(ids) if self.max_length is None else self.max_length
        ids, learns = ids[:limit], learns[:limit]
        if not any(learns):
            raise ValueError("no tokens are left to compute a loss on")
        end = self._id(self.dialect.end)
        labels: list[int | None] = [token if on else NO_LOSS for token, on in zip(ids, learns, strict=True)]
        for place in range(1, len(ids)):
            if learns[place - 1] and not learns[place]:
                labels[place] = end  # the script's extra target: the end mark again, at whatever follows it
        labels[0] = NO_LOSS  # nothing predicts the first token
        return {"input_ids": ids, "labels": labels, "image_bound": image_bounds(ids, self._id, self._wrapped)}

    @property
    def _wrapped(self) -> bool:
        return bool(self.settings.get("slices_wrapped"))

    def _id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def _holders(self, pictures: Pictures) -> dict[str, str]:
        """Placeholder texts by name. Only pictures that are cut get a number, and only those are counted."""
        holders, cut = {}, 0
        for name, (width, height) in pictures.items():
            cost = image_cost(self.settings, width, height)
            numbered = bool(self.settings.get("use_image_id")) and cost.grid != (0, 0)
            holders[name] = placeholder(cost, cut, {**self.settings, "use_image_id": numbered})
            cut += int(numbered)
        return holders

    def _placed(self, conversation: Sequence[Mapping[str, str]], pictures: Pictures) -> list[dict[str, str]]:
        """Turns with placeholders: one picture at its tag in the first turn or before it, several by their names."""
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in conversation]
        holders = self._holders(pictures)
        if len(holders) == 1 and "<image>" in holders:
            holder, first = holders["<image>"], turns[0]
            found = "<image>" in first["content"]
            words = first["content"].replace("<image>", holder) if found else f"{holder}\n{first['content']}"
            turns[0] = {**first, "content": words}
            return turns
        if holders:
            for turn in turns:
                pieces = _NAMED.split(turn["content"])
                turn["content"] = "\n".join(holders.get(piece, piece) for piece in pieces)
        return turns

    def _text(self, turns: list[dict[str, str]]) -> str:
        text = self.template.render(turns)
        if self.dialect.opens_always:
            # Training must not end on the opening of an answer, which the checkpoint's template always writes.
            text = text[: text.rindex(self.dialect.end) + len(self.dialect.end)]
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _learns(self, ids: Sequence[int]) -> list[bool]:
        """True from the answer's first token to the next end mark behind it (over the next turn after an empty one)."""
        word, end = self._id("assistant"), self._id(self.dialect.end)
        ends = [place for place, token in enumerate(ids) if token == end]
        learns = [False] * len(ids)
        openings = [place for place, token in enumerate(ids) if token == word]
        for opening in openings:
            start = opening + self.dialect.header
            if self.dialect.thought and opening == openings[-1] and ids[start : start + 1] == [self._id("<think>")]:
                start += 4
            stop = next((place for place in ends if place > start), None)
            if stop is not None:
                learns[start : stop + 1] = [True] * (stop + 1 - start)
        return learns


def image_bounds(ids: Sequence[int], id_of: Any, wrapped: bool) -> list[list[int]]:
    """[start, end) of each crop's queries, between its tags. ValueError when tags do not pair, as in the script."""
    opening = {id_of(TOKENS["image_start_token"])}
    closing = {id_of(TOKENS["image_end_token"])}
    if not wrapped:
        opening.add(id_of(TOKENS["slice_start_token"]))
        closing.add(id_of(TOKENS["slice_end_token"]))
    starts = [place + 1 for place, token in enumerate(ids) if token in opening]
    stops = [place for place, token in enumerate(ids) if token in closing]
    if len(starts) != len(stops):
        raise ValueError(f"{len(starts)} pictures begin and {len(stops)} end")
    return [list(pair) for pair in zip(starts, stops, strict=True)]
