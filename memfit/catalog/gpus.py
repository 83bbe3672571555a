"""GPUs by name, and hardware as a person writes it. The rows themselves are in `memfit.catalog.gpu_rows`.

A name carries no spaces, any case, and the memory where a chip is sold with several.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz import fuzz, process

from memfit.catalog.gpu_rows import GPUS, NOMINAL_SHARE
from memfit.errors import UserError
from memfit.specs.hardware import GpuRow, Hardware
from memfit.units import parse_bytes

__all__ = ["ALIASES", "GPUS", "NOMINAL_SHARE", "find_gpu", "gpu_names", "parse_hardware"]

# Another spelling -> the row it means. A bare H100 means the common one; A100 is sold as often with 40 as with 80.
ALIASES: dict[str, str] = {
    "H100": "H100-80G",
    "H100NVL": "H100-94G",
    "GH200": "H100-96G",
    "RTXA6000": "A6000",
    "RTX3080-10G": "RTX3080",
    "RTX4070TiSUPER": "RTX4070TiS",
    "RTX6000AdaGeneration": "RTX6000Ada",
}

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
