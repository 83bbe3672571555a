"""Names of modules and parameters: whose they are, adapted or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from memfit.families.base import Family
from memfit.specs.trace import OUTSIDE

Where = tuple[str, int | None]  # part, block


def base_name(parameter: str) -> str:
    """The name that a parameter of an adapted model had before PEFT wrapped it."""
    name = parameter.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".original_module.", ".")


def locator(family: Family) -> Callable[[str], Where]:
    """Gives the part and block of a module path or parameter name; what no part owns is `OUTSIDE`."""

    @cache
    def locate(path: str) -> Where:
        name = base_name(path + ".")
        try:
            part = family.part_of(name)
        except KeyError:
            return OUTSIDE, None
        prefix = family.blocks.get(part)
        if prefix is None or not name.startswith(prefix):
            return part, None
        number = name.removeprefix(prefix).partition(".")[0]
        return part, int(number) if number.isdigit() else None

    return locate
