"""A model's parameters as numbers: read once from the meta device, cached, enough to plan without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any


@dataclass(frozen=True)
class ParameterRow:
    """One parameter. `module` is its owner's dotted name, `kind` the owner's class of layer.

    kind: linear | linear-transposed (weight [in, out]) | embedding | norm | conv | other. `block` is the index of the
    repeated block it belongs to inside its part, or None. `tied_to` names the parameter whose storage it shares (its
    bytes are then zero). `reached`: its output comes to the loss, so that it can get a gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str
    module: str
    kind: str
    block: int | None = None
    tied_to: str | None = None
    reached: bool = True

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Profile:
    """All parameters of one model under one config; `versions` are those of torch and transformers that built it."""

    model_type: str
    key: str
    parameters: tuple[ParameterRow, ...]
    buffers_bytes: int
    versions: tuple[tuple[str, str], ...]

    def part_numel(self) -> dict[str, int]:
        """Unique parameters of every part."""
        counts: dict[str, int] = {}
        for row in self.parameters:
            if row.tied_to is None:
                counts[row.part] = counts.get(row.part, 0) + row.numel
        return counts

    def to_json(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "key": self.key,
            "buffers_bytes": self.buffers_bytes,
            "versions": dict(self.versions),
            "parameters": [
                [r.name, list(r.shape), r.dtype, r.part, r.module, r.kind, r.block, r.tied_to, r.reached]
                for r in self.parameters
            ],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Profile:
        """Inverse of `to_json`. KeyError or TypeError when the file is of another shape."""
        return Profile(
            model_type=data["model_type"],
            key=data["key"],
            buffers_bytes=data["buffers_bytes"],
            versions=tuple(sorted(data["versions"].items())),
            parameters=tuple(ParameterRow(name, tuple(shape), *others) for name, shape, *others in data["parameters"]),
        )
