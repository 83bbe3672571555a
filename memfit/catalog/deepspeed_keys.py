"""Every key of DeepSpeed's configuration, as one version of DeepSpeed reads it: a list that needs no DeepSpeed.

Written by tools/deepspeed_keys.py from the installed package (memfit.engine.deepspeed_keys:installed_keys); a test
compares the two.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

FILE = "deepspeed_keys.json"


@dataclass(frozen=True)
class DeepSpeedKeys:
    """`sections`: section ("" is the top level) -> key -> default, None where it is not said in one number or word.

    `closed`: sections in which DeepSpeed refuses an unknown key; elsewhere it ignores one. `aliases`: another spelling
    that it takes -> the key. `removed`: keys that it refuses since the feature is gone.
    """

    version: str
    sections: Mapping[str, Mapping[str, Any]]
    closed: tuple[str, ...]
    aliases: Mapping[str, str]
    removed: tuple[str, ...]

    def places(self, key: str) -> list[str]:
        """The sections that have a key of this name, the outermost first."""
        return sorted((name for name, keys in self.sections.items() if key in keys), key=lambda name: name.count("."))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@functools.cache
def shipped_keys() -> DeepSpeedKeys:
    """The list that comes along."""
    data = json.loads(resources.files("memfit.catalog").joinpath(FILE).read_text(encoding="utf-8"))
    return keys_from(data)


def keys_from(data: Mapping[str, Any]) -> DeepSpeedKeys:
    """What `to_json` gave, read again."""
    return DeepSpeedKeys(**{**data, "closed": tuple(data["closed"]), "removed": tuple(data["removed"])})
