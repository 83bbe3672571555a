"""Samples to batches: encoded and drawn one by one, padded and joined by the collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from memfit.build.pixels import PixelReader, joined
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.inputs.data.images import ImageError, open_image
from memfit.inputs.encode import Encoder
from memfit.specs.sample import Sample

# Families with pictures whose forward takes position_ids as they are.
PACKS_PICTURES = ("llava",)
IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index: no loss at this place


def refuse_packing(family: Family, config: Mapping[str, Any]) -> None:
    """Raises UserError for a model whose classes cannot keep the samples of one row apart."""
    text = config.get("text_config") or config
    kinds = text.get("layer_types") or ()
    why = None
    if "linear_attention" in kinds or str(text.get("model_type", "")).startswith("qwen3_5"):
        why = "its linear-attention layers carry one sample's state into the next"
    elif family.images is not None and family.name not in PACKS_PICTURES:
        why = "it computes positions from all pictures of a row, as if they belonged to one sample"
    if why is not None:
        raise UserError(f"levers.packing: {family.name} models cannot pack: {why}", "levers.packing: false")


class SampleDataset(Dataset):
    """Encoded samples, made when asked for, so that no decoded picture is kept: one at a time is in memory.

    With `prompts` the last answer is left off, for generation. `read` opens a picture; evaluation's controls change it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        pixels: PixelReader | None,
        prompts: bool = False,
        read: Callable[[Path], Image.Image] = open_image,
    ) -> None:
        self.samples = samples
        self._encoder = encoder
        self._pixels = pixels
        self._prompts = prompts
        self._read = read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        sizes, tensors = self._pictures(sample)
        row: dict[str, torch.Tensor] = {}
        if self._prompts:
            row["input_ids"] = torch.as_tensor(self._encoder.prompt(sample, sizes), dtype=torch.long)
        else:
            encoded = self._encoder.encode(sample, sizes)
            row["input_ids"] = torch.as_tensor(encoded.input_ids, dtype=torch.long)
            row["labels"] = torch.as_tensor(encoded.labels, dtype=torch.long)
        return row | tensors

    def _pictures(self, sample: Sample) -> tuple[list[tuple[int, int]], dict[str, torch.Tensor]]:
        """Sizes of the sample's pictures in its own order, and their tensors joined in the order of appearance.

        One picture is read, prepared and let go before the next one: host memory is that of the largest.
        """
        sizes: list[tuple[int, int]] = []
        made: list[dict[str, torch.Tensor]] = []
        for path in sample.images:
            try:
                picture = self._read(path)
            except ImageError as error:
                raise UserError(
                    f"row {sample.row}: {error.detail}",
                    "the file has changed since the data was checked: run memfit check",
                ) from error
            sizes.append(picture.size)
            made.append(self._pixels.read([picture]) if self._pixels is not None else {})
            del picture
        if self._pixels is None or not made:
            return sizes, {}
        return sizes, self._pixels.join([made[index] for index in sample.picture_order])


class Collator:
    """Pads the texts of several samples to the longest and joins their image tensors as the family says.

    Training pads on the right, generation on the left, so that the last token of every row is a real one.
    """

    def __init__(
        self,
        family: Family,
        pad_id: int,
        extra: Mapping[str, Any],
        image_token_id: int | None,
        packing: bool = False,
    ) -> None:
        self._family = family
        self._pad_id = pad_id
        self._extra = dict(extra)
        self._image_token_id = image_token_id
        self._packing = packing

    def __call__(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        return self.pack(rows) if self._packing else self.join(rows, left=False)

    def pack(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """All samples in one row, without padding: input_ids, labels and position_ids of shape (1, sum of T).

        Positions begin at 0 with every sample. Where no mask and no cache is given, transformers reads the samples'
        bounds off them and lets none attend to another (masking_utils:find_packed_sequence_indices;
        modeling_flash_attention_utils:_is_packed_sequence).
        """
        positions = [torch.arange(len(row["input_ids"])) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
            "position_ids": torch.cat(positions)[None],
            "use_cache": False,
        }
        if "labels" in rows[0]:
            labels_T = torch.cat([row["labels"] for row in rows])
            # The last token of a sample must not learn to say the first one of the next.
            labels_T[batch["position_ids"][0] == 0] = IGNORED
            batch["labels"] = labels_T[None]
        return batch | self._pictures(rows, batch["input_ids"]) | self._extra

    def join(self, rows: Sequence[Mapping[str, torch.Tensor]], left: bool) -> dict[str, Any]:
        """One batch: input_ids, attention_mask (and labels) of shape (B, T), and the image tensors of all rows."""
        ids_BT = _pad([row["input_ids"] for row in rows], self._pad_id, left)
        lengths = [len(row["input_ids"]) for row in rows]
        batch: dict[str, Any] = {"input_ids": ids_BT}
        # Without padding there is nothing to mask, and a mask costs memory: attention kernels that cannot take one
        # with grouped heads expand keys and values (transformers integrations.sdpa_attention:use_gqa_in_sdpa).
        if left or min(lengths) != max(lengths):
            batch["attention_mask"] = _pad([torch.ones(length, dtype=torch.long) for length in lengths], 0, left)
        if "labels" in rows[0]:
            batch["labels"] = _pad([row["labels"] for row in rows], IGNORED, left)
        return batch | self._pictures(rows, ids_BT) | self._extra

    def _pictures(self, rows: Sequence[Mapping[str, torch.Tensor]], ids: torch.Tensor) -> dict[str, Any]:
        """The image tensors of all rows, joined as the family says."""
        images, batch = self._family.images, {}
        if images is not None:
            batch = joined(images, rows)
            if images.needs_token_types:
                batch["mm_token_type_ids"] = (ids == self._image_token_id).long()
        return batch


def _pad(rows: Sequence[torch.Tensor], value: int, left: bool) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )
