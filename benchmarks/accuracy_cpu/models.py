"""The models of the grid: real classes with random weights, large enough that a step moves more than 64 MB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
}
# kind -> (text config, vision config, preprocessor settings), laid over those of `memfit.testing.make_dummy`.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (_TEXT | {"num_hidden_layers": 8}, {}, {}),
    "qwen3": (_TEXT | {"hidden_size": 640, "intermediate_size": 1600, "num_hidden_layers": 5}, {}, {}),
    "llava": (
        _TEXT,
        {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 5, "num_attention_heads": 5}
        | {"image_size": 224, "patch_size": 14},
        {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    ),
    "qwen2_5_vl": (
        _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}},
        {"depth": 5, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "out_hidden_size": 512}
        | {"fullatt_block_indexes": [2, 4]},
        {"min_pixels": 56 * 56, "max_pixels": 448 * 448},
    ),
    "minicpmv4_6": (
        _TEXT
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2}
        | {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
        | {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
        {"hidden_size": 288, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 4}
        | {"image_size": 224, "patch_size": 14},
        {"scale_resolution": 224, "max_slice_nums": 4},
    ),
}
KINDS = tuple(SIZES)
WITH_IMAGES = ("minicpmv4_6", "qwen2_5_vl", "llava")


def make_model(kind: str, folder: Path) -> Path:
    """A model folder as from the hub (random weights, float32), made once; KeyError for an unknown kind."""
    if (folder / "done").exists():
        return folder
    import torch
    import transformers

    from memfit.families import family_for
    from memfit.testing import make_dummy

    text, vision, preprocessor = SIZES[kind]
    make_dummy(kind, folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inner = raw.get("text_config", raw)
    for name in ("rope_parameters", "layer_types"):
        inner.pop(name, None)
    inner.update(text)
    if vision:
        raw["vision_config"].update(vision)
        _update(folder / "preprocessor_config.json", preprocessor)
    values = {name: value for name, value in raw.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(raw["model_type"], **values)
    torch.manual_seed(0)
    model = getattr(transformers, family_for(raw).auto_class).from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    (folder / "done").touch()
    return folder


def _update(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")
