"""The user's data, from files to samples, without torch.

In reading order: `rows` (file -> rows), `formats` and `draft` (row -> conversation), `paths` (names -> files inside
the data root), `images` (size and pixels), `scan` (every picture once), `examine` (all of it for one file), `split`,
`load` (for training), and for the report `quality`, `answers`, `similar`, `stats`, `check`, `check_text`,
`quarantine`.
"""

from __future__ import annotations

from memfit.inputs.data.check import check_data
from memfit.inputs.data.check_text import report_lines
from memfit.inputs.data.examine import CheckOptions
from memfit.inputs.data.images import ImageError, open_image, read_size
from memfit.inputs.data.load import load_samples
from memfit.inputs.data.quarantine import write_quarantine

__all__ = [
    "CheckOptions",
    "ImageError",
    "check_data",
    "load_samples",
    "open_image",
    "read_size",
    "report_lines",
    "write_quarantine",
]
