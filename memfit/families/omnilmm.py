"""OmniLMM-12B: EVA02-enormous (its last block left out), a resampler with 64 queries, Zephyr-7B (Mistral).

Forecast only. The checkpoint runs on timm and on its own repository's code; no vector of it was at hand to compare
with, and its weights are no safetensors. `memfit.models.omnilmm` is an equivalent that can be counted and traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family, Images
from memfit.families.budget import pinned_knob, refuse_downsample_mode
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

QUERIES = 64  # num_query of train_omnilmm.py
SIDE = 448  # image_size of the released config.json; verified: memory
# timm.models.eva:eva02_enormous_patch14_clip_224; omnilmm.py puts an identity in the place of the last of 64 blocks.
TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",  # the nearest transformers config; the blocks are memfit.models.omnilmm's
    "hidden_size": 1792,
    "intermediate_size": 15_360,
    "num_hidden_layers": 63,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": SIDE,
    "layer_norm_eps": 1e-6,
}
# timm's table of positions is that of 224 px and is stretched for larger pictures.
TABLE_SIDE = 16


def image_cost(settings: Mapping[str, Any], width: int, height: int) -> ImageCost:
    """One square crop, whatever the picture's size; `queries` tokens. ValueError for a picture without pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} px has no pixels")
    side = int(settings["image_size"]) // int(settings["patch_size"])
    return ImageCost(crops=((side, side),), crop_tokens=(int(settings["queries"]),))


def processor_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """What the cost of a picture follows from. It is fixed by the checkpoint: a budget can only be met or not."""
    queries, side = int(config.get("num_query") or QUERIES), int(config.get("image_size") or SIDE)
    refuse_downsample_mode(
        budget, f"the {queries} queries of a picture are fixed by the checkpoint", "image.downsample_mode: auto"
    )
    pinned, fixed = pinned_knob(budget), {"max_slices": 1, "max_pixels": side * side, "max_tokens": queries}
    if pinned is not None and pinned[1] < fixed[pinned[0]]:
        raise UserError(
            f"image.{pinned[0]}: {pinned[1]} is below {fixed[pinned[0]]}, what every picture of this model takes: its "
            f"{queries} queries are fixed by the checkpoint",
            f"image.{pinned[0]}: auto",
        )
    return {"image_size": side, "patch_size": TOWER["patch_size"], "queries": queries}


def placeholder(cost: ImageCost, index: int, settings: Mapping[str, Any]) -> str:
    """Source: omnilmm/train/train_utils.py of OpenBMB/MiniCPM-V."""
    return "<im_start>" + "<im_patch>" * cost.tokens + "<im_end>"


FAMILY = Family(
    name="omnilmm",
    model_types=("omnilmm",),
    auto_class="AutoModelForCausalLM",
    parts=(
        ("model.vision_tower.", "vision"),
        ("model.resampler.", "connector"),
        ("lm_head.", "head"),
        ("model.", "language"),
    ),
    blocks={"vision": "model.vision_tower.blocks.", "language": "model.layers."},
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    images=Images(
        processor="none",
        rule=image_cost,
        budget=processor_settings,
        placeholder=placeholder,
        image_token="<im_patch>",
        batch={"pixel_values": ("cat", 0)},  # [pictures, 3, side, side]
        token_in_config=False,
    ),
    native=True,
    forecast_only="OmniLMM's tower is timm's and its weights are no safetensors: memfit counts and traces an "
    "equivalent, which was not compared with the original",
    sources={
        "parts": "OpenBMB/MiniCPM-V at 24bb62b, omnilmm/model/omnilmm.py",
        "tower": "timm.models.eva:eva02_enormous_patch14_clip_224 (EvaBlockPostNorm)",
    },
)
