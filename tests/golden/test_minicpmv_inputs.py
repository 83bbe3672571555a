"""Pictures, placeholders and conversations against vectors of the original code."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import numpy as np
import PIL
import pytest

from memfit.errors import UserError
from memfit.families import minicpmv2
from memfit.models.minicpmv.images import packed, slices
from tests.golden import minicpmv_adapter as adapter
from tests.golden.minicpmv_vectors import FOLDER, picture, text

IMAGES = text("image_processor")["images"]
SETS = ("26", "25")
CONVERSATIONS = [(name, case) for name in SETS for case in text(f"conversations{name}")["cases"]]


def named(item: Any) -> str:
    return item["name"] if isinstance(item, dict) else str(item)


@pytest.mark.parametrize("entry", IMAGES, ids=named)
def test_slices_are_equal_to_the_byte(entry: dict[str, Any]) -> None:
    size, settings = (entry["width"], entry["height"]), entry["settings"]
    image = picture(*size, entry["k"], entry["mode"])
    assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest() == entry["image_sha256"]
    crops, sizes = adapter.process_image(image, **settings)
    assert [list(pair) for pair in sizes] == entry["tgt_sizes"]
    cost = minicpmv2.image_cost(settings, *size)
    assert [list(crop) for crop in cost.crops] == entry["tgt_sizes"]
    assert (list(cost.grid[::-1]) if cost.grid != (0, 0) else None) == entry["grid"]
    same_pillow = PIL.__version__ == text("image_processor")["pillow"]
    for crop, facts in zip(crops, entry["slices"], strict=True):
        assert list(crop.shape) == facts["shape"]
        if same_pillow:
            assert hashlib.sha256(crop.astype("<f4").tobytes()).hexdigest() == facts["sha256_float32"]
            raw = np.rint((crop / 2 + 0.5) * 255).astype(np.uint8)
            assert hashlib.sha256(raw.tobytes()).hexdigest() == facts["sha256_uint8"]
        assert math.isclose(float(crop.mean()), facts["mean"], abs_tol=2e-3)
        assert math.isclose(float(crop.std()), facts["std"], abs_tol=2e-3)
        assert np.allclose(crop.reshape(-1)[facts["sample_index"]], facts["sample_value"], atol=2e-2)


@pytest.mark.parametrize("entry", IMAGES, ids=named)
def test_placeholders(entry: dict[str, Any]) -> None:
    size, settings = (entry["width"], entry["height"]), entry["settings"]
    texts = {
        "placeholder_index3_with_id": adapter.placeholder(size, 3, True, num_queries=64, **settings),
        "placeholder_without_id": adapter.placeholder(size, 3, False, num_queries=64, **settings),
        "placeholder_v25_96": adapter.placeholder(size, 3, True, num_queries=96, version="2.5", **settings),
    }
    for key, written in texts.items():
        count = 96 if key.endswith("96") else 64
        assert written.replace("<unk>" * count, f"<unk>{{{count}}}") == entry[key]["text"]
        assert hashlib.sha256(written.encode()).hexdigest() == entry[key]["sha256"]


def test_pictures_of_one_or_three_rows_work() -> None:
    """The original guesses the channel axis and crashes on them."""
    for entry in text("image_processor")["reference_raises"]:
        image = picture(entry["width"], entry["height"], entry.get("k", 1))
        cost = minicpmv2.image_cost({}, *image.size)
        assert [(c.height // 14, c.width // 14) for c in slices(image, {})] == list(cost.crops)


def test_the_rule_gives_the_sizes_of_2000_pictures() -> None:
    """The torch-free rule of the planner against the crops that are really cut; sizes only, so that it stays quick."""
    rng = random.Random(7)
    from PIL import Image

    for number in range(2000):
        limit = 1200 if number % 2 else 300
        size = (rng.randint(1, limit), rng.randint(1, limit))
        settings = {"max_slice_nums": rng.choice((1, 2, 4, 9, 12)), "scale_resolution": rng.choice((56, 112, 448))}
        if number % 20:  # whole pictures are slow at this count: the sizes that Pillow would be asked for
            whole, piece = minicpmv2.crop_sizes(*size, settings)
            rows, columns = minicpmv2.slice_grid(*size, settings)
            sizes = [(side[1] // 14, side[0] // 14) for side in (whole, *[piece] * (rows * columns))]
        else:
            sizes = [(c.height // 14, c.width // 14) for c in slices(Image.new("RGB", size), settings)]
        cost = minicpmv2.image_cost({**settings, "query_num": 5}, *size)
        assert sizes == list(cost.crops), (size, settings)
        assert cost.tokens == 5 * len(sizes)
        assert len(sizes) <= settings["max_slice_nums"] + 1


def test_packed_pictures_are_the_crops_in_order() -> None:
    image = picture(900, 620, 4)
    pixels, sizes = packed([image, image.crop((0, 0, 100, 60))], {})
    crops, _ = adapter.process_image(image)
    assert pixels.dtype == np.uint8
    assert len(pixels) == int(sizes.prod(axis=1).sum())
    first = pixels[: sizes[0].prod()].reshape(-1, 3, 14, 14)
    assert np.allclose((first[5] / 255 - 0.5) / 0.5, crops[0][:, :, 5 * 14 : 6 * 14], atol=1e-6)


# ---- conversations -------------------------------------------------------------------------------------------------


def config_of(name: str, case: dict[str, Any]) -> dict[str, Any]:
    facts = text(f"conversations{name}")
    version = {"26": 2.6, "25": "2.5"}[name]
    limit = {"max_length": case["max_length"]} if "max_length" in case else {}
    return {"query_num": facts["query_num"], "slice_settings": facts["slice_settings"], "version": version, **limit}


def encoded(name: str, case: dict[str, Any], mode: str) -> dict[str, list[Any]]:
    return adapter.encode(
        case["conversation"], case["images"], FOLDER / f"tokenizer{name}", config_of(name, case), mode
    )


@pytest.mark.parametrize(("name", "case"), CONVERSATIONS, ids=named)
def test_reference_mode_is_the_original(name: str, case: dict[str, Any]) -> None:
    wanted = case["training"]
    if "error" in wanted:
        with pytest.raises(ValueError, match=r"no tokens|pictures begin"):
            encoded(name, case, "reference")
        return
    got = encoded(name, case, "reference")
    assert got == {key: wanted[key] for key in ("input_ids", "labels", "image_bound")}


@pytest.mark.parametrize(("name", "case"), [pair for pair in CONVERSATIONS if "inference" in pair[1]], ids=named)
def test_ours_begins_with_the_prompt_of_inference(name: str, case: dict[str, Any]) -> None:
    got, prompt = encoded(name, case, "ours"), case["inference"]
    count = len(prompt["input_ids"])
    assert got["input_ids"][:count] == prompt["input_ids"]
    assert got["image_bound"] == prompt["image_bound"]
    tail = list(zip(got["input_ids"][count:], got["labels"][count:], strict=True))
    newline = [(198, -100)] if name == "26" else []  # ChatML's newline behind the end mark carries no loss
    assert [pair for pair in tail if pair[0] != pair[1]] == newline
    if len(case["conversation"]) == 2:
        assert set(got["labels"][:count]) == {-100}


@pytest.mark.parametrize("name", SETS)
def test_an_empty_answer_leaks_nothing(name: str) -> None:
    case = next(case for case in text(f"conversations{name}")["cases"] if case["name"] == "empty_middle_answer")
    theirs, ours = encoded(name, case, "reference"), encoded(name, case, "ours")
    assert theirs["input_ids"] == ours["input_ids"]
    trained = [place for place, label in enumerate(ours["labels"]) if label != -100]
    leaked = [place for place, label in enumerate(theirs["labels"]) if label != -100]
    assert len(trained) < len(leaked)
    ends = {"26": 382, "25": 385}[name]
    assert ours["labels"][trained[0]] == ends  # the empty answer: its end mark and nothing else
    assert trained[1] - trained[0] > 4


@pytest.mark.parametrize("name", SETS)
def test_ours_drops_whole_turns_or_refuses(name: str) -> None:
    cases = {case["name"]: case for case in text(f"conversations{name}")["cases"]}
    second = cases["truncated_inside_second_image"]
    got = encoded(name, second, "ours")
    # The oldest turns go first. In the 2.6 set the second question's picture fits no more: the first one is kept.
    kept, images = (second["conversation"][:2], {}) if name == "26" else (second["conversation"][2:], second["images"])
    assert got == encoded(name, {**second, "conversation": kept, "images": images}, "ours")
    assert len(got["input_ids"]) <= second["max_length"]
    assert len(got["image_bound"]) == (0 if name == "26" else 3)
    with pytest.raises(UserError, match="tokens up to its first answer; max_length is 30"):
        encoded(name, cases["truncated_inside_image"], "ours")
