"""From a sample to token ids, labels and picture costs, without torch.

The conversation is rendered with the model's own chat template and tokenized once. Labels follow the characters:
every assistant answer and the end mark behind it carry loss, nothing else does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.errors import UserError
from memfit.families import family_for
from memfit.families.base import Images
from memfit.families.budget import picture_settings
from memfit.inputs.chat import (
    ChatTemplate,
    Style,
    always_opens,
    around_answer,
    content_style,
    joined_by_newlines,
    moves_pictures,
)
from memfit.inputs.model_source import ModelSource
from memfit.inputs.tokens import add_missing_tokens, load_tokenizer, special_names, special_pattern, tokens_of
from memfit.specs.recipe import ImageBudget
from memfit.specs.sample import Sample, Turn
from memfit.specs.workload import ImageCost, SampleCost

NO_LOSS = -100  # torch.nn.CrossEntropyLoss: ignore_index

# Private-use characters: no tokenizer's special token and no sensible text holds them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_KEPT_FRAMES = 1024

Size = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One sample as the model sees it.

    `input_ids`, `labels`: int32 [T]; labels are NO_LOSS where there is no loss. `image_order` lists the indices of
    `Sample.images` in the order in which they appear; `image_costs` and `image_spans` (first image token, one past the
    last) follow that order. `image_mask`: bool [T], true at image tokens.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    image_mask: NDArray[np.bool_]
    image_order: tuple[int, ...]
    image_costs: tuple[ImageCost, ...]
    image_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Text:
    """A rendered conversation: pictures stand as one image token each; `trained` are character spans with loss."""

    text: str
    trained: tuple[tuple[int, int], ...]


class Encoder:
    """Encodes samples for one model under one image budget.

    UserError at once when the tokenizer, the template or the budget does not suit the model. Public attributes:
    `source`, `family`, `processor_settings` (the preprocessor's, with the budget compiled in), `image_token`,
    `image_token_id` (both None for text models), `pad_id`, `stop_ids`, `end_mark` (the token that ends an answer),
    `adds_end_mark` (the template writes none, so it is put behind each answer), `moves_pictures` (the template puts a
    turn's pictures before its words).
    """

    def __init__(self, source: ModelSource, budget: ImageBudget | None = None) -> None:
        budget = budget or ImageBudget()
        self.source = source
        self.family = family_for(source.config)
        self.family.refuse_to_run()
        self.images = self.family.images
        self._budget_tokens = budget.max_tokens if isinstance(budget.max_tokens, int) else None
        self._tokenizer = load_tokenizer(source)
        self._names = special_names(source.tokenizer)
        add_missing_tokens(self._tokenizer, source.tokenizer, self._names.values())
        self._frames: dict[tuple[Any, ...], tuple[list[str], str]] = {}
        self.processor_settings = picture_settings(self.family, source.config, source.preprocessor, budget)
        self.image_token: str | None = None
        self.image_token_id: int | None = None
        if self.images is not None:
            self._read_image_token(source, self.images)
        self._specials = special_pattern(self._tokenizer, self._names.values())
        self._template = ChatTemplate(source.chat_template or self.family.chat_template or "", self._names)
        self._style: Style = content_style(self._template, self.image_token)
        self.end_mark, self.adds_end_mark, self._opening_gap = self._find_end_mark(source)
        self._always_opens = always_opens(self._template, self._style)
        self.moves_pictures = self._style == "parts" and moves_pictures(self._template, self.image_token)
        self.pad_id, self.stop_ids = self._ending_ids(source)

    # ---- costs -------------------------------------------------------------------------------------------------

    def cost(self, width: int, height: int) -> ImageCost:
        """What one picture takes. ValueError with the numbers for one that the model or the budget cannot take."""
        if self.images is None:
            raise ValueError("this model takes no pictures")
        cost = self.images.rule(self.processor_settings, width, height)
        if self._budget_tokens is not None and cost.tokens > self._budget_tokens:
            raise ValueError(
                f"a picture of {width} x {height} px takes {cost.tokens} tokens whatever the processor is told, "
                f"above image.max_tokens: {self._budget_tokens}"
            )
        return cost

    def sample_cost(self, encoded: Encoded) -> SampleCost:
        """Tokens, trained tokens, crops and patches of an encoded sample."""
        return SampleCost(
            tokens=len(encoded.input_ids),
            trained_tokens=int((encoded.labels != NO_LOSS).sum()),
            image_tokens=sum(cost.tokens for cost in encoded.image_costs),
            crops=sum(len(cost.crops) for cost in encoded.image_costs),
            patches=sum(cost.patches for cost in encoded.image_costs),
        )

    # ---- samples -----------------------------------------------------------------------------------------------

    def encode(self, sample: Sample, sizes: Sequence[Size]) -> Encoded:
        """Ids and labels of a whole conversation. `sizes` are (width, height) in the order of `sample.images`.

        UserError, naming the row, for a conversation that cannot be encoded as it stands.
        """
        order = self._checked_order(sample, sizes)
        if not any(turn.role == "assistant" for turn in sample.turns):
            raise UserError(f"row {sample.row}: no assistant turn, so nothing to learn from", "add an answer")
        layout = self._layout(sample, sample.turns)
        costs = self._costs(sample, sizes, order)
        return self._tokenize(sample, layout, order, costs)

    def prompt(self, sample: Sample, sizes: Sequence[Size]) -> NDArray[np.int32]:
        """Ids int32 [T] of everything before the last assistant turn, and the template's opening of an answer."""
        order = self._checked_order(sample, sizes)
        last = max((i for i, turn in enumerate(sample.turns) if turn.role == "assistant"), default=len(sample.turns))
        turns = sample.turns[:last]
        if sum(isinstance(piece, int) for turn in turns for piece in turn.pieces) != len(order):
            raise UserError(f"row {sample.row}: a picture stands after the last answer", "move it before the answer")
        layout = self._layout(sample, turns, generation=True)
        return self._tokenize(sample, layout, order, self._costs(sample, sizes, order)).input_ids

    def decode(self, ids: Sequence[int] | NDArray[np.int32], special: bool = False) -> str:
        """The words of `ids`; special tokens are left out unless `special`."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special))

    def special_tokens_in(self, text: str) -> list[str]:
        """Special tokens that `text` spells out, which the tokenizer would take for the real ones."""
        return self._specials.findall(text)

    # ---- text --------------------------------------------------------------------------------------------------

    def _checked_order(self, sample: Sample, sizes: Sequence[Size]) -> tuple[int, ...]:
        """Indices of the pictures in order of appearance, after the checks that need no rendering."""
        order = tuple(piece for turn in sample.turns for piece in turn.pieces if isinstance(piece, int))
        if len(sizes) != len(sample.images) or set(order) != set(range(len(sample.images))):
            raise UserError(
                f"row {sample.row}: {len(sample.images)} images, {len(sizes)} sizes, placeholders {list(order)}",
                "one placeholder for every image",
            )
        if order and self.images is None:
            raise UserError(f"row {sample.row}: {len(order)} images for a model that takes none", "use a vision model")
        for turn in sample.turns:
            if turn.role == "assistant" and any(isinstance(piece, int) for piece in turn.pieces):
                raise UserError(f"row {sample.row}: a picture inside an answer", "move it into the user's turn")
            found = self._specials.search(turn.text)
            if found is not None or _OPEN in turn.text:
                literal = found.group() if found else _OPEN
                raise UserError(
                    f"row {sample.row}: the {turn.role}'s words contain {literal!r}, a special token of this model",
                    f"remove {literal!r} or write it with spaces",
                )
        return order

    def _costs(self, sample: Sample, sizes: Sequence[Size], order: Sequence[int]) -> tuple[ImageCost, ...]:
        try:
            return tuple(self.cost(*sizes[index]) for index in order)
        except ValueError as error:
            raise UserError(f"row {sample.row}: {error}", "leave the picture out or cut it into pieces") from error

    def _messages(self, turns: Sequence[Turn], answers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Turns as the template takes them; `answers` stand in for the assistant's words."""
        messages: list[dict[str, Any]] = []
        waiting = iter(answers or ())
        for turn in turns:
            pieces: Sequence[str | int] = turn.pieces
            if turn.role == "assistant":
                pieces = (next(waiting),) if answers is not None else (turn.text,)
            content: Any
            if self._style == "text":
                marker = (self.images.marker or self.image_token) if self.images else ""
                if self.images and self.images.newlines:
                    content = joined_by_newlines(pieces, str(marker))
                else:
                    content = "".join(piece if isinstance(piece, str) else str(marker) for piece in pieces)
            else:
                content = [
                    {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in pieces
                ]
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render(self, sample: Sample, messages: list[dict[str, Any]], generation: bool) -> str:
        # enable_thinking: templates that know it then open an answer as they do in training.
        extra = {"enable_thinking": False} if generation else {}
        try:
            return self._template.render(messages, generation, **extra)
        except ValueError as error:
            raise UserError(f"row {sample.row}: {error}", "change the order of roles in this row") from error

    def _layout(self, sample: Sample, turns: Sequence[Turn], generation: bool = False) -> _Text:
        """The rendered conversation and where its answers stand.

        Answers are found by rendering unique stand-ins; the text with the real answers in their places must then be
        what the template renders for the real conversation.
        """
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        parts, tail = self._frame(sample, turns, generation)
        real = self._render(sample, self._messages(turns), generation)
        for candidate in (answers, [answer.strip() for answer in answers]):
            if "".join(b + a for b, a in zip(parts, candidate, strict=True)) + tail == real:
                if self._always_opens and not generation and tail.startswith(self.end_mark):
                    tail = self.end_mark  # the opening of an answer that never comes
                return self._marked(parts, candidate, tail)
        raise UserError(
            f"row {sample.row}: the chat template changes the words of an answer",
            "this template cannot be used for training; give the model folder another chat_template",
        )

    def _frame(self, sample: Sample, turns: Sequence[Turn], generation: bool) -> tuple[list[str], str]:
        """(the text before each answer, the text behind the last), kept: most data sets repeat a few prompts."""
        key = (generation, *((turn.role, turn.pieces if turn.role != "assistant" else None) for turn in turns))
        if key in self._frames:
            return self._frames[key]
        count = sum(turn.role == "assistant" for turn in turns)
        stand_ins = [f"{_OPEN}{index}{_CLOSE}" for index in range(count)]
        tail = self._render(sample, self._messages(turns, stand_ins), generation)
        parts: list[str] = []
        for stand_in in stand_ins:
            before, found, tail = tail.partition(stand_in)
            if not found or stand_in in tail:
                raise UserError(
                    f"row {sample.row}: the chat template does not keep answer {len(parts) + 1} as it is",
                    "this template cannot be used for training; give the model folder another chat_template",
                )
            parts.append(before)
        if len(self._frames) >= _KEPT_FRAMES:
            self._frames.clear()
        self._frames[key] = parts, tail
        return parts, tail

    def _marked(self, parts: Sequence[str], answers: Sequence[str], tail: str) -> _Text:
        """Joins the text; each trained span runs from the answer's start over its end mark."""
        text, spans = "", []
        for index, (before, answer) in enumerate(zip(parts, answers, strict=True)):
            text += before
            # What the template puts between its opening of an answer and the answer, the model has to say itself.
            start = len(text) - (len(self._opening_gap) if before.endswith(self._opening_gap) else 0)
            text += answer + (self.end_mark if self.adds_end_mark else "")
            stop = len(text)
            if not self.adds_end_mark:
                behind = parts[index + 1] if index + 1 < len(parts) else tail
                space = len(behind) - len(behind.lstrip())
                stop += space + len(self.end_mark) if behind.startswith(self.end_mark, space) else 0
            spans.append((start, stop))
        return _Text(text + tail, tuple(spans))

    # ---- ids ---------------------------------------------------------------------------------------------------

    def _tokenize(self, sample: Sample, layout: _Text, order: tuple[int, ...], costs: tuple[ImageCost, ...]) -> Encoded:
        """Tokenizes with one image token a crop, then repeats those: the same ids at a fraction of the time."""
        text, spans = self._place_pictures(sample, layout, costs)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int32)
        labels = np.full(len(ids), NO_LOSS, dtype=np.int32)
        for start, stop in spans:
            first, last = tokens_of(encoding, (start, stop), len(text))
            labels[first:last] = ids[first:last]
        if self.image_token_id is None:
            return Encoded(ids, labels, np.zeros(len(ids), dtype=bool), (), (), ())
        mask = ids == self.image_token_id
        counts = [count for cost in costs for count in cost.crop_tokens]
        if int(mask.sum()) != len(counts):
            raise UserError(
                f"row {sample.row}: {int(mask.sum())} image tokens for {len(counts)} crops",
                f"the chat template must write {self.image_token} once for every picture",
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[mask] = counts
        places = np.flatnonzero(mask)
        stops_at = np.cumsum(repeats)
        image_spans, crop = [], 0
        for cost in costs:
            first, last = places[crop], places[crop + len(cost.crop_tokens) - 1]
            image_spans.append((int(stops_at[first] - repeats[first]), int(stops_at[last])))
            crop += len(cost.crop_tokens)
        return Encoded(
            input_ids=np.repeat(ids, repeats),
            labels=np.repeat(labels, repeats),
            image_mask=np.repeat(mask, repeats),
            image_order=order,
            image_costs=costs,
            image_spans=tuple(image_spans),
        )

    def _place_pictures(
        self, sample: Sample, layout: _Text, costs: tuple[ImageCost, ...]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Puts each picture's placeholder (one image token a crop) in its place and moves the trained spans along."""
        if self.images is None or self.image_token is None:
            return layout.text, list(layout.trained)
        pieces = layout.text.split(self.image_token)
        if len(pieces) != len(costs) + 1:
            raise UserError(
                f"row {sample.row}: the chat template writes {len(pieces) - 1} pictures for {len(costs)}",
                "check that the template handles pictures in this turn",
            )
        settings = {**self.processor_settings, "tokens": self._names}
        text, position, moves = pieces[0], len(pieces[0]), []
        for index, (cost, following) in enumerate(zip(costs, pieces[1:], strict=True)):
            single = dataclasses.replace(cost, crop_tokens=(1,) * len(cost.crop_tokens))
            holder = self.images.placeholder(single, index, settings)
            moves.append((position, len(holder) - len(self.image_token)))
            text += holder + following
            position += len(self.image_token) + len(following)
        spans = []
        for start, stop in layout.trained:
            shift = sum(extra for place, extra in moves if place < start)
            spans.append((start + shift, stop + shift))
        return text, spans

    # ---- what the model's files say ----------------------------------------------------------------------------

    def _read_image_token(self, source: ModelSource, images: Images) -> None:
        config_id = source.config.get("image_token_id", source.config.get("image_token_index"))
        # As the processors choose it: the tokenizer's own name, else the family's.
        token = self._names.get("image_token", images.image_token)
        self.image_token, self.image_token_id = token, self._tokenizer.token_to_id(token)
        self._names["image_token"] = token
        if self.image_token_id is None or config_id not in (None, self.image_token_id):
            raise UserError(
                f"{token!r} has id {self.image_token_id} in tokenizer.json, the image token {config_id} in config.json",
                "the two files must come from the same model",
            )

    def _find_end_mark(self, source: ModelSource) -> tuple[str, bool, str]:
        """(the token that ends an answer, whether it has to be put there, the gap that opens an answer)."""
        try:
            gap, behind = around_answer(self._template, self._style, _OPEN)
        except ValueError as error:
            raise UserError(f"{source.name}: {error}", "give the model folder another chat_template") from error
        mark = self._specials.match(behind, len(behind) - len(behind.lstrip()))
        if mark is not None:
            return mark.group(), False, gap
        eos = self._names.get("eos_token")
        if eos is None:
            raise UserError(
                f"{source.name}: neither the chat template nor the tokenizer says how an answer ends",
                "name an eos_token in tokenizer_config.json",
            )
        return eos, True, gap

    def _ending_ids(self, source: ModelSource) -> tuple[int, tuple[int, ...]]:
        """(id used for padding, ids that end generation)."""

        def ids_of(value: Any) -> list[int]:
            if value is None:
                return []
            return [int(i) for i in value] if isinstance(value, list | tuple) else [int(value)]

        stops = set(ids_of(source.generation.get("eos_token_id") or source.config.get("eos_token_id")))
        for token in (self._names.get("eos_token"), self.end_mark):
            found = self._tokenizer.token_to_id(token) if token else None
            stops |= set(ids_of(found))
        pad = self._tokenizer.token_to_id(self._names["pad_token"]) if self._names.get("pad_token") else None
        if pad is None:
            pad = next(iter(ids_of(source.generation.get("pad_token_id"))), min(stops))
        return pad, tuple(sorted(stops))
