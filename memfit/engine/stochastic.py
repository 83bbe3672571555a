"""AdamW for weights and moments in bf16: what a step adds is rounded up or down by chance, so that nothing is lost.

bf16 keeps eight bits. Rounded to nearest, a step below 1/512 of a weight leaves it as it was, however many such steps
come; so does the second moment, which moves by 1/1000 a step. Rounded by chance, up with the share of the gap that the
value has gone, each step counts on average (Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020,
arXiv:2010.06192).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from memfit.catalog.optimizers import CHANCE_CHUNK, rounds_by_chance
from memfit.specs.recipe import Recipe

DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
_LOW_BITS = 16  # of fp32 that bf16 has not


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) computed in fp32, a chunk at a time.

    bf16 weights and their moments are rounded by chance; parameters of other dtypes as torch's AdamW does. States are
    those of torch's fused AdamW, to the byte: two moments like the parameter, and a step counter in fp32. The bits come
    from `seed` and the step alone, so that copies of a weight on several ranks stay equal, and a run that goes on from
    a checkpoint draws as it would have.
    """

    def __init__(self, params: Iterable[Any], seed: int = 0, **values: Any) -> None:
        """`values`: any of lr, betas, eps and weight_decay; the others are torch's own defaults."""
        unknown = values.keys() - DEFAULTS.keys()
        if unknown:
            raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
        super().__init__(params, {**DEFAULTS, **values})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        bits: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._one(parameter, group, bits)
        return loss

    def _one(self, parameter: torch.Tensor, group: dict[str, Any], bits: dict[torch.device, torch.Generator]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        step = int(state["step"])
        own = [local(tensor) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        device = own[0].device
        if device not in bits:
            bits[device] = torch.Generator(device).manual_seed(self._seed * 1_000_003 + step)
        for piece in chunks(own):
            _update(piece, group, step, bits[device])


def _update(piece: list[torch.Tensor], group: dict[str, Any], step: int, bits: torch.Generator) -> None:
    """Change a weight and its two moments in place. `piece`: weight, gradient, first and second moment."""
    weight, gradient, *moments = piece
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    wide = gradient.float()
    first = moments[0].to(torch.float32, copy=True).lerp_(wide, 1 - beta1)
    second = moments[1].float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    del wide
    put(moments[0], first, bits)
    scale = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    put(moments[1], second, bits)
    del second
    first.div_(scale)
    del scale
    put(weight, weight.float().mul_(1 - lr * group["weight_decay"]).add_(first, alpha=-lr / (1 - beta1**step)), bits)


def put(target: torch.Tensor, value: torch.Tensor, bits: torch.Generator) -> None:
    """Write fp32 values, which are changed on the way, into `target`; into bf16 rounded by chance."""
    if target.dtype == torch.bfloat16:
        raw = value.view(torch.int32)
        # Adding up to one unit of bf16, less one fp32 unit, and cutting off: the sign bit is no part of the sum.
        raw.add_(torch.randint(1 << _LOW_BITS, raw.shape, generator=bits, device=raw.device, dtype=torch.int32))
        raw.bitwise_and_(-(1 << _LOW_BITS))
    target.copy_(value)


def lost_steps(recipe: Recipe, model: nn.Module) -> tuple[str, ...]:
    """A note for optimizers that round bf16 weights to nearest, where such weights learn."""
    name = recipe.levers.optimizer
    narrow = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    if recipe.levers.precision != "pure-bf16" or rounds_by_chance(name, "pure-bf16") or not narrow:
        return ()
    return (
        f"pure-bf16: {name} rounds {narrow:,} weights to nearest, which loses steps below 1/512 of a weight; "
        "levers.optimizer: adamw rounds by chance",
    )


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a tensor; it shares the tensor's memory."""
    own: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own


def chunks(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The same elements of tensors of one shape, CHANCE_CHUNK at a time; all at once where they do not lie alike."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), CHANCE_CHUNK):
        yield [tensor[first : first + CHANCE_CHUNK] for tensor in flat]
