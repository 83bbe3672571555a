"""The speed model against published training speeds: docs/measured/speed.md, generated, never typed.

    python tools/speed_docs.py            # fit, and write the table
    python tools/speed_docs.py --check    # compare instead

Rows: tests/golden/data/speed/rows.jsonl. Three numbers are fit over all rows that can be compared: the share of large
products' rate that a step's products reach, and the host's time for a kernel and for an engine's call. Each row is
judged by a fit that has seen no row of its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from memfit.catalog.gpus import find_gpu, parse_hardware  # noqa: E402
from memfit.catalog.links import pcie_rate, ring_rate  # noqa: E402
from memfit.catalog.matmul import achieved_flops  # noqa: E402
from memfit.physics.decoder import DecoderRun, DecoderShape, decoder_work  # noqa: E402
from memfit.physics.speed import (  # noqa: E402
    CALL_SECONDS,
    HOST_ADAM_BYTES,
    HOST_STEP_RATE,
    LAUNCH_SECONDS,
    PRODUCT_SHARE,
    Rates,
    StepTime,
    StepWork,
    adam_bytes,
    step_time,
)

ROWS = ROOT / "tests/golden/data/speed/rows.jsonl"
PAGE = ROOT / "docs/measured/speed.md"

# The models' own config.json, as remembered; parameters come out as the rows print them (a test checks it).
SHAPES = {
    "qwen-1.8B": DecoderShape(2048, 24, 5504, 151936, 2048),
    "qwen-7B": DecoderShape(4096, 32, 11008, 151936, 4096),
    "qwen-14B": DecoderShape(5120, 40, 13696, 152064, 5120),
    "qwenvl": DecoderShape(4096, 32, 11008, 151936, 4096),
    "torchtune-l31-8b": DecoderShape(4096, 32, 14336, 128256, 1024),
    "swift-docs-qwen25-14b": DecoderShape(5120, 48, 13824, 152064, 1024),
    "ds-bf16master": DecoderShape(4096, 32, 16384, 50304, 4096, gated=False),
}
# Qwen-VL's frozen ViT-bigG (48 layers, width 1664, feed-forward 8192) over the 32 x 32 patches of a 448 px picture.
VIT_FLOPS = 2 * 1024 * 48 * (4 * 1664**2 + 2 * 1664 * 8192) + 48 * 4 * 1024**2 * 1664
GPU_NAMES = {
    "A100-SXM4-80G": "A100-80G",
    "A800": "A100-80G",
    "RTX4090": "RTX4090",
    "A6000": "A6000",
    "H100": "H100-80G",
}
# A800: an A100 with 8 of its 12 NVLinks.
A800_LINKS = 8 / 12

# Rows of the development set that cannot be compared, and why.
LEFT_OUT = {
    r"qlora|int4": "GPTQ kernels unpack the weights at every use, which is not modelled",
    r"^litgpt": "the mean length is not stated (the longest sample is), so the work is unknown",
    r"^peft": "the mean length is not stated (the cap is), so the work is unknown",
    r"^swift-bench": "samples are shorter than the cap by an unknown amount: at the cap the card would have to exceed "
    "its data sheet",
    r"torchtune-l31-8b-full-4090": "a paged optimizer moves its states over PCIe, which is not modelled",
    r"torchtune.*a6000": "48 GFLOP a token (64 in full) at that speed are more than the card's data sheet has",
}


@dataclass(frozen=True)
class Published:
    """One row: what was measured, in seconds of an optimizer step, and what the model is asked."""

    id: str
    used: str
    gpu: str
    seconds: float
    work: StepWork
    rates: Rates
    source: str

    @property
    def group(self) -> str:
        """The repository that published it."""
        return self.source.partition(":")[0]


@dataclass(frozen=True)
class Judged:
    """A row and the model's answer: seconds, and its error as predicted / measured - 1."""

    row: Published
    time: StepTime

    @property
    def error(self) -> float:
        return float(self.time.seconds) / self.row.seconds - 1


def read_rows() -> tuple[list[Published], list[tuple[str, str]]]:
    """Rows that can be compared, and (id, reason) of those that cannot."""
    rows, out = [], []
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reason = next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, row["id"])), None)
        if reason is None:
            rows.append(_published(row))
        else:
            out.append((row["id"], reason))
    return rows, out


def _published(row: Mapping[str, Any]) -> Published:
    name = next(key for key in sorted(SHAPES, key=len, reverse=True) if row["id"].startswith(key))
    shape, ranks = SHAPES[name], int(row["gpus"])
    gpu = next(value for key, value in GPU_NAMES.items() if row["gpu_type"].startswith(key))
    # Qwen's table: accumulation 8 (its README); swift's benchmark scripts: 2; the others: one micro-batch.
    micro = 8 if row["id"].startswith("qwen") else 2 if row["id"].startswith("swift") else 1
    tokens = micro * row["micro_batch"] * row["seq_len"]
    speed = re.match(r"[\d.]+", row["throughput"])
    assert speed is not None
    seconds = tokens / float(speed[0]) if "tok/s" in row["throughput"] else float(speed[0])
    rates = _rates(gpu, ranks, "A800" in row["gpu_type"])
    return Published(row["id"], row["used"], gpu, seconds, _work(row, shape, micro, ranks), rates, row["source"])


def _rates(gpu: str, ranks: int, a800: bool) -> Rates:
    hardware = parse_hardware(f"{ranks}x{gpu}")
    row, ring = find_gpu(gpu), ring_rate(hardware)
    products = achieved_flops(row, "bf16")
    assert row.speed is not None
    assert row.link is not None
    assert ring is not None
    assert products is not None
    rate = ring.rate * (A800_LINKS if a800 else 1.0)
    return Rates(products.flops, row.speed.bandwidth, rate, pcie_rate(row.link))


def _work(row: Mapping[str, Any], shape: DecoderShape, micro: int, ranks: int) -> StepWork:
    """The step of one rank. LoRA in these rows: all matrices of a layer; `emb` trains embedding and head, too."""
    lora = row["method"] == "lora"
    trains_head = "emb" in row["id"] or "lorabase" in row["id"]
    layers = shape.layers * shape.layer_parameters
    learning = (shape.head_parameters if trains_head else 0) if lora else layers + shape.head_parameters
    stepped = 2 * shape.head_parameters * trains_head if lora else shape.parameters
    rank = int(row["lora_rank"] or 0) if lora else 0
    # Qwen's script for training in full, finetune_ds.sh, runs ZeRO-3 also on one GPU.
    parallel = "zero3" if "fullparameter" in row["id"] else str(row["parallel"])
    widths = 4 * shape.hidden + 2 * shape.hidden + 3 * (shape.hidden + shape.feed_forward)
    run = DecoderRun(
        tokens=row["seq_len"],
        rows=row["micro_batch"],
        learning=learning,
        checkpointing=bool(row["gradient_checkpointing"]),
        attention="full" if "Multihead" in row["attention"] else "flash",
        fused=row["id"].startswith("torchtune"),  # torch.compile, by its README
        adapters=5 if lora else 0,
        adapter_parameters=rank * widths * shape.layers,
        by_module=parallel == "zero3",
    )
    work = decoder_work(shape, run)
    if row["id"].startswith("qwenvl"):
        work = dataclasses.replace(work, flops=work.flops + VIT_FLOPS)
    return _with_engine(work, parallel, shape, (micro, ranks, stepped))


def _with_engine(work: StepWork, parallel: str, shape: DecoderShape, counts: tuple[int, int, int]) -> StepWork:
    """Collectives and the optimizer: ZeRO steps fp32 copies of 16-bit weights; alone, 16-bit weights are stepped."""
    micro, ranks, stepped = counts
    whole = 2.0 * shape.parameters
    width = 4 if parallel.startswith("zero") else 2
    work = dataclasses.replace(
        work, micro_batches=micro, ranks=ranks, optimizer_bytes=adam_bytes(width, width, width) * stepped / ranks
    )
    if parallel == "zero3":  # gathered for forward and for backward, gradients split as they come; overlap_comm is on
        return dataclasses.replace(work, gathered_bytes=2 * whole, scattered_bytes=whole, hidden_links=1.0)
    if parallel == "zero2":
        return dataclasses.replace(work, scattered_bytes=whole, step_gathered_bytes=whole, hidden_links=1.0)
    return work


# ---- the fit -------------------------------------------------------------------------------------------------------

# Values tried, in turn, from the first guess on until nothing gets better.
GRIDS: dict[str, tuple[float, ...]] = {
    "product_share": tuple(round(0.40 + 0.01 * step, 2) for step in range(61)),
    "launch_seconds": tuple(round(1e-6 * step, 6) for step in range(2, 61)),
    "call_seconds": tuple(round(5e-5 * step, 5) for step in range(1, 41)),
}
Fit = dict[str, float]


def judge(rows: Sequence[Published], fitted: Fit) -> list[Judged]:
    """The model's answer to every row."""
    return [Judged(row, step_time(row.work, dataclasses.replace(row.rates, **fitted))) for row in rows]


def loss(rows: Sequence[Published], fitted: Fit) -> float:
    """The sum over sources of the mean absolute logarithm of predicted / measured: no table outweighs another."""
    by_source: dict[str, list[float]] = {}
    for one in judge(rows, fitted):
        by_source.setdefault(one.row.group, []).append(abs(math.log1p(one.error)))
    return sum(sum(errors) / len(errors) for errors in by_source.values())


def fit(rows: Sequence[Published]) -> Fit:
    """The three numbers with the least loss, found one after the other on a grid."""
    best: Fit = {"product_share": 0.7, "launch_seconds": 10e-6, "call_seconds": 5e-4}
    least = loss(rows, best)
    while True:
        before = least
        for name, grid in GRIDS.items():
            for value in grid:
                found = loss(rows, {**best, name: value})
                if found < least - 1e-12:
                    best, least = {**best, name: value}, found
        if least == before:
            return best


def left_source_out(rows: Sequence[Published]) -> list[Judged]:
    """Each row by the fit over the rows of all other sources."""
    fits = {group: fit([row for row in rows if row.group != group]) for group in {row.group for row in rows}}
    return [judge([row], fits[row.group])[0] for row in rows]


# ---- offload: one published run, of which nothing is fit -----------------------------------------------------------


@dataclass(frozen=True)
class HostRow:
    """A step whose optimizer runs on the host. `seconds` as published."""

    what: str
    seconds: float
    predicted: StepTime
    source: str


def host_row() -> HostRow:
    """Qwen2.5-3B in full on 2 A100-40G, ZeRO-Offload, 128 cores bound to ranks; its length is not stated: 0 products.

    So the figure is the part that offload adds, which must not be above the whole step.
    """
    row, ring, parameters = find_gpu("A100-40G"), ring_rate(parse_hardware("2xA100-40G")), 3.09e9
    assert row.speed is not None
    assert row.link is not None
    assert ring is not None
    work = StepWork(
        flops=0.0,
        ranks=2,
        step_gathered_bytes=2 * parameters,
        step_scattered_bytes=2 * parameters,
        step_down_bytes=2 * parameters / 2,
        step_up_bytes=2 * parameters / 2,
        host_optimizer_bytes=HOST_ADAM_BYTES * parameters,
    )
    rates = Rates(1.0, row.speed.bandwidth, ring.rate, pcie_rate(row.link), HOST_STEP_RATE["server"])
    return HostRow(
        "Qwen2.5-3B, 2 x A100-40G, ZeRO-Offload", 2.38316, step_time(work, rates), "microsoft/DeepSpeed#7474"
    )


# ---- the page ------------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/measured/speed.md."""
    rows, out = read_rows()
    fitted, judged, host = fit(rows), left_source_out(rows), host_row()
    spent, on_host = float(host.predicted.seconds), float(host.predicted.parts["host optimizer"])
    text = f"""# Speed: forecast against published runs

Written by `python tools/speed_docs.py`. Work is counted by formula (`memfit/physics/decoder.py`), because these models
ran under other code than memfit's; rates of GPUs and links come from the catalogue. Three numbers are fit over the rows
below, each source counting once: products reach **{fitted["product_share"]:.2f}** of the rate of large ones, a kernel
costs the host **{1e6 * fitted["launch_seconds"]:.0f} us**, a call of an engine that works module by module
**{1e3 * fitted["call_seconds"]:.2f} ms**.

In the table each row is judged by a fit that has seen no row of its source. Low and high: everything overlaps that may,
nothing does.

{_table(judged)}

{_summary(judged)}

## Offload

{host.what} ({host.source}): {host.seconds:.2f} s a step were measured.
Its length is not stated, so that only what offload adds is forecast: {spent:.2f} s, of which {on_host:.2f} s are the
optimizer on the host. The rest of the step is unexplained here.

## Rows that state a speed and cannot be compared

"""
    return text + "".join(f"- `{name}`: {why}.\n" for name, why in out)


def _table(judged: Sequence[Judged]) -> str:
    lines = [
        "| row | GPUs | measured s | forecast s | low | high | error | bound by |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for one in judged:
        time, row = one.time, one.row
        cells = (
            row.id,
            f"{int(row.work.ranks)}x{row.gpu}",
            *(f"{float(value):.2f}" for value in (row.seconds, time.seconds, time.low, time.high)),
            f"{one.error:+.0%}",
            time.bound,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(judged: Sequence[Judged]) -> str:
    errors = [abs(one.error) for one in judged]
    return (
        f"{len(judged)} rows: median error {median(errors):.0%}, largest {max(errors):.0%}, "
        f"{sum(error <= 0.25 for error in errors)} within 25%."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or with --check say whether it is the one that would be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    text = page()
    if options.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("docs/measured/speed.md is up to date" if same else "run python tools/speed_docs.py")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}; in the code: {PRODUCT_SHARE}, {LAUNCH_SECONDS}, {CALL_SECONDS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
