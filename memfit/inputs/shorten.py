"""Bring a sample under a length without cutting anything in two: whole trailing turns go, with their pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.errors import UserError
from memfit.inputs.encode import Encoded, Encoder, Size
from memfit.specs.sample import Sample, Turn


def shortened(encoder: Encoder, sample: Sample, sizes: Sequence[Size], max_length: int) -> tuple[Sample, Encoded]:
    """The longest beginning of `sample`, ending with an answer, that takes at most `max_length` tokens.

    Pictures of turns that go, go with them, so that text, pixels and places stay together. UserError that names the
    sample and its length when even its first answer does not fit.
    """
    ends = [index + 1 for index, turn in enumerate(sample.turns) if turn.role == "assistant"]
    shortest = 0
    for stop in reversed(ends):
        kept = _first_turns(sample, stop)
        encoded = encoder.encode(kept, [sizes[index] for index in _images_of(sample.turns[:stop])])
        if len(encoded.input_ids) <= max_length:
            return kept, encoded
        shortest = len(encoded.input_ids)
    raise UserError(
        f"row {sample.row}: {shortest:,} tokens up to its first answer; max_length is {max_length:,}",
        f"max_length: {shortest}, or fewer or smaller pictures (image.max_slices)",
    )


def _images_of(turns: Sequence[Turn]) -> list[int]:
    """Indices of `Sample.images` that some turns show, in the order of the list."""
    return sorted({piece for turn in turns for piece in turn.pieces if isinstance(piece, int)})


def _first_turns(sample: Sample, stop: int) -> Sample:
    """The sample's first `stop` turns, with the pictures that they show."""
    if stop == len(sample.turns):
        return sample
    kept = _images_of(sample.turns[:stop])
    place = {old: new for new, old in enumerate(kept)}
    turns = tuple(
        dataclasses.replace(turn, pieces=tuple(place[p] if isinstance(p, int) else p for p in turn.pieces))
        for turn in sample.turns[:stop]
    )
    return dataclasses.replace(sample, turns=turns, images=tuple(sample.images[index] for index in kept))
