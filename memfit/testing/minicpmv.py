"""Tiny MiniCPM-V and -o checkpoints before 4.6, with the flat config.json and the tokens of the real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.families.minicpmv2 import CHATML, TOKENS
from memfit.testing import tokenizers as tiny

# generation's name -> what its config.json says of itself
KINDS: dict[str, dict[str, Any]] = {
    "minicpmv2_5": {"model_type": "minicpmv", "version": "2.5", "query_num": 6},
    "minicpmv2_6": {"model_type": "minicpmv", "version": 2.6, "query_num": 4, "use_sliding_window": False},
    "minicpmv4_0": {"model_type": "minicpmv", "version": 4.0, "query_num": 4},
    "minicpmv4_5": {"model_type": "minicpmv", "version": 4.5, "query_num": 4, "head_dim": 32},
    "minicpmo2_6": {"model_type": "minicpmo", "query_num": 4, "use_sliding_window": False, "init_audio": True,
                    "init_tts": True, "audio_pool_step": 2, "audio_config": {"d_model": 8}, "tts_config": {}},
    "minicpmo4_5": {"model_type": "minicpmo", "query_num": 4, "head_dim": 32, "init_audio": True, "init_tts": True,
                    "audio_pool_step": 5, "audio_config": {"d_model": 8}, "tts_config": {}},
}  # fmt: skip
_LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_VISION = {
    "model_type": "siglip",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
# Names as in -o checkpoints: an encoder, its projection, a speech decoder with weight norm. Sizes are tiny.
_OTHER_PARTS = {
    "apm.conv1.weight": (8, 4, 3),
    "apm.layers.0.self_attn.q_proj.weight": (8, 8),
    "audio_projection_layer.linear1.weight": (16, 8),
    "audio_projection_layer.linear2.bias": (16,),
    "tts.emb_text.weight": (12, 8),
    "tts.head_code.0.parametrizations.weight.original0": (6, 1),
}
_NAMED = ("<unk>", *(token for token in TOKENS.values() if token != "<unk>"))
# The checkpoint's own template: it opens an answer behind every conversation, whatever it is told.
_LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


def write(folder: Path, kind: str) -> dict[str, Any]:
    """Tokenizer, template and preprocessor settings; returns config.json's content."""
    facts = KINDS[kind]
    old, thinks = kind == "minicpmv2_5", kind.endswith("4_5")
    named = tuple(token for token in _NAMED if not (old and "image_id" in token))
    if old:
        tokenizer = tiny.byte_level(tiny.LLAMA3_SPECIAL + named)
        ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    else:
        base = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        tokenizer = tiny.byte_level(base + named, plain=("<think>", "</think>") if thinks else ())
        ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    extra = [token for token in named if token != "<unk>"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **ends, "unk_token": "<unk>"}
    template = _LLAMA3 if old else tiny.QWEN3_TEMPLATE if thinks else CHATML
    tiny.save(tokenizer, folder, {**settings, "additional_special_tokens": extra}, template)
    # Slices of 112 px: 8 x 8 patches.
    cut = {"max_slice_nums": 4, "scale_resolution": 112, "patch_size": 14}
    speaks = facts["model_type"] == "minicpmo"
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "MiniCPMVImageProcessor",
            "processor_class": f"MiniCPM{'O' if speaks else 'V'}Processor",
            **cut,
            "image_feature_size": facts["query_num"],
            "use_image_id": not old,
            "norm_mean": [0.5, 0.5, 0.5],
            "norm_std": [0.5, 0.5, 0.5],
        },
    )
    ids = {f"{name}_token_id": tokenizer.token_to_id(ends[f"{name}_token"]) for name in ("bos", "eos")}
    return {
        **facts,
        **_LANGUAGE,
        **ids,
        "vocab_size": tokenizer.get_vocab_size(),
        "architectures": [f"MiniCPM{'O' if speaks else 'V'}"],
        "drop_vision_last_layer": False,
        "image_size": 448,
        "slice_mode": True,
        "slice_config": {**cut, "model_type": "minicpmv"},
        "vision_config": dict(_VISION),
        **({} if old else {"use_image_id": True, "vision_batch_size": 16}),
    }


def add_other_parts(folder: Path, config: Mapping[str, Any]) -> None:
    """Puts tiny audio and speech tensors beside a saved -o model, as a real checkpoint has them."""
    import torch

    from memfit.models.minicpmv.checkpoint import write_beside

    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator).half() for name, shape in _OTHER_PARTS.items()}
    write_beside(tensors, folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", {**saved, "init_audio": True, "init_tts": True})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
