"""Every tensor that is alive while steps run: its bytes, the module and the source line that made it, its role.

A weak reference to each untyped storage is kept, never a tensor, so that watching frees nothing later than it would go.
What a kernel takes and gives back inside one operator is not seen: it is no tensor. This shares no code with
memfit.trace, which watches fakes before the run; a test compares it with torch's own profiler.
"""

from __future__ import annotations

import bisect
import gc
import math
import sys
import weakref
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.engine.measuring.outside import Outside

aten = torch.ops.aten
GRADIENT = "gradients"
_BEHIND = ("/torch/", "/memfit/engine/measuring/", "/memfit/engine/foreign/", "/accelerate/", "/deepspeed/", "<")


@dataclass
class Storage:
    """One live storage. `role` is a kind of state, "batch", "made" (by a step) or "engine"; `owner` a name or part."""

    bytes: int
    role: str
    owner: str
    module: str
    line: str
    shape: tuple[int, ...]
    dtype: str
    phase: str


class Change(NamedTuple):
    """A storage that grew or shrank by `bytes` in `phase`; one that goes shrinks by all it has.

    `replaces`: what comes stands where the next change takes away, as without a watcher both would be one.
    """

    number: int
    bytes: int
    phase: str
    replaces: bool = False


class _What(NamedTuple):
    """What is said of a storage as it is taken in; `line`: its source line, or the operator that makes it now."""

    role: str
    owner: str
    line: str = ""


@dataclass
class Course:
    """What happened between `begin` and `end`: `base` bytes alive at the begin by storage number, then changes."""

    base: dict[int, int]
    changes: list[Change] = field(default_factory=list)

    def peaks(self, skip: Container[int] = ()) -> dict[str, tuple[int, int]]:
        """Phase -> (the most bytes alive in it, the index of the change after which that was; -1 for its begin).

        `skip`: numbers of storages that do not count.
        """
        now, last = sum(size for number, size in self.base.items() if number not in skip), ""
        found: dict[str, tuple[int, int]] = {}
        for index, change in enumerate(self.changes):
            if change.number in skip:
                continue
            if change.phase != last:
                last = change.phase
                if now > found.get(last, (-1, 0))[0]:
                    found[last] = (now, index - 1)
            now += change.bytes
            if now > found.setdefault(last, (-1, 0))[0] and not change.replaces:
                found[last] = (now, index)
        return found

    def alive(self, index: int) -> dict[int, int]:
        """Storage number -> bytes after the change at `index`."""
        sizes = dict(self.base)
        for change in self.changes[: index + 1]:
            sizes[change.number] = sizes.get(change.number, 0) + change.bytes
        return {number: size for number, size in sizes.items() if size > 0}


class LiveTensors(TorchDispatchMode):
    """Follows storages while it is entered. `enter` tells the phase; `storages` says what each number was.

    `outside`: numbers of storages that belong to somebody else (`seen_now` before a run was built), never counted.
    """

    def __init__(self, model: nn.Module, outside: Container[int] = ()) -> None:
        super().__init__()
        self.phase = ""
        self.storages: dict[int, Storage] = {}
        self.course = Course({})
        self._outside = outside
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = [""]
        self._sequence, self._sequence_paths = [0], [""]
        self._numbers: dict[int, int] = {}  # address of a storage's C++ object -> number
        self._kept: dict[int, Any] = {}  # number -> weak reference
        self._sizes: dict[int, int] = {}
        self._resizing: list[int] = []
        self._hooks: list[Any] = []

    def enter(self, phase: str) -> None:
        """`phase` begins: one that makes nothing has a peak too.

        What the phase before it made without an operator (the generator's state that checkpointing keeps) counts there.
        """
        if self.phase in ("forward", "loss"):
            for tensor in reachable(young=True):
                for local in plain(tensor):
                    self._take(local, _What("made", "", "made by no operator"), adopted=True)
        self.phase = phase
        self.course.changes.append(Change(-1, 0, phase))

    # ---- before and after -----------------------------------------------------------------------------------------

    def adopt(self, tensors: Iterable[tuple[str, str, torch.Tensor]]) -> None:
        """Take in tensors that exist: (role, owner, tensor). The first word about a storage counts."""
        for role, owner, tensor in tensors:
            for local in plain(tensor):
                self._take(local, _What(role, owner), adopted=True)

    def adopt_rest(self, role: str) -> None:
        """Every other tensor that this process can reach, found through the garbage collector."""
        self.adopt((role, "", tensor) for tensor in reachable())

    def begin(self) -> None:
        """Forget what happened before; what is alive is the base.

        Nothing is collected until the tracker is left: cyclic garbage would go at moments of its own, and what is new
        stays among the youngest objects.
        """
        gc.collect()
        gc.disable()
        self._resizing = [number for number, size in self._sizes.items() if self._can_resize(number)]
        self.course = Course(dict(self._sizes))

    def __enter__(self) -> LiveTensors:
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.enable()
        for hook in self._hooks:
            hook.remove()

    def label(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Say of storages whose they are, by a parameter's name, where no module made them."""
        for name, tensor in named:
            for local in plain(tensor):
                number = self._numbers.get(local.untyped_storage()._cdata)
                if number is not None and not self.storages[number].module:
                    self.storages[number].module = name

    def rename(self, tensors: Iterable[Any], role: str) -> None:
        """Give the storages of `tensors` another role."""
        for tensor in (local for given in tensors for local in plain(given)):
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self.storages[number].role = role

    def rename_all(self, old: str, new: str) -> None:
        """Give every storage of one role another."""
        for storage in self.storages.values():
            if storage.role == old:
                storage.role = new

    def rename_views(self, old: str, new: str) -> None:
        """Give another role to those storages of one role that were seen as a part of themselves."""
        for storage in self.storages.values():
            width = getattr(torch, storage.dtype).itemsize
            if storage.role == old and math.prod(storage.shape) * width < storage.bytes:
                storage.role = new

    def with_role(self, *roles: str) -> set[int]:
        """Numbers of all storages, alive or gone, with one of these roles."""
        return {number for number, storage in self.storages.items() if storage.role in roles}

    def as_gradient(self, tensor: torch.Tensor, owner: str) -> None:
        """From now on the storage of `tensor` is a gradient."""
        for local in plain(tensor):
            number = self._numbers.get(local.untyped_storage()._cdata)
            if number is None:  # older than this course, and seen by nobody: DDP's buckets
                self._take(local, _What(GRADIENT, owner), adopted=True)
                number = self._numbers.get(local.untyped_storage()._cdata)
                if number is not None:
                    self.course.base[number] = self.course.changes.pop().bytes
            elif self.storages[number].role == "made":
                self.storages[number].role, self.storages[number].owner = GRADIENT, owner

    # ---- while it runs --------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; the guard would cost as much as an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sums = func is aten.add.Tensor and self._is_engine_sum(args)
        out = func(*args, **kwargs)
        if self._resizing:
            self._look_at_sizes()
        for tensor in _tensors(out):
            self._take(tensor, _What("made", "", func._schema.name))
        if sums and self.course.changes and self.course.changes[-1].bytes > 0:
            self.course.changes[-1] = self.course.changes[-1]._replace(replaces=True)
        return out

    def _is_engine_sum(self, args: Any) -> bool:
        """Autograd's engine sums two gradients in place where it holds the last reference to one, but not while a mode
        watches (torch/csrc/autograd/input_buffer.cpp: can_accumulate_inplace)."""
        if self.phase != "backward" or len(self._stack) > 1 or torch._C._current_autograd_node() is not None:
            return False
        first, second = args[0], args[1]
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.shape == second.shape

    def _take(self, tensor: torch.Tensor, what: _What, adopted: bool = False) -> None:
        """Follow a tensor's storage from now on, unless it is known. `adopted`: it may be empty and be filled later."""
        try:
            storage = tensor.untyped_storage()
            size = storage.nbytes()
        except (NotImplementedError, RuntimeError):  # no storage behind it
            return
        key = storage._cdata
        if key in self._numbers or key in self._outside or (not size and not adopted) or storage.device.type == "meta":
            return
        number = len(self.storages)
        path, line = ("", what.line) if adopted else (self._path(), self._line(what.line))
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self.storages[number] = Storage(size, what.role, what.owner, path, line, shape, dtype, self.phase)
        self._numbers[key] = number
        self._sizes[number] = size
        self._kept[number] = weakref.ref(storage, self._forgetter(key, number))
        self.course.changes.append(Change(number, size, self.phase))

    def _forgetter(self, key: int, number: int) -> Any:
        def forget(_: Any) -> None:
            self._numbers.pop(key, None)
            self._kept.pop(number, None)
            self.course.changes.append(Change(number, -self._sizes.pop(number, 0), self.phase))

        return forget

    def _can_resize(self, number: int) -> bool:
        """Whether an engine may change the size of a storage in place: FSDP2 does, with those that it gathers into."""
        return self.storages[number].role in ("gathered", "engine")

    def _look_at_sizes(self) -> None:
        for number in self._resizing:
            kept = self._kept.get(number)
            storage = kept() if kept is not None else None
            if storage is None:
                continue
            size = storage.nbytes()
            if size != self._sizes[number]:
                self.course.changes.append(Change(number, size - self._sizes[number], self.phase))
                self._sizes[number] = size

    # ---- who runs -------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1]))
        self._turn()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()
        self._turn()

    def _turn(self) -> None:
        self._sequence.append(torch.autograd._get_sequence_nr())
        self._sequence_paths.append(self._stack[-1])

    def _path(self) -> str:
        """The module that runs; in backward the one whose forward made the node that runs."""
        if len(self._stack) > 1:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None or node._sequence_nr() > self._sequence[-1]:
            return ""
        return self._sequence_paths[bisect.bisect_right(self._sequence, node._sequence_nr()) - 1]

    def _line(self, op: str) -> str:
        """The innermost source line outside torch and engines, and the operator."""
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            name = frame.f_code.co_filename
            if not any(part in name for part in _BEHIND):
                return f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno} {op}"
            frame = frame.f_back
        return op


def plain(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's bytes: a DTensor's own share, a subclass's inner ones, else itself."""
    if hasattr(tensor, "_local_tensor"):
        yield from plain(tensor._local_tensor)
    elif type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    else:
        yield tensor


def reachable(young: bool = False) -> list[torch.Tensor]:
    """Every tensor that the garbage collector knows of; `young`: only those made since it was stopped."""
    found, kinds = [], {}
    for thing in gc.get_objects(generation=0 if young else None):
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, torch.Tensor)
        if kinds[kind]:
            found.append(thing)
            if thing.is_leaf and thing.grad is not None:
                found.append(thing.grad)
    return found


def seen_now() -> Outside:
    """The storages of all tensors that are alive, as `LiveTensors` takes them for `outside`."""
    return Outside(local for tensor in reachable() for local in plain(tensor))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield from plain(value)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
