"""Begin to follow every live tensor of a prepared trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from memfit.engine.measuring.live import GRADIENT, LiveTensors
from memfit.engine.measuring.outside import Outside
from memfit.engine.measuring.states import states_of, waiting_batches, walk


def followed(trainer: Any, part_of: Callable[[str], str], outside: Outside, waits: Iterable[Any]) -> LiveTensors:
    """A tracker that knows all that stands now.

    `waits`: batches that the proof itself holds; `outside`: what is not the run's.
    """
    tracker = LiveTensors(trainer.model, outside)
    tracker.adopt(states_of(trainer, trainer.model, part_of))
    tracker.adopt(("waiting", "", tensor) for tensor in (*waiting_batches(), *walk(list(waits))))
    tracker.adopt_rest("held")
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        tracker.rename_views("held", GRADIENT)  # its buckets: nobody in Python holds them but by views
    return tracker
