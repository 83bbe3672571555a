"""MiniCPM-V and -o (vision and language): a tower, a resampler and one of transformers' language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from memfit.families.minicpmv2 import KEPT_ON_DISK, LANGUAGE
from memfit.models.minicpmv.checkpoint import keep_other_parts, require_match
from memfit.models.minicpmv.configuration import MiniCPMOConfig, MiniCPMVConfig
from memfit.models.minicpmv.resampler import Resampler, ResamplerAttention, refuse_time_steps
from memfit.models.minicpmv.vision import Sizes, VisionEmbeddings, VisionTower

LANGUAGE_MODELS = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
# A picture for micro-batches without one: 16 x 16 grey patches, as the checkpoints' training code takes.
DUMMY: Sizes = ((16, 16),)
_PICTURES = ("pixel_values", "tgt_sizes", "image_bound", "mm_token_type_ids")


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """`llm`, `vpm` and `resampler` as in the checkpoints, so that their names, adapters and other programs fit."""

    config_class = MiniCPMVConfig
    config: MiniCPMVConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = (
        *("SiglipEncoderLayer", "VisionEmbeddings", "Resampler"),
        *("Qwen2DecoderLayer", "LlamaDecoderLayer", "Qwen3DecoderLayer"),
    )
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # V 2.0 stored its position table; older transformers stored the rotary one. Both are computed here.
    _keys_to_ignore_on_load_unexpected: tuple[str, ...] = (r"^resampler\.pos_embed$", r"rotary_emb\.inv_freq$")

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        if vision._attn_implementation is None:  # the tower is no model of its own, so nobody else chose for it
            vision._attn_implementation = config._attn_implementation
        self.vpm = VisionTower(vision, config.vision_layers, config.one_row_positions)
        self.resampler = Resampler(config.queries, config.hidden_size, vision.hidden_size)
        self.llm = LANGUAGE_MODELS[LANGUAGE[config.generation]](config.text_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', after comparing every name and shape with the checkpoint: a fresh weight is never made."""
        require_match(cls, source, kwargs)
        load = super().from_pretrained
        return load(source, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """As transformers', with the parts of the checkpoint that were never loaded beside it, byte for byte."""
        with keep_other_parts(self, save_directory, is_main_process):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: Any = None,
        tgt_sizes: Any = None,
        image_bound: Sequence[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        temporal_ids: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) and, with `labels` (B, T; -100 without loss), the mean next-token loss.

        Pictures: `pixel_values` is (patches, 3 * patch * patch), bytes or normalised floats, with `tgt_sizes` (crops,
        2) in the order of the text; or, as the checkpoints' code has it, one list of (3, patch, patches * patch)
        tensors and one (n, 2) tensor for each row. Where they stand: `image_bound`, one (n, 2) tensor of [start, end)
        for each row, or `mm_token_type_ids` (B, T), 1 at each place. ValueError when places and pictures do not match.
        `temporal_ids`, which V 4.5's own processor writes, may hold pictures only (-1): UserError for video.
        """
        refuse_time_steps(temporal_ids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        pixels, sizes = packed_pictures(pixel_values, tgt_sizes, inputs_embeds.device)
        if sizes:
            places = self._places(inputs_embeds.shape[:2], len(sizes), image_bound, mm_token_type_ids)
            features = self.image_features(pixels, sizes).to(inputs_embeds.dtype)
            where = places.to(inputs_embeds.device)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(where, features)
        elif self._wants_dummy(past_key_values):
            inputs_embeds = inputs_embeds + self._dummy(inputs_embeds)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=None if labels is None else labels.long(),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def image_features(self, pixels: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """(patches of all crops, values) -> (crops, queries, width).

        One call of tower and resampler, so that ranks with unequal crops run the same modules. Where no graph is kept
        and nothing is split over ranks, `vision_batch_size` crops at a time: an evaluation batch can show hundreds.
        """
        most = int(self.config.vision_batch_size or len(sizes))
        if torch.is_grad_enabled() or len(sizes) <= most or self.vpm.joint or is_sharded(self.resampler):
            return self.resampler(self.vpm(pixels, sizes), sizes)
        parts, start = [], 0
        for first in range(0, len(sizes), most):
            own = sizes[first : first + most]
            stop = start + sum(rows * columns for rows, columns in own)
            parts.append(self.resampler(self.vpm(pixels[start:stop], own), own))
            start = stop
        return torch.cat(parts)

    def _places(
        self, shape: torch.Size, crops: int, bounds: Sequence[torch.Tensor] | None, types: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T), true where a query's vector goes; as many as there are queries, counted before anything runs."""
        if bounds is not None:
            places = torch.zeros(shape, dtype=torch.bool)
            for row, spans in enumerate(bounds):
                for start, stop in torch.as_tensor(spans).reshape(-1, 2).tolist():
                    places[row, start:stop] = True
        elif types is not None:
            places = types == 1
        else:
            raise ValueError("pictures without image_bound or mm_token_type_ids: nothing says where they stand")
        count, wanted = int(places.sum()), crops * self.config.queries
        if count != wanted:
            raise ValueError(
                f"the text has {count} picture places, {crops} crops of {self.config.queries} queries need {wanted}"
            )
        return places

    def _wants_dummy(self, past: Any) -> bool:
        """Whether the tower runs though there is no picture: in training every parameter takes part in every step,
        and where parameters are sharded every rank runs the same modules, in evaluation too."""
        if self.training:
            return True
        return is_sharded(self.resampler) and (past is None or past.get_seq_length() == 0)

    def _dummy(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Zero, with a graph through tower and resampler. RuntimeError if their weights do not give finite numbers."""
        patch = self.config.vision_config.patch_size
        pixels = torch.zeros(256, 3 * patch * patch, dtype=torch.float32, device=inputs_embeds.device)
        mean = self.resampler(self.vpm(pixels, DUMMY), DUMMY).mean()
        torch._assert_async(
            torch.isfinite(mean.detach()), "the vision tower or the resampler gives NaN or infinity on a grey picture"
        )
        return (mean * 0).to(inputs_embeds.dtype)

    # ---- what transformers asks --------------------------------------------------------------------------------

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pictures go into the first forward only; later ones read the cache."""
        pictures = {name: kwargs.pop(name) for name in _PICTURES if name in kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs |= pictures
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams repeat rows; pictures are packed over rows, so they are repeated row by row."""
        refuse_time_steps(kwargs.pop("temporal_ids", None))
        if expand_size == 1 or kwargs.get("pixel_values") is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        pictures = {name: kwargs.pop(name, None) for name in _PICTURES}
        rows = rows_of_pictures(pictures, self.config.queries)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        repeated = [row for row in rows for _ in range(expand_size)]
        kwargs["pixel_values"] = torch.cat([pixels for pixels, _ in repeated])
        kwargs["tgt_sizes"] = torch.cat([sizes for _, sizes in repeated])
        if pictures["mm_token_type_ids"] is not None:
            kwargs["mm_token_type_ids"] = pictures["mm_token_type_ids"].repeat_interleave(expand_size, dim=0)
        if pictures["image_bound"] is not None:
            kwargs["image_bound"] = [bound for bound in pictures["image_bound"] for _ in range(expand_size)]
        return input_ids, kwargs

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.llm.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.llm.model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Resampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
        elif isinstance(module, ResamplerAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, VisionEmbeddings):
            init.normal_(module.position_embedding.weight, std=module.position_embedding.embedding_dim**-0.5)
        else:
            super()._init_weights(module)


class MiniCPMO(MiniCPMV):
    """-o checkpoints: vision and language are loaded; audio and speech stay on disk and are written back on saving."""

    config_class = MiniCPMOConfig
    config: MiniCPMOConfig
    _keys_to_ignore_on_load_unexpected = (
        *MiniCPMV._keys_to_ignore_on_load_unexpected,
        *("^" + prefix.replace(".", r"\.") for prefixes in KEPT_ON_DISK.values() for prefix in prefixes),
    )


def packed_pictures(pixel_values: Any, tgt_sizes: Any, device: torch.device) -> tuple[Any, Sizes]:
    """Both forms of pictures as (patches, values) on `device` and the crops' (rows, columns) in order."""
    if pixel_values is None:
        return None, ()
    if isinstance(pixel_values, torch.Tensor):
        sizes = [(int(rows), int(columns)) for rows, columns in tgt_sizes.tolist()]
        return pixel_values.to(device), sizes
    crops = [crop for row in pixel_values for crop in row]
    if not crops:
        return None, ()
    rows = [torch.as_tensor(row).reshape(-1, 2) for row in tgt_sizes if len(row)]
    sizes = [(int(high), int(wide)) for high, wide in torch.cat(rows).tolist()]
    if len(sizes) != len(crops) or any(
        c.shape[2] != h * w * c.shape[1] for c, (h, w) in zip(crops, sizes, strict=True)
    ):
        raise ValueError(f"{len(crops)} crops and {len(sizes)} sizes in tgt_sizes that do not belong together")
    flat = [crop.unflatten(2, (-1, crop.shape[1])).permute(2, 0, 1, 3).flatten(1) for crop in crops]
    return torch.cat([patches.to(device) for patches in flat]), sizes


def rows_of_pictures(pictures: dict[str, Any], queries: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(pixel_values, tgt_sizes) of each row of a batch, told apart by the places that its text keeps for them."""
    pixels, sizes = packed_pictures(pictures["pixel_values"], pictures["tgt_sizes"], torch.device("cpu"))
    if pictures["image_bound"] is not None:
        counts = [len(torch.as_tensor(bound).reshape(-1, 2)) for bound in pictures["image_bound"]]
    else:
        counts = [int(count) // queries for count in (pictures["mm_token_type_ids"] == 1).sum(1).tolist()]
    rows, crop, patch = [], 0, 0
    for count in counts:
        own = sizes[crop : crop + count]
        length = sum(high * wide for high, wide in own)
        rows.append((pixels[patch : patch + length], torch.tensor(own, dtype=torch.long).reshape(-1, 2)))
        crop, patch = crop + count, patch + length
    return rows


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters are spread over ranks: ZeRO-3 marks them with ds_id, FSDP2 makes them DTensors."""
    parameter = next(module.parameters())
    return hasattr(parameter, "ds_id") or type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh")
