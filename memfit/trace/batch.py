"""A batch made of numbers: the tensors that the collator would hand over, without data.

Integers (ids, sizes, masks) are real, because model code reads them; pixels are made by the caller's mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memfit.build.data import IGNORED, Collator, refuse_packing
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.specs.trace import TraceBatch
from memfit.specs.workload import ImageCost

TEXT = 0  # any ordinary token
# config.json's names for the tokens around a picture and its slices; a model that has them reads positions off them.
MARKERS = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")


def make_batch(family: Family, config: Mapping[str, Any], batch: TraceBatch, packing: bool = False) -> dict[str, Any]:
    """The model's inputs and `labels` for `batch`, joined by the collator that training uses.

    Raises UserError when a row is too short for its pictures, the model takes none, or it cannot pack.
    """
    if packing:
        refuse_packing(family, config)
    pictures = batch.images or ((),) * len(batch.rows)
    if len(pictures) != len(batch.rows):
        raise UserError(
            f"{len(batch.rows)} rows, but pictures for {len(pictures)}", "one tuple of pictures for every row"
        )
    if any(pictures) and family.images is None:
        raise UserError(f"{family.name} models take no pictures", "trace without pictures")
    extra = family.forward_kwargs(config, {}) if family.forward_kwargs else {}
    image_token = _image_token(family, config)
    collator = Collator(family, TEXT, extra, image_token, packing)
    rows = [_row(family, config, tokens, costs) for tokens, costs in zip(batch.rows, pictures, strict=True)]
    for row, trained in zip(rows, batch.trained, strict=bool(batch.trained)):
        row["labels"][: len(row["labels"]) - trained] = IGNORED
    return collator(rows)


def _row(family: Family, config: Mapping[str, Any], tokens: int, costs: Sequence[ImageCost]) -> dict[str, torch.Tensor]:
    image_ids = [identity for cost in costs for identity in _picture_ids(family, config, cost)]
    if len(image_ids) >= tokens:
        raise UserError(
            f"a row of {tokens} tokens has no room for pictures of {len(image_ids)} tokens and one of text",
            f"a row of at least {len(image_ids) + 1} tokens",
        )
    ids = torch.tensor(image_ids + [_text_id(config)] * (tokens - len(image_ids)), dtype=torch.long)
    # Full logits are taken whatever the labels are; `TraceBatch.trained` says which carry loss where that matters.
    row = {"input_ids": ids, "labels": ids.clone()}
    if costs:
        row |= _pixels(family, config, costs)
    return row


def _text_id(config: Mapping[str, Any]) -> int:
    """An id that is no marker: the smallest one that config.json names for nothing."""
    named = {value for name, value in config.items() if name.endswith(("_id", "_index")) and isinstance(value, int)}
    return next(number for number in range(len(named) + 1) if number not in named)


def _image_token(family: Family, config: Mapping[str, Any]) -> int | None:
    """The id that stands for pictures: config.json's, or any for a family that does not name it there."""
    if family.images is not None and not family.images.token_in_config:
        return int(config.get("vocab_size", 2)) - 1
    return config.get("image_token_id", config.get("image_token_index"))


def _picture_ids(family: Family, config: Mapping[str, Any], cost: ImageCost) -> list[int]:
    """Ids of one picture with its markers, in the order of the family's `placeholder`."""
    pad = _image_token(family, config)
    if pad is None:
        raise UserError("config.json names no image_token_id", "image_token_id: the id of the model's image token")
    if all(config.get(name) is not None for name in MARKERS):
        start, end, slice_start, slice_end, newline = (int(config[name]) for name in MARKERS)
        rows, columns = cost.grid
        ids = [start, *[pad] * cost.crop_tokens[0], end]
        for row in range(rows):
            ids += [newline] if row else []
            for count in cost.crop_tokens[1 + row * columns : 1 + (row + 1) * columns]:
                ids += [slice_start, *[pad] * count, slice_end]
        return ids
    around = [config.get("vision_start_token_id"), config.get("vision_end_token_id")]
    inner = [pad] * cost.tokens
    return inner if None in around else [int(around[0] or 0), *inner, int(around[1] or 0)]


def _pixels(family: Family, config: Mapping[str, Any], costs: Sequence[ImageCost]) -> dict[str, torch.Tensor]:
    """Image tensors of one row; fp32, as every processor gives them."""
    assert family.images is not None
    vision = config.get("vision_config") or {}
    crops = [crop for cost in costs for crop in cost.crops]
    names = set(family.images.batch)
    if names == {"pixel_values", "target_sizes"}:
        # One row of patches side by side: [1, channels, patch, patches x patch] (minicpmv4_6 processors).
        patch, channels = int(vision.get("patch_size", 14)), int(vision.get("num_channels", 3))
        width = sum(high * wide for high, wide in crops) * patch
        return {
            "pixel_values": torch.empty(1, channels, patch, width),
            "target_sizes": torch.tensor(crops, dtype=torch.int32),
        }
    if names == {"pixel_values", "tgt_sizes"}:
        # Bytes, one row a patch: [patches, channels x patch x patch] (memfit.models.minicpmv.processor).
        patch, channels = int(vision.get("patch_size", 14)), int(vision.get("num_channels", 3))
        count = sum(high * wide for high, wide in crops)
        return {
            "pixel_values": torch.empty(count, channels * patch * patch, dtype=torch.uint8),
            "tgt_sizes": torch.tensor(crops, dtype=torch.long),
        }
    if names == {"pixel_values", "image_grid_thw"}:
        # [patches, channels x temporal x patch x patch] (qwen2_vl processors); a picture is one step in time.
        patch, channels = int(vision.get("patch_size", 14)), int(vision.get("in_channels", vision.get("in_chans", 3)))
        values = channels * int(vision.get("temporal_patch_size", 2)) * patch * patch
        return {
            "pixel_values": torch.empty(sum(high * wide for high, wide in crops), values),
            "image_grid_thw": torch.tensor([(1, high, wide) for high, wide in crops], dtype=torch.long),
        }
    if names == {"pixel_values"}:
        side = int(vision.get("image_size", config.get("image_size", 336)))
        return {"pixel_values": torch.empty(len(crops), int(vision.get("num_channels", 3)), side, side)}
    raise UserError(
        f"the trace cannot make the image tensors of {family.name}: {', '.join(sorted(names))}",
        "add the family's tensors to memfit.trace.batch",
    )
