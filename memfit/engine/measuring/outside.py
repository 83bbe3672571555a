"""Storages that belong to somebody else than the run that is measured."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch


class Outside:
    """A set of storages, by number, out of which each falls as it is freed: its number may be another's then."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._held.setdefault(storage._cdata, weakref.ref(storage, self._forgetter(storage._cdata)))

    def __contains__(self, number: object) -> bool:
        return number in self._held

    def __len__(self) -> int:
        return len(self._held)

    def _forgetter(self, number: int) -> Callable[[object], None]:
        held = self._held

        def forget(_: object) -> None:
            held.pop(number, None)

        return forget
