"""How many bytes a patch takes in the tensors that a family's image processor hands over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfit.families.base import Family

FLOAT = 4  # torch.float32, as every processor of transformers gives it


def patch_bytes(family: Family, config: Mapping[str, Any]) -> int:
    """Bytes of one vision patch in `pixel_values`; 0 for a model that takes no pictures.

    Sources: the processors' own shapes, as in memfit.trace.batch; transformers' hand over fp32, memfit's own bytes.
    """
    if family.images is None:
        return 0
    vision = config.get("vision_config") or {}
    patch = int(vision.get("patch_size", 14))
    channels = int(vision.get("num_channels", vision.get("in_channels", vision.get("in_chans", 3))))
    values = channels * patch * patch
    if "image_grid_thw" in family.images.batch:  # every patch stands there once for each of two frames
        values *= int(vision.get("temporal_patch_size", 2))
    return values * (1 if family.native else FLOAT)
