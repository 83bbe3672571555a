"""A tracked step as plain figures: bytes of each phase's peak by group, and the largest tensors of the highest one."""

from __future__ import annotations

from typing import Any

from memfit.engine.measuring.live import Course, LiveTensors, Storage

LARGEST = 20
# Roles that are told apart in the table; "made" becomes "saved" or "transient", "held" is alive and nobody's.
WAITING, HELD = "waiting", "held"


def course_json(tracker: LiveTensors) -> dict[str, Any]:
    """`phases`: name -> bytes, bytes by "role.owner", how many tensors; `largest`: of the highest phase; `held`: of
    those the ones that are nobody's; `kept`: made by the step and still alive at its end, gradients excepted; `saved`:
    what backward found, by module."""
    course, storages = tracker.course, tracker.storages
    skip = tracker.with_role(WAITING)
    saved = _saved(course, storages)
    phases, highest, peak = {}, "", -1
    peaks = course.peaks(skip)
    for phase, (size, index) in peaks.items():
        if not phase:
            continue
        alive = {number: size for number, size in course.alive(index).items() if number not in skip}
        phases[phase] = {"bytes": size, "tensors": len(alive), "of": _by_group(alive, storages, saved)}
        if size > peak:
            highest, peak = phase, size
    alive = course.alive(peaks[highest][1]) if highest else {}
    end = course.alive(len(course.changes) - 1)
    kept = {n: size for n, size in end.items() if n not in course.base and storages[n].role == "made"}
    by_module: dict[str, int] = {}
    for number in saved:
        by_module[storages[number].module] = by_module.get(storages[number].module, 0) + storages[number].bytes
    return {
        "phases": phases,
        "peak_phase": highest,
        "largest": _largest({n: s for n, s in alive.items() if n not in skip}, storages, saved),
        "kept": _largest(kept, storages, saved),
        "kept_bytes": sum(kept.values()),
        "held": _largest({n: s for n, s in alive.items() if storages[n].role == HELD}, storages, saved),
        "saved": by_module,
    }


def _saved(course: Course, storages: dict[int, Storage]) -> set[int]:
    """Made by the step and alive whenever backward begins: what autograd keeps, and what anybody else does."""
    found: set[int] = set()
    sizes = dict(course.base)
    last = ""
    for change in course.changes:
        if change.phase == "backward" != last:
            found |= {
                n for n, size in sizes.items() if size > 0 and storages[n].role == "made" and n not in course.base
            }
        last = change.phase
        sizes[change.number] = sizes.get(change.number, 0) + change.bytes
    return found


def _by_group(alive: dict[int, int], storages: dict[int, Storage], saved: set[int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, size in alive.items():
        name = ".".join(filter(None, (role_of(number, storages, saved), storages[number].owner)))
        found[name] = found.get(name, 0) + size
    return dict(sorted(found.items()))


def role_of(number: int, storages: dict[int, Storage], saved: set[int]) -> str:
    """The role of a storage, what a step made told apart."""
    role = storages[number].role
    if role != "made":
        return role
    return "saved" if number in saved else "transient"


def _largest(alive: dict[int, int], storages: dict[int, Storage], saved: set[int]) -> list[dict[str, Any]]:
    numbers = sorted(alive, key=lambda number: -alive[number])[:LARGEST]
    return [
        {
            "bytes": alive[number],
            "shape": list(storages[number].shape),
            "dtype": storages[number].dtype,
            "module": storages[number].module,
            "line": storages[number].line,
            "role": role_of(number, storages, saved),
            "owner": storages[number].owner,
        }
        for number in numbers
    ]
