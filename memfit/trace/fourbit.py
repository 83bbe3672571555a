"""Linear layers in 4 bit, as bitsandbytes and PEFT run them on a GPU: a stand-in with their lifetimes.

The weight is unpacked for every product, in forward and again in backward, and freed after each; the product keeps
nothing of its own for backward. Values mean nothing here. Sources: bitsandbytes.autograd._functions:MatMul4Bit
(0.43.2 and later; before, the input was kept), bitsandbytes.nn.modules:Linear4bit.forward,
peft.tuners.lora.bnb:Linear4bit.forward, peft.utils.other:prepare_model_for_kbit_training.

DoRA is PEFT's own module on these stand-ins: it unpacks the weight once more for its norm, and with dropout multiplies
the unpacked weight by the dropped-out input, so that autograd keeps that whole weight, in the input's dtype, until
backward.
Source: peft.tuners.lora.dora:DoraLinearLayer.forward, peft.tuners.lora.variants:DoraLinearVariant.forward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from memfit.families.names import base_name


class _MatMul4bit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, layer: LinearInFourBit
    ) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.unpacked(packed).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        layer: LinearInFourBit = ctx.layer
        grad = None
        if ctx.needs_input_grad[0]:
            grad = torch.matmul(grads[0], layer.unpacked(layer.weight).to(grads[0].dtype))
        bias = grads[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad, None, bias, None


class LinearInFourBit(nn.Module):
    """A Linear whose weight is packed, two numbers a byte. `unpacks_to` is the dtype it had before."""

    W_q = None  # by this name peft.utils.integrations:dequantize_module_weight knows a layer that unpacks itself

    def __init__(self, linear: nn.Linear, compute: torch.dtype) -> None:
        super().__init__()
        self.shape, self.unpacks_to, self.compute = linear.weight.shape, linear.weight.dtype, compute
        size = (-(-linear.weight.numel() // 2), 1)
        packed = torch.empty(size, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def unpacked(self, packed: torch.Tensor) -> torch.Tensor:
        """A new tensor of the weight's size; `packed` is read."""
        return torch.empty(self.shape, dtype=self.unpacks_to, device=packed.device)

    def dequantize(self) -> torch.Tensor:
        """What PEFT asks a packed layer for: its weight, as a new tensor."""
        return self.unpacked(self.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute)
        out: torch.Tensor = _MatMul4bit.apply(x.to(self.compute), self.weight, bias, self)
        return out.to(x.dtype)


class LoraOnFourBit(nn.Module):
    """An adapter on such a Linear: unlike PEFT's on an ordinary one it copies the base's result first."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = adapted.base_layer, adapted.lora_A, adapted.lora_B
        self.lora_dropout, self.scaling = adapted.lora_dropout, adapted.scaling
        self.lora_magnitude_vector = adapted.lora_magnitude_vector  # empty without DoRA

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x).clone()
        plain = not torch.is_autocast_enabled("cpu")
        for name, down in self.lora_A.items():
            dtype = result.dtype
            lowered = x.to(down.weight.dtype) if plain else x
            if name in self.lora_magnitude_vector:
                result = self._dora(name, lowered, result)
                result = result.to(dtype) if plain else result
                continue
            output = self.lora_B[name](down(self.lora_dropout[name](lowered))) * self.scaling[name]
            result = result + (output.to(dtype) if plain else output)
        return result

    def _dora(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        drop = self.lora_dropout[name]
        drops = self.training and not isinstance(drop, nn.Identity)
        more = self.lora_magnitude_vector[name](
            drop(x) if drops else x,
            lora_A=self.lora_A[name],
            lora_B=self.lora_B[name],
            scaling=self.scaling[name],
            base_layer=self.base_layer,
            base_result=None if drops else result,
            adapter_name=name,
        )
        out: torch.Tensor = result + more
        return out


def to_four_bit(model: nn.Module, quantised: Collection[str], compute: torch.dtype) -> None:
    """Put stand-ins for the Linear layers whose weights are named in `quantised`, and for the adapters on them."""
    names = [base_name(name + ".weight") for name, _ in model.named_modules()]
    for (name, module), weight in zip(list(model.named_modules()), names, strict=True):
        if isinstance(module, nn.Linear) and weight in quantised:
            _replace(model, name, LinearInFourBit(module, compute))
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "base_layer", None), LinearInFourBit):
            _replace(model, name, LoraOnFourBit(module))


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
