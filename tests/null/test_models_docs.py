"""docs/models.md claims what is tested: its lists are the tests' own, and each model's stand-in is of its kind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from memfit.catalog.models import MODELS, ModelRow
from memfit.families import family_for
from memfit.families.minicpmv2 import generation_of
from memfit.testing.minicpmv import KINDS as OLDER
from tests import supported
from tests.supported import ALL, DUMMY_OF, LIKE_ANOTHER, SHOWN, VECTORS
from tools import models_docs

ROOT = Path(__file__).parents[2]


def row_of(name: str) -> ModelRow:
    return next(row for row in MODELS if row.name == name)


def test_the_page_is_as_the_lists_say() -> None:
    assert models_docs.main(["--check"]) == 0, "run python tools/models_docs.py"


@pytest.mark.parametrize("column", SHOWN)
def test_each_column_has_a_test_that_takes_its_models_from_the_list(column: str) -> None:
    file, _, name = SHOWN[column].test.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(functions) == 1, SHOWN[column].test
    function = functions[0]
    text = "\n".join([*map(ast.unparse, function.decorator_list), ast.unparse(function)])
    assert f"SHOWN['{column}'].kinds" in text or f"shown('{column}')" in text
    assert set(SHOWN[column].kinds) <= set(ALL)
    assert "skip" not in text or "deepspeed_is_ready" in text


def test_every_model_has_a_stand_in_of_its_own_kind() -> None:
    for row in MODELS:
        family = family_for(row.config)
        if family.forecast_only:
            assert row.name not in DUMMY_OF
            continue
        dummy = DUMMY_OF[row.name]
        if dummy in OLDER:
            assert generation_of(row.config) == generation_of(OLDER[dummy])
        else:
            assert dummy in (family.name, row.config["model_type"])
    assert set(DUMMY_OF) <= {row.name for row in MODELS}


def test_vectors_are_there() -> None:
    found = {path.name for path in (ROOT / "tests" / "golden" / "data" / "minicpmv").glob("model*_cases.safetensors")}
    assert found == {f"model{name}_cases.safetensors" for name in VECTORS.values()}


def test_a_claim_needs_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that leaves a list, or a test that is not there, changes the page."""
    row = row_of("minicpm-v-2.6")
    assert models_docs.shown("zero3", row) == "yes"
    fewer = {**SHOWN, "zero3": supported.Shown(SHOWN["zero3"].test, ("qwen2_5_vl",))}
    monkeypatch.setattr(models_docs, "SHOWN", fewer)
    assert models_docs.shown("zero3", row) == "untested"
    assert models_docs.main(["--check"]) == 1
    assert models_docs.shown("full", row_of("omnilmm-12b")) == "forecast"


def test_what_waits_for_the_long_tests_shares_its_classes() -> None:
    """The language model and the tower of each run in the short tests under another name."""
    short = {kind for kind in ALL if kind not in LIKE_ANOTHER}
    assert {"minicpmv2_5", "minicpmv2_6", "minicpmo2_6", "llama", "qwen3"} <= short


def test_a_downsample_mode_or_what_fixes_the_tokens() -> None:
    assert models_docs.downsample(row_of("minicpm-v-4.6")) == "4x, 16x"
    assert models_docs.downsample(row_of("minicpm-llama3-v-2.5")) == "no: 96 queries a crop, fixed by the checkpoint"
    assert models_docs.knobs(row_of("qwen2.5-vl-3b")) == "max_tokens, max_pixels"
    assert models_docs.knobs(row_of("llava-1.5-7b")) == "fixed: 576 tokens a picture"
