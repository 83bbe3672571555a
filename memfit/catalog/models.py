"""Models that memfit knows by name: what config.json and preprocessor_config.json of the hub's model say, as facts.

With a row a forecast needs no network. Training always reads the files of the checkpoint itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz import fuzz, process


@dataclass(frozen=True)
class ModelRow:
    """One model.

    `config` is what its config.json says of shapes (the rest is left out), `preprocessor` the same of its
    preprocessor_config.json. `parameters` is the published count as the hub counts it, exact where a person can read
    it off the checkpoint's index, else rounded as published; `published` says which and where. `verified`:

    - "cited": the facts were read in a public copy of the model's config.json, and their count is the published one;
    - "counted": from memory or from stored code, and the count they give is the published one to the last parameter;
    - "memory": from memory or from stored code; the count agrees with a published figure of a few digits.
    `on_disk`: published parameters that memfit neither trains nor loads.
    """

    name: str
    hub_id: str
    family: str
    config: Mapping[str, Any]
    parameters: int
    published: str
    source: str
    verified: str
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    on_disk: int = 0


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _llama(hidden: int, layers: int, heads: tuple[int, int], feed_forward: int, **other: Any) -> dict[str, Any]:
    """A LLaMA config; `heads` are attention heads and key-value heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": feed_forward,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **other,
    }


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {"factor": factor, **_LLAMA3_ROPE},
    }


def _qwen3(hidden: int, layers: int, heads: int, feed_forward: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": feed_forward,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 40_960,
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def _qwen2_5_vl(hidden: int, layers: int, heads: tuple[int, int], feed_forward: int, **other: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": feed_forward,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128_000,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        **other,
    }


_QWEN2_VL_PICTURES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12_845_056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}

# SigLIP-400M at 980 pixels and patches of 14 stands in all MiniCPM-V models from 2.5 on.
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}

_MINICPM_V_4_6 = {
    "architectures": ["MiniCPMV4_6ForConditionalGeneration"],
    "model_type": "minicpmv4_6",
    "text_config": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248_320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "tie_word_embeddings": True,
    },
    "vision_config": _SIGLIP,
    "insert_layer_id": 6,
    "image_size": 448,
    "downsample_mode": "16x",
    # Any id that is in the vocabulary will do for a forecast: what it is decides where pictures go, not what they cost.
    "image_token_id": 248_056,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

_SLICES = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14}


def _minicpm_2_6(model_type: str, vocabulary: int, **other: Any) -> dict[str, Any]:
    """Language model, vision and resampler in one flat config, as the 2.6 checkpoints' own code reads it.

    `other` makes its relatives of it: the sizes of another language model, another number of queries.
    """
    return {
        "architectures": ["MiniCPMO" if model_type == "minicpmo" else "MiniCPMV"],
        "model_type": model_type,
        "version": 2.6,
        "vocab_size": vocabulary,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
        "query_num": 64,
        "image_size": 448,
        "patch_size": 14,
        "drop_vision_last_layer": False,
        "use_image_id": True,
        "vision_batch_size": 16,
        "slice_config": {"model_type": "minicpmv", **_SLICES},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        "torch_dtype": "bfloat16",
        **other,
    }


# The language models of its relatives, as that config's fields.
_LLAMA3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
_QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12_288,
}
_MINICPM4_3B: dict[str, Any] = {
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 10_240,
}
_MINICPM_PICTURES = {**_SLICES, "image_feature_size": 64, "use_image_id": True, "slice_mode": True}

MODELS: tuple[ModelRow, ...] = (
    ModelRow(
        name="minicpm-v-4.6",
        hub_id="openbmb/MiniCPM-V-4.6",
        family="minicpmv4_6",
        config=_MINICPM_V_4_6,
        preprocessor={**_SLICES, "slice_mode": True, "downsample_mode": "16x"},
        parameters=1_300_000_000,
        published="1.3B in the model card",
        source="transformers models.minicpmv4_6 defaults; text sizes of Qwen3.5-0.8B",
        verified="memory",
    ),
    ModelRow(
        name="minicpm-v-2.6",
        hub_id="openbmb/MiniCPM-V-2_6",
        family="minicpmv2",
        config=_minicpm_2_6("minicpmv", 151_666),
        preprocessor=_MINICPM_PICTURES,
        parameters=8_099_175_152,
        published="8.1B in the model card, 8,099,175,152 in the hub's safetensors summary",
        source="Qwen2-7B with 151,666 tokens, SigLIP-400M with 27 layers, 64 queries: configuration_minicpm.py of the "
        "checkpoint has the defaults, its config.json was not at hand",
        verified="counted",
    ),
    ModelRow(
        name="minicpm-o-2.6",
        hub_id="openbmb/MiniCPM-o-2_6",
        family="minicpmv2",
        config=_minicpm_2_6("minicpmo", 151_700, audio_pool_step=2, init_vision=True, init_audio=True, init_tts=True),
        preprocessor=_MINICPM_PICTURES,
        parameters=8_670_000_000,
        published="8.67B in the hub's safetensors summary, 8B in the model card",
        source="Qwen2.5-7B with 151,700 tokens, SigLIP-400M, 64 queries; audio (Whisper-medium's encoder) and speech "
        "(ChatTTS) stay on disk: modeling_minicpmo.py of the checkpoint; config.json was not at hand",
        verified="memory",
        on_disk=571_000_000,
    ),
    ModelRow(
        name="minicpm-llama3-v-2.5",
        hub_id="openbmb/MiniCPM-Llama3-V-2_5",
        family="minicpmv2",
        config=_minicpm_2_6(
            *("minicpmv", 128_256),
            version="2.5",
            **_LLAMA3_8B,
            max_position_embeddings=8192,
            query_num=96,
            torch_dtype="float16",
        ),
        preprocessor={**_MINICPM_PICTURES, "image_feature_size": 96, "use_image_id": False},
        parameters=8_500_000_000,
        published="8.5B: the hub rounds Llama3-8B, SigLIP-400M and the resampler so; 8B in the model card",
        source="config.json, tokenizer_config.json and weight index in a public copy (theonlyengine/VQA_Model)",
        verified="memory",
    ),
    ModelRow(
        name="minicpm-v-4.0",
        hub_id="openbmb/MiniCPM-V-4",
        family="minicpmv2",
        config=_minicpm_2_6("minicpmv", 73_448, version=4.0, **_MINICPM4_3B),
        preprocessor=_MINICPM_PICTURES,
        parameters=4_100_000_000,
        published="4.1B in the model card",
        source="MiniCPM4-3B's sizes with SigLIP2-400M and 64 queries; config.json was not at hand",
        verified="memory",
    ),
    ModelRow(
        name="minicpm-v-4.5",
        hub_id="openbmb/MiniCPM-V-4_5",
        family="minicpmv2",
        config=_minicpm_2_6("minicpmv", 151_748, version=4.5, **_QWEN3_8B),
        preprocessor=_MINICPM_PICTURES,
        parameters=8_700_000_000,
        published="8.7B: the hub rounds Qwen3-8B, SigLIP2-400M and the resampler so; 8B in the model card",
        source="Qwen3-8B's sizes with SigLIP2-400M and 64 queries; config.json was not at hand",
        verified="memory",
    ),
    ModelRow(
        name="minicpm-o-4.5",
        hub_id="openbmb/MiniCPM-o-4_5",
        family="minicpmv2",
        config=_minicpm_2_6("minicpmo", 151_748, version=4.5, audio_pool_step=5, **_QWEN3_8B),
        preprocessor=_MINICPM_PICTURES,
        parameters=9_000_000_000,
        published="9B in the model card; what Qwen3-8B, SigLIP2-400M and the resampler leave of it is audio and speech",
        source="MiniCPMO45 of OpenBMB/MiniCPM-o-Demo for the parts; Qwen3-8B's sizes; config.json was not at hand",
        verified="memory",
        on_disk=304_000_000,
    ),
    ModelRow(
        name="omnilmm-12b",
        hub_id="openbmb/OmniLMM-12B",
        family="omnilmm",
        config={
            "architectures": ["OmniLMMForCausalLM"],
            "model_type": "omnilmm",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "max_position_embeddings": 32_768,
            # Mistral's 32,000, <im_patch>, two tags around it and six more (omnilmm.py: initialize_vision_tokenizer).
            "vocab_size": 32_009,
            "num_query": 64,
            "image_size": 448,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        parameters=11_600_000_000,
        published="11.6B: the hub rounds EVA02-enormous without its last block, the resampler and Zephyr-7B so; 12B in "
        "the model card",
        source="OpenBMB/MiniCPM-V at 24bb62b, omnilmm/model/omnilmm.py for the parts; timm.models.eva for the tower; "
        "Mistral-7B's sizes; config.json was not at hand",
        verified="memory",
    ),
    ModelRow(
        name="qwen2.5-vl-3b",
        hub_id="Qwen/Qwen2.5-VL-3B-Instruct",
        family="qwen2_5_vl",
        config=_qwen2_5_vl(2048, 36, (16, 2), 11_008, vocab_size=151_936, tie_word_embeddings=True),
        preprocessor=_QWEN2_VL_PICTURES,
        parameters=3_754_622_976,
        published="3.75B in the hub's safetensors summary",
        source="the model's config.json, as public copies have it",
        verified="cited",
    ),
    ModelRow(
        name="qwen2.5-vl-7b",
        hub_id="Qwen/Qwen2.5-VL-7B-Instruct",
        family="qwen2_5_vl",
        config=_qwen2_5_vl(3584, 28, (28, 4), 18_944, vocab_size=152_064, tie_word_embeddings=False),
        preprocessor=_QWEN2_VL_PICTURES,
        parameters=8_292_166_656,
        published="8.29B in the hub's safetensors summary",
        source="module tree of the loaded model, as public copies print it",
        verified="cited",
    ),
    ModelRow(
        name="llava-1.5-7b",
        hub_id="llava-hf/llava-1.5-7b-hf",
        family="llava",
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32_000,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "torch_dtype": "float16",
            "text_config": {
                **_llama(4096, 32, (32, 32), 11_008, vocab_size=32_064, max_position_embeddings=4096),
                "torch_dtype": "float16",
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        preprocessor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
        },
        parameters=7_063_427_072,
        published="7.06B in the hub's safetensors summary",
        source="config.json of llava-hf/llava-1.5-7b-hf; arXiv:2310.03744",
        verified="counted",
    ),
    ModelRow(
        name="llama-2-7b",
        hub_id="meta-llama/Llama-2-7b-hf",
        family="text",
        config=_llama(
            *(4096, 32, (32, 32), 11_008),
            vocab_size=32_000,
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            torch_dtype="float16",
        ),
        parameters=6_738_415_616,
        published="6.74B in the hub's safetensors summary; arXiv:2307.09288 says 7B",
        source="module tree of the loaded model, as public copies print it; arXiv:2307.09288",
        verified="cited",
    ),
    ModelRow(
        name="llama-3.1-8b",
        hub_id="meta-llama/Llama-3.1-8B",
        family="text",
        config=_llama(4096, 32, (32, 8), 14_336, **_llama3(8.0)),
        parameters=8_030_261_248,
        published="8.03B in the hub's safetensors summary",
        source="the model's config.json, as public copies have it; arXiv:2407.21783 table 3",
        verified="cited",
    ),
    ModelRow(
        name="llama-3.2-1b",
        hub_id="meta-llama/Llama-3.2-1B",
        family="text",
        config=_llama(2048, 16, (32, 8), 8192, head_dim=64, **_llama3(32.0)) | {"tie_word_embeddings": True},
        parameters=1_235_814_400,
        published="1.23B in the model card, 1.24B in the hub's safetensors summary",
        source="the model's config.json, as public copies have it (kevinstephano/thunder_model_blocks)",
        verified="cited",
    ),
    ModelRow(
        name="llama-3.2-3b",
        hub_id="meta-llama/Llama-3.2-3B",
        family="text",
        config=_llama(3072, 28, (24, 8), 8192, head_dim=128, **_llama3(32.0)) | {"tie_word_embeddings": True},
        parameters=3_212_749_824,
        published="3.21B in the model card and the hub's safetensors summary",
        source="the model's sizes, as public copies have them (silvaxxx1/MyLLM_101)",
        verified="cited",
    ),
    ModelRow(
        name="qwen3-0.6b",
        hub_id="Qwen/Qwen3-0.6B",
        family="text",
        config=_qwen3(1024, 28, 16, 3072, tied=True),
        parameters=596_049_920,
        published="0.6B in the model card; its index also holds the tied head",
        source="the model's config.json, as public copies have it",
        verified="cited",
    ),
    ModelRow(
        name="qwen3-4b",
        hub_id="Qwen/Qwen3-4B",
        family="text",
        config=_qwen3(2560, 36, 32, 9728, tied=True),
        parameters=4_022_468_096,
        published="4.02B in the hub's safetensors summary, 4.0B in the model card",
        source="the model's config.json, as public copies have it",
        verified="cited",
    ),
    ModelRow(
        name="qwen3-8b",
        hub_id="Qwen/Qwen3-8B",
        family="text",
        config=_qwen3(4096, 36, 32, 12_288, tied=False),
        parameters=8_190_735_360,
        published="8.19B in the hub's safetensors summary, 8.2B in the model card",
        source="config.json of Qwen/Qwen3-8B",
        verified="counted",
    ),
)


def find_row(name: str) -> ModelRow | None:
    """The row of a catalogue name or hub id; case and the marks - _ . make no difference."""
    wanted = _plain(name)
    return next((row for row in MODELS if wanted in (_plain(row.name), _plain(row.hub_id))), None)


def nearest_rows(name: str, cutoff: float = 60) -> tuple[str, ...]:
    """Catalogue names that a person may have meant by `name`, best first."""
    wanted = _plain(name.rpartition("/")[2])
    plain = {_plain(row.name): row.name for row in MODELS}
    found = process.extract(wanted, list(plain), scorer=fuzz.WRatio, limit=3, score_cutoff=cutoff)
    return tuple(plain[key] for key, _, _ in found)


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.casefold())
