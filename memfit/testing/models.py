"""Tiny random models: real classes, real names, a few hundred kilobytes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from memfit.families import family_for
from memfit.families.minicpmv4_6 import TOKENS
from memfit.families.minicpmv4_7 import CONFIG_IDS
from memfit.testing import minicpmv
from memfit.testing import tokenizers as tiny

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def _ids(tokenizer: Any, **named: str) -> dict[str, int]:
    return {name: tokenizer.token_to_id(token) for name, token in named.items()}


def _minicpm(folder: Path, model_type: str) -> dict[str, Any]:
    tokenizer = tiny.byte_level(tiny.QWEN_SPECIAL + tiny.MINICPM_SPECIAL)
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": TOKENS,
    }
    tiny.save(tokenizer, folder, settings, tiny.MINICPM_TEMPLATE)
    # Slices of 112 px: 8 x 8 patches, 4 tokens (16x).
    _write(
        folder / "preprocessor_config.json",
        {"image_processor_type": "MiniCPMV4_6ImageProcessor", "scale_resolution": 112, "max_slice_nums": 4},
    )
    config = {
        "model_type": model_type,
        "text_config": {
            "model_type": "qwen3_5_text",
            **_TEXT,
            "vocab_size": tokenizer.get_vocab_size(),
            # One of each kind: the gated-delta layers have projections of their own.
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            **_ids(tokenizer, eos_token_id="<|im_end|>"),
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
        },
        "insert_layer_id": 1,
        "tie_word_embeddings": True,
        **_ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    }
    if model_type == "minicpmv4_7":
        # "\n" stands in the vocabulary as the byte-level character for it.
        config |= _ids(tokenizer, **{**CONFIG_IDS, "newline_id": "Ċ"})
    return config


def _qwen2_5_vl(folder: Path) -> dict[str, Any]:
    tokenizer = tiny.byte_level(tiny.QWEN_SPECIAL)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tiny.save(tokenizer, folder, settings, tiny.QWEN_VL_TEMPLATE)
    _write(
        folder / "preprocessor_config.json",
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 4 * 28 * 28, "max_pixels": 36 * 28 * 28},
    )
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **_TEXT,
            "vocab_size": tokenizer.get_vocab_size(),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            **_ids(tokenizer, bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>"),
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        **_ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
        **_ids(tokenizer, vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    }


def _llava(folder: Path) -> dict[str, Any]:
    tokenizer = tiny.sentencepiece_like()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    tiny.save(tokenizer, folder, settings, tiny.LLAVA_TEMPLATE)
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
        },
    )
    return {
        "model_type": "llava",
        "text_config": {
            "model_type": "llama",
            **_TEXT,
            "vocab_size": tokenizer.get_vocab_size(),
            **_ids(tokenizer, bos_token_id="<s>", eos_token_id="</s>", pad_token_id="<pad>"),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "projection_dim": 32,
            "image_size": 56,
            "patch_size": 14,
        },
        **_ids(tokenizer, image_token_id="<image>"),
    }


def _llama(folder: Path) -> dict[str, Any]:
    tokenizer = tiny.byte_level(tiny.LLAMA3_SPECIAL)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|end_of_text|>",
    }
    tiny.save(tokenizer, folder, settings, tiny.LLAMA3_TEMPLATE)
    return {
        "model_type": "llama",
        **_TEXT,
        "vocab_size": tokenizer.get_vocab_size(),
        **_ids(tokenizer, bos_token_id="<|begin_of_text|>", eos_token_id="<|eot_id|>"),
    }


def _qwen3(folder: Path) -> dict[str, Any]:
    tokenizer = tiny.byte_level(tiny.QWEN_SPECIAL, plain=("<think>", "</think>"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tiny.save(tokenizer, folder, settings, tiny.QWEN3_TEMPLATE)
    return {
        "model_type": "qwen3",
        **_TEXT,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": True,
        **_ids(tokenizer, bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>"),
    }


_WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "minicpmv4_6": lambda folder: _minicpm(folder, "minicpmv4_6"),
    "minicpmv4_7": lambda folder: _minicpm(folder, "minicpmv4_7"),
    "qwen2_5_vl": _qwen2_5_vl,
    "llava": _llava,
    "llama": _llama,
    "qwen3": _qwen3,
}
KINDS = tuple(_WRITERS)  # classes of transformers
NATIVE_KINDS = tuple(minicpmv.KINDS)  # memfit's own classes
_WRITERS |= {kind: functools.partial(minicpmv.write, kind=kind) for kind in NATIVE_KINDS}


def make_dummy(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random model of `kind` (one of KINDS or NATIVE_KINDS) into `folder` and return it.

    The folder looks like one from the hub: config, float32 safetensors (under 2 MB), tokenizer, chat template,
    preprocessor and generation settings. The same seed gives the same weights. KeyError for an unknown kind.
    """
    import torch
    import transformers

    from memfit import models

    models.register()
    write = _WRITERS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    raw = write(folder)
    config = transformers.AutoConfig.for_model(**raw)
    auto = getattr(transformers, family_for(raw).auto_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.generation_config.eos_token_id = tokenizer.token_to_id(settings["eos_token"])
    model.generation_config.pad_token_id = tokenizer.token_to_id(settings["pad_token"])
    model.save_pretrained(folder)
    if raw["model_type"] == "minicpmo":
        minicpmv.add_other_parts(folder, raw)
    return folder


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
