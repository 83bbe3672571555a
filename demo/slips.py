"""Order slips: small forms with printed labels, filled in by hand or by a printer.

    python demo/slips.py --out DIR --hand handwritten --split train --count 2000 --seed 0

writes DIR/images/00000.png ... and DIR/data.json, a list of conversations in the OpenBMB format. Nothing
in these files is special: replace them by your own images and conversations and every command still works.

Handwriting comes from scikit-learn's copy of the UCI digits (8 x 8 pixels, 1797 glyphs by 13 writers).
Training slips use the first 1400 glyphs and held-out slips the last 397, two blocks in the order of the data
set: no held-out glyph is ever seen in training. Printed digits use Pillow's built-in font (Aileron).
Training slips vary their glyphs (rotation, shear, stretch, stroke, ink), because 1400 glyphs are soon
learned by heart; held-out slips are left as they are, apart from the jitter, noise and tilt of every slip.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 112, 140  # pixels: 8 x 10 patches of 14, so the image processor need not resize
QUESTION = "Read the slip. Answer with JSON."
TRAIN_GLYPHS = 1400  # of 1797; the rest is for held-out slips
LABELS = {"number": "No.", "quantity": "Qty", "date": "Date", "total": "Total"}
FIELDS = tuple(LABELS)
ROW, TITLE = 28, 28  # heights; a row for each field under the title
ENTRY_LEFT, PITCH = 28, 14  # where entries begin, and from one character to the next
FINE = 24  # the square on which a digit is drawn; the digit itself is about 18 high

Array = np.ndarray
CORNERS = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * FINE / 2  # of a glyph: the order that QUAD expects


@dataclass(frozen=True)
class Form:
    """What one batch of slips looks like: the options of a training stage.

    ``digits`` shortens the number field; ``jitter`` is the largest shift of an entry in pixels, ``rotation``
    the largest tilt of the whole slip in degrees, ``noise`` the standard deviation of the grain (of 255);
    ``vary`` how far the glyphs of training slips are bent, held-out glyphs never being varied.
    """

    hand: str = "handwritten"
    split: str = "train"
    fields: tuple[str, ...] = FIELDS
    digits: int = 4
    jitter: int = 2
    rotation: float = 1.5
    noise: float = 6.0
    vary: float = 1.0


# ---------------------------------------------------------------- what is written on a slip


def draw_values(form: Form, rng: np.random.Generator) -> dict[str, str | int]:
    """The truth of one slip; every field is drawn on its own, so that none can be guessed from another."""
    month = int(rng.integers(1, 13))
    days = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]
    values: dict[str, str | int] = {
        "number": f"{rng.integers(10**form.digits):0{form.digits}d}",
        "quantity": int(rng.integers(1, 100)),
        "date": f"{rng.integers(1, days + 1):02d}-{month:02d}",
        "total": f"{rng.integers(1, 100)}.{rng.integers(100):02d}",
    }
    return {name: values[name] for name in form.fields}


# ---------------------------------------------------------------- single digits, as ink between 0 and 1


@functools.cache
def handwriting() -> tuple[Array, Array]:
    """All 1797 glyphs as [N, FINE, FINE] ink and their digits [N]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    size = (FINE - 6, FINE - 6)  # with a margin of three, so that a turned glyph keeps its corners
    glyphs = [
        np.pad(np.asarray(Image.fromarray(np.uint8(image * 15.9)).resize(size, Image.Resampling.BICUBIC)), 3)
        for image in bunch.images
    ]
    return np.stack(glyphs).astype(np.float32) / 255.0, bunch.target


@functools.cache
def handwriting_of(split: str) -> list[Array]:
    """For each digit 0-9 its glyphs [n, FINE, FINE] in this split: two contiguous blocks of the data set."""
    ink, digits = handwriting()
    block = slice(0, TRAIN_GLYPHS) if split == "train" else slice(TRAIN_GLYPHS, None)
    return [ink[block][digits[block] == digit] for digit in range(10)]


@functools.cache
def printed_digit(digit: int, size: int, bold: int) -> Array:
    """One printed digit [FINE, FINE], in the middle of its square."""
    image = Image.new("L", (FINE, FINE))
    pen = ImageDraw.Draw(image)
    middle = (FINE / 2, FINE / 2)
    pen.text(middle, str(digit), 255, ImageFont.load_default(size), anchor="mm", stroke_width=bold / 2)
    return np.asarray(image, dtype=np.float32) / 255.0


def vary(ink: Array, amount: float, rng: np.random.Generator) -> Array:
    """The same glyph written otherwise: turned, slanted, stretched, pulled at its corners, in another pen.

    ``amount`` 1 is the range of a hurried hand, 0 leaves the glyph alone.
    """
    turn, slant, wide, high = rng.uniform(-1, 1, 4) * amount * (0.25, 0.22, 0.17, 0.17)
    matrix = np.array([[np.cos(turn), np.sin(turn) + slant], [-np.sin(turn), np.cos(turn)]])
    corners = CORNERS @ matrix.T * (1 + wide, 1 + high) + rng.uniform(-1.5, 1.5, (4, 2)) * amount
    quad = tuple((corners + FINE / 2).ravel().tolist())
    image = Image.fromarray(np.uint8(ink * 255)).transform(
        (FINE, FINE), Image.Transform.QUAD, quad, Image.Resampling.BILINEAR
    )
    strength, thinness = 1 + 0.25 * amount * rng.uniform(-0.6, 1), 2.0 ** (0.6 * amount * rng.uniform(-1, 1))
    return np.clip(np.asarray(image, dtype=np.float32) * (strength / 255.0), 0, 1) ** thinness


def draw_digit(form: Form, digit: int, print_style: tuple[int, int], rng: np.random.Generator) -> Array:
    """Ink [FINE, FINE] of one digit in this form's hand."""
    if form.hand == "printed":
        ink = printed_digit(digit, *print_style)
    else:
        glyphs = handwriting_of(form.split)[digit]
        ink = glyphs[rng.integers(len(glyphs))]
    return vary(ink, form.vary, rng) if form.vary and form.split == "train" else ink


# ---------------------------------------------------------------- the slip


@functools.cache
def blank_form(fields: tuple[str, ...]) -> Array:
    """The empty form, ink [HEIGHT, WIDTH]: title, labels and lines to write on, always at the same places."""
    image = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    draw.text((WIDTH / 2, 9), "ORDER SLIP", fill=200, font=ImageFont.load_default(12), anchor="mt")
    for row, name in enumerate(FIELDS):
        if name in fields:
            line = TITLE + (row + 1) * ROW - 2
            draw.text((3, line - 1), LABELS[name], fill=180, font=ImageFont.load_default(10), anchor="ls")
            draw.line((ENTRY_LEFT, line, WIDTH - 6, line), fill=80)
    return np.asarray(image, dtype=np.float32) / 255.0


def write_entry(ink: Array, text: str, middle: tuple[int, int], form: Form, rng: np.random.Generator) -> None:
    """Write ``text`` into ``ink``, its first character around ``middle`` = (x, y), in one style and one darkness."""
    style = (int(rng.integers(16, 23)), int(rng.integers(3)))
    darkness = np.float32(rng.uniform(0.75, 1.0))
    x, y = middle
    for character in text:
        if character.isdigit():
            wobble = int(rng.integers(-1, 2)) if form.jitter else 0
            paste(ink, draw_digit(form, int(character), style, rng) * darkness, x, y + wobble)
        else:
            size = (2, 6) if character == "-" else (3, 3)
            paste(ink, np.full(size, darkness), x, y if character == "-" else y + 7)
        x += PITCH


def paste(ink: Array, glyph: Array, x: int, y: int) -> None:
    """Lay the middle of ``glyph`` on (x, y) of ``ink``; the darker of the two stays, the rest is cut off."""
    height, width = glyph.shape
    left, top = x - width // 2, y - height // 2
    rows, columns = slice(max(top, 0), min(top + height, HEIGHT)), slice(max(left, 0), min(left + width, WIDTH))
    part = glyph[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    np.maximum(ink[rows, columns], part, out=ink[rows, columns])


def draw_slip(form: Form, values: dict[str, str | int], rng: np.random.Generator) -> Image.Image:
    """The slip as a grey image of WIDTH x HEIGHT pixels."""
    ink = blank_form(form.fields).copy()
    for name, value in values.items():
        shift_x, shift_y = rng.integers(-form.jitter, form.jitter + 1, 2).tolist()
        x, y = ENTRY_LEFT + PITCH // 2, TITLE + FIELDS.index(name) * ROW + ROW // 2 - 1
        write_entry(ink, str(value), (x + shift_x, y + shift_y // 2), form, rng)
    if form.rotation:
        angle = rng.uniform(-form.rotation, form.rotation)
        turned = Image.fromarray(np.uint8(ink * 255)).rotate(angle, Image.Resampling.BILINEAR)
        ink = np.asarray(turned, dtype=np.float32) / 255.0
    paper = rng.uniform(225, 250) if form.noise else 240.0
    grey = paper * (1 - 0.9 * ink)
    if form.noise:
        grey += rng.normal(0, form.noise, grey.shape)
    return Image.fromarray(np.uint8(np.clip(grey, 0, 255)))


def one_slip(form: Form, seed: int, index: int) -> tuple[Image.Image, dict[str, str | int]]:
    """One slip with its truth. It depends on ``seed`` and its place only, not on how many are drawn."""
    rng = np.random.default_rng([seed, index, form.split == "train", form.hand == "printed"])
    values = draw_values(form, rng)
    return draw_slip(form, values, rng), values


# ---------------------------------------------------------------- files


def conversation(name: str, image: str, values: dict[str, str | int]) -> dict[str, Any]:
    """One sample in the OpenBMB format."""
    turns = [("user", f"<image>\n{QUESTION}"), ("assistant", json.dumps(values))]
    return {"id": name, "image": image, "conversations": [{"role": r, "content": c} for r, c in turns]}


def write_slip(images: Path, form: Form, seed: int, index: int) -> dict[str, Any]:
    """Write the picture of one slip; returns its sample."""
    name = f"{index:05d}"
    image, values = one_slip(form, seed, index)
    image.save(images / f"{name}.png", compress_level=1)
    return conversation(name, f"images/{name}.png", values)


def write_slips(folder: Path, form: Form, count: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Write ``count`` slips into ``folder``; returns the path of its data.json."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        samples = list(pool.map(functools.partial(write_slip, images, form, seed), range(count), chunksize=100))
    data = folder / "data.json"
    data.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    tell(f"{count} {form.hand} slips ({form.split}) in {data}")
    return data


def parser() -> argparse.ArgumentParser:
    """The command line; every option of ``Form`` has one of its own."""
    plain = Form()
    result = argparse.ArgumentParser(description="Draw order slips and write them as an ordinary data set.")
    result.add_argument("--out", type=Path, required=True, help="folder to write")
    result.add_argument("--hand", choices=("handwritten", "printed"), default=plain.hand)
    result.add_argument("--split", choices=("train", "heldout"), default=plain.split)
    result.add_argument("--count", type=int, default=1000)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--fields", default=",".join(plain.fields), help="comma-separated, of " + ",".join(FIELDS))
    result.add_argument("--digits", type=int, default=plain.digits, help="digits of the number field")
    result.add_argument("--jitter", type=int, default=plain.jitter, help="largest shift of an entry, pixels")
    result.add_argument("--rotation", type=float, default=plain.rotation, help="largest tilt, degrees")
    result.add_argument("--noise", type=float, default=plain.noise, help="grain, of 255")
    result.add_argument("--vary", type=float, default=plain.vary, help="how far training glyphs are bent, 0 to 1")
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    given = parser().parse_args(argv)
    fields = tuple(name for name in FIELDS if name in given.fields.split(","))
    form = Form(given.hand, given.split, fields, given.digits, given.jitter, given.rotation, given.noise, given.vary)
    write_slips(given.out, form, given.count, given.seed, print)


if __name__ == "__main__":
    main()
