"""MiniCPM-V 4.6: SigLIP with a window merger inside, an MLP merger, and Qwen3.5 text (linear attention 3:1).

A picture is one overview plus up to `max_slice_nums` slices of about `scale_resolution` squared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family, Images
from memfit.families.budget import WIDEST_RATIO, pinned_knob
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

# transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6:MiniCPMV4_6ImageProcessorPil, class attributes
DEFAULTS: dict[str, Any] = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "downsample_mode": "16x",
    "use_image_id": True,
    "do_resize": True,
}

# The eight names that processing_minicpmv4_6:MiniCPMV4_6Processor.__init__ reads from the tokenizer.
TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}

LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
)

# ChatML, as in Qwen3.5 and MiniCPM-V; used only when the model brings no template of its own.
CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{%- for piece in message['content'] %}"
    "{%- if piece['type'] == 'image' %}{{ IMAGE }}{%- else %}{{ piece['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    value = settings.get(name)
    return DEFAULTS[name] if value is None else value


def _nearest_multiple(length: float, divisor: int) -> int:
    return max(round(length / divisor) * divisor, divisor)


def token_side(settings: Mapping[str, Any]) -> int:
    """Pixels along one side of one image token: the patch times 2 (4x mode) or 4 (16x)."""
    return int(_setting(settings, "patch_size")) * (2 if _setting(settings, "downsample_mode") == "4x" else 4)


def _crop_size(height: float, width: float, side: int, scale: int) -> tuple[int, int]:
    """(height, width) of a crop brought to about scale x scale px at its own ratio, in multiples of `side`."""
    ratio = width / height
    height = int(scale / math.sqrt(ratio))
    width = int(height * ratio)
    return _nearest_multiple(height, side), _nearest_multiple(width, side)


def slice_grid(width: int, height: int, scale: int, max_slices: int) -> tuple[int, int]:
    """(rows, columns) of slices whose ratio is nearest to the picture's, (0, 0) for a picture that is not sliced."""
    wanted = min(math.ceil(width * height / (scale * scale)), max_slices)
    if wanted <= 1:
        return 0, 0
    target = math.log(width / height)
    best, error = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > max_slices:
            continue
        for rows in range(1, count + 1):
            if count % rows:
                continue
            off = abs(target - math.log(count // rows / rows))
            # On a tie the grid with more rows wins, as upstream does.
            if off < error or (off == error and rows > best[0]):
                best, error = (rows, count // rows), off
    return best


def image_cost(settings: Mapping[str, Any], width: int, height: int) -> ImageCost:
    """Crops, patches and tokens of a picture of `width` x `height` px.

    Source: image_processing_pil_minicpmv4_6:MiniCPMV4_6ImageProcessorPil._preprocess and
    processing_minicpmv4_6:MiniCPMV4_6Processor.replace_image_token. ValueError for a picture without pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} px has no pixels")
    scale, patch = int(_setting(settings, "scale_resolution")), int(_setting(settings, "patch_size"))
    side = token_side(settings)
    grid = (0, 0)
    if _setting(settings, "slice_mode"):
        grid = slice_grid(width, height, scale, int(_setting(settings, "max_slice_nums")))
    sizes = [_crop_size(height, width, side, scale)]
    if grid != (0, 0):
        rows, columns = grid
        piece = (_nearest_multiple(height, rows) / rows, _nearest_multiple(width, columns) / columns)
        sizes += [_crop_size(*piece, side, scale)] * (rows * columns)
    return ImageCost(
        crops=tuple((high // patch, wide // patch) for high, wide in sizes),
        crop_tokens=tuple((high // side) * (wide // side) for high, wide in sizes),
        grid=grid,
    )


@lru_cache(maxsize=512)
def most_crop_tokens(scale: int, side: int, ratio: float) -> int:
    """The most tokens one crop can take over all pictures whose sides are at most 1 : `ratio`.

    A crop of a x b tokens needs a picture scaled to at least w x h px, where w and h are the fewest pixels that round
    to a and b tokens; scaling keeps w * h <= scale^2 and the ratio. So this bounds every case from above.
    """

    def fewest_pixels(count: int) -> int:
        pixels = max(0, math.floor((count - 0.5) * side) - 1)
        while round(pixels / side) < count:
            pixels += 1
        return pixels

    best, most = 1, math.ceil(scale * math.sqrt(ratio) / side) + 1
    for rows in range(1, most + 1):
        high = 0 if rows == 1 else fewest_pixels(rows)
        for columns in range(rows, most + 1):
            wide = 0 if columns == 1 else fewest_pixels(columns)
            widest = (scale * scale if high == 0 else (scale / high) ** 2) >= (wide / scale) ** 2
            if high * wide <= scale * scale and (wide / scale) ** 2 <= ratio and widest:
                best = max(best, rows * columns)
    return best


def most_tokens(settings: Mapping[str, Any], slices: int) -> int:
    """A bound on the tokens of any picture up to 1 : WIDEST_RATIO under `max_slice_nums` = `slices`.

    The grid nearest to the picture's ratio is taken, so slices are never longer than 1 : 2 or the picture's own ratio
    over their number, whichever is longer. Sides are first rounded to multiples of the grid: `slices` / `scale` of a
    sliced picture's long side at most, and half as much again is allowed on 1 : 2, where both sides round.
    """
    scale, side = int(_setting(settings, "scale_resolution")), token_side(settings)

    def all_slices(count: int) -> int:
        ratio = max(3.0, WIDEST_RATIO / count * (1 + count / scale))
        return count * most_crop_tokens(scale, side, ratio)

    return most_crop_tokens(scale, side, WIDEST_RATIO) + max(map(all_slices, range(2, slices + 1)), default=0)


def _slices_within(settings: Mapping[str, Any], tokens: int, knob: str, value: int) -> int:
    """The largest `max_slice_nums` that keeps every picture within `tokens`; UserError when even 1 does not."""
    least = most_tokens(settings, 1)
    if tokens < least:
        unit = token_side(settings) ** 2 if knob == "max_pixels" else 1
        raise UserError(
            f"image.{knob}: {value} is below the {least * unit} that a picture of this model may take without slices",
            f"image.{knob}: {least * unit}, or image.max_slices: 1",
        )
    slices = 1
    while most_tokens(settings, slices + 1) <= tokens:
        slices += 1
    return slices


def processor_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """Explicit settings for MiniCPMV4_6ImageProcessorPil. The budget becomes `max_slice_nums`.

    `downsample_mode` is the budget's, else the preprocessor's, else the model's: the same value goes to the model's
    forward.
    """
    if config.get("image_token_id") is None and config:
        raise UserError(
            "config.json has no image_token_id: the model would ignore every picture without a word",
            "image_token_id: the id of <|image_pad|> in tokenizer.json",
        )
    settings = {**DEFAULTS, "downsample_mode": config.get("downsample_mode") or DEFAULTS["downsample_mode"]}
    settings.update({name: value for name, value in preprocessor.items() if value is not None})
    if budget.downsample_mode != "auto":
        settings["downsample_mode"] = budget.downsample_mode
    if not settings["do_resize"]:
        raise UserError(
            "preprocessor_config.json: do_resize is false; pictures would not fall on the patch grid",
            "do_resize: true",
        )
    pinned = pinned_knob(budget)
    if pinned is None:
        return settings
    knob, value = pinned
    if knob == "max_slices":
        settings["max_slice_nums"] = value
    else:
        tokens = value if knob == "max_tokens" else value // token_side(settings) ** 2
        settings["max_slice_nums"] = _slices_within(settings, tokens, knob, value)
    return settings


def placeholder(cost: ImageCost, index: int, settings: Mapping[str, Any]) -> str:
    """The text that stands for picture number `index` of its sample.

    Source: processing_minicpmv4_6:MiniCPMV4_6Processor.replace_image_token and _prepend_local_ids.
    """
    tokens = {**TOKENS, **settings.get("tokens", {})}
    pad = tokens["image_token"]
    text = tokens["image_start_token"] + pad * cost.crop_tokens[0] + tokens["image_end_token"]
    if _setting(settings, "use_image_id"):
        text = f"{tokens['image_id_start_token']}{index}{tokens['image_id_end_token']}{text}"
    rows, columns = cost.grid
    lines = [
        "".join(tokens["slice_start_token"] + pad * count + tokens["slice_end_token"] for count in line)
        for line in (cost.crop_tokens[1 + row * columns : 1 + (row + 1) * columns] for row in range(rows))
    ]
    return text + "\n".join(lines)


def forward_kwargs(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`downsample_mode` must be the same in the processor and in every forward and generate call."""
    return {"downsample_mode": settings.get("downsample_mode") or config.get("downsample_mode") or "16x"}


def unreached(config: Mapping[str, Any]) -> tuple[str, ...]:
    """In 4x mode the window merger inside the tower is passed by: it gets no gradient.

    Source: transformers.models.minicpmv4_6.modeling_minicpmv4_6:MiniCPMV4_6Model.get_image_features (use_vit_merger).
    """
    return ("model.vision_tower.vit_merger.",) if config.get("downsample_mode") == "4x" else ()


IMAGES = Images(
    processor="MiniCPMV4_6ImageProcessorPil",
    rule=image_cost,
    budget=processor_settings,
    placeholder=placeholder,
    image_token=TOKENS["image_token"],
    # pixel_values [1, 3, patch, L]: one row for the whole batch (forward reads pixel_values[:1] only).
    batch={"pixel_values": ("cat", 3), "target_sizes": ("cat", 0)},
    tokens=TOKENS,
    shared=("downsample_mode",),
)

FAMILY = Family(
    name="minicpmv4_6",
    model_types=("minicpmv4_6",),
    auto_class="AutoModelForImageTextToText",
    parts=(
        ("model.vision_tower.", "vision"),
        ("model.merger.", "connector"),
        ("model.language_model.", "language"),
        ("lm_head.", "head"),
    ),
    blocks={"vision": "model.vision_tower.encoder.layers.", "language": "model.language_model.layers."},
    lora_targets=LORA_TARGETS,
    images=IMAGES,
    chat_template=CHATML.replace("IMAGE", "'<|image_pad|>'"),
    forward_kwargs=forward_kwargs,
    unreached=unreached,
    sources={
        "parts": "transformers.models.minicpmv4_6.modeling_minicpmv4_6:MiniCPMV4_6ForConditionalGeneration",
        "images": "transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6:MiniCPMV4_6ImageProcessorPil",
        "placeholder": "transformers.models.minicpmv4_6.processing_minicpmv4_6:MiniCPMV4_6Processor",
        "lora_targets": "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5GatedDeltaNet",
    },
)
