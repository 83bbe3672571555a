"""MiniCPM-V and -o before 4.6 (V 2.5, 2.6, 4.0, 4.5, o 2.6, o 4.5): SigLIP, a resampler with learned queries, an LLM.

A picture is one overview plus up to `max_slice_nums` slices of about `scale_resolution` squared. Every crop takes the
same number of tokens, the checkpoint's `query_num`, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family, Images
from memfit.families.budget import pinned_knob, refuse_downsample_mode
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

# The image processor's own defaults (image_processing_minicpmv.py of the checkpoints); `use_image_id` is the value of
# the files of 2.6 and later, where the class says false.
DEFAULTS: dict[str, Any] = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "use_image_id": True,
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
}
QUERIES = 64  # configuration_minicpm.py: query_num

# generation -> the language model's model_type in transformers. 2.5 and 2.6 are read from the checkpoints' code, 4.0
# and o 4.5 from other engines' loaders and demos, 4.5 from a draft for transformers: a checkpoint that says otherwise
# stops the load with the differing names.
LANGUAGE = {"2.5": "llama", "2.6": "qwen2", "4.0": "llama", "4.5": "qwen3", "o-2.6": "qwen2", "o-4.5": "qwen3"}

TOKENS = {
    "image_token": "<unk>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}

# The parts of -o checkpoints that memfit neither trains nor loads: they stay on disk and are written back as they are.
KEPT_ON_DISK = {"audio": ("apm.", "audio_projection_layer."), "tts": ("tts.",)}

# ChatML with Qwen2's default system turn, as the 2.6 checkpoints' tokenizer has it; used when there is no template.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def generation_of(config: Mapping[str, Any]) -> str:
    """Which of LANGUAGE's generations a config.json is. UserError for one that is not known here.

    `model_type` alone does not say it: `version` does, and where it is missing the language model's fields do.
    """
    version, speaks = config.get("version"), config.get("model_type") == "minicpmo"
    if version is None:
        if speaks:
            late = config.get("audio_pool_step") == 5 or config.get("head_dim") is not None
            return "o-4.5" if late else "o-2.6"
        version = "2.0" if (config.get("hidden_size"), config.get("query_num")) == (2304, 64) else "2.5"
    major, _, minor = str(version).partition(".")
    name = f"{'o-' if speaks else ''}{major}.{minor.partition('.')[0] or '0'}"
    if name not in LANGUAGE:
        hint = "V 2.0 has a language model and a vision tower of its own" if name == "2.0" else "convert the checkpoint"
        raise UserError(
            f"config.json: MiniCPM version {version!r} is not supported",
            f"versions known here: {', '.join(LANGUAGE)}; {hint}",
        )
    return name


def query_num(config: Mapping[str, Any]) -> int:
    """Tokens of every crop: learned queries, fixed by the checkpoint."""
    return int(config.get("query_num") or QUERIES)


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    value = settings.get(name)
    return DEFAULTS[name] if value is None else value


def nearest_multiple(length: float, divisor: int) -> int:
    """`length` rounded (half to even) to a multiple of `divisor`, at least one."""
    return max(round(length / divisor) * divisor, divisor)


def fitted(width: float, height: float, settings: Mapping[str, Any], enlarge: bool) -> tuple[int, int]:
    """(width, height) in whole patches: about scale x scale px at the picture's own ratio.

    Smaller pictures keep their size unless `enlarge`.
    """
    scale, patch = int(_setting(settings, "scale_resolution")), int(_setting(settings, "patch_size"))
    if enlarge or width * height > scale * scale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return nearest_multiple(width, patch), nearest_multiple(height, patch)


def slice_grid(width: int, height: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of slices whose ratio is nearest to the picture's, (0, 0) for a picture that is not sliced."""
    scale, most = int(_setting(settings, "scale_resolution")), int(_setting(settings, "max_slice_nums"))
    wanted = min(math.ceil(width * height / scale**2), most)
    if wanted <= 1:
        return 0, 0
    target, best, error = math.log(width / height), (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > most:
            continue
        for columns in range(1, count + 1):
            if count % columns == 0:
                off = abs(target - math.log(columns / (count // columns)))
                if off < error:  # the first of equals: fewer slices, then fewer columns
                    best, error = (count // columns, columns), off
    return best


def crop_sizes(width: int, height: int, settings: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) of the overview, (width, height) of each slice); the second is (0, 0) without slices.

    ValueError for a picture without pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} px has no pixels")
    rows, columns = slice_grid(width, height, settings)
    if not rows:
        return fitted(width, height, settings, enlarge=True), (0, 0)
    cell = (nearest_multiple(width, columns) / columns, nearest_multiple(height, rows) / rows)
    return fitted(width, height, settings, enlarge=False), fitted(*cell, settings, enlarge=True)


def image_cost(settings: Mapping[str, Any], width: int, height: int) -> ImageCost:
    """Crops, patches and tokens of a picture of `width` x `height` px."""
    patch, queries = int(_setting(settings, "patch_size")), query_num(settings)
    whole, piece = crop_sizes(width, height, settings)
    rows, columns = slice_grid(width, height, settings)
    sizes = [whole] + [piece] * (rows * columns)
    return ImageCost(
        crops=tuple((high // patch, wide // patch) for wide, high in sizes),
        crop_tokens=(queries,) * len(sizes),
        grid=(rows, columns),
    )


def _slices_within(queries: int, knob: str, value: int, scale: int) -> int:
    """`max_slice_nums` that keeps every picture within `value` tokens or pixels. One slice stands for no cutting."""
    unit = scale * scale if knob == "max_pixels" else queries
    crops = value // unit
    if crops < 1:
        raise UserError(
            f"image.{knob}: {value} is below {unit}, what every picture of this model takes: its {queries} queries "
            "are fixed by the checkpoint",
            f"image.{knob}: {unit}, or image.max_slices: 1",
        )
    # A cut picture is its slices and the overview: two slices take three crops.
    return max(1, crops - 1)


def _check_agreement(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
    """UserError where the two files differ in what text and pixels both follow; the originals refuse that too."""
    vision = config.get("vision_config") or {}
    for name, said in (("image_feature_size", query_num(config)), ("patch_size", vision.get("patch_size", 14))):
        found = preprocessor.get(name)
        if config and found is not None and int(found) != int(said):
            raise UserError(
                f"preprocessor_config.json: {name} is {found}, config.json says {said}",
                f"{name}: {said}, or the config.json that came with these files",
            )


def processor_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """Explicit settings of the image processor. The budget becomes `max_slice_nums`, which text and pixels both read.

    `slices_wrapped` is V 2.5's way to write slices; it knows no picture numbers.
    """
    settings = {**DEFAULTS, **{name: value for name, value in preprocessor.items() if value is not None}}
    # As in the configuration class: without slice_config a picture is not cut.
    asked = config.get("slice_config")
    if not preprocessor and isinstance(asked, Mapping):
        settings |= {name: asked[name] for name in DEFAULTS if asked.get(name) is not None}
    generation = generation_of(config) if config else "2.6"
    queries = query_num(config)
    refuse_downsample_mode(
        budget,
        f"the {queries} queries that a crop becomes are fixed by the checkpoint",
        "image.max_slices: N, which changes how many crops there are",
    )
    _check_agreement(config, preprocessor)
    settings["query_num"] = queries
    settings["slices_wrapped"] = generation == "2.5"
    settings["use_image_id"] = generation != "2.5" and bool(config.get("use_image_id", True))
    if not settings["slice_mode"]:
        raise UserError(
            "preprocessor_config.json: slice_mode is false; pictures would not fall on the patch grid",
            "slice_mode: true, and image.max_slices: 1 for no slices",
        )
    if list(settings["norm_mean"]) != [0.5] * 3 or list(settings["norm_std"]) != [0.5] * 3:
        raise UserError(
            f"preprocessor_config.json: norm_mean {settings['norm_mean']} and norm_std {settings['norm_std']} are not "
            "those of this family",
            "norm_mean: [0.5, 0.5, 0.5] and norm_std: [0.5, 0.5, 0.5]",
        )
    pinned = pinned_knob(budget)
    if pinned is not None:
        knob, value = pinned
        scale = int(settings["scale_resolution"])
        settings["max_slice_nums"] = value if knob == "max_slices" else _slices_within(queries, knob, value, scale)
    return settings


def placeholder(cost: ImageCost, index: int, settings: Mapping[str, Any]) -> str:
    """A picture as text: number, overview, rows of slices. `index` counts the sample's pictures from 0.

    The tags are fixed texts of the tokenizers; V 2.5 puts <slice> around the whole grid and <image> around each piece.
    """
    names = {**TOKENS, **settings.get("tokens", {})}
    unit, opening, closing = names["image_token"], names["image_start_token"], names["image_end_token"]
    first, last = names["slice_start_token"], names["slice_end_token"]
    text: str = opening + unit * cost.crop_tokens[0] + closing
    if settings.get("use_image_id", True):
        text = f"{names['image_id_start_token']}{index}{names['image_id_end_token']}{text}"
    rows, columns = cost.grid
    if not rows:
        return text
    wrapped = bool(settings.get("slices_wrapped"))
    before, behind = (opening, closing) if wrapped else (first, last)
    lines = "\n".join(
        "".join(before + unit * count + behind for count in cost.crop_tokens[1 + row * columns :][:columns])
        for row in range(rows)
    )
    return text + (first + lines + last if wrapped else lines)


IMAGES = Images(
    processor="MiniCPMVImageProcessor",
    rule=image_cost,
    budget=processor_settings,
    placeholder=placeholder,
    image_token=TOKENS["image_token"],
    # pixel_values uint8 [patches, 3 * patch * patch], tgt_sizes [crops, 2]
    batch={"pixel_values": ("cat", 0), "tgt_sizes": ("cat", 0)},
    # Where the pictures stand: a user's own <unk> is refused by the encoder, so the id is enough.
    needs_token_types=True,
    tokens=TOKENS,
    newlines=True,
    token_in_config=False,
)

FAMILY = Family(
    name="minicpmv2",
    model_types=("minicpmv", "minicpmo"),
    auto_class="AutoModelForImageTextToText",
    parts=(
        ("vpm.", "vision"),
        ("resampler", "connector"),
        ("llm.lm_head.", "head"),
        ("llm.", "language"),
    ),
    blocks={"vision": "vpm.encoder.layers.", "language": "llm.model.layers."},
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    images=IMAGES,
    chat_template=CHATML,
    native=True,
    sources={
        "parts": "memfit.models.minicpmv.model:MiniCPMV; names as in the checkpoints",
        "images": "memfit.models.minicpmv.images:slices, equal to image_processing_minicpmv.py of the checkpoints",
        "placeholder": "processing_minicpmv.py of the checkpoints",
    },
)
