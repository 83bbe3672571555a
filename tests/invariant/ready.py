"""Whether DeepSpeed can run here without compiling for minutes first."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

OPERATORS = ("cpu_adam", "deepspeed_shm_comm")


def deepspeed_is_ready() -> bool:
    """DeepSpeed is installed and `make ops` (or a run) has compiled its operators, where torch looks for them.

    And with this environment's headers: with another's, ninja would compile them again.

    Source: torch.utils.cpp_extension:_get_build_directory (TORCH_EXTENSIONS_DIR, else a folder a Python and device).
    """
    if importlib.util.find_spec("deepspeed") is None:
        return False
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    root = Path(own) if own else Path.home() / ".cache" / "torch_extensions" / version
    return all(
        (root / name / f"{name}.so").exists()
        and sys.prefix in (root / name / "build.ninja").read_text(encoding="utf-8")
        for name in OPERATORS
    )
