"""What making batches takes in host memory, from the largest picture and the heaviest samples. Upper bounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from memfit.specs.workload import LoaderLoad

# Bytes of a token in a batch: input_ids, labels, attention_mask, mm_token_type_ids, each of torch.long.
TOKEN_BYTES = 4 * 8
# Bytes of a crop's size: at most three numbers of torch.long (image_grid_thw).
CROP_BYTES = 3 * 8
# Bytes a pixel at the peak of reading one picture, or of the image processor's work on it while the picture is there.
# Measured 2026-11-22 (VmHWM of a fresh process above VmRSS before, 12 megapixels, Pillow 13.0.0): RGB and RGBA PNG,
# baseline and progressive JPEG, CMYK, TIFF, BMP, GIF 5 to 12, turned by EXIF included (Pillow keeps 4 bytes a pixel, of
# the file's own mode, as RGB and turned); processors of every family 4 + 10 at most, see SAMPLE_COPIES.
PIXEL_BYTES = 14
# Formats whose decoders keep frames of their own. Measured likewise: WebP 16.0 to 20.5, JPEG 2000 19.4, AVIF 10.4.
FRAMED_PIXEL_BYTES = 21
FRAMED = (".webp", ".jp2", ".j2k", ".jpx", ".avif")
# Copies of a sample's tensors while its processor works: resized, scaled, cut, joined. Measured likewise over pictures
# of 0.8 and 12 megapixels: Qwen2.5-VL 2.6 to 3.0 of what it hands over, the others less beside 10 bytes a pixel.
SAMPLE_COPIES = 4
# A batch while it is made: the samples' tensors and the joined ones, or these and their copy in shared memory.
BATCH_COPIES = 2

Figures = Mapping[str, NDArray[np.int64]]


def reading_bytes(width: int, height: int, suffix: str) -> int:
    """The most that one picture takes while it is read and prepared; `suffix` is its file's (".png")."""
    return width * height * (FRAMED_PIXEL_BYTES if suffix.lower() in FRAMED else PIXEL_BYTES)


def loader_load(figures: Figures, patch_bytes: int, micro_batch: int, reading: int) -> LoaderLoad:
    """What the heaviest samples make of a loader. `figures`: their tokens, patches and crops, int64 [samples] each.

    A batch is bounded by its longest row for all rows, and by the pictures of the heaviest samples, whichever they are.
    """
    tokens, patches, crops = figures["tokens"], figures["patches"], figures["crops"]
    if not len(tokens):
        return LoaderLoad(0, 0, 0)
    pictures = np.sort(patches * patch_bytes + crops * CROP_BYTES)[::-1]
    rows = min(micro_batch, len(tokens))
    longest = int(tokens.max()) * TOKEN_BYTES
    return LoaderLoad(reading, longest + int(pictures[0]), rows * longest + int(pictures[:rows].sum()))


def making_bytes(load: LoaderLoad) -> int:
    """The most that one process takes which makes one batch: pictures are read one at a time."""
    return load.reading + SAMPLE_COPIES * load.sample + BATCH_COPIES * load.batch
