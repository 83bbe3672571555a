"""GPUs: one row each. A name carries no spaces, any case, and the memory where a chip is sold with several.

`capacity_bytes` is the total that torch.cuda.mem_get_info reports. CUDA's out-of-memory messages print exactly that
number ("GPU 0 has a total capacity of 23.64 GiB"), which is where most rows have it from; `total_memory=24259MB` of
torch.cuda.get_device_properties is the same number in MiB. It moves by up to 0.2 GiB with the driver's branch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz import fuzz, process

from memfit.errors import UserError
from memfit.specs.hardware import GpuRow, Hardware
from memfit.units import GIB, MIB, parse_bytes

# Share of the nominal size that is left where nobody has published the figure; rows that use it say "nominal".
NOMINAL_SHARE = 0.965


def _cited(gib: float) -> int:
    return int(gib * GIB)


def _nominal(gib: int) -> int:
    return int(NOMINAL_SHARE * gib * GIB)


GPUS: tuple[GpuRow, ...] = (
    GpuRow(
        name="RTX3090",
        chip="RTX3090",
        nominal_gib=24,
        capacity_bytes=_cited(23.69),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="total_memory=24259MB (23.69 GiB) in public logs of torch.cuda.get_device_properties; "
        "23.70 GiB in Lightning-AI/lit-llama#137",
    ),
    GpuRow(
        name="RTX4090",
        chip="RTX4090",
        nominal_gib=24,
        capacity_bytes=_cited(23.64),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="23.64 GiB in ali-vilab/VGen#104 and deepseek-ai/DeepSeek-V3#205; "
        "23.52 GiB with a newer driver in Soul-AILab/SoulX-FlashTalk#5",
    ),
    GpuRow(
        name="RTX4080",
        chip="RTX4080",
        nominal_gib=16,
        capacity_bytes=16049 * MIB,
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="total_memory=16049MB of torch.cuda.get_device_properties, in brainglobe's documentation "
        "'Speeding up cellfinder'",
    ),
    GpuRow(
        name="RTX5090",
        chip="RTX5090",
        nominal_gib=32,
        capacity_bytes=_cited(31.37),
        compute_capability="12.0",
        has_bf16=True,
        verified="cited",
        source="31.37 GiB in Wan-Video/Wan2.1#465",
    ),
    GpuRow(
        name="A10",
        chip="A10",
        nominal_gib=24,
        capacity_bytes=_cited(21.99),
        compute_capability="8.6",
        has_bf16=True,
        verified="cited",
        source="21.99 GiB in zai-org/CogVLM#236; with ECC on the driver itself shows 23028 MiB "
        "(modal-labs/modal-client#2797)",
    ),
    GpuRow(
        name="T4",
        chip="T4",
        nominal_gib=16,
        capacity_bytes=_cited(14.56),
        compute_capability="7.5",
        has_bf16=False,
        verified="cited",
        source="14.56 GiB in Zheng-Chong/CatVTON#133 and AlphaGPU/leetgpu-challenges#52; "
        "14.58 GiB with driver 535 in mbzuai-oryx/GeoPixel#5",
    ),
    GpuRow(
        name="V100-32G",
        chip="V100",
        nominal_gib=32,
        capacity_bytes=_cited(31.74),
        compute_capability="7.0",
        has_bf16=False,
        verified="cited",
        source="31.74 GiB in haotian-liu/LLaVA#812 and liucongg/ChatGLM-Finetuning#73",
    ),
    GpuRow(
        name="L40S",
        chip="L40S",
        nominal_gib=48,
        capacity_bytes=_cited(44.42),
        compute_capability="8.9",
        has_bf16=True,
        verified="cited",
        source="44.42 GiB in stepfun-ai/Step-Video-T2V#8; 44.53 GiB in Wan-Video/Wan2.1#205",
    ),
    GpuRow(
        name="A100-40G",
        chip="A100",
        nominal_gib=40,
        capacity_bytes=_cited(39.50),
        compute_capability="8.0",
        has_bf16=True,
        verified="cited",
        source="39.50 GiB in TianheWu/CoSeR#10; 39.59 GiB with an older driver in raoyongming/DenseCLIP#52",
    ),
    GpuRow(
        name="A100-80G",
        chip="A100",
        nominal_gib=80,
        capacity_bytes=_cited(79.25),
        compute_capability="8.0",
        has_bf16=True,
        verified="cited",
        source="79.25 GiB in wbfwonderful/Vad-R1#11 and HiDream-ai/VAREdit#6; 79.14 GiB in lianqi1008/Control-GIC#6",
    ),
    GpuRow(
        name="H100-80G",
        chip="H100",
        nominal_gib=80,
        capacity_bytes=_cited(79.11),
        compute_capability="9.0",
        has_bf16=True,
        verified="cited",
        source="79.11 GiB with driver 535 in vllm-project/vllm#27508",
    ),
    GpuRow(
        name="H100-94G",
        chip="H100",
        nominal_gib=94,
        capacity_bytes=_cited(93.00),
        compute_capability="9.0",
        has_bf16=True,
        verified="cited",
        source="93.00 GiB on an H100 NVL in ali-vilab/VACE#56",
    ),
    GpuRow(
        name="H100-96G",
        chip="H100",
        nominal_gib=96,
        capacity_bytes=_nominal(96),
        compute_capability="9.0",
        has_bf16=True,
        verified="nominal",
        source="0.965 of the nominal 96 GiB: no published figure found",
    ),
)

# Another spelling -> the row it means. A bare H100 means the common one; A100 is sold as often with 40 as with 80.
ALIASES: dict[str, str] = {"H100": "H100-80G", "H100NVL": "H100-94G", "A10G": "A10"}

_SPELLED = re.compile(r"^(?:(\d+)\s*[xX×*]\s*)?(?:(\d+)\s*[xX×*]\s*)?([A-Za-z][A-Za-z0-9_. +-]*|\d{4}\S*)$")


def find_gpu(name: str) -> GpuRow:
    """The row of a GPU's name. UserError with the nearest rows, or with both sizes where the name leaves it open."""
    wanted = _plain(name)
    rows = {_plain(row.name): row for row in GPUS}
    aliases = {_plain(alias): target for alias, target in ALIASES.items()}
    if wanted in aliases:
        wanted = _plain(aliases[wanted])
    if wanted in rows:
        return rows[wanted]
    sizes = [row.name for row in GPUS if _plain(row.chip) == wanted]
    if sizes:
        raise UserError(f"{name} is sold with several sizes of memory: say which", f"write {_list(sizes, 'or')}")
    raise UserError(f"unknown GPU {name!r}", f"did you mean {_list(_nearest(wanted), 'or')}? All: {_list(gpu_names())}")


def gpu_names() -> list[str]:
    """The names of all rows, in the table's order."""
    return [row.name for row in GPUS]


def parse_hardware(text: str, host_memory: str | int | None = None, nvme: str | int | None = None) -> Hardware:
    """Hardware as a person writes it: `RTX3090` (one), `2xRTX3090`, `2x8xA100-40G` (nodes x GPUs), `2xcpu` (ranks).

    `host_memory` and `nvme` are sizes of one node. Raises UserError that names the wrong piece.
    """
    match = _SPELLED.match(text.strip())
    if match is None:
        raise UserError(
            f"cannot read {text!r} as hardware", "write for example 2xRTX3090, 2x8xA100-40G (nodes x GPUs) or 2xcpu"
        )
    first, second, name = match.groups()
    nodes, count = (int(first), int(second)) if second else (1, int(first or 1))
    if nodes < 1 or count < 1:
        raise UserError(f"{text}: a count of 0 runs nothing", f"write 1x{name} or more")
    return Hardware(
        gpu=None if name.strip().lower() == "cpu" else find_gpu(name),
        gpus_per_node=count,
        nodes=nodes,
        host_memory_bytes=_size(host_memory, "host_memory"),
        nvme_bytes=_size(nvme, "nvme"),
    )


def _size(text: str | int | None, key: str) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UserError(f"{key}: {error}", f"write for example {key.replace('_', '-')} 128GiB") from None


def _plain(name: str) -> str:
    """A name without maker, spaces and punctuation, in capitals; `80GB` and `80GiB` read as `80G`."""
    bare = re.sub(r"[\s_.+-]|NVIDIA|GEFORCE|TESLA", "", name.upper())
    return re.sub(r"(\d)GI?B$", r"\1G", bare)


def _nearest(wanted: str) -> list[str]:
    names = {_plain(row.name): row.name for row in GPUS}
    found = process.extract(wanted, list(names), scorer=fuzz.WRatio, limit=3)
    return [names[plain] for plain, _, _ in found]


def _list(names: Sequence[str], word: str = "") -> str:
    if len(names) == 1 or not word:
        return ", ".join(names)
    return f"{', '.join(names[:-1])} {word} {names[-1]}"
