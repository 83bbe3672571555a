"""The torch-free image rules against transformers' own PIL image processors.

For most sizes the real processor runs on one-value arrays, with only the resampling of pixels taken out: every
size, grid, crop and token count is still computed by upstream code. A few real pictures run through everything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import image_processing_backends
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
from transformers.models.minicpmv4_7.processing_minicpmv4_7 import MiniCPMV4_7Processor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from memfit.families import family_for, llava, minicpmv4_6, qwen2_5_vl
from memfit.families.base import Family
from memfit.families.budget import WIDEST_RATIO
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

MINICPM = {"model_type": "minicpmv4_6", "image_token_id": 7}
QWEN = {"model_type": "qwen2_5_vl", "image_token_id": 7}
CLIP_336 = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
LLAVA = {"model_type": "llava", "image_token_id": 7, "vision_config": CLIP_336}
SIGLIP = {
    "model_type": "llava",
    "image_token_id": 7,
    "vision_feature_select_strategy": "full",
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
}
CROP_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}

# (model config, preprocessor_config.json, sizes to try): 2,000 a family
CASES = {
    "minicpm": (MINICPM, {}, 1000),
    "minicpm-4x": (MINICPM, {"downsample_mode": "4x"}, 300),
    "minicpm-36": (MINICPM, {"max_slice_nums": 36}, 300),
    "minicpm-unsliced": (MINICPM, {"slice_mode": False}, 100),
    "minicpm-small": (MINICPM, {"scale_resolution": 112, "max_slice_nums": 5}, 300),
    "qwen": (QWEN, {}, 500),
    "qwen-min-max": (QWEN, {"min_pixels": 256 * 784, "max_pixels": 512 * 784}, 500),
    "qwen-small": (QWEN, {"size": {"shortest_edge": 3136, "longest_edge": 64 * 784}}, 1000),
    "llava-clip": (LLAVA, {"image_processor_type": "CLIPImageProcessor", **CROP_336}, 1000),
    "llava-padded": (LLAVA, {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **CROP_336}, 300),
    "llava-siglip": (
        SIGLIP,
        {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 384, "width": 384}},
        700,
    ),
}


def random_sizes(count: int, seed: int) -> Iterator[tuple[int, int]]:
    """(width, height), 1 to 6,000 px: corners first, then even, skewed to small, extreme ratios, and squares.

    Squares and whole ratios are where two grids of slices are equally near.
    """
    rng = random.Random(seed)
    corners = [(1, 1), (1, 6000), (6000, 1), (6000, 6000), (448, 448), (449, 448), (1344, 1344), (30, 6000)]
    yield from corners[:count]

    def skewed() -> int:
        return round(math.exp(rng.uniform(0, math.log(6000))))

    for index in range(count - len(corners)):
        if index % 4 == 0:
            yield rng.randint(1, 6000), rng.randint(1, 6000)
        elif index % 4 == 1:
            yield skewed(), skewed()
        elif index % 4 == 2:
            long, short = rng.randint(1000, 6000), rng.randint(1, 40)
            yield (long, short) if rng.random() < 0.5 else (short, long)
        else:
            side, ratio = rng.randint(1, 2000), rng.choice((1, 1, 2, 3))
            yield (side * ratio, side) if rng.random() < 0.5 else (side, side * ratio)


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the resampling itself (transformers' np_resize) by an array of the size asked for."""

    def sized(image: np.ndarray, size: tuple[int, int], **_: Any) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), (image.shape[0], *size))

    monkeypatch.setattr(image_processing_backends, "np_resize", sized)


def real_processor(family: Family, settings: Mapping[str, Any], **more: Any) -> Any:
    assert family.images is not None
    return getattr(transformers, family.images.processor)(**{**settings, **more})


def cheap_processor(family: Family, settings: Mapping[str, Any]) -> Callable[[int, int], Mapping[str, Any]]:
    """width, height -> what the real processor returns, without work on pixel values (see `no_pixels`)."""
    processor = real_processor(family, settings, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    padded = {"image_mean": [0.5]} if settings.get("do_pad") else {}

    def run(width: int, height: int) -> Mapping[str, Any]:
        pixels = np.broadcast_to(np.uint8(0), (1, height, width))
        return processor([pixels], input_data_format="channels_first", **padded)

    return run


def upstream_cost(family: Family, settings: Mapping[str, Any], out: Mapping[str, Any]) -> ImageCost:
    """What the real processor's output says, with the token counts of the real processor's placeholder."""
    if family.images is minicpmv4_6.IMAGES:
        sizes = np.asarray(out["target_sizes"])
        divisor = 4 if settings["downsample_mode"] == "4x" else 16
        patch = settings["patch_size"]
        assert out["pixel_values"].shape[-1] == int(sizes.prod(-1).sum()) * patch
        text = MiniCPMV4_6Processor.replace_image_token(
            SimpleNamespace(slice_mode=settings["slice_mode"], **minicpmv4_6.TOKENS),
            out,
            0,
            image_token_divisor=divisor,
        )
        counts = _runs(text, minicpmv4_6.TOKENS["image_token"])
        crops = tuple((int(rows), int(columns)) for rows, columns in sizes)
        return ImageCost(crops=crops, crop_tokens=counts, grid=tuple(out["grids"][0]))
    if family is qwen2_5_vl.FAMILY:
        holder = SimpleNamespace(image_processor=SimpleNamespace(merge_size=settings["merge_size"]), image_token="#")
        text = Qwen2_5_VLProcessor.replace_image_token(holder, out, 0)
        _, rows, columns = (int(side) for side in out["image_grid_thw"][0])
        assert out["pixel_values"].shape[0] == rows * columns
        return ImageCost(crops=((rows, columns),), crop_tokens=(len(text),))
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    holder = SimpleNamespace(image_token="#", **{name: settings[name] for name in names})
    pixels = [np.broadcast_to(np.uint8(0), (3, *np.asarray(out["pixel_values"][0]).shape[-2:]))]
    text = LlavaProcessor.replace_image_token(holder, {"pixel_values": pixels}, 0)
    rows, columns = (side // settings["patch_size"] for side in pixels[0].shape[-2:])
    return ImageCost(crops=((rows, columns),), crop_tokens=(len(text),))


def _runs(text: str, token: str) -> tuple[int, ...]:
    """How often `token` stands in a row, for every such row in `text`."""
    counts, position = [], text.find(token)
    while position >= 0:
        count = 0
        while text.startswith(token, position):
            position, count = position + len(token), count + 1
        counts.append(count)
        position = text.find(token, position)
    return tuple(counts)


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("case", CASES)
def test_rule_equals_the_real_processor(case: str) -> None:
    config, preprocessor, count = CASES[case]
    family = family_for(config)
    assert family.images is not None
    settings = family.images.budget(config, preprocessor, ImageBudget())
    run = cheap_processor(family, settings)
    refused = 0
    for width, height in random_sizes(count, seed=len(case)):
        try:
            out = run(width, height)
        except ValueError as error:
            if "aspect ratio" not in str(error):
                raise
            with pytest.raises(ValueError, match=f"{width} x {height}"):
                family.images.rule(settings, width, height)
            refused += 1
            continue
        mine = family.images.rule(settings, width, height)
        assert mine == upstream_cost(family, settings, out), (width, height)
    assert (refused > 0) == (family is qwen2_5_vl.FAMILY)
    assert refused < count / 2


@pytest.mark.parametrize("case", CASES)
def test_rule_equals_real_pictures(case: str) -> None:
    """Nothing replaced: PIL pictures through the whole processor, several in one call."""
    config, preprocessor, _ = CASES[case]
    family = family_for(config)
    assert family.images is not None
    settings = family.images.budget(config, preprocessor, ImageBudget())
    processor = real_processor(family, settings)
    for width, height in ((37, 19), (640, 480), (500, 900), (1100, 120)):
        out = processor([Image.new("RGB", (width, height), (90, 120, 200))], return_tensors="np")
        assert family.images.rule(settings, width, height) == upstream_cost(family, settings, out)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_llava_settings_reproduce_other_processors(kind: str) -> None:
    """LlavaImageProcessorPil with compiled settings gives the pixels of the class that the checkpoint names."""
    size = {"CLIPImageProcessor": CROP_336, "SiglipImageProcessor": {"size": {"height": 384, "width": 384}}}[kind]
    config = LLAVA if kind.startswith("CLIP") else SIGLIP
    settings = llava.processor_settings(config, {"image_processor_type": kind, **size}, ImageBudget())
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (123, 201, 3), dtype=np.uint8))
    named = getattr(transformers, kind + "Pil")(**size)
    ours = real_processor(llava.FAMILY, settings)
    theirs = named([picture], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours([picture], return_tensors="np")["pixel_values"], theirs)


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("use_id", [True, False])
@pytest.mark.parametrize("processor", [MiniCPMV4_6Processor, MiniCPMV4_7Processor])
def test_minicpm_placeholder_is_the_real_one(processor: type, use_id: bool) -> None:
    """Three pictures of one sample, through the real replacement and the real numbering."""
    settings = minicpmv4_6.processor_settings(MINICPM, {"use_image_id": use_id}, ImageBudget())
    run = cheap_processor(minicpmv4_6.FAMILY, settings)
    holder = SimpleNamespace(slice_mode=True, **minicpmv4_6.TOKENS)
    sizes = [(300, 200), (1240, 1754), (2000, 500)]
    texts = [processor.replace_image_token(holder, run(*size), 0, image_token_divisor=16) for size in sizes]
    if use_id:
        pad = minicpmv4_6.TOKENS["image_token"]
        texts = processor._prepend_local_ids(holder, [f"{pad} {pad} {pad}"], texts, pad)
    for index, (size, text) in enumerate(zip(sizes, texts, strict=True)):
        assert minicpmv4_6.placeholder(minicpmv4_6.image_cost(settings, *size), index, settings) == text


def test_minicpm_budget_is_never_exceeded_and_not_wasted() -> None:
    """The compiled slices keep every picture up to 1 : WIDEST_RATIO within the tokens, and come near to them."""
    rng = random.Random(5)
    for mode, scale in (("16x", 448), ("4x", 448), ("4x", 112)):
        found = dict.fromkeys(range(1, 13), 0)
        own = {"downsample_mode": mode, "scale_resolution": scale}
        base = minicpmv4_6.processor_settings(MINICPM, own, ImageBudget())
        for _ in range(5000):
            ratio = math.exp(rng.uniform(-math.log(WIDEST_RATIO), math.log(WIDEST_RATIO)))
            side = rng.uniform(scale / 3, scale * 6)
            width = max(1, round(side * math.sqrt(ratio)))
            height = max(1, round(side / math.sqrt(ratio)), math.ceil(width / WIDEST_RATIO))
            width = max(width, math.ceil(height / WIDEST_RATIO))
            for slices in found:
                cost = minicpmv4_6.image_cost({**base, "max_slice_nums": slices}, width, height)
                found[slices] = max(found[slices], cost.tokens)
        for slices, most in found.items():
            bound = minicpmv4_6.most_tokens(base, slices)
            near = 0.93 if scale == 448 else 0.85  # crops of a few tokens are rounded more coarsely
            assert near * bound <= most <= bound, (mode, scale, slices, most, bound)
            compiled = minicpmv4_6.processor_settings(MINICPM, own, ImageBudget(max_tokens=bound))
            assert compiled["max_slice_nums"] == slices


@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 19, 20, 64, 100, 256, 1280])
@pytest.mark.parametrize("least", [3136, 256 * 784])
def test_qwen_budget_is_never_exceeded_and_not_wasted(tokens: int, least: int) -> None:
    settings = qwen2_5_vl.processor_settings(QWEN, {"min_pixels": least}, ImageBudget(max_tokens=tokens))
    rng = random.Random(tokens)
    most = 0
    for _ in range(4000):
        ratio = math.exp(rng.uniform(-math.log(WIDEST_RATIO), math.log(WIDEST_RATIO)))
        side = math.exp(rng.uniform(math.log(10), math.log(3000)))
        width = max(1, round(side * math.sqrt(ratio)))
        height = max(1, round(side / math.sqrt(ratio)), math.ceil(width / WIDEST_RATIO))
        width = max(width, math.ceil(height / WIDEST_RATIO))
        most = max(most, qwen2_5_vl.image_cost(settings, width, height).tokens)
    assert 0.9 * tokens <= most <= tokens
    if tokens >= WIDEST_RATIO:  # a square picture gets the whole of it
        square = qwen2_5_vl.image_cost(settings, 3000, 3000).tokens
        assert square == math.isqrt(tokens) ** 2
