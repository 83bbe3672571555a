"""How fast large matrix products ran in torch on real cards: public measurements, one row a kind of GPU.

A data sheet's figure holds at the boost clock; a card under load runs lower (data centre) or higher (GeForce).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import median

from memfit.catalog.gpu_rows import GPUS
from memfit.specs.hardware import GpuRow

SOURCE = "zzc0721/torch-performance-test-data:database.md@078586871da3, issues #79 and #95 there"


@dataclass(frozen=True)
class MatmulRow:
    """The best of several sizes of square products, in TFLOP/s; None where it was not run. Medians of `runs` people."""

    gpu: str
    fp32: float | None
    fp16: float | None
    bf16: float | None
    runs: int
    source: str = SOURCE


MATMUL: tuple[MatmulRow, ...] = (
    MatmulRow("RTX3090", 24.79, 75.64, 76.58, 3),
    MatmulRow("RTX4060Ti-16G", 11.50, None, 42.65, 1),
    MatmulRow("RTX4090", 54.67, 165.08, 163.09, 4),
    MatmulRow("RTX5090", 68.4, 231.0, 239.1, 2),
    MatmulRow("T4", 4.30, 42.31, None, 2),
    MatmulRow("P40", 10.07, 10.02, None, 1),
    MatmulRow("A6000", 23.92, 120.49, 123.34, 1),
    MatmulRow("L40S", 46.88, 264.02, 269.15, 1),
    MatmulRow("A100-40G", 18.11, 247.63, 246.33, 1),
    MatmulRow("A100-80G", 19.18, 258.74, 264.53, 1),
    MatmulRow("H100-80G", 52.00, 760.04, 789.24, 3),
    MatmulRow("H100-PCIe", 36.95, 458.03, 495.93, 1),
    MatmulRow("H200", 51.34, 759.40, 790.29, 1),
    MatmulRow("B200", 66.24, 1627.64, 1696.03, 1),
)


@dataclass(frozen=True)
class Achieved:
    """FLOP/s of large products. `verified` is "measured" on that kind of card, or "similar": by its class's share."""

    flops: float
    verified: str
    source: str


def achieved_flops(row: GpuRow, precision: str) -> Achieved | None:
    """What large products in "fp32", "tf32", "fp16" or "bf16" reach on this GPU; None where nothing is known.

    A card that nobody has measured takes the median share of its data sheet's figure over measured cards of its class.
    """
    if row.speed is None or row.speed.flops(precision) is None:
        return None
    peak = row.speed.flops(precision) or 0.0
    for found in MATMUL:
        value = _value(found, precision)
        if found.gpu == row.name and value is not None:
            return Achieved(value * 1e12, "measured", found.source)
    # Products in tf32 were not measured on enough cards: they run on the units of the 16-bit ones.
    shares = _shares(_is_geforce(row.name), "fp16" if precision == "tf32" else precision)
    share = median(shares)
    kind = "GeForce" if _is_geforce(row.name) else "other"
    return Achieved(peak * share, "similar", f"{share:.2f} of the data sheet, the median of {len(shares)} {kind} cards")


def _value(row: MatmulRow, precision: str) -> float | None:
    return {"fp32": row.fp32, "fp16": row.fp16, "bf16": row.bf16}.get(precision)


def _is_geforce(name: str) -> bool:
    return name.startswith("RTX") and not name.startswith("RTX6000")


@functools.cache
def _shares(geforce: bool, precision: str) -> tuple[float, ...]:
    """What was reached of the data sheet's figure, over the measured cards of a class."""
    rows = {row.name: row for row in GPUS}
    shares = []
    for found in MATMUL:
        speed, value = rows[found.gpu].speed, _value(found, precision)
        peak = speed.flops(precision) if speed else None
        if value is not None and peak is not None and _is_geforce(found.gpu) == geforce:
            shares.append(value * 1e12 / peak)
    return tuple(shares)
