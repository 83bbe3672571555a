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
CPU = torch.device("cpu")

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


class _OnMeta:
    """Inside, operators on fakes reach the meta kernels and no mode sees them.

    What fake_tensor.py:in_kernel_invocation_manager does, without the cost of a generator; a test compares both.
    """

    __slots__ = ("_guards", "_mode")

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._guards = torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard()

    def __enter__(self) -> None:
        for guard in self._guards:
            guard.__enter__()
        self._mode.in_kernel_invocation = True
        torch._C._set_meta_in_tls_dispatch_include(True)

    def __exit__(self, *_: Any) -> None:
        self._mode.in_kernel_invocation = False
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)


class Fakes:
    """One trace's fake tensors: a FakeTensorMode and what is remembered of its operators."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}
        with self.mode:
            self._attributes = dict(torch.empty(1).__dict__)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of `func` as fake tensors; real tensors among the arguments are taken for their shapes."""
        if func in VIEWS:
            if all(_is_fake_or_plain(value) for value in args) and not kwargs:
                with _OnMeta(self.mode):
                    out = func(*args)
                return self._wrapped(out)
        elif func in FRESH:
            key = _key((func, args, kwargs))
            if key is not None:
                return self._remembered(key, func, args, kwargs)
        with self.mode:
            return func(*args, **kwargs)

    def empty(self, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """A new fake CPU tensor."""
        with _OnMeta(self.mode):
            out = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return self._fake(out)

    def _remembered(self, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        known = self._known.get(key)
        if known is None:
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
        fake = torch.Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=CPU)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(self._attributes)
        return fake


def _pattern(out: Any) -> Any:
    """(shape, stride, dtype) of a result, or (None, the same of each) for several."""
    if isinstance(out, torch.Tensor):
        return tuple(out.shape), out.stride(), out.dtype
    return None, tuple(_pattern(item) if isinstance(item, torch.Tensor) else item for item in out)


def _is_fake_or_plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(value, FakeTensor)
    return all(_is_fake_or_plain(item) for item in value) if isinstance(value, list | tuple) else True


def _key(value: Any) -> Any:
    """`value` with every fake tensor replaced by its shape, stride and dtype; None where a real one is inside."""
    if isinstance(value, torch.Tensor):
        if not isinstance(value, FakeTensor):
            return None
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        keys = tuple(_key(item) if item is not None else "None" for item in value)
        return None if None in keys else keys
    if isinstance(value, dict):
        return _key(tuple(value.items()))
    # 1 and 1.0 and True are equal, and give different dtypes.
    return (type(value), value) if isinstance(value, bool | int | float) else value
