"""What evaluation does to the pictures: nothing, or a control that shows whether the model looks at them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from memfit.errors import UserError
from memfit.inputs.data.images import open_image
from memfit.specs.sample import Sample

CONTROLS = ("as-is", "shuffled", "blank")


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Every sample with another sample's pictures: no sample keeps its own. Same prompts, same truths.

    Raises UserError when fewer than two samples have the same number of pictures.
    """
    by_count: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_count.setdefault(len(sample.images), []).append(index)
    result = list(samples)
    for count, members in by_count.items():
        if count == 0:
            continue
        if len(members) < 2:
            raise UserError(
                f"sample {samples[members[0]].id} alone has {count} pictures: there is none to swap with",
                "evaluate more samples, or leave the shuffled control out",
            )
        order = members[:]
        random.Random(seed).shuffle(order)
        # One step round a shuffled ring: a permutation without fixed points.
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            result[here] = dataclasses.replace(samples[here], images=samples[there].images)
    return result


def blank_like(path: Path) -> Image.Image:
    """A white picture of the size of the one at `path`."""
    return Image.new("RGB", open_image(path).size, "white")
