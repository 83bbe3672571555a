"""docs/measured/accuracy_gpu.md from the records, and one line a cell while a run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.accuracy_gpu.records import FOLDER, pairs
from memfit.units import gib

PAGE = Path(__file__).parents[2] / "docs" / "measured" / "accuracy_gpu.md"
FIGURES = (
    ("allocated", "peak_allocated_bytes"),
    ("reserved", "peak_reserved_bytes"),
    ("process", "process_bytes"),
)
Record = dict[str, Any]


def write_page(check: bool = False, folder: Path = FOLDER, page: Path = PAGE) -> int:
    """Write the page, or with `check` say whether it is what the records give."""
    wanted = page_text(folder)
    if check:
        if not page.exists() or page.read_text(encoding="utf-8") != wanted:
            print(f"{page.name} is old: run python -m benchmarks.accuracy_gpu table", file=sys.stderr)
            return 1
        return 0
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(wanted, encoding="utf-8")
    print(page)
    return 0


def page_text(folder: Path = FOLDER) -> str:
    """The page: what was run, the table, the errors; or that nothing has been run yet."""
    found = [row for row in pairs(folder) if row[2].get("device", {}).get("kind") != "cpu"]
    lines = [
        "# Forecast against a GPU",
        "",
        "Written by `python -m benchmarks.accuracy_gpu table` from `benchmarks/accuracy_gpu/records`. Random weights",
        "at full size, one row a step, bf16 weights, gradients and moments, AdamW; measured by torch's own statistics",
        "and nvidia-smi. The forecast is made without a GPU.",
        "",
    ]
    if not found:
        return "\n".join([*lines, "No measurement on a GPU has been taken yet.", ""])
    for machine in dict.fromkeys(name for name, _, _ in found):
        own = [(forecast, measured) for name, forecast, measured in found if name == machine]
        lines += [*_machine(machine, own), ""]
    return "\n".join(lines)


def _machine(machine: str, rows: list[tuple[Record | None, Record]]) -> list[str]:
    device = next((measured["device"] for _, measured in rows if "device" in measured), {})
    versions = next((measured["versions"] for _, measured in rows if "versions" in measured), {})
    said = ", ".join(f"{name} {value}" for name, value in versions.items())
    lines = [
        f"## {device.get('name', machine)}",
        "",
        f"{said}, CUDA {device.get('cuda')}. Forecast / measured / error.",
        "",
    ]
    heads = ["cell", "result", *(name for name, _ in FIGURES), "s per step"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for forecast, measured in rows:
        cells = [measured["cell"]["id"], _result(forecast, measured)]
        cells += [_cell(forecast, measured, key) for _, key in FIGURES]
        lines.append("| " + " | ".join([*cells, _seconds(forecast, measured)]) + " |")
    lines.append("")
    for name, key in FIGURES:
        errors = [error for forecast, measured in rows if (error := error_of(forecast, measured, key)) is not None]
        if errors:
            worst = max(errors, key=abs)
            middle = median(abs(error) for error in errors)
            lines.append(f"- {name}: median absolute error {middle:.1%}, worst {worst:+.1%}, {len(errors)} cells")
    return lines


def error_of(forecast: Record | None, measured: Record, key: str) -> float | None:
    """(forecast - measured) / measured of one figure; None where one of them is missing."""
    one, two = _figure(forecast, key), _figure(measured, key)
    return None if one is None or not two else one / two - 1


def line_of(forecast: Record | None, measured: Record) -> str:
    """One cell as a line of text."""
    parts = [f"{name} {_cell(forecast, measured, key)}" for name, key in FIGURES]
    result = _result(forecast, measured) + (f" ({measured['error']})" if measured.get("error") else "")
    return f"{measured['cell']['id']}: {'; '.join([result, *parts, _seconds(forecast, measured)])}"


def _figure(record: Record | None, key: str) -> int | None:
    if record is None or not record.get("gpu") or record.get("result", "ran") != "ran":
        return None
    value = record["gpu"].get(key)
    if value is None and key == "process_bytes":
        # Inside a container nvidia-smi shows no process: all that is used on the card, which this run had to itself.
        value = record["gpu"].get("device_used_bytes")
    return value


def _cell(forecast: Record | None, measured: Record, key: str) -> str:
    one, two, error = _figure(forecast, key), _figure(measured, key), error_of(forecast, measured, key)
    shown = [gib(size) if size is not None else "-" for size in (one, two)]
    return " / ".join([*shown, "-" if error is None else f"{error:+.1%}"])


def _result(forecast: Record | None, measured: Record) -> str:
    """What happened, and whether the verdict had said so."""
    result = str(measured["result"])
    fits = forecast.get("fits") if forecast else None
    if result == "out of memory":
        return f"{result} ({'forecast: does not fit' if fits is False else 'NOT forecast'})"
    return f"{result} (forecast: does not fit)" if fits is False and result == "ran" else result


def _seconds(forecast: Record | None, measured: Record) -> str:
    speed = (forecast or {}).get("speed") or {}
    shown = [speed.get("step_seconds"), measured.get("step_seconds")]
    return " / ".join("-" if value is None else f"{value:.3f}" for value in shown) + " s"
