"""Near-duplicates: altered copies are found, other pictures are not, and the work stays bounded."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from memfit.inputs.data.scan import THUMB, thumbnail
from memfit.inputs.data.similar import near_duplicates


def pairs(images: list[Image.Image]) -> set[tuple[int, int]]:
    return set(near_duplicates([thumbnail(image) for image in images], [image.size for image in images]))


def photo(seed: int) -> Image.Image:
    spots = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((400, 300), Image.Resampling.BICUBIC)


@functools.cache
def page(seed: int) -> Image.Image:
    """A text page, as they lie in one folder: the same paper, type and margins, other words."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (620, 877), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for line in range(36):
        draw.text((50, 50 + 20 * line), "".join(rng.choice(list("abcdefgh ijklm 012345"), 60)), fill=0, font=font)
    return image


def form(seed: int) -> Image.Image:
    """A small printed form: everything alike but four entries."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (168, 168), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(20)
    for row, label in enumerate(("No.", "Qty", "Date", "Total")):
        draw.text((8, 10 + 38 * row), label, fill=60)
        draw.line((50, 34 + 38 * row, 160, 34 + 38 * row), fill=0)
        draw.text((56, 10 + 38 * row), f"{rng.integers(10_000):04d}", fill=0, font=font)
    return image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


ALTER: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 90": lambda image: jpeg(image, 90),
    "jpeg 50": lambda image: jpeg(image, 50),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.08),
    "flatter": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
    "smaller": lambda image: image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS),
}


@pytest.mark.parametrize("draw", [photo, page, form])
@pytest.mark.parametrize("change", ALTER)
def test_altered_copies_are_found(draw: Callable[[int], Image.Image], change: str) -> None:
    originals = [draw(seed) for seed in range(12)]
    copies = [ALTER[change](image) for image in originals[:6]]
    assert pairs(originals + copies) == {(index, 12 + index) for index in range(6)}


@pytest.mark.parametrize("draw", [photo, page, form])
def test_other_pictures_are_not(draw: Callable[[int], Image.Image]) -> None:
    assert pairs([draw(seed) for seed in range(60)]) == set()


def test_two_pictures_are_enough() -> None:
    # With two pictures the mean of the set is between them: what is left of each is the other's mirror image.
    assert pairs([photo(0), jpeg(photo(0), 60)]) == {(0, 1)}
    assert pairs([photo(0), photo(1)]) == set()
    assert near_duplicates([], []) == near_duplicates([thumbnail(photo(0))], [(400, 300)]) == []


def test_one_page_with_four_other_numbers_is_another_page() -> None:
    """An A4 form at 75 dpi, filled in differently: 9 cells of the thumbnail differ, and not by much."""
    filled = []
    for seed in range(8):
        image = page(0).copy()
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(20)
        for column in range(4):
            number = np.random.default_rng([seed, column]).integers(100_000)
            draw.text((50 + 140 * column, 800), f"{number:05d}", fill=0, font=font)
        filled.append(image)
    assert pairs(filled) == set()


def test_faint_pictures_are_compared_by_their_own_contrast() -> None:
    faint = [ImageEnhance.Contrast(page(seed)).enhance(0.05) for seed in range(4)]
    assert pairs(faint) == set()


def test_the_same_thumbnail_of_another_shape_is_another_picture() -> None:
    assert pairs([photo(0), photo(0).resize((300, 300))]) == set()


def test_a_film_is_one_connected_group() -> None:
    """All alike: nothing is left but noise when the mean picture is taken away."""
    base = np.asarray(photo(3).convert("L")).astype(int)
    frames = [
        Image.fromarray(np.uint8(np.clip(base + np.random.default_rng(seed).normal(0, 2, base.shape), 0, 255)))
        for seed in range(80)
    ]
    reached, found = {0}, pairs(frames)
    for _ in frames:
        reached |= {j for i, j in found if i in reached} | {i for i, j in found if j in reached}
    assert len(reached) == 80


def test_work_is_bounded_when_all_are_alike() -> None:
    """20,000 forms of one template: all pairs would be 200 million comparisons."""
    rng = np.random.default_rng(0)
    base = rng.integers(60, 200, THUMB * THUMB, dtype=np.int16)
    thumbs = [
        (base + rng.integers(-40, 40, base.size, dtype=np.int16)).astype(np.uint8).tobytes() for _ in range(20_000)
    ]
    start = time.perf_counter()
    assert near_duplicates(thumbs, [(100, 100)] * len(thumbs)) == []
    assert time.perf_counter() - start < 60
