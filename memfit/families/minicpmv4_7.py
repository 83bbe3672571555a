"""MiniCPM-V 4.7: as 4.6, with positions on a canvas (M-RoPE), which forward derives from token types and marker ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.families import minicpmv4_6
from memfit.specs.recipe import ImageBudget

# The crops are laid out by `mm_token_type_ids`; forward raises without them once there is a picture
# (modeling_minicpmv4_7:MiniCPMV4_7Model.compute_3d_position_ids). config.json must hold these ids of its tokenizer.
CONFIG_IDS = {
    "image_start_id": "<image>",
    "image_end_id": "</image>",
    "slice_start_id": "<slice>",
    "slice_end_id": "</slice>",
    "newline_id": "\n",
}


def processor_settings(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """As for 4.6, once config.json names the marker ids that the canvas is laid out by."""
    missing = [name for name in CONFIG_IDS if config.get(name) is None]
    if missing and config:
        raise UserError(
            f"config.json lacks {', '.join(missing)}: without them pictures get wrong positions",
            f"{missing[0]}: the id of {CONFIG_IDS[missing[0]]!r} in tokenizer.json",
        )
    return minicpmv4_6.processor_settings(config, preprocessor, budget)


FAMILY = dataclasses.replace(
    minicpmv4_6.FAMILY,
    name="minicpmv4_7",
    model_types=("minicpmv4_7",),
    images=dataclasses.replace(minicpmv4_6.IMAGES, budget=processor_settings, needs_token_types=True),
    sources={
        **minicpmv4_6.FAMILY.sources,
        "parts": "transformers.models.minicpmv4_7.modeling_minicpmv4_7:MiniCPMV4_7ForConditionalGeneration",
        "placeholder": "transformers.models.minicpmv4_7.processing_minicpmv4_7:MiniCPMV4_7Processor",
    },
)
