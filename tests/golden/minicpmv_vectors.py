"""Reads a set of MiniCPM-V reference vectors; data/minicpmv/README.md says what its files hold."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "data" / "minicpmv"
MODELS = ("26", "25")


@cache
def text(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    """Stored in float16 where every value is exact; float32 here."""
    found = load_file(FOLDER / f"{name}.safetensors")
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in found.items()}


def inputs(model: str, case: str) -> dict[str, Any]:
    """The forward's arguments of one case, labels included where the case has them."""
    facts, values = text(f"model{model}_cases")["cases"][case], tensors(f"model{model}_cases")
    given = {
        "input_ids": values[f"{case}.input_ids"],
        "pixel_values": [[values[key] for key in row] for row in facts["pixel_values"]],
        "tgt_sizes": [torch.tensor(rows, dtype=torch.long).reshape(-1, 2) for rows in facts["tgt_sizes"]],
        "image_bound": [torch.tensor(rows, dtype=torch.long).reshape(-1, 2) for rows in facts["image_bound"]],
    }
    return given | ({"labels": values[f"{case}.labels"]} if f"{case}.labels" in values else {})


def picture(width: int, height: int, k: int, mode: str = "RGB") -> Image.Image:
    """A picture made of whole numbers, by the formula that the set states."""
    x, y = np.arange(width, dtype=np.int64)[None, :], np.arange(height, dtype=np.int64)[:, None]
    planes = []
    for c in range(4 if mode == "RGBA" else 1 if mode == "L" else 3):
        value = x * (3 + k + c) + y * (5 + 2 * c) + (x * y) // (7 + k) + 40 * (((x // 9) ^ (y // 11)) % 5) + 17 * c * k
        planes.append((value % 256).astype(np.uint8))
    return Image.fromarray(planes[0] if mode == "L" else np.stack(planes, axis=2), mode=mode)
