"""Where failures are planted: a table of functions for each place, by the failure's name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback

from memfit.build.build import Built
from memfit.engine.train import Job

Around = Callable[[Job], contextlib.AbstractContextManager[Any]]
AROUND: dict[str, Around] = {}
ARGUMENTS: dict[str, Callable[[Any], None]] = {}
ENGINE: dict[str, Callable[[dict[str, Any]], None]] = {}
BUILT: dict[str, Callable[[Built], Built | None]] = {}
TRAINER: dict[str, Callable[[Any], None]] = {}


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute set, and set back."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def swapped_global(function: Any, name: str, value: Any) -> Iterator[None]:
    """A global of a function's module set, and set back."""
    names = function.__globals__
    old = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = old


def at(table: dict[str, Any], name: str) -> Callable[[Any], Any]:
    """Puts a function into a table under the name of what it plants."""

    def put(function: Any) -> Any:
        table[name] = function
        return function

    return put


def setting(name: str, **values: Any) -> None:
    """Plants values of TrainingArguments."""

    def change(arguments: Any) -> None:
        for key, value in values.items():
            setattr(arguments, key, value)

    ARGUMENTS[name] = change


class AtBegin(TrainerCallback):
    """Changes the live model as training begins."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self._change = change

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._change(kwargs["model"])
