"""Run an operator on fake tensors quickly.

FakeTensorMode takes 0.1 to 2 ms an operator when sizes or offsets are new to it, as in a loop over chunks or windows.
Two shorter ways lead to the same tensors: views call the meta kernel directly, and operators whose results are always
new tensors are remembered by the shapes of their arguments. A test runs whole steps both ways and compares every event.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")
# Looked up once: they are called for every tensor of a step.
_include_meta = torch._C._set_meta_in_tls_dispatch_include
_subclass, _guarded, _empty = torch.Tensor._make_subclass, torch._C._set_throw_on_mutable_data_ptr, torch.empty_strided
_PLAIN = frozenset({int, float, bool, type(None), torch.dtype, torch.device, str})

# Results share their input's storage; the meta kernel is in C++ and takes no device.
VIEWS = frozenset(
    {
        *(aten.detach.default, aten.alias.default, aten.view.default, aten._unsafe_view.default, aten.t.default),
        *(aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.expand.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.split.Tensor, aten.split_with_sizes.default),
        *(aten.unbind.int, aten.add_.Tensor, aten.copy_.default),
    }
)
# Results are new tensors that depend on shapes, strides, dtypes and plain arguments alone.
FRESH = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar),
        *(aten.neg.default, aten.exp.default, aten.rsqrt.default, aten.sigmoid.default, aten.silu.default),
        *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.sum.dim_IntList, aten.mean.dim),
        *(aten.pow.Tensor_Scalar, aten.cat.default, aten.gelu.default, aten.gelu_backward.default),
        *(aten.silu_backward.default, aten.sigmoid_backward.default, aten.cumsum.default, aten.clone.default),
        *(aten.select_backward.default, aten.slice_backward.default, aten.native_layer_norm.default),
        *(aten.native_layer_norm_backward.default, aten._to_copy.default, aten.masked_fill.Scalar),
        *(aten.zeros_like.default, aten.new_zeros.default, aten.new_empty_strided.default),
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
    }
)


# Of these only so many arguments matter: the size of what comes out, not the place that is filled.
MATTERS = {aten.select_backward.default: 2, aten.slice_backward.default: 2}
# FakeTensorMode looks at each of thousands of windows; the meta kernel is in C++.
IN_C = frozenset({aten.cat.default})


class _OnMeta:
    """Inside, operators on fakes reach the meta kernels and no mode sees them. Not to be entered again inside.

    What fake_tensor.py:in_kernel_invocation_manager does, without the cost of a generator and of new guards each time;
    a test compares both.
    """

    __slots__ = ("_aside", "_mode")

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._aside = aside()

    def __enter__(self) -> None:
        self._aside.__enter__()
        self._mode.in_kernel_invocation = True
        _include_meta(True)

    def __exit__(self, *_: Any) -> None:
        _include_meta(False)
        self._mode.in_kernel_invocation = False
        self._aside.__exit__(None, None, None)


def aside() -> Any:
    """A guard that can be entered many times: inside, no Python mode or subclass sees an operator.

    It excludes what torch/csrc/utils/disable_torch_function.h: DisableTorchDispatch does.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
    for key in (torch._C.DispatchKey.PythonTLSSnapshot, torch._C.DispatchKey.PreDispatch):
        keys = keys.add(key)
    return torch._C._ExcludeDispatchKeyGuard(keys)


class Fakes:
    """One trace's fake tensors: a FakeTensorMode and what is remembered of its operators."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}
        # Nothing that runs inside comes back to this class, so that one of each will do.
        self._on_meta, self._aside = _OnMeta(self.mode), aside()
        with self.mode:
            self._attributes = dict(torch.empty(1).__dict__)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of `func` as fake tensors; real tensors among the arguments are taken for their shapes."""
        if func in VIEWS:
            if not kwargs and _fake_or_plain(args):
                with self._on_meta:
                    out = func(*args)
                return self._wrapped(out)
        elif func in FRESH:
            key = _key((func, args[: MATTERS.get(func)], kwargs))
            if key is not None:
                return self._remembered(key, func, args, kwargs)
        with self.mode:
            return func(*args, **kwargs)

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """A new fake CPU tensor."""
        with self._aside:
            out = _empty(shape, stride, dtype=dtype, device=META)
        return self._fake(out)

    def _remembered(self, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        known = self._known.get(key)
        if known is None:
            if func in IN_C and not kwargs:
                with self._on_meta:
                    out = self._fake(func(*args))
            else:
                with self.mode:
                    out = func(*args, **kwargs)
            known = self._known[key] = _pattern(out)
            return out
        if known[0] is None:
            return tuple(self.empty(*item) if isinstance(item, tuple) else item for item in known[1])
        return self.empty(*known)

    def _wrapped(self, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return out if isinstance(out, FakeTensor) else self._fake(out)
        return type(out)(self._wrapped(item) for item in out)

    def _fake(self, meta: torch.Tensor) -> torch.Tensor:
        """What FakeTensor(mode, meta, CPU) makes, without its checks."""
        fake: torch.Tensor = _subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=CPU)
        _guarded(fake)
        fake.__dict__.update(self._attributes)
        return fake


def _pattern(out: Any) -> Any:
    """(shape, stride, dtype) of a result, or (None, the same of each) for several."""
    if isinstance(out, torch.Tensor):
        return tuple(out.shape), out.stride(), out.dtype
    return None, tuple(_pattern(item) if isinstance(item, torch.Tensor) else item for item in out)


def _fake_or_plain(values: Any) -> bool:
    """Whether no real tensor is among `values`, lists and tuples inside included."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor or kind in _PLAIN:
            continue
        if isinstance(value, torch.Tensor):
            if not isinstance(value, FakeTensor):
                return False
        elif isinstance(value, list | tuple) and not _fake_or_plain(value):
            return False
    return True


def _key(value: Any) -> Any:
    """`value` with every fake tensor replaced by its shape, stride and dtype; None where a real one is inside."""
    kind = type(value)
    if kind is FakeTensor:
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list or kind is dict or isinstance(value, list | tuple | dict):
        keys = []
        for item in value.items() if isinstance(value, dict) else value:
            key = "None" if item is None else _key(item)
            if key is None:
                return None
            keys.append(key)
        return tuple(keys)
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype) if isinstance(value, FakeTensor) else None
    # 1 and 1.0 and True are equal, and give different dtypes.
    return (kind, value) if kind is int or kind is float or kind is bool or isinstance(value, float | int) else value
