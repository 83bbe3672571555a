"""Write docs/openbmb-table.md: OpenBMB's published memory table rebuilt from its own settings; `--check` compares.

The forecasts are kept in docs/measured/openbmb_table.json, which `--forecast` writes (some minutes); the page is drawn
from that record.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from memfit.units import GIB

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "openbmb-table.md"
RECORD = ROOT / "docs" / "measured" / "openbmb_table.json"

MODEL = "minicpm-llama3-v-2.5"
GPUS = (2, 4, 8)
METHODS = ("lora", "full")
# OpenBMB/MiniCPM-V finetune/readme.md, June 2024, GiB a GPU: ZeRO-3, optimizer and parameters on the CPU,
# checkpointing, 2,048 tokens, batch 1, A100-80G. What was measured (allocated, reserved, nvidia-smi) is not said.
PUBLISHED = {"lora": (14.4, 13.6, 13.1), "full": (16.0, 15.8, 15.63)}
# The same file a month earlier (at 0dac2385): ZeRO-2 without offload; None is "out of memory".
EARLIER = {"lora": (31.2, 29.3, 28.4), "full": (None, 75.0, 51.2)}
# Parameters that today's LoRA script copies whole: 128,256 x 4096, and the parts as memfit counts them.
SAVED = {"embeddings": 128_256 * 4096, "resampler": 89_038_848, "tower": 417_792_240}

COMMON = ("levers.checkpointing=full", "workload.tokens=2048")
ONE, TEN = "workload.image_size=448x448", "workload.image_size=1344x1344"
# finetune_ds.sh (at 1eb9ba3) and finetune_lora.sh (at 091236a): everything trained in bf16; adapters in fp16.
OWN = {
    "full": ("method=full", "levers.precision=bf16-mixed"),
    "lora": (
        *("method=lora", "levers.precision=fp16-mixed", "lora.rank=64"),
        "lora.targets=[q_proj, k_proj, v_proj, o_proj]",
    ),
}
# What the script of June 2024 trains in place beside the adapters (its read-me loads vpm_resampler_embedtokens.pt). A
# recipe has no word for the embeddings in place: a copy of them stands in, 0.98 GiB of 16-bit weights too much.
IN_PLACE = ("parts.vision=full", "parts.connector=full", "lora.modules_to_save=[embed_tokens]")
# What it trains today: whole copies of all three (finetune.py: modules_to_save, with tune_vision true).
COPIES = ("lora.modules_to_save=[embed_tokens, resampler, vpm]",)
# ds_config_zero3.json (at f6cbd4f) and ds_config_zero2.json (at 764f50b), without what they say of offload.
ZERO3 = (
    *("levers.parallel=zero3", "engine.zero.overlap_comm=true", "engine.zero.reduce_bucket_size=auto"),
    *("engine.zero.stage3_prefetch_bucket_size=auto", "engine.zero.stage3_param_persistence_threshold=auto"),
    *("engine.zero.sub_group_size=1e9", "engine.zero.stage3_max_live_parameters=1e9"),
    "engine.zero.stage3_max_reuse_distance=1e9",
)
ZERO2 = ("levers.parallel=zero2", "engine.zero.overlap_comm=true", "engine.zero.reduce_bucket_size=2e8")
ON_THE_CPU, ON_THE_GPU = "levers.offload=params+optimizer", "levers.offload=none"
BATCH = {1: "levers.micro_batch=1", 2: "levers.micro_batch=2"}

# Step of the ladder -> (what differs from the step before, settings by method; None: the step is not of that method).
# `eager`: the tower's attention as the original writes it out.
START = "as published: ZeRO-3, everything on the CPU, a picture of 448 x 448 px (one crop)"
EAGER = "the tower's attention written out, as in the original's code"
LADDER: dict[str, dict[str, tuple[str, ...] | None]] = {
    START: {
        "lora": (*ZERO3, ON_THE_CPU, ONE, BATCH[1], *IN_PLACE),
        "full": (*ZERO3, ON_THE_CPU, ONE, BATCH[1]),
    },
    "a picture of 1344 x 1344 px (ten crops)": {
        "lora": (*ZERO3, ON_THE_CPU, TEN, BATCH[1], *IN_PLACE),
        "full": (*ZERO3, ON_THE_CPU, TEN, BATCH[1]),
    },
    EAGER: {
        "lora": (*ZERO3, ON_THE_CPU, TEN, BATCH[1], *IN_PLACE),
        "full": (*ZERO3, ON_THE_CPU, TEN, BATCH[1]),
    },
    "offload off, as `ds_config_zero3.json` ships": {
        "lora": (*ZERO3, ON_THE_GPU, TEN, BATCH[1], *IN_PLACE),
        "full": (*ZERO3, ON_THE_GPU, TEN, BATCH[1]),
    },
    "whole copies of embeddings, resampler and tower (`modules_to_save`)": {
        "lora": (*ZERO3, ON_THE_GPU, TEN, BATCH[1], *COPIES),
        "full": None,
    },
    "`ds_config_zero2.json`, which both scripts name": {
        "lora": (*ZERO2, ON_THE_GPU, TEN, BATCH[1], *COPIES),
        "full": (*ZERO2, ON_THE_GPU, TEN, BATCH[1]),
    },
    "two samples a GPU, as both scripts ship": {
        "lora": (*ZERO2, ON_THE_GPU, TEN, BATCH[2], *COPIES),
        "full": (*ZERO2, ON_THE_GPU, TEN, BATCH[2]),
    },
}
FROM_EAGER = list(LADDER).index(EAGER)  # later steps keep it
# May 2024: adapters on q, k, v, o and the embeddings in place; the tower was frozen by PEFT (finetune.py at 22d1a6d).
MAY = "May 2024"
# Beside the ladder: what the copies cost against adapters alone, in the step where the ZeRO-2 file comes in.
ALONE, WITH_COPIES = "adapters alone, ZeRO-2", list(LADDER)[5]
ALONE_SETS = (*ZERO2, ON_THE_GPU, TEN, BATCH[1])
MAY_SETS = {
    "lora": (*ZERO2, ON_THE_GPU, TEN, BATCH[1], "lora.modules_to_save=[embed_tokens]"),
    "full": (*ZERO2, ON_THE_GPU, TEN, BATCH[1]),
}
GROUP_NAMES = {"engine": "engine's buffers", "context": "CUDA context, NCCL", "allocator": "allocator's rest"}


def eager_vision_bytes(crops: int, patches: int = 1024, heads: int = 16) -> int:
    """What attention written out takes in one vision layer that SDPA does not, by hand: scores and their softmax.

    Bytes a score: 2 + 4 + 2 kept while the layer is computed again in backward (scores, softmax in fp32, its cast), 4
    + 2 for their gradients. The layer is one of 27 under checkpointing, so it counts once.
    Source: modeling_navit_siglip.py: SiglipAttention.forward.
    """
    return crops * heads * patches * patches * (2 + 4 + 2 + 4 + 2)


def wanted() -> list[tuple[str, str, bool, tuple[str, ...]]]:
    """(method, step, tower written out, settings) of every row but the number of GPUs."""
    rows = [
        (method, step, index >= FROM_EAGER, sets[method] or ())
        for method in METHODS
        for index, (step, sets) in enumerate(LADDER.items())
        if sets[method] is not None
    ]
    return [*rows, *((method, MAY, True, MAY_SETS[method]) for method in METHODS), ("lora", ALONE, True, ALONE_SETS)]


def forecasts() -> dict[str, Any]:
    """Process, reserved and allocated bytes by method, step and number of GPUs, and what lives at the peak."""
    from memfit import api
    from memfit.planner.forecast_json import forecast_json
    from memfit.planner.groups import group_sums
    from memfit.trace import model as traced

    record: dict[str, Any] = {"model": MODEL, "rows": []}
    plain = traced.attention_name
    # A recipe speaks of all attention at once. Two caches: their keys do not hold which parts are written out.
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for method, step, eager, sets in wanted():
            os.environ["MEMFIT_CACHE"] = one if eager else other
            names: Any = {"": "sdpa", "vision_config": "eager"}
            traced.attention_name = (lambda recipe, names=names: names) if eager else plain
            for gpus in GPUS:
                settings = (*COMMON, *OWN[method], *sets, f"hardware.gpus={gpus}xA100-80G")
                forecast = api.estimate(model=MODEL, sets=settings)
                value = forecast_json(forecast)
                gpu = value["gpu"]
                alive = [t for t in forecast.ledger.terms if t.place in ("gpu", "allocator", "context", "comm")]
                sums = group_sums(term for term in alive if gpu["peak_phase"] in term.alive)
                record["rows"].append(
                    {
                        "method": method,
                        "step": step,
                        "gpus": gpus,
                        "eager_tower": eager,
                        "sets": list(settings),
                        "process": gpu["process_bytes"],
                        "reserved": gpu["peak_reserved_bytes"],
                        "allocated": gpu["peak_allocated_bytes"],
                        "peak_phase": gpu["peak_phase"],
                        "tower_for_a_moment": _largest_in_tower(forecast),
                        "at_the_peak": {name: size for name, size in sums.items() if size},
                        "trained": sum(part["trainable"] for part in value["parameters"].values()),
                        "missing": value["missing"],
                    }
                )
                print(method, step, gpus, gpu["process_bytes"], flush=True)
    traced.attention_name = plain
    return record


def _largest_in_tower(forecast: Any) -> int:
    """The most bytes that are neither kept for backward nor gradients while a block of the tower runs."""
    return max(peak.transient for peak in forecast.trace.parts if peak.part == "vision")


TEMPLATE = """\
# OpenBMB's memory table, rebuilt

Written by `tools/openbmb_docs.py`; the figures are forecasts of memfit's own implementation of the model, GiB a GPU,
none of them measured. Published: `finetune/readme.md` of OpenBMB/MiniCPM-V, June 2024, for MiniCPM-Llama3-V 2.5 on
A100-80G with ZeRO-3, optimizer and parameters on the CPU, checkpointing, 2,048 tokens, batch 1. It does not say which
pictures were shown, nor whether allocated, reserved or process memory was read; it was not measured again for later
models. Public copies of later read-me files repeat the figures and say "ZeRO-3" without the words on the CPU.

## The table's own settings

{table}

The engine's values are those of `ds_config_zero3.json`; adapters are on q, k, v and o, and the tower, the resampler and
the embeddings learn beside them, as in the script of that month. `unexplained` is what the forecast lacks of what was
published; it is not spread over other terms. Two things may be in it and are not in these rows: which pictures were
shown (ten crops instead of one: {ten_lora} GiB for LoRA, {ten_full} for full, on 2 GPUs), and that the original's tower
writes its attention out (then {eager_lora} and {eager_full}). With both, {left_lora} and {left_full} GiB are left on 2
GPUs, and have no source here: the part of the process that is no tensor (context, NCCL) rests on published figures
between 0.1 and 1.4 GiB each, and what the releases of 2024 held more was not measured. What of the published LoRA
figures shrinks with the number of GPUs is what {shared_low} to {shared_high} GiB shared by all of them would; the fp32
copy of the {trained:.2f} B trained parameters has {fp32} GiB. That it stayed on the GPUs is a guess, and not counted.

## The table before it: ZeRO-2 without offload, May 2024

{earlier}

Ten crops are assumed, and the tower's attention is the original's. The script of that month trained the embeddings in
place beside the adapters; a copy stands in for them (0.98 GiB too much). A card has 79.25 GiB.

## Why a user of today's scripts sees more

GiB a GPU, on 2, 4 and 8 GPUs. Each row changes one thing against the row above it. Bytes are the difference on 2 GPUs,
of the process and of the tensors at their peak; the process also has what the allocator's replay keeps cached, which
moves by some hundred MiB from one set of sizes to another.

{ladder}

- **Offload.** The table was measured with optimizer and parameters on the CPU. `ds_config_zero3.json` beside it ships
  with `"device": "none"` for both, and both scripts name the ZeRO-2 file, which splits no weights at all.
- **"LoRA" trains {saved:.2f} billion parameters.** `modules_to_save` keeps and trains whole copies of the embeddings
  ({embeddings:,.0f} M), the resampler ({resampler:,.0f} M) and, by default (`tune_vision true`), the vision tower
  ({tower:,.0f} M), beside the frozen originals; the adapters themselves are {adapters:,.0f} M. Under ZeRO-2 a copy
  takes 2 bytes a parameter on every GPU and 14 bytes shared by all (gradients, fp32 master weights, two moments):
  {copies} GiB on 2, 4 and 8 GPUs by hand. Adapters alone under the same file, one sample and ten crops,
  take {alone} GiB: the copies and what the tower then keeps for backward make {beside} more.
- **Pictures.** A picture of 1344 x 1344 px is ten crops of 1,024 patches; 448 x 448 px is one. In the language model
  both fit into the 2,048 tokens; the tower sees ten times as much.
- **Attention.** While one layer of the tower runs on ten crops, {tower_eager} GiB are alive for a moment with the
  scores written out, {tower_sdpa} with SDPA (traced); by hand, scores and softmax of a layer are {eager_ten} GiB (14
  bytes a score, crops x 16 heads x 1024 x 1024 scores; {eager_one} with one crop). That moment is not that of the
  logits (2,048 x 128,256 in fp32, several times), so that the tensors' peak may stay where it is. memfit's tower runs
  on SDPA.
- **Batch.** Both scripts ship with two samples a GPU; the table says one.

## Term by term, on 2 GPUs

What lives at the moment of the peak, GiB.

{terms}

To see every term of one row: `memfit estimate --model minicpm-llama3-v-2.5` with the settings in
`docs/measured/openbmb_table.json`.
"""


class Rows:
    """The record, by method, step and GPUs."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._rows = {(row["method"], row["step"], row["gpus"]): row for row in record["rows"]}

    def row(self, method: str, step: str, gpus: int) -> dict[str, Any]:
        return dict(self._rows[(method, step, gpus)])

    def size(self, method: str, step: str, gpus: int, figure: str = "process") -> int:
        return int(self._rows[(method, step, gpus)][figure])

    def steps(self, method: str) -> list[str]:
        """The ladder's steps of a method, in order."""
        return [step for step, sets in LADDER.items() if sets[method] is not None]

    def change(self, method: str, step: str, figure: str = "process") -> int:
        """Bytes that a step has more than the one before it, on 2 GPUs."""
        steps = self.steps(method)
        before = steps[steps.index(step) - 1]
        return self.size(method, step, 2, figure) - self.size(method, before, 2, figure)


def page(record: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows, ten = Rows(record), list(LADDER)[1]
    left = {
        method: PUBLISHED[method][0] * GIB - rows.size(method, EAGER, 2)  # with the pictures and the attention
        for method in METHODS
    }
    trained, total = rows.row("lora", START, 2)["trained"], sum(SAVED.values())
    two, four, eight = PUBLISHED["lora"]
    shared = (two - four) / (1 / 2 - 1 / 4), (four - eight) / (1 / 4 - 1 / 8)
    return TEMPLATE.format(
        table=_published(rows),
        earlier=_earlier(rows),
        ladder=_ladder(rows),
        terms=_terms(rows),
        ten_lora=_signed(rows.change("lora", ten)),
        ten_full=_signed(rows.change("full", ten)),
        eager_lora=_signed(rows.change("lora", EAGER)),
        eager_full=_signed(rows.change("full", EAGER)),
        left_lora=f"{left['lora'] / GIB:.1f}",
        left_full=f"{left['full'] / GIB:.1f}",
        eager_one=_gib(eager_vision_bytes(1)),
        eager_ten=_gib(eager_vision_bytes(10)),
        saved=total / 1e9,
        adapters=(trained - total) / 1e6,
        trained=trained / 1e9,
        fp32=_gib(4 * trained),
        shared_low=f"{min(shared):.1f}",
        shared_high=f"{max(shared):.1f}",
        tower_eager=_gib(rows.size("full", EAGER, 2, "tower_for_a_moment")),
        tower_sdpa=_gib(rows.size("full", ten, 2, "tower_for_a_moment")),
        alone=", ".join(_gib(rows.size("lora", ALONE, gpus)) for gpus in GPUS),
        beside=", ".join(_gib(rows.size("lora", WITH_COPIES, gpus) - rows.size("lora", ALONE, gpus)) for gpus in GPUS),
        copies=", ".join(_gib(round(total * (2 + 14 / gpus))) for gpus in GPUS),
        **{name: count / 1e6 for name, count in SAVED.items()},
    )


def _published(rows: Rows) -> str:
    lines = [
        "| method | GPUs | published | forecast, process | reserved | allocated | unexplained (published - process) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, published in PUBLISHED.items():
        for gpus, figure in zip(GPUS, published, strict=True):
            row = rows.row(method, START, gpus)
            cells = [_gib(row[key]) for key in ("process", "reserved", "allocated")]
            lines.append(
                f"| {method} | {gpus} | {figure} | {' | '.join(cells)} | {figure - row['process'] / GIB:+.1f} |"
            )
    return "\n".join(lines)


def _earlier(rows: Rows) -> str:
    lines = ["| method | GPUs | published | forecast, process | unexplained |", "|---|---|---|---|---|"]
    for method, figures in EARLIER.items():
        for gpus, told in zip(GPUS, figures, strict=True):
            size = rows.size(method, MAY, gpus)
            rest = "-" if told is None else f"{told - size / GIB:+.1f}"
            lines.append(f"| {method} | {gpus} | {told or 'out of memory'} | {_gib(size)} | {rest} |")
    return "\n".join(lines)


def _ladder(rows: Rows) -> str:
    heads = ("what differs", "LoRA, process", "bytes", "of tensors", "full, process", "bytes", "of tensors")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for step, sets in LADDER.items():
        cells = []
        for method in METHODS:
            if sets[method] is None:
                cells += ["-", "-", "-"]
                continue
            cells.append(", ".join(_gib(rows.size(method, step, gpus)) for gpus in GPUS))
            for figure in ("process", "allocated"):
                cells.append("" if step == START else f"{rows.change(method, step, figure):+,}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _terms(rows: Rows) -> str:
    steps = [(method, step) for method in METHODS for step in (START, *list(LADDER)[3:6]) if LADDER[step][method]]
    found = [rows.row(method, step, 2) for method, step in steps]
    names = list(dict.fromkeys(name for row in found for name in row["at_the_peak"]))
    short = {
        START: "as published",
        list(LADDER)[3]: "offload off",
        list(LADDER)[4]: "copies",
        list(LADDER)[5]: "ZeRO-2",
    }
    heads = ["", *(f"{method}, {short[step]}" for method, step in steps)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines.append(f"| at the peak of | {' | '.join(row['peak_phase'] for row in found)} |")
    for name in names:
        cells = [_gib(row["at_the_peak"][name]) if row["at_the_peak"].get(name) else "-" for row in found]
        lines.append(f"| {GROUP_NAMES.get(name, name)} | {' | '.join(cells)} |")
    lines.append(f"| process | {' | '.join(_gib(row['process']) for row in found)} |")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _signed(size: int) -> str:
    return f"{size / GIB:+.1f}"


def main(arguments: list[str]) -> int:
    if "--forecast" in arguments:
        RECORD.write_text(json.dumps(forecasts(), indent=1) + "\n", encoding="utf-8")
    text = page(json.loads(RECORD.read_text(encoding="utf-8")))
    if "--check" in arguments:
        same = PAGE.read_text(encoding="utf-8") == text
        print("docs/openbmb-table.md is as its record says" if same else "docs/openbmb-table.md is old: run this tool")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
