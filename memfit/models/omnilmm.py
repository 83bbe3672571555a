"""OmniLMM-12B as far as a forecast needs it: the shapes, products and kept tensors of its three parts.

Built from transformers' Mistral and attention functions, memfit's resampler and an EVA02 block. It holds no weights of
the original and is not compared with it; what is left out is named where it is. Source: omnilmm/model/omnilmm.py of
OpenBMB/MiniCPM-V, timm.models.eva.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import MistralConfig, MistralForCausalLM, MistralModel, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward

from memfit.families.omnilmm import QUERIES, TABLE_SIDE, TOWER
from memfit.models.minicpmv.resampler import Resampler


class OmniLMMConfig(MistralConfig):
    """Mistral's fields beside `num_query` and `image_size`; the tower is the same in every checkpoint.

    The checkpoint's code learns from the tokenizer which id stands for a picture. Here any id will do: it decides where
    pictures go, not what they cost.
    """

    model_type = "omnilmm"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=SiglipVisionConfig),
    }
    vision_config: Any = None
    num_query: int = QUERIES
    image_size: int = TOWER["image_size"]
    image_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, SiglipVisionConfig):
            given = {**TOWER, "image_size": self.image_size, **(self.vision_config or {})}
            self.vision_config = SiglipVisionConfig(**{k: v for k, v in given.items() if k != "model_type"})
        if self.image_token_id is None:
            self.image_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)


class PackedProjection(nn.Linear):
    """Queries, keys and values in one product; keys have no bias."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, 3 D)."""
        return F.linear(hidden, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class EvaAttention(nn.Module):
    """Attention over all patches of a picture, through transformers' attention functions."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.heads) ** -0.5
        self.qkv = PackedProjection(config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, length, width = hidden.shape
        query, key, value = self.qkv(hidden).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.proj(out.reshape(rows, length, width))


class EvaBlock(GradientCheckpointingLayer):
    """Norms stand behind attention and behind the MLP (timm's EvaBlockPostNorm)."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = EvaAttention(config)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.norm1(self.attn(hidden_states))
        return hidden_states + self.norm2(self.fc2(F.gelu(self.fc1(hidden_states))))


class EvaTower(nn.Module):
    """Pictures to patch features; the class token takes part and is dropped at the end.

    The table of positions is stretched from 16 x 16 to the picture's patches.
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, TABLE_SIDE**2 + 1, width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, side, side) -> (pictures, patches, width)."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        rows, columns = patches.shape[-2:]
        table = self.pos_embed[:, 1:].view(1, TABLE_SIDE, TABLE_SIDE, -1).permute(0, 3, 1, 2)
        # In float32, as timm does it; its smoothing filter for larger sides changes nothing when stretching.
        table = F.interpolate(table.float(), (rows, columns), mode="bicubic").to(patches.dtype).flatten(2).mT
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT], dim=1)
        hidden = hidden + torch.cat([self.pos_embed[:, :1].to(table.dtype), table], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)[:, 1:]


class OmniLMMModel(MistralModel):
    """Mistral with a tower and a resampler inside, as the checkpoint's names have it.

    The original's resampler also keeps its fixed table of positions as a parameter that never learns (64 x 4096).
    """

    config_class = OmniLMMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision = config.vision_config
        if vision._attn_implementation is None:
            vision._attn_implementation = config._attn_implementation
        self.vision_tower = EvaTower(vision)
        self.resampler = Resampler(config.num_query, config.hidden_size, vision.hidden_size)

    def forward(self, input_ids: Any = None, pixel_values: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        """As Mistral's; `pixel_values` (pictures, 3, side, side) take the places of `image_token_id`, in order."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if pixel_values is not None:
            side = pixel_values.shape[-1] // self.config.vision_config.patch_size
            features = self.resampler(self.vision_tower(pixel_values), [(side, side)] * len(pixel_values))
            where = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(where, features.to(inputs_embeds.dtype))
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class OmniLMM(MistralForCausalLM):
    """The whole model with its head."""

    config_class = OmniLMMConfig
    _no_split_modules = ("MistralDecoderLayer", "EvaBlock", "Resampler")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = OmniLMMModel(config)
        self.post_init()
