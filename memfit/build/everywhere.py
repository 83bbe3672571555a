"""The same modules on every rank, whatever pictures its samples bring: engines that split weights wait for each other
at every module, and a rank that skips one, or runs it more often, would wait for ever.

MiniCPM-V 2.x does both itself (`memfit.models.minicpmv.model`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from memfit.families.base import Family

PICTURE_PARTS = frozenset({"vision", "connector"})
# Engines that gather weights where a module runs.
GATHERS = frozenset({"zero3", "fsdp"})
# transformers.models.minicpmv4_{6,7}: `for batch_idx in range(len(target_sizes))` in their forward.
LOOPING = frozenset({"MiniCPMV4_6Merger", "MiniCPMV4_7Merger"})


@dataclass
class GreyPicture:
    """Shows the model a grey picture in each forward that brings none, and adds nothing of it to what is computed.

    Two hooks: one on the module that owns tower and language model sees whether there are pictures, one on the language
    model runs the tower, at the place where it runs for pictures. In evaluation only with `always`.
    """

    owner: Any
    inputs: Mapping[str, Callable[[torch.device], torch.Tensor]]
    always: bool
    missing: bool = False
    given: dict[str, Any] = field(default_factory=dict)

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the owner's forward."""
        self.missing = kwargs.get("pixel_values") is None and kwargs.get("past_key_values") is None
        self.given = {name: kwargs[name] for name in ("downsample_mode",) if name in kwargs}

    def show(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the language model's forward. RuntimeError if the weights do not give finite numbers."""
        if not self.missing or not (module.training or self.always):
            return None
        self.missing = False
        embeds_BTD = kwargs["inputs_embeds"]
        made = {name: make(embeds_BTD.device) for name, make in self.inputs.items()}
        features = self.owner.get_image_features(**made, **self.given).pooler_output
        mean = torch.cat(list(features)).mean()
        torch._assert_async(torch.isfinite(mean.detach()), "the vision tower gives NaN or infinity on a grey picture")
        if not mean.requires_grad:
            return None
        return args, kwargs | {"inputs_embeds": embeds_BTD + (mean * 0).to(embeds_BTD.dtype)}


class MergerAtOnce(nn.Module):
    """MiniCPM-V 4.6's merger with the crops of all pictures in one call of its layers, which the original calls once a
    crop. It holds the merger's own layers under their own names."""

    def __init__(self, merger: Any) -> None:
        super().__init__()
        self.merge_kernel_size = merger.merge_kernel_size
        self.mlp = merger.mlp

    def forward(self, hidden_states: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
        """hidden_states (1, patches of all crops, D), target_sizes (crops, 2) -> tokens of each crop."""
        sizes = [(int(high), int(wide)) for high, wide in target_sizes.tolist()]
        rows_PD = hidden_states[0]
        for layer in self.mlp:
            rows_PD, sizes = self._layer(layer, rows_PD, sizes)
        return list(rows_PD.split([high * wide for high, wide in sizes]))

    def _layer(
        self, layer: nn.Module, rows: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """One round of merging: neighbouring rows side by side, then the layer over all of them."""
        down, across = self.merge_kernel_size
        merged = []
        for crop, (high, wide) in zip(rows.split([high * wide for high, wide in sizes]), sizes, strict=True):
            if high % down or wide % across:
                raise ValueError(f"a crop of {high} x {wide} patches cannot be merged {down} x {across} at a time")
            grid = crop.view(high // down, down, wide // across, across, -1).transpose(1, 2)
            merged.append(grid.reshape(high * wide // (down * across), -1))
        return layer(torch.cat(merged)), [(high // down, wide // across) for high, wide in sizes]


def merge_at_once(model: nn.Module) -> int:
    """Put `MergerAtOnce` in the place of every merger that loops over crops; returns how many there were."""
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in LOOPING]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MergerAtOnce(module))
    return len(found)


def show_grey_picture(model: nn.Module, family: Family, always: bool) -> GreyPicture | None:
    """Hook a `GreyPicture` into a model that sees pictures, which must not do so by itself (`Family.native`).

    `always`: in evaluation too, where weights are split. None for a model without pictures.
    """
    if family.images is None or family.native:
        return None
    owner: Any = next(m for m in model.modules() if hasattr(m, "get_image_features") and "language_model" in _own(m))
    grey = GreyPicture(owner, _smallest(owner.config, frozenset(family.images.batch)), always)
    owner.register_forward_pre_hook(grey.look, with_kwargs=True)
    owner.get_submodule("language_model").register_forward_pre_hook(grey.show, with_kwargs=True)
    return grey


def _own(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _smallest(config: Any, names: frozenset[str]) -> Mapping[str, Callable[[torch.device], torch.Tensor]]:
    """The smallest picture of a family, by the names of its tensors; zero is the middle of what processors give."""
    vision = config.vision_config

    def pixels(*shape: int) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.zeros(*shape, device=device)

    def numbers(rows: list[list[int]], dtype: torch.dtype) -> Callable[[torch.device], torch.Tensor]:
        return lambda device: torch.tensor(rows, dtype=dtype, device=device)

    if names == {"pixel_values", "target_sizes"}:  # minicpmv4_6, 4_7: the tower halves once, each merger again
        side = 2 * max(config.merge_kernel_size) ** config.merger_times
        patch = vision.patch_size
        return {
            "pixel_values": pixels(1, vision.num_channels, patch, side * side * patch),
            "target_sizes": numbers([[side, side]], torch.int32),
        }
    if names == {"pixel_values", "image_grid_thw"}:  # qwen2_5_vl
        side, channels = vision.spatial_merge_size, getattr(vision, "in_channels", 3)
        return {
            "pixel_values": pixels(side * side, channels * vision.temporal_patch_size * vision.patch_size**2),
            "image_grid_thw": numbers([[1, side, side]], torch.long),
        }
    if names == {"pixel_values"}:  # llava: the tower takes one size
        return {"pixel_values": pixels(1, vision.num_channels, vision.image_size, vision.image_size)}
    raise NotImplementedError(f"no grey picture is known for the image tensors {', '.join(sorted(names))}")
