"""Watches every tensor that a step makes, by storage: when it comes, whose it is, when it goes.

torch's own MemTracker cannot take frozen parameters. This one keeps a weak reference to each untyped storage, which
dies with the last tensor or saved tensor that holds it, and writes one event for each birth and death.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.specs.trace import Event
from memfit.trace.fakes import CPU, Fakes
from memfit.trace.flops import flops_of

aten = torch.ops.aten
# (operator, its arguments) -> bytes that its kernel takes beside its results while it runs
Workspace = Callable[[Any, Any], int]
# path of a module -> its part and block
Locate = Callable[[str], tuple[str, int | None]]
# A real integer tensor above this size becomes fake: model code reads lengths and ids, never a whole attention mask.
LARGEST_REAL = 1 << 24
VISIT = "visit"  # the operator of an event of no bytes: a module ran and made nothing
# Asked of every fake tensor several times an operator.
_DEVICE_OF = torch.ops.prim.device.default
_INDEX, _ADD, _ADD_IN_PLACE = aten.index.Tensor, aten.add.Tensor, aten.add_.Tensor


class StepTracker(TorchDispatchMode):
    """Runs operators on fakes, integers of real inputs for real, and records storages.

    `events` and `flops` (phase, module path) -> operations are what it gathers.
    """

    def __init__(self, fakes: Fakes, model: nn.Module, workspace: Workspace, locate: Locate) -> None:
        super().__init__()
        self._fakes = fakes
        self._locate = locate
        self._workspace = workspace
        # (index of an event, the block whose operators run from there on)
        self.marks: list[tuple[int, tuple[str, int | None]]] = []
        self.events: list[Event] = []
        self.flops: dict[tuple[str, str], int] = {}
        self.phase = "forward"
        self.recording = True
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = [""]
        self._made: list[int] = []
        self._sequence: list[int] = [0]
        self._sequence_paths: list[str] = [""]
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._count = 0
        self._states: set[int] = set()

    # ---- what the caller says ----------------------------------------------------------------------------------

    def exclude(self, tensors: Iterable[torch.Tensor]) -> int:
        """Storages that are states and never recorded; returns their bytes. Views of them are none either."""
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._states:
                self._states.add(storage._cdata)
                size += storage.nbytes()
        return size

    def begin(self, phase: str) -> None:
        """`phase` begins."""
        self.phase = phase
        self.events.append(Event("phase", -1, 0, phase, "", ""))

    def adopt(self, tensors: Iterable[torch.Tensor], op: str) -> int:
        """Record tensors that exist already; returns their bytes."""
        before = sum(event.bytes for event in self.events)
        for tensor in tensors:
            self._record(tensor, op)
        return sum(event.bytes for event in self.events) - before

    def mark_gradient(self, tensor: torch.Tensor, name: str) -> None:
        """The storage of `tensor` is a gradient from now on."""
        found = self._live.get(tensor.untyped_storage()._cdata)
        if found is not None:
            self.events.append(Event("gradient", found[0], 0, self.phase, name, ""))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow which module runs, until left."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def on_host(self) -> AbstractContextManager[Any]:
        """What autograd saves inside leaves the device for host memory, and comes back as a new tensor.

        As torch.autograd.graph:save_on_cpu(pin_memory=True) does on a GPU. Events "host" and "host-free" tell of it.
        """
        return torch.autograd.graph.saved_tensors_hooks(self._to_host, self._from_host)

    def keep_generator(self, layer: nn.Module) -> torch.Tensor | None:
        """A new tensor as large as the state of the CPU's generator, in the name of `layer`.

        torch.utils.checkpoint keeps one for every call of a layer (torch.get_rng_state, which no mode sees). A GPU's
        state is a tensor in host memory (torch.cuda.get_rng_state), so that nothing of it lies on the device.
        """
        if not self.recording:
            return None
        path = self._paths.get(id(layer), "")
        self._mark(path)
        state = self._fakes.empty((torch.get_rng_state().numel(),), (1,), torch.uint8)
        self._record(state, "get_rng_state", path)
        return state

    # ---- modules -----------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1]))
        self._made.append(self._count)
        self._turn()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path, made = self._stack.pop(), self._made.pop()
        self._turn()
        if self.recording and made == self._count and module._parameters:
            # Run again while its results were kept (selective checkpointing), or a head that hands its input on: an
            # engine gathers its parameters all the same (deepspeed.runtime.zero.parameter_offload: the hooks of every
            # module), so something must say so.
            self._mark(path)
            self._pass_through(0, path, VISIT)

    def _turn(self) -> None:
        """From this autograd sequence number on, nodes belong to the module on top of the stack."""
        self._sequence.append(torch.autograd._get_sequence_nr())
        self._sequence_paths.append(self._stack[-1])

    def _path(self) -> str:
        """The module that runs; in backward, the module whose forward made the node that runs."""
        if len(self._stack) > 1:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        number = node._sequence_nr()
        if number > self._sequence[-1]:
            # AccumulateGrad has no number of its own; what runs after the last module is the loss.
            return ""
        return self._sequence_paths[bisect.bisect_right(self._sequence, number) - 1]

    # ---- operators ---------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and the guard that torch would put around every operator costs as much as it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return CPU
        kwargs = kwargs or {}
        if not self.recording:
            return self._run(func, args, kwargs)
        path = self._path()
        self._mark(path)
        out = self._run(func, args, kwargs)
        op = func._schema.name
        inside = self._workspace(func, args)
        if type(out) is FakeTensor:
            self._record(out, op, path)
        else:
            for tensor in _tensors(out):
                self._record(tensor, op, path)
        if inside:
            self._pass_through(inside, path, op)
        count = flops_of(func, args, kwargs, out)
        if count:
            self._work(path, count)
        return out

    def add_flops(self, count: int) -> None:
        """Operations of a fused kernel: of its stand-in no operator tells of them."""
        if self.recording:
            self._work(self._path(), count)

    def _work(self, path: str, count: int) -> None:
        key = (self.phase, path)
        self.flops[key] = self.flops.get(key, 0) + count

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        fake = (args and type(args[0]) is FakeTensor) or any(
            isinstance(t, FakeTensor) for t in _tensors((args, kwargs))
        )
        if not fake and not _makes_float(kwargs):
            return self._real(func, args, kwargs)
        if func is _INDEX:
            args = (args[0], [place for index in args[1] for place in self._positions(index)])
        elif func is _ADD and self._is_engine_sum(args):
            # The engine sums a gradient in place when it holds the last reference, but never with a mode active
            # (torch/csrc/autograd/input_buffer.cpp: can_accumulate_inplace).
            func = _ADD_IN_PLACE
        return self._fakes.run(func, args, kwargs)

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run for real; floats and large results become fake, views and in-place results stay what they are."""
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor):
            return out
        size = out.untyped_storage().nbytes()
        shared = any(t.untyped_storage()._cdata == out.untyped_storage()._cdata for t in _tensors((args, kwargs)))
        if shared or (size <= LARGEST_REAL and not (out.is_floating_point() and out.numel() > 1)):
            return out
        return self._fakes.empty(out.size(), out.stride(), out.dtype)

    def _positions(self, index: Any) -> list[Any]:
        """An index as positions: a real bool mask becomes as many fake positions as it has true places."""
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool or isinstance(index, FakeTensor):
            return [index]
        count = int(index.sum())
        places = self._fakes.empty((count, index.dim()), (index.dim(), 1), torch.long)
        self._record(places, "aten::nonzero")
        with self._fakes.mode:
            return list(places.unbind(1))

    def _is_engine_sum(self, args: Any) -> bool:
        if self.phase != "backward" or len(self._stack) > 1 or torch._C._current_autograd_node() is not None:
            return False
        first, second = args[0], args[1]
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.shape == second.shape

    # ---- storages ----------------------------------------------------------------------------------------------

    def _record(self, tensor: torch.Tensor, op: str, path: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not self.recording or key in self._live or key in self._states:
            return
        size = storage.nbytes()
        if not size:
            return
        number = self._count = self._count + 1
        where = self._path() if path is None else path
        self.events.append(Event("alloc", number, size, self.phase, where, op))
        self._live[key] = (number, weakref.ref(storage, self._forgetter(key, number, size)))

    def _to_host(self, tensor: torch.Tensor) -> _OnHost:
        size = tensor.numel() * tensor.element_size()
        parcel = _OnHost(tuple(tensor.shape), tensor.dtype, None if isinstance(tensor, FakeTensor) else tensor)
        if size and self.recording:
            number = self._count = self._count + 1
            self.events.append(Event("host", number, size, self.phase, self._path(), "save_on_cpu"))
            weakref.finalize(parcel, self._leave_host, number, size).atexit = False
        return parcel

    def _from_host(self, parcel: _OnHost) -> torch.Tensor:
        if parcel.real is not None:
            return parcel.real
        out = self._fakes.empty(parcel.shape, torch.empty(parcel.shape, device="meta").stride(), parcel.dtype)
        self._record(out, "aten::_to_copy")
        return out

    def _leave_host(self, number: int, size: int) -> None:
        self.events.append(Event("host-free", number, size, self.phase, "", ""))

    def _mark(self, path: str) -> None:
        """Note where another block begins. What runs outside all modules, as the engine's sums, belongs to the last."""
        if path:
            where = self._locate(path)
            if not self.marks or self.marks[-1][1] != where:
                self.marks.append((len(self.events), where))

    def _pass_through(self, size: int, path: str, op: str) -> None:
        """Memory that a kernel takes beside its results and gives back before it ends."""
        number = self._count = self._count + 1
        self.events.append(Event("alloc", number, size, self.phase, path, op))
        self.events.append(Event("free", number, size, self.phase, "", ""))

    def _forgetter(self, key: int, number: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self._live[key]
            self.events.append(Event("free", number, size, self.phase, "", ""))

        return forget


@dataclass(eq=False)
class _OnHost:
    """A tensor that waits in host memory; a real one (integers, masks) is kept as it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    real: torch.Tensor | None


def _makes_float(kwargs: Any) -> bool:
    dtype = kwargs.get("dtype")
    return dtype is not None and dtype.is_floating_point


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
