"""LLaVA 1.5: CLIP or SigLIP at one fixed size, an MLP projector, a LLaMA-like language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family, Images
from memfit.families.budget import pinned_knob, refuse_downsample_mode
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

# vision model type -> (tokens beside the patches, default patch_size, default image_size).
# Sources: models.clip.configuration_clip:CLIPVisionConfig, modeling_clip:CLIPVisionEmbeddings (one class token);
# models.siglip.configuration_siglip:SiglipVisionConfig (none).
TOWERS = {"clip_vision_model": (1, 32, 224), "siglip_vision_model": (0, 16, 224)}
# models.llava.configuration_llava:LlavaConfig, the vision tower of a config that names none
DEFAULT_TOWER: dict[str, Any] = {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 336}
DEFAULT_LAYERS = 12  # CLIPVisionConfig and SiglipVisionConfig: num_hidden_layers

# preprocessor_config.json's class -> its defaults. All three are the same PIL pipeline with other defaults, so
# LlavaImageProcessorPil with these values spelt out does what they do.
# Sources: image_processing_pil_{llava,clip,siglip}: class attributes.
_CLIP_LIKE = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
_CLIP_MEAN = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SIGLIP = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaImageProcessor": {**_CLIP_LIKE, **_CLIP_MEAN, "do_pad": False},
    "CLIPImageProcessor": {**_CLIP_LIKE, **_CLIP_MEAN, "do_pad": False},
    "SiglipImageProcessor": {**_SIGLIP, "do_pad": False},
}


def _sides(size: Any) -> tuple[int, int] | None:
    """(height, width) that a `size` entry fixes, None for one that keeps the picture's ratio."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    return None


def fixed_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) every picture is brought to. UserError when the settings leave it to the picture."""
    sides = None
    if settings.get("do_center_crop"):
        sides = _sides(settings.get("crop_size"))
    elif settings.get("do_resize", True):
        size = settings.get("size")
        sides = _sides(size)
        if sides is None and settings.get("do_pad") and isinstance(size, Mapping) and size.get("shortest_edge"):
            sides = (int(size["shortest_edge"]), int(size["shortest_edge"]))
    if sides is None:
        raise UserError(
            "preprocessor_config.json leaves the picture's size open; this vision tower takes one fixed size",
            "set size to height and width, or do_center_crop to true with a crop_size",
        )
    return sides


def image_cost(settings: Mapping[str, Any], width: int, height: int) -> ImageCost:
    """One crop of the model's own size, whatever the picture's.

    Source: processing_llava:LlavaProcessor.replace_image_token.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} px has no pixels")
    high, wide = fixed_size(settings)
    patch = int(settings["patch_size"])
    tokens = (high // patch) * (wide // patch) + int(settings["num_additional_image_tokens"])
    if settings["vision_feature_select_strategy"] == "default":
        tokens -= 1
    return ImageCost(crops=((high // patch, wide // patch),), crop_tokens=(tokens,))


def _tower(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(tokens beside the patches, patch_size, image_size) of the vision tower. UserError for one not known here."""
    vision = config.get("vision_config") or DEFAULT_TOWER
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise UserError(
            f"config.json: a llava model with the vision tower {kind!r} is not supported",
            f"towers known here: {', '.join(sorted(TOWERS))}",
        )
    extra, patch, side = TOWERS[kind]
    return extra, int(vision.get("patch_size", patch)), int(vision.get("image_size", side))


def processor_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """Explicit settings for LlavaImageProcessorPil, with the three of LlavaProcessor that count tokens beside them.

    The cost of a picture is fixed by the model, so a budget can only be met or not.
    """
    refuse_downsample_mode(budget, "the cost of every picture is fixed by this model", "image.downsample_mode: auto")
    kind = str(preprocessor.get("image_processor_type", "LlavaImageProcessor"))
    base = kind.removesuffix("Fast").removesuffix("Pil")
    if base not in PROCESSORS:
        raise UserError(
            f"preprocessor_config.json: image_processor_type {kind!r} is not supported for llava",
            f"types known here: {', '.join(sorted(PROCESSORS))}",
        )
    extra, patch, side = _tower(config)
    settings = {**PROCESSORS[base], "do_resize": True}
    settings.update({name: value for name, value in preprocessor.items() if value is not None})
    settings.update(
        patch_size=patch,
        num_additional_image_tokens=extra,
        vision_feature_select_strategy=config.get("vision_feature_select_strategy", "default"),
    )
    size = fixed_size(settings)
    if size != (side, side):
        raise UserError(
            f"preprocessor_config.json brings pictures to {size[1]} x {size[0]} px, the model takes {side} x {side}",
            f"crop_size: {{height: {side}, width: {side}}}",
        )
    cost = image_cost(settings, side, side)
    fixed = {"max_slices": 1, "max_pixels": side * side, "max_tokens": cost.tokens}
    pinned = pinned_knob(budget)
    if pinned is not None and pinned[1] < fixed[pinned[0]]:
        knob, value = pinned
        raise UserError(
            f"image.{knob}: {value} is below {fixed[knob]}, the cost of every picture, which is fixed by this model",
            f"image.{knob}: auto",
        )
    return settings


def unreached(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the tower computes behind the layer that is read: it gets no gradient.

    Source: transformers.models.llava.modeling_llava:LlavaModel.get_image_features (hidden_states[vision_feature_layer],
    of which the first are the embeddings).
    """
    layers = int((config.get("vision_config") or DEFAULT_TOWER).get("num_hidden_layers", DEFAULT_LAYERS))
    wanted = config.get("vision_feature_layer", -2)
    read = [index + layers + 1 if index < 0 else index for index in (wanted if isinstance(wanted, list) else [wanted])]
    behind = [f"model.vision_tower.encoder.layers.{layer}." for layer in range(max(read), layers)]
    return (*behind, "model.vision_tower.post_layernorm.", "model.vision_tower.head.")


def placeholder(cost: ImageCost, index: int, settings: Mapping[str, Any]) -> str:
    """The image token as often as the picture has tokens."""
    token: str = settings.get("tokens", {}).get("image_token", "<image>")
    return token * cost.tokens


FAMILY = Family(
    name="llava",
    model_types=("llava",),
    auto_class="AutoModelForImageTextToText",
    parts=(
        ("model.vision_tower.", "vision"),
        ("model.multi_modal_projector.", "connector"),
        ("model.language_model.", "language"),
        ("lm_head.", "head"),
    ),
    blocks={"vision": "model.vision_tower.encoder.layers.", "language": "model.language_model.layers."},
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    images=Images(
        processor="LlavaImageProcessorPil",
        rule=image_cost,
        budget=processor_settings,
        placeholder=placeholder,
        image_token="<image>",
        batch={"pixel_values": ("cat", 0)},  # [pictures, 3, height, width]
        tokens={"image_token": "<image>"},
        marker="<image>\n",
    ),
    unreached=unreached,
    # The Vicuna dialogue that LLaVA 1.5 was trained on: pictures open the turn, </s> ends an answer.
    chat_template=(
        "{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{%- else %}{{ message['role'] | upper + ': ' }}{%- endif %}"
        "{%- if message['content'] is string %}{{ message['content'] }}"
        "{%- else %}{%- for piece in message['content'] if piece['type'] == 'image' %}{{ '<image>\\n' }}{%- endfor %}"
        "{%- for piece in message['content'] if piece['type'] == 'text' %}{{ piece['text'] }}{%- endfor %}{%- endif %}"
        "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{%- endif %}"
    ),
    sources={
        "parts": "transformers.models.llava.modeling_llava:LlavaForConditionalGeneration",
        "images": "transformers.models.llava.image_processing_pil_llava:LlavaImageProcessorPil",
        "placeholder": "transformers.models.llava.processing_llava:LlavaProcessor",
    },
)
