"""What memfit knows by name, as tables for people: GPUs and models."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.catalog.models import ModelRow
from memfit.monitor.report_text import table_text
from memfit.monitor.tables import Cell, Table
from memfit.specs.hardware import GpuRow
from memfit.units import count_text, gib


def gpus_text(rows: Sequence[GpuRow]) -> str:
    """The rows of `memfit gpus`."""
    heads = ("name", "usable", "nominal", "compute", "bf16", "figure")
    texts = [
        (
            row.name,
            gib(row.capacity_bytes),
            f"{row.nominal_gib} GiB",
            row.compute_capability,
            "yes" if row.has_bf16 else "no",
            row.verified,
        )
        for row in rows
    ]
    table = Table("GPUs that --gpus knows", heads, tuple(tuple(map(Cell, row)) for row in texts))
    return f"{table_text(table)}\n\n--json names the source of every figure"


def models_text(rows: Sequence[ModelRow]) -> str:
    """The rows of `memfit models`."""
    heads = ("name", "hub id", "parameters", "family", "facts")
    texts = [(row.name, row.hub_id, count_text(row.parameters), row.family, row.verified) for row in rows]
    table = Table("Models that --model knows by name", heads, tuple(tuple(map(Cell, row)) for row in texts))
    return (
        f"{table_text(table)}\n\nany other model: a hub id, a local folder, or a config.json; "
        "--json names the source of every row"
    )
