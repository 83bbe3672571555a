"""Watches optimizer steps from within: hooks and modes of torch, all of them gone when a step has ended."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memfit.build.freeze import whole_numel
from memfit.engine.readback.live import Live
from memfit.engine.readback.seen import OUTSIDE, Seen
from memfit.planner.parts import ORDER

# Operators of products with weights, and of attention, by their names in torch's dispatcher.
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
WEIGHTED = frozenset({"mm", "addmm"})
SDPA = "_scaled_dot_product_"
FLASH = ("_flash_attention_forward", "_flash_attn_forward", "_flash_attn_varlen_forward")
SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
# Linear attention: its reference sums gates by torch's own operator, fla's kernels do it themselves
# (transformers.models.qwen3_5.modeling_qwen3_5:torch_chunk_gated_delta_rule; fla.ops.gated_delta_rule.chunk).
DELTA, DELTA_LAYER, DELTA_SUM = "delta by torch", "GatedDeltaNet", "cumsum"


class Watch:
    """`begin()` before a step, `gradients()` before the optimizer runs, `end()` after it; `seen` grows with each.

    Nothing is computed otherwise than without it; a step takes longer. Hooks that saved tensors pass through keep the
    tensors themselves, so that the step's memory is that of any other.
    """

    def __init__(self, live: Live) -> None:
        self.seen = Seen()
        self._live = live
        self._names = {id(module): name for name, module in live.model.named_modules()}
        self._parts = {name: part_or_none(live.part_of, name) for name in self._names.values()}
        self._learning = learning_modules(live.model)
        learning_parts = {self._parts.get(name, OUTSIDE) for name in self._learning}
        self._around = {place for name in self._learning for place in ancestors(name)}
        self._delta = {n for n, module in live.model.named_modules() if type(module).__name__.endswith(DELTA_LAYER)}
        self._fed = {part: _is_fed(part, learning_parts) for part in {*self._parts.values(), *ORDER}}
        self._begun: set[str] = set()
        self.stack: list[str] = []
        self._vocabulary, self._hidden = _sizes(live.model)
        self._own: set[int] = set()
        self._idle: list[tuple[str, int, weakref.ref[_Kept]]] = []
        self._open: contextlib.ExitStack | None = None

    def begin(self) -> None:
        """Watch until `end`."""
        self._open = contextlib.ExitStack()
        self.stack.clear()
        self._own = {_storage(p) for p in self._live.model.parameters()}
        for name, module in self._live.model.named_modules():
            before, after = self._before(name), self._after(name)
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, always_call=True),
            ):
                self._open.callback(handle.remove)
        for name, parameter in self._live.model.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                self._open.callback(parameter.register_hook(self._gradient(name)).remove)
        self._open.enter_context(torch.autograd.graph.saved_tensors_hooks(self._saved, _Kept.get))
        self._open.enter_context(_Functions(self))
        self._open.enter_context(_Operators(self))

    def gradients(self) -> None:
        """Look at gradients that live in `.grad`: shards have no hook that sees them."""
        for name, parameter in self._live.model.named_parameters():
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                self._look(name, parameter.grad)

    def end(self) -> None:
        """Take every hook and mode away."""
        if self._open is not None:
            self._open.close()
            self._open = None
            self.seen.steps += 1

    @property
    def watching(self) -> bool:
        """Whether a step is being watched."""
        return self._open is not None

    @property
    def part(self) -> str:
        """The part that computes now."""
        return next((self._parts[name] for name in reversed(self.stack) if self._parts[name]), OUTSIDE)

    # ---- modules -------------------------------------------------------------------------------------------------

    def _before(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            if in_backward():
                self.seen.again[name] += 1
                return
            if name == "":
                self.seen.forwards += 1
                self.seen.training = self.seen.training and module.training
                self.seen.pictures = self.seen.pictures or kwargs.get("pixel_values") is not None
                self._begun.clear()
            self.seen.calls[name] += 1
            self.seen.delta_layers += name in self._delta
            part = self._parts[name]
            if name in self._learning:
                self._begun.add(part)
            if part and self.stack[0] == "":  # a head that a loss calls makes its own autocast
                self.seen.autocast[part, _autocast(self._live.device.type)] += 1

        return enter

    def _after(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.stack and self.stack[-1] == name:
                self.stack.pop()
            elif name in self.stack:  # an error passed through what was inside
                del self.stack[self.stack.index(name) :]
            if name == "" and not in_backward():
                self._count_kept()
            if in_backward() or not any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves(output)):
                return
            self.seen.graph.add(name)
            part = self._parts[name]
            if self.idle(part) and name not in self._around:
                self.seen.idle_graph.setdefault(part, set()).add(name)

        return leave

    def idle(self, part: str) -> bool:
        """Whether nothing that learns has run in this part or can have come into it."""
        return bool(part) and not self._fed[part] and part not in self._begun

    # ---- tensors -------------------------------------------------------------------------------------------------

    def _saved(self, tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        if in_backward() or _storage(tensor) in self._own:
            return kept
        size = tensor.numel() * tensor.element_size()
        part = self.part
        # What is around a learning module (the input of a checkpointed layer) is kept for its sake.
        if self.idle(part) and self.stack and self.stack[-1] not in self._around:
            self._idle.append((part, size, weakref.ref(kept)))
        if self._is_logits(tensor) and (self.seen.logits is None or size > self.seen.logits[0]):
            self.seen.logits = (size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return kept

    def _count_kept(self) -> None:
        """At the end of forward: what was saved and let go again (a checkpointed layer without a graph) is no cost."""
        for part, size, kept in self._idle:
            if kept() is not None:
                self.seen.idle_bytes[part] += size
        self._idle.clear()

    def _is_logits(self, tensor: torch.Tensor) -> bool:
        """Logits or their gradient, not a cast copy of the head's weights, which lies transposed."""
        if not self._vocabulary or tensor.dim() < 2 or tensor.shape[-1] != self._vocabulary:
            return False
        transposed = tensor.dim() == 2 and tensor.stride(0) == 1 and tensor.shape[0] == self._hidden
        return tensor.is_floating_point() and not transposed

    def _gradient(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            self._look(name, gradient)

        return look

    def _look(self, name: str, gradient: torch.Tensor) -> None:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        self.seen.gradients[name] = (str(local.dtype).removeprefix("torch."), local.device.type)
        if name not in self.seen.moving and bool((local != 0).any()):
            self.seen.moving.add(name)

    # ---- operators -----------------------------------------------------------------------------------------------

    def operator(self, name: str, args: Any) -> None:
        """One operator below autograd, by its name in the dispatcher."""
        again = in_backward()
        if again:
            if self.stack and (name in WEIGHTED or name.startswith(SDPA)) and not name.endswith("_backward"):
                self.seen.products_again[self.part] += 1
            return
        part = self.part
        if name in WEIGHTED:
            matrices = [each for each in args if isinstance(each, torch.Tensor)]
            self.seen.computes[part, str(matrices[-1].dtype).removeprefix("torch.")] += 1
        elif name.startswith(SDPA) or name in FLASH:
            self.seen.kernels[part, name] += 1
        elif name in SOFTMAX and args[0].dim() == 4:  # (B, N, T, T)
            self.seen.kernels[part, "softmax"] += 1
        elif name == DELTA_SUM and self.stack and self.stack[-1] in self._delta:
            self.seen.kernels[part, DELTA] += 1

    def function(self) -> None:
        """One call of scaled_dot_product_attention, whichever kernel it takes."""
        if not in_backward():
            self.seen.kernels[self.part, "sdpa"] += 1


class _Kept:
    """A tensor as autograd keeps it; it lives as long as the graph needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get(self) -> torch.Tensor:
        return self.tensor


class _Functions(TorchFunctionMode):
    """Counts calls of scaled_dot_product_attention, whose math kernel is no operator of its own."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._watch.function()
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Tells the watch every operator."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None:
            self._watch.operator(schema.name.rpartition("::")[2], args)
        return func(*args, **(kwargs or {}))


def in_backward() -> bool:
    """Whether autograd runs now: what a module computes then, it computes again."""
    return bool(torch._C._current_graph_task_id() != -1)


def part_or_none(part_of: Callable[[str], str], name: str) -> str:
    """The part of a module's name, `OUTSIDE` where no part owns it."""
    try:
        return part_of(name + ".") if name else OUTSIDE
    except KeyError:
        return OUTSIDE


def learning_modules(model: nn.Module) -> set[str]:
    """Names of the modules that own a parameter which learns."""
    return {
        name
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module._parameters.values() if p is not None)
    }


def ancestors(name: str) -> Iterator[str]:
    """A module's name and those of all that hold it, the whole model's too."""
    yield ""
    pieces = name.split(".")
    for count in range(1, len(pieces) + 1):
        yield ".".join(pieces[:count])


def learning_parameters(live: Live) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(name, parameter, part) of what learns; empty shards of an engine included."""
    for name, parameter in live.model.named_parameters():
        if parameter.requires_grad and whole_numel(parameter):
            yield name, parameter, live.part_of(name)


def _is_fed(part: str, learning: set[str]) -> bool:
    """Whether a part that learns comes before this one on the way of the data."""
    place = ORDER.index(part) if part in ORDER else len(ORDER)
    return any((ORDER.index(other) if other in ORDER else len(ORDER)) < place for other in learning - {OUTSIDE, part})


def _autocast(device: str) -> str:
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else "off"


def _sizes(model: nn.Module) -> tuple[int, int]:
    """(vocabulary, hidden size) of the language model; zeros where the configuration does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", 0) or 0), int(getattr(text, "hidden_size", 0) or 0)


def _storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor looks into; 0 for none."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return int(local.untyped_storage().data_ptr())
