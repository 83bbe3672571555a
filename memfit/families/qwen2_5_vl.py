"""Qwen2.5-VL: one crop a picture at its own ratio, 2 x 2 patches merged into one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family, Images
from memfit.families.budget import WIDEST_RATIO, pinned_knob, refuse_downsample_mode
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

# transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil, class attributes
DEFAULTS: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "do_resize": True}
DEFAULT_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
# image_processing_pil_qwen2_vl:smart_resize refuses beyond this ratio.
LONGEST_RATIO = 200


def _setting(settings: Mapping[str, Any], name: str) -> int:
    value = settings.get(name)
    return int(DEFAULTS[name] if value is None else value)


def resized(width: int, height: int, side: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) in multiples of `side`, between `least` and `most` pixels where the ratio allows it.

    Source: image_processing_pil_qwen2_vl:smart_resize. ValueError for a ratio above 200, as upstream.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} px has no pixels")
    ratio = max(width, height) / min(width, height)
    if ratio > LONGEST_RATIO:
        raise ValueError(
            f"a picture of {width} x {height} px has sides 1 : {ratio:g}; this model takes at most 1 : {LONGEST_RATIO}"
        )
    high, wide = round(height / side) * side, round(width / side) * side
    if high * wide > most:
        shrink = math.sqrt((height * width) / most)
        high = max(side, math.floor(height / shrink / side) * side)
        wide = max(side, math.floor(width / shrink / side) * side)
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high = math.ceil(height * grow / side) * side
        wide = math.ceil(width * grow / side) * side
    return high, wide


def image_cost(settings: Mapping[str, Any], width: int, height: int) -> ImageCost:
    """Patches and tokens of a picture of `width` x `height` px under compiled settings (see `processor_settings`)."""
    patch, merge = _setting(settings, "patch_size"), _setting(settings, "merge_size")
    size = settings["size"]
    high, wide = resized(width, height, patch * merge, size["shortest_edge"], size["longest_edge"])
    rows, columns = high // patch, wide // patch
    return ImageCost(crops=((rows, columns),), crop_tokens=(rows * columns // merge**2,))


def most_tokens_enlarged(least: int, side: int) -> int:
    """The most tokens of a picture that is enlarged to `least` pixels, for ratios up to 1 : WIDEST_RATIO."""
    best, limit = 1, math.ceil(math.sqrt(least * WIDEST_RATIO) / side)
    for wide in range(1, limit + 1):
        # wide tokens across need more than (wide - 1) * side px, so at most least / that px down.
        across = (wide - 1) * side
        down = math.sqrt(least * WIDEST_RATIO) if across == 0 else least / across
        if across < math.sqrt(least * WIDEST_RATIO):
            best = max(best, wide * min(limit, math.ceil(down / side)))
    return best


def pixels_for_tokens(tokens: int, side: int) -> int:
    """The largest `longest_edge` in whole tokens that keeps pictures up to 1 : WIDEST_RATIO within `tokens`.

    A long picture keeps at least one row of tokens, so below WIDEST_RATIO tokens its length is what counts.
    """
    if tokens >= WIDEST_RATIO:
        return tokens * side * side
    return math.ceil((side * (tokens + 1)) ** 2 / WIDEST_RATIO) - 1


def _compiled_size(preprocessor: Mapping[str, Any]) -> dict[str, int]:
    """`size` with both edges; `min_pixels` and `max_pixels` win, as in Qwen2VLImageProcessorPil.__init__."""
    size = {**DEFAULT_SIZE, **(preprocessor.get("size") or {})}
    for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if preprocessor.get(old) is not None:
            size[edge] = preprocessor[old]
    return {"shortest_edge": int(size["shortest_edge"]), "longest_edge": int(size["longest_edge"])}


def processor_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """Explicit settings for Qwen2VLImageProcessorPil. The budget becomes `size.longest_edge` (pixels, not a side)."""
    refuse_downsample_mode(
        budget, "this model always merges its patches in the same way", "image.max_tokens or image.max_pixels"
    )
    settings = {**DEFAULTS, **{name: value for name, value in preprocessor.items() if value is not None}}
    settings["size"] = size = _compiled_size(preprocessor)
    settings.pop("min_pixels", None)
    settings.pop("max_pixels", None)
    if not settings["do_resize"]:
        raise UserError(
            "preprocessor_config.json: do_resize is false; pictures would not fall on the patch grid",
            "do_resize: true",
        )
    pinned = pinned_knob(budget)
    if pinned is None:
        return settings
    knob, value = pinned
    side = _setting(settings, "patch_size") * _setting(settings, "merge_size")
    if knob == "max_slices":
        raise UserError(
            f"image.max_slices: {value} has no effect: this model never slices a picture",
            "image.max_tokens or image.max_pixels",
        )
    tokens = value // side**2 if knob == "max_pixels" else value
    if tokens < 1:
        raise UserError(
            f"image.max_pixels: {value} is below one image token of this model ({side} x {side} px)",
            f"image.max_pixels: {side * side}",
        )
    size["longest_edge"] = value if knob == "max_pixels" else pixels_for_tokens(value, side)
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    # Small pictures are enlarged to shortest_edge, rounded up: that must not break the budget either.
    while most_tokens_enlarged(size["shortest_edge"], side) > tokens and size["shortest_edge"] > 1:
        size["shortest_edge"] //= 2
    return settings


def placeholder(cost: ImageCost, index: int, settings: Mapping[str, Any]) -> str:
    """The pads; the chat template itself writes <|vision_start|> and <|vision_end|> around them.

    Source: processing_qwen2_5_vl:Qwen2_5_VLProcessor.replace_image_token.
    """
    token: str = settings.get("tokens", {}).get("image_token", "<|image_pad|>")
    return token * cost.tokens


_IMAGE = "'<|vision_start|><|image_pad|><|vision_end|>'"

FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    auto_class="AutoModelForImageTextToText",
    parts=(
        ("model.visual.merger.", "connector"),
        ("model.visual.", "vision"),
        ("model.language_model.", "language"),
        ("lm_head.", "head"),
    ),
    blocks={"vision": "model.visual.blocks.", "language": "model.language_model.layers."},
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    images=Images(
        processor="Qwen2VLImageProcessorPil",
        rule=image_cost,
        budget=processor_settings,
        placeholder=placeholder,
        image_token="<|image_pad|>",
        # pixel_values [patches, 3 * temporal_patch_size * patch^2], image_grid_thw [pictures, 3]
        batch={"pixel_values": ("cat", 0), "image_grid_thw": ("cat", 0)},
        # Without mm_token_type_ids the model silently falls back to one-dimensional positions
        # (modeling_qwen2_5_vl:Qwen2_5_VLModel.compute_3d_position_ids).
        needs_token_types=True,
        tokens={"image_token": "<|image_pad|>"},
        marker="<|vision_start|><|image_pad|><|vision_end|>",
    ),
    chat_template=(
        "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['content'] is string %}{{ message['content'] }}"
        "{%- else %}{%- for piece in message['content'] %}"
        "{%- if piece['type'] == 'image' %}{{ " + _IMAGE + " }}{%- else %}{{ piece['text'] }}{%- endif %}"
        "{%- endfor %}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    sources={
        "parts": "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        "images": "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
        "placeholder": "transformers.models.qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
    },
)
