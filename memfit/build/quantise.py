"""Weights in 4 bit: bitsandbytes is called here and nowhere else.

Which ones is `ResolvedParts.quantised`: the Linear layers of the method's part. Heads, embeddings, norms, biases, other
parts and what PEFT saves in full stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memfit.build.adapters import is_adapter
from memfit.build.freeze import DTYPES
from memfit.catalog.methods import METHODS, QuantRow
from memfit.catalog.precisions import PRECISIONS
from memfit.errors import UserError
from memfit.planner.parts import ResolvedParts
from memfit.specs.recipe import Recipe


@dataclass(frozen=True)
class Packing:
    """How weights are packed. `wide`: the dtype that they have before, and come back in; `compute`: of the products."""

    row: QuantRow
    names: Collection[str]
    wide: torch.dtype
    compute: torch.dtype
    device: torch.device


def packing_of(recipe: Recipe, parts: ResolvedParts, device: torch.device) -> Packing | None:
    """How an effective recipe packs its weights; None where it packs none."""
    row = METHODS[recipe.method].quant
    if row is None or not parts.quantised:
        return None
    precision = PRECISIONS[str(recipe.levers.precision)]
    return Packing(row, parts.quantised, DTYPES[precision.frozen], DTYPES[precision.compute], device)


def pack_weights(model: Any, packing: Packing) -> None:
    """Put bitsandbytes' layers in the place of the named Linear layers, packed on the device one after another.

    PEFT and transformers know such a model by `is_loaded_in_4bit`. Raises UserError without bitsandbytes, and for a
    layer that is no Linear.
    """
    bnb = _bitsandbytes()
    for name, module in _named(model, packing.names):
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=packing.compute,
            compress_statistics=packing.row.nested_block is not None,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(
            module.weight.data.to(packing.wide),
            requires_grad=False,
            blocksize=packing.row.block,
            compress_statistics=packing.row.nested_block is not None,
            quant_type="nf4",
            module=layer,
        )
        layer.weight, layer.bias = weight.to(packing.device), module.bias
        # On some CPUs evaluation would pack the weights in another way for good, which training cannot read.
        layer.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True


def round_trip(model: Any, packing: Packing) -> None:
    """Give the named Linear layers the values that packing leaves of their weights, in the weights' own dtype: what
    adapters beside 4-bit weights were trained with."""
    bnb = _bitsandbytes()
    for _, module in _named(model, packing.names):
        packed, state = bnb.functional.quantize_4bit(
            module.weight.data.to(packing.wide),
            blocksize=packing.row.block,
            compress_statistics=packing.row.nested_block is not None,
            quant_type="nf4",
        )
        module.weight.data = bnb.functional.dequantize_4bit(packed, state).to(module.weight.dtype)


def upcast_the_rest(model: nn.Module) -> None:
    """What `lora.kbit_upcast` asks for: all frozen 16-bit tensors that are not packed go to fp32, adapters excepted.

    Source: peft.utils.other:prepare_model_for_kbit_training.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not parameter.requires_grad and not is_adapter(name):
            parameter.data = parameter.data.to(torch.float32)


def _named(model: nn.Module, names: Collection[str]) -> list[tuple[str, nn.Linear]]:
    """The modules whose weights are named. UserError for one that is no Linear, KeyError for a name without module."""
    found = []
    for weight in sorted(names):
        name = weight.removesuffix(".weight")
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"method: qlora packs Linear layers, and {name} is a {type(module).__name__}", "method: lora"
            )
        found.append((name, module))
    return found


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"method: qlora needs the package bitsandbytes ({error})", "pip install 'memfit[qlora]', or method: lora"
        ) from error
    return bitsandbytes
