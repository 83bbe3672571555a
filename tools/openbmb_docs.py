"""Write docs/openbmb-table.md: OpenBMB's published memory table rebuilt from its own settings; `--check` compares.

The forecasts are kept in docs/measured/openbmb_table.json, which `--forecast` writes (some minutes); the page is drawn
from that record, and its hand-worked rows from the formulas below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from memfit.units import GIB

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "openbmb-table.md"
RECORD = ROOT / "docs" / "measured" / "openbmb_table.json"

MODEL = "minicpm-llama3-v-2.5"
GPUS = (2, 4, 8)
# OpenBMB/MiniCPM-V finetune/readme.md, June 2024, GiB a GPU: ZeRO-3, optimizer and parameters on the CPU,
# checkpointing, 2,048 tokens, batch 1, A100-80G. What was measured (allocated, reserved, nvidia-smi) is not said.
PUBLISHED = {"lora": (14.4, 13.6, 13.1), "full": (16.0, 15.8, 15.63)}
# Its script: rank 64 on the attention's q and k, and whole copies of three modules (SAVED).
# The same file a month earlier (at 0dac2385): ZeRO-2 without offload; None is "out of memory".
EARLIER = {"lora": (31.2, 29.3, 28.4), "full": (None, 75.0, 51.2)}
SETTINGS = {
    "lora": (
        "method=lora",
        "lora.rank=64",
        "lora.targets=[q_proj, k_proj]",
    ),
    "full": ("method=full",),
}
COMMON = ("levers.parallel=zero3", "levers.checkpointing=full", "levers.micro_batch=1", "workload.tokens=2048")
# Parameters of what the LoRA script copies whole: 128,256 x 4096, and the parts as memfit counts them.
SAVED = {"embeddings": 128_256 * 4096, "resampler": 89_038_848, "tower": 417_792_240}
ON_THE_CPU = "levers.offload=params+optimizer"
# One question each: what the same script takes when this differs from the table's run.
FIRST = "as published, one crop"
LAST = "ten crops, ZeRO-2 without offload, the LoRA script's default"
CHANGES: dict[str, tuple[str, ...]] = {
    FIRST: (ON_THE_CPU, "workload.image_size=448x448"),
    "ten crops (a picture of 1344 x 1344 px)": (ON_THE_CPU, "workload.image_size=1344x1344"),
    "ten crops, offload off, as the ZeRO-3 file ships": ("levers.offload=none", "workload.image_size=1344x1344"),
    LAST: (
        "levers.parallel=zero2",
        "levers.offload=none",
        "workload.image_size=1344x1344",
    ),
}


def eager_vision_bytes(crops: int, patches: int = 1024, heads: int = 16) -> int:
    """What attention written out takes in one vision layer that SDPA does not: scores and their softmax in fp32, the
    softmax cast back, and in backward as much again for the gradients of scores and softmax.

    Bytes a score: 2 + 4 + 2 kept while the layer is computed again, 4 + 2 for their gradients. The layer is one of 27
    under checkpointing, so it counts once. Source: modeling_navit_siglip.py: SiglipAttention.forward.
    """
    return crops * heads * patches * patches * (2 + 4 + 2 + 4 + 2)


def forecasts() -> dict[str, Any]:
    """process, reserved and allocated bytes by method, change and number of GPUs; trained parameters by method."""
    from memfit import api
    from memfit.planner.forecast_json import forecast_json

    record: dict[str, Any] = {"model": MODEL, "rows": []}
    for method, own in SETTINGS.items():
        for change, sets in CHANGES.items():
            for gpus in GPUS:
                wanted = (*COMMON, *own, *sets, f"hardware.gpus={gpus}xA100-80G")
                value = forecast_json(api.estimate(model=MODEL, sets=wanted))
                gpu = value["gpu"]
                record["rows"].append(
                    {
                        "method": method,
                        "change": change,
                        "gpus": gpus,
                        "sets": list(wanted),
                        "process": gpu["process_bytes"],
                        "reserved": gpu["peak_reserved_bytes"],
                        "allocated": gpu["peak_allocated_bytes"],
                        "trained": sum(part["trainable"] for part in value["parameters"].values()),
                        "missing": value["missing"],
                    }
                )
                print(method, change, gpus, value["gpu"]["process_bytes"], flush=True)
    return record


TEMPLATE = """\
# OpenBMB's memory table, rebuilt

Written by `tools/openbmb_docs.py`; the figures are forecasts of memfit's own implementation of the model, GiB a GPU,
none of them measured. Published: `finetune/readme.md` of OpenBMB/MiniCPM-V, June 2024, for MiniCPM-Llama3-V 2.5 on
A100-80G with ZeRO-3, optimizer and parameters on the CPU, checkpointing, 2,048 tokens, batch 1. It does not say which
pictures were shown, nor whether allocated, reserved or process memory was read; it was not measured again for later
models.

## The table's own settings

{table}

`unexplained` is what memfit's implementation does not take under these settings. Known to be in it, and not in a
forecast of memfit's own model: the original's attention in the vision tower is written out. For one layer that is
{eager_one} GiB with one crop and {eager_ten} GiB with ten (by hand: 14 bytes a score, crops x 16 heads x 1024 x 1024
scores). memfit's tower runs on SDPA and keeps no scores. The LoRA rows leave out the whole copies that the script
trains beside the adapters (below): with parameters and optimizer on the CPU their states are not on the GPU.

## The table before it: ZeRO-2 without offload, May 2024

{earlier}

Ten crops are assumed. The LoRA rows include a whole copy of the embeddings, which the script of that month trained
(by hand: 2 + 14 / GPUs bytes for each of its parameters). A card has 79.25 GiB.

## Why a user of today's scripts sees more

Process memory, GiB a GPU, on 2, 4 and 8 GPUs; each row says what it changes against the published settings.

{changes}

- **Offload.** The table was measured with optimizer and parameters on the CPU; `ds_config_zero3.json` beside it ships
  with offload off, and the LoRA script names the ZeRO-2 file.
- **"LoRA" trains {saved:.2f} billion parameters.** `modules_to_save` keeps and trains whole copies of the embeddings
  ({embeddings:,.0f} M), the resampler ({resampler:,.0f} M) and, by default (`tune_vision true`), the vision tower
  ({tower:,.0f} M), beside the frozen originals. Under ZeRO-2 a copy takes 2 bytes on every GPU and 14 bytes shared by
  all (gradients, fp32 master weights, two moments).
- **Pictures.** A picture of 1344 x 1344 px is ten crops of 1,024 patches; 448 x 448 px is one.
- **Attention.** See above: it grows with the number of crops, whatever the length of the text.

To see every term of one row: `memfit estimate --model minicpm-llama3-v-2.5` with the settings in
`docs/measured/openbmb_table.json`.
"""


def page(record: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows = {(row["method"], row["change"], row["gpus"]): row for row in record["rows"]}
    table = [
        "| method | GPUs | published | forecast, process | reserved | allocated | unexplained (published - process) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, published in PUBLISHED.items():
        for gpus, figure in zip(GPUS, published, strict=True):
            row = rows[(method, FIRST, gpus)]
            cells = [_gib(row[key]) for key in ("process", "reserved", "allocated")]
            rest = "-" if row["process"] is None else f"{figure - row['process'] / GIB:+.1f}"
            table.append(f"| {method} | {gpus} | {figure} | {' | '.join(cells)} | {rest} |")
    earlier = ["| method | GPUs | published | forecast, process | unexplained |", "|---|---|---|---|---|"]
    for method, figures in EARLIER.items():
        for gpus, told in zip(GPUS, figures, strict=True):
            size = rows[(method, LAST, gpus)]["process"]
            size += round(SAVED["embeddings"] * (2 + 14 / gpus)) if method == "lora" else 0
            rest = "-" if told is None else f"{told - size / GIB:+.1f}"
            earlier.append(f"| {method} | {gpus} | {told or 'out of memory'} | {_gib(size)} | {rest} |")
    changes = ["| what differs | LoRA | full |", "|---|---|---|"]
    for change in CHANGES:
        cells = [", ".join(_gib(rows[(m, change, g)]["process"]) for g in GPUS) for m in PUBLISHED]
        changes.append(f"| {change} | {' | '.join(cells)} |")
    total = sum(SAVED.values())
    copies = ", ".join(f"+{_gib(round(total * (2 + 14 / gpus)))}" for gpus in GPUS)
    changes.append(f"| the whole copies beside the adapters, under ZeRO-2 without offload (by hand) | {copies} | - |")
    ten = f"+{_gib(eager_vision_bytes(10))}"
    changes.append(f"| attention of the original's tower written out, ten crops (by hand) | {ten} | {ten} |")
    return TEMPLATE.format(
        table="\n".join(table),
        earlier="\n".join(earlier),
        changes="\n".join(changes),
        eager_one=_gib(eager_vision_bytes(1)),
        eager_ten=_gib(eager_vision_bytes(10)),
        saved=total / 1e9,
        **{name: count / 1e6 for name, count in SAVED.items()},
    )


def _gib(size: int | None) -> str:
    return "not forecast" if size is None else f"{size / GIB:.1f}"


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
