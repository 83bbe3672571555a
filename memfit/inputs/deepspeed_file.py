"""Read a DeepSpeed configuration file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.errors import UserError


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. UserError where it is missing, no JSON, no mapping, or says a key twice."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        raise UserError(f"no DeepSpeed file at {path}", "paths are from the folder that memfit is started in") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}", "mend that line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a JSON file in UTF-8") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no keys with values", 'it begins with {"zero_optimization": {"stage": 2}}')
    if twice:
        # DeepSpeed refuses it too (deepspeed.runtime.config_utils:dict_raise_error_on_duplicate_keys).
        raise UserError(f"{path}: {', '.join(sorted(set(twice)))} stands there twice", "keep one of them")
    return dict(content)
