"""Bring a sample under a length without cutting anything in two: whole turns go, with their pictures.

The oldest go first, as in a chat whose window is full, and the last answer stays. But no answer outlives the picture it
may speak of: where a picture's own turn has to go, the turns that follow it up have gone before. A model that is taught
to answer about a picture which it was not shown learns to make things up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memfit.errors import UserError
from memfit.specs.sample import Sample, Turn

if TYPE_CHECKING:
    from memfit.inputs.data.examine import SampleEncoder

Size = tuple[int, int]
# Indices: of the turns of one question up to the end of its answer, or of such exchanges.
Exchange = tuple[int, ...]


class TooLongError(UserError):
    """Not even one question with its answer fits; `tokens` is what the shortest beginning takes."""

    def __init__(self, problem: str, hint: str, tokens: int) -> None:
        super().__init__(problem, hint)
        self.tokens = tokens


def shortened(encoder: SampleEncoder, sample: Sample, sizes: Sequence[Size], max_length: int) -> tuple[Sample, Any]:
    """(`sample` with as few turns left out as bring it to `max_length` tokens, what `encoder.encode` says of it).

    System turns at the beginning stay. Out go first: turns behind the last answer, then exchanges (a question up to the
    end of its answer) in the order of `leaving`; where the latest picture does not fit at all, what stands before it is
    kept, as much as fits. `sizes` are (width, height) in the order of `sample.images`. TooLongError that names the row
    and the length when not even the first answer fits.
    """
    head, exchanges = split_turns(sample.turns)

    @functools.cache
    def attempt(kept: Exchange) -> tuple[Sample, Any] | int:
        """The sample with these exchanges, or its tokens where they are too many."""
        places = [*head, *(turn for index in kept for turn in exchanges[index])]
        part = with_turns(sample, places)
        encoded = encoder.encode(part, [sizes[index] for index in _images_of(sample.turns, places)])
        tokens = encoder.sample_cost(encoded).tokens
        return (part, encoded) if tokens <= max_length else tokens

    whole = encoder.encode(sample, list(sizes))
    if encoder.sample_cost(whole).tokens <= max_length:
        return sample, whole
    order = leaving([_shows_picture(sample.turns, exchange) for exchange in exchanges])
    everything = range(len(exchanges))
    newest = [tuple(index for index in everything if index not in order[:gone]) for gone in range(len(order) + 1)]
    oldest = [tuple(range(count)) for count in range(len(exchanges) - 1, 0, -1)]
    for candidates in (newest, oldest):
        found = _first_that_fits(candidates, attempt)
        if found is not None:
            return found
    least = attempt((0,))
    if not isinstance(least, int):
        return least
    raise TooLongError(
        f"row {sample.row}: {least:,} tokens up to its first answer; max_length is {max_length:,}",
        f"max_length: {least}, or fewer or smaller pictures (image.max_slices)",
        least,
    )


def leaving(pictured: Sequence[bool]) -> list[int]:
    """Exchanges in the order in which they go; `pictured[i]`: exchange i shows a picture.

    The oldest first, but a picture's exchange only after those that follow it up without a picture of their own. The
    last exchange and the one with the latest picture are kept to the end; of these two the last goes.
    """
    last = len(pictured) - 1
    latest = max((index for index, shows in enumerate(pictured) if shows), default=None)
    order: list[int] = []
    leader: int | None = None
    for index, shows in enumerate(pictured):
        if shows:
            order += [leader] if leader is not None else []
            leader = index
        elif index != last:
            order.append(index)
    return order if latest in (None, last) else [*order, last]


def split_turns(turns: Sequence[Turn]) -> tuple[Exchange, list[Exchange]]:
    """(the system turns at the beginning, the exchanges); turns behind the last answer are in neither."""
    start = next((index for index, turn in enumerate(turns) if turn.role != "system"), len(turns))
    head, exchanges = tuple(range(start)), []
    for index, turn in enumerate(turns):
        ends = index + 1 == len(turns) or turns[index + 1].role != "assistant"
        if turn.role == "assistant" and ends:
            exchanges.append(tuple(range(start, index + 1)))
            start = index + 1
    return head, exchanges


def with_turns(sample: Sample, kept: Sequence[int]) -> Sample:
    """The sample with the turns of these indices only, and the pictures that they show."""
    if len(kept) == len(sample.turns):
        return sample
    images = _images_of(sample.turns, kept)
    place = {old: new for new, old in enumerate(images)}
    turns = tuple(
        dataclasses.replace(turn, pieces=tuple(place[p] if isinstance(p, int) else p for p in turn.pieces))
        for turn in (sample.turns[index] for index in kept)
    )
    return dataclasses.replace(sample, turns=turns, images=tuple(sample.images[index] for index in images))


def _images_of(turns: Sequence[Turn], places: Sequence[int]) -> list[int]:
    """Indices of `Sample.images` that the turns at `places` show, in the order of that list."""
    return sorted({piece for place in places for piece in turns[place].pieces if isinstance(piece, int)})


def _shows_picture(turns: Sequence[Turn], exchange: Exchange) -> bool:
    return any(isinstance(piece, int) for index in exchange for piece in turns[index].pieces)


def _first_that_fits(
    candidates: Sequence[Exchange], attempt: Callable[[Exchange], tuple[Sample, Any] | int]
) -> tuple[Sample, Any] | None:
    """The first of ever shorter candidates that fits, by halving: each try encodes the conversation."""
    low, high, found = 0, len(candidates), None
    while low < high:
        middle = (low + high) // 2
        tried = attempt(candidates[middle])
        if isinstance(tried, int):
            low = middle + 1
        else:
            high, found = middle, tried
    return found
