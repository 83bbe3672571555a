"""A traced step cut where engines act: at every change of module and at every gradient that is ready."""

from __future__ import annotations

from typing import NamedTuple


class Stretch(NamedTuple):
    """The moment with the most bytes alive while one module runs, gradients of parameters excepted.

    `begins`: the event with which the stretch starts. `module` is its name in transformers' model (adapters keep their
    own, and what the module around an adapted layer computes stands under the layer's name with ".adapter"). `inputs`,
    `saved`, `transient` are as in `PeakRow`; `gradients` those of parameters that are there already. `recent`: of
    `saved`, what the block that runs has made itself, which lives without a graph as well. `arrives`: the parameter
    whose gradient (of `size` bytes) is ready now; such a stretch is a single moment, and the new gradient is in `size`
    only. A gradient that was there before has size 0. `start`: what was alive when the stretch began, gradients of
    parameters excepted.
    """

    begins: int
    phase: str
    module: str
    inputs: int
    saved: int
    transient: int
    gradients: int
    recent: int
    arrives: str = ""
    size: int = 0
    start: int = 0

    @property
    def activations(self) -> int:
        """All that is alive except gradients of parameters."""
        return self.inputs + self.saved + self.transient
