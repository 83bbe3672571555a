"""Bytes and dtypes: the one place where widths and size texts are known.

Inside memfit a size is an `int` of bytes. GiB appears only where a person reads.
"""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# Bytes of one element. Source: torch dtype itemsize; nf4 is two weights a byte (bitsandbytes functional.quantize_4bit),
# its scales are counted apart.
DTYPE_BYTES: dict[str, float] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "nf4": 0.5,
}

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*$")
_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": TIB,
    "tib": TIB,
    "tb": 10**12,
}


def parse_bytes(text: str | int | float) -> int:
    """Bytes of a size as a person writes it: `128GiB`, `128 GB` (10^9), `24G` (GiB), or a plain number of bytes.

    Raises ValueError with the accepted spellings when it cannot be read.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return int(text)
    match = _SIZE.match(str(text))
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"cannot read {text!r} as a size; write 128GiB (2^30), 128GB (10^9) or plain bytes")
    return int(float(match.group(1)) * _UNITS[unit])


def gib(count: int | float, digits: int = 2) -> str:
    """`count` bytes as text in GiB, or in MiB / KiB where GiB would print as nothing."""
    if abs(count) >= 0.1 * GIB:
        return f"{count / GIB:,.{digits}f} GiB"
    if abs(count) >= 0.1 * MIB:
        return f"{count / MIB:,.{digits}f} MiB"
    return f"{count / KIB:,.{digits}f} KiB"


def count_text(count: int) -> str:
    """A number of parameters or tokens as people say it: 8.10 B, 40.4 M, 1,234."""
    for width, name in ((10**9, "B"), (10**6, "M")):
        if count >= width:
            return f"{count / width:.3g} {name}" if count < 100 * width else f"{count / width:.0f} {name}"
    return f"{count:,}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 20 ms, 4.5 s, 45 s, 12.5 min, 3.4 h."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
