"""A second trainer of the user's own class over the same model, that runs a few steps and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Sampler
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, TrainerMemoryTracker

# Attributes that hold data: shared, never copied.
DATA = ("train_dataset", "eval_dataset", "data_collator", "processing_class")


class Listed(Dataset[Any]):
    """Samples as they were drawn."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, place: int) -> Any:
        return copy.copy(self._samples[place])


def clone_of(trainer: Any, samples: Sequence[Any], order: Sampler[int], args: Any) -> Any:
    """A trainer of the same class with the same model, loss, collator and optimizer class; its constructor is not run.

    Its callbacks are transformers' own flow and nothing else: the user's may write, log, stop or change what learns.
    """
    clone = object.__new__(type(trainer))
    vars(clone).update({name: _own(name, value) for name, value in vars(trainer).items()})
    clone.args = args
    clone.train_dataset = Listed(samples)
    clone.eval_dataset = None
    clone.control, clone.state = TrainerControl(), TrainerState()
    clone._memory_tracker = TrainerMemoryTracker(skip_memory_metrics=True)
    clone.callback_handler = CallbackHandler(
        [DefaultFlowCallback()], clone.model, clone.processing_class, clone.optimizer, clone.lr_scheduler
    )
    clone._get_train_sampler = lambda dataset=None: order  # this object's alone, whatever its class has
    return clone


def _own(name: str, value: Any) -> Any:
    """A trainer's own lists and tables of figures are the clone's own; everything else is shared."""
    if name in DATA or not isinstance(value, dict | list | set):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # something inside cannot be copied: it is no table of figures
        return copy.copy(value)


def arguments_of(trainer: Any, folder: Path, total: int) -> Any:
    """The user's arguments, writing into `folder`, with nothing saved, logged, pushed or evaluated.

    `total`: optimizer steps of the user's whole run, over which the schedule is laid.
    """
    args = copy.copy(trainer.args)
    changed: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": total,
        "eval_strategy": IntervalStrategy.NO,
        "save_strategy": IntervalStrategy.NO,
        "logging_strategy": IntervalStrategy.NO,
        "do_eval": False,
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": [],
        "disable_tqdm": True,
        "auto_find_batch_size": False,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_persistent_workers": False,
    }
    for name, value in changed.items():
        setattr(args, name, value)
    return args


def total_steps(trainer: Any) -> int:
    """Optimizer steps of the user's whole run. ValueError for data without an end and without max_steps."""
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def silent_callbacks(trainer: Any) -> list[str]:
    """Classes of the user's own callbacks, which the clone does not run."""
    theirs = [type(each) for each in trainer.callback_handler.callbacks]
    return sorted(kind.__name__ for kind in theirs if not kind.__module__.startswith(("transformers.", "memfit.")))
