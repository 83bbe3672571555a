"""Facts about model families, one file a family. `family_for(config)` finds the right one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rapidfuzz import process

from memfit.errors import UserError
from memfit.families import llava, minicpmv2, minicpmv4_6, minicpmv4_7, omnilmm, qwen2_5_vl, text
from memfit.families.base import Family

FAMILIES: tuple[Family, ...] = (
    minicpmv2.FAMILY,
    minicpmv4_6.FAMILY,
    minicpmv4_7.FAMILY,
    qwen2_5_vl.FAMILY,
    llava.FAMILY,
    omnilmm.FAMILY,
    text.FAMILY,
    text.GPT2,
)


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a model's config.json, by `model_type`. UserError that names the nearest known types otherwise."""
    model_type = config.get("model_type")
    known = {name: family for family in FAMILIES for name in family.model_types}
    if not isinstance(model_type, str):
        raise UserError("config.json has no model_type", f"known model types: {', '.join(sorted(known))}")
    if model_type in known:
        return known[model_type]
    nearest = [name for name, _, _ in process.extract(model_type, sorted(known), limit=3)]
    raise UserError(f"model_type {model_type!r} is not supported yet", f"the nearest supported: {', '.join(nearest)}")
