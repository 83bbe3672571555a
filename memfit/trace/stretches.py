"""Cut the events of a traced step into stretches: what an engine needs to know of it, without its events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from memfit.families.names import Where, base_name
from memfit.specs.stretch import Stretch
from memfit.specs.trace import Event
from memfit.trace.summary import INPUT

WRAPPED = ".base_layer"  # peft.tuners.tuners_utils:BaseTunerLayer.get_base_layer
ADAPTER = ".adapter"  # behind a layer's name: what the module around it computes


def stretches(events: Iterable[Event], locate: Callable[[str], Where]) -> tuple[Stretch, ...]:
    """The stretches of a step, in order. `locate` gives the part and block of a path."""
    events = list(events)
    cutter = _Cutter(kept_for_backward(events), locate, wrappers(events))
    for at, event in enumerate(events):
        cutter.take(at, event)
    cutter.close()
    return tuple(cutter.rows)


def wrappers(events: Iterable[Event]) -> frozenset[str]:
    """Paths of modules that PEFT put around a layer. They own no parameters: what an engine gathers for the layer has
    no part in what they compute themselves, which may be all that the layer's place has in backward."""
    return frozenset(event.path.partition(WRAPPED)[0] for event in events if WRAPPED in event.path)


def kept_for_backward(events: Iterable[Event]) -> set[int]:
    """Storages alive when backward begins."""
    alive: set[int] = set()
    for event in events:
        if event.kind == "alloc":
            alive.add(event.storage)
        elif event.kind in ("free", "gradient"):
            alive.discard(event.storage)
        elif event.kind == "phase" and event.phase == "backward":
            break
    return alive


@dataclass
class _Cutter:
    kept: set[int]
    locate: Callable[[str], Where]
    wrappers: frozenset[str] = frozenset()
    rows: list[Stretch] = field(default_factory=list)
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("inputs", "saved", "transient", "gradients"), 0))
    alive: dict[int, tuple[int, str]] = field(default_factory=dict)
    open: Stretch | None = None
    block: Where | None = None
    saved_before: int = 0
    path: str | None = None  # of the last allocation, while its stretch is open

    def take(self, at: int, event: Event) -> None:
        if event.kind == "alloc":
            role = "inputs" if event.op == INPUT else "saved" if event.storage in self.kept else "transient"
            self._enter(at, event)
            self.alive[event.storage] = (event.bytes, role)
            self.now[role] += event.bytes
            self._look()
        elif event.kind == "free":
            size, role = self.alive.pop(event.storage)
            self.now[role] -= size
        elif event.kind == "gradient":
            self._gradient(at, event)
        else:
            self.close()
            self.saved_before, self.block, self.path = self.now["saved"], None, None
            self.open = self._row(at, event.phase, "")

    def close(self) -> None:
        if self.open is not None:
            self.rows.append(self.open)
        self.open = None

    def _enter(self, at: int, event: Event) -> None:
        path = event.path
        if self.open is not None and path == self.path and event.phase == self.open.phase:
            return
        self.path = path
        module = base_name(path + ".").rstrip(".") + (ADAPTER if path in self.wrappers else "")
        where = self.locate(path)
        if where != self.block:
            self.block, self.saved_before = where, self.now["saved"]
        if self.open is None or (self.open.phase, self.open.module) != (event.phase, module):
            self.close()
            self.open = self._row(at, event.phase, module)

    def _look(self) -> None:
        row = self.open
        if row is not None and self.now["inputs"] + self.now["saved"] + self.now["transient"] > row.activations:
            self.open = self._row(row.begins, row.phase, row.module)._replace(start=row.start)

    def _gradient(self, at: int, event: Event) -> None:
        module = self.open.module if self.open is not None else ""
        self.close()
        size, role = self.alive[event.storage]
        self.now[role] -= size
        row = self._row(at, event.phase, module)
        self.rows.append(row._replace(arrives=base_name(event.path), size=0 if role == "gradients" else size))
        self.now["gradients"] += size
        self.alive[event.storage] = (size, "gradients")
        self.open = self._row(at + 1, event.phase, module)

    def _row(self, at: int, phase: str, module: str) -> Stretch:
        recent = max(0, self.now["saved"] - self.saved_before)
        now = self.now
        row = Stretch(at, phase, module, now["inputs"], now["saved"], now["transient"], now["gradients"], recent)
        return row._replace(start=row.activations)
