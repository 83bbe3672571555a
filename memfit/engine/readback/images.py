"""The image budget as it is compiled into the live processor: pictures are put through it and counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from memfit.build.pixels import PixelReader
from memfit.engine.readback.data import dataset_of
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.pictures import crops_of, patch_of
from memfit.engine.readback.reading import Reading, stated
from memfit.families.budget import budget_text, picture_settings

# Pictures that every budget tells apart: large, tall, wide, small (width, height in pixels).
PROBES = ((1600, 1200), (420, 1700), (1500, 300), (150, 120))
FIX = "image.* is compiled into preprocessor settings once, by memfit: environment variables and processor defaults "
FIX += "(MAX_PIXELS, max_slice_nums) must not replace it"


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """Crops of pictures through the live processor, and tokens by the live encoder, against the plan's budget."""
    if live.family is None or live.encoder is None or live.family.images is None:
        if live.family is not None:
            yield stated("image budget", "no pictures", "the model takes none")
        return
    reader = reader_of(live)
    if asked.plan is None or reader is None:
        yield stated("image budget", "as the processor has it", "no budget was asked, or the data set has no reader")
        return
    source, images = live.encoder.source, live.family.images
    wanted = picture_settings(live.family, source.config, source.preprocessor, asked.plan.recipe.image)
    patch = patch_of(source.config)
    asked_texts, texts, tokens = [], [], []
    for width, height in PROBES:
        cost = images.rule(wanted, width, height)
        found = crops_of(reader.read([Image.new("RGB", (width, height), (128, 128, 128))]), patch)
        if found is None:
            yield stated("image budget", "unknown", "the image tensors of this family do not tell their crops")
            return
        asked_texts.append(_text(width, height, sorted(cost.crops)))
        texts.append(_text(width, height, sorted(found)))
        tokens.append((cost.tokens, images.rule(live.encoder.processor_settings, width, height).tokens))
    settled = {name: value for name, value in wanted.items() if live.encoder.processor_settings.get(name) != value}
    yield Reading(
        "image budget",
        "; ".join(asked_texts),
        "; ".join(texts),
        asked_texts == texts,
        f"{type(_processor(reader)).__name__} on {len(PROBES)} pictures; {budget_text(asked.plan.recipe.image)} asked",
        FIX,
    )
    yield Reading(
        "image tokens",
        ", ".join(str(a) for a, _ in tokens),
        ", ".join(str(b) for _, b in tokens),
        all(a == b for a, b in tokens) and not settled,
        "placeholders that the live encoder writes for the same pictures"
        + (f"; its settings differ in {', '.join(sorted(settled))}" if settled else ""),
        FIX,
    )


def reader_of(live: Live) -> PixelReader | None:
    """What turns the training data's pictures into tensors."""
    reader: Any = getattr(dataset_of(live), "_pixels", None)
    return reader if isinstance(reader, PixelReader) else None


def _processor(reader: PixelReader) -> Any:
    return reader._processor


def _text(width: int, height: int, crops: list[tuple[int, int]]) -> str:
    patches = sum(rows * columns for rows, columns in crops)
    return f"{width}x{height}: {len(crops)} crops, {patches} patches"
