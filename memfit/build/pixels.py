"""Pictures to tensors, through the model's own PIL image processor (torchvision is never needed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from memfit import models
from memfit.families.base import Family, Images


class PixelReader:
    """Turns pictures into the tensors that the family's forward takes.

    `settings` are the preprocessor_config.json values with the image budget already compiled in.
    """

    def __init__(self, family: Family, settings: Mapping[str, Any]) -> None:
        if family.images is None:
            raise TypeError(f"{family.name} reads no pictures")
        known = {key: value for key, value in settings.items() if not key.endswith(("_type", "_class"))}
        self._processor = models.image_processor(family.images.processor)(**known)
        self._images = family.images
        self._wanted = tuple(family.images.batch)

    def read(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The family's image tensors of one sample, its pictures in order."""
        batch = self._processor(images=list(pictures), return_tensors="pt")
        return {name: batch[name] for name in self._wanted}

    def join(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of several `read`s as those of one; equal to reading all pictures at once."""
        return dict(parts[0]) if len(parts) == 1 else joined(self._images, parts)


def joined(images: Images, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The image tensors of several rows (or pictures), joined as the family says; rows without pictures have none."""
    batch = {}
    for name, (how, dimension) in images.batch.items():
        tensors = [row[name] for row in rows if name in row]
        if tensors:
            batch[name] = torch.cat(tensors, dimension) if how == "cat" else torch.stack(tensors, dimension)
    return batch
