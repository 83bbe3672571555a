"""The parts of MiniCPM-o 2.6 as the textbook adds them up, against transformers' own classes on the meta device."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from memfit.physics.textbook import minicpm_o_2_6

PARTS = minicpm_o_2_6()


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_language() -> None:
    config = Qwen2Config(
        vocab_size=151_700,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        assert numel(Qwen2ForCausalLM(config)) == PARTS["language"]


def test_vision() -> None:
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=980,
        patch_size=14,
        vision_use_head=False,
    )
    with torch.device("meta"):
        assert numel(SiglipVisionModel(config)) == PARTS["vision"]


def test_connector() -> None:
    with torch.device("meta"):
        attention, norms = nn.MultiheadAttention(3584, 28), [nn.LayerNorm(3584) for _ in range(3)]
    query, kv_proj, proj = 64 * 3584, 1152 * 3584, 3584 * 3584
    assert numel(attention) + sum(map(numel, norms)) + query + kv_proj + proj == PARTS["connector"]


def test_audio() -> None:
    config = WhisperConfig(
        d_model=1024, encoder_layers=24, encoder_attention_heads=16, encoder_ffn_dim=4096, num_mel_bins=80
    )
    with torch.device("meta"):
        encoder = WhisperEncoder(config)
        projection = nn.ModuleList([nn.Linear(1024, 3584), nn.Linear(3584, 3584)])
    assert numel(encoder) + numel(projection) == PARTS["audio"]


def test_speech_decoder() -> None:
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=20,
        vocab_size=32_000,
    )
    with torch.device("meta"):
        decoder = LlamaModel(config)
        projector = nn.ModuleList([nn.Linear(3584, 768), nn.Linear(768, 768)])
    text, codes = 21_178 * 768, 4 * 626 * 768
    # A weight-normed head holds its directions and one length for each of the 626 outputs.
    heads = 4 * (626 * 768 + 626)
    assert numel(decoder) + numel(projector) + text + codes + heads == PARTS["tts"]
