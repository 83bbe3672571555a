"""The catalogue of models: rows, names, and forecasts that need neither network nor files."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

import memfit.inputs.model_source as model_source
from memfit.catalog.models import MODELS, ModelRow, find_row, nearest_rows
from memfit.errors import UserError
from memfit.families import FAMILIES
from memfit.families.base import Family
from memfit.inputs.model_source import find_model
from memfit.physics.textbook import minicpm_o_2_6
from memfit.specs.recipe import ImageBudget

NAMES = [row.name for row in MODELS]


def row_of(name: str) -> ModelRow:
    row = find_row(name)
    assert row is not None
    return row


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a network that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def asked(hub_id: str) -> Path:
        raise AssertionError(f"the network was asked for {hub_id}")

    monkeypatch.setattr(model_source, "_hub_folder", asked)
    return tmp_path


def test_rows_are_complete() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert len({row.hub_id for row in MODELS}) == len(MODELS)
    for row in MODELS:
        assert row.verified in {"cited", "counted", "memory"}, row.name
        assert row.source, row.name
        assert row.published, row.name
        assert "/" in row.hub_id, row.name
        assert row.name == row.name.lower(), row.name


@pytest.mark.parametrize(
    "name", ["openbmb/MiniCPM-V-4_6", "openbmb/MiniCPM-V-4.6", "minicpm-v-4.6", "MiniCPM-V-4_6", "minicpm_v_4_6"]
)
def test_spellings(name: str) -> None:
    assert row_of(name).hub_id == "openbmb/MiniCPM-V-4.6"


def test_nearest() -> None:
    assert nearest_rows("meta-llama/Lama-3.1-8B")[0] == "llama-3.1-8b"
    assert nearest_rows("qwen2.5vl7b")[0] == "qwen2.5-vl-7b"
    assert nearest_rows("zzzz") == ()


@pytest.mark.parametrize("name", NAMES)
def test_no_network_is_needed(name: str, empty_hub: Path) -> None:
    source = find_model(name, catalogue=True)
    assert source.folder is None
    assert source.catalogued == name
    assert source.hub_id == row_of(name).hub_id
    assert source.config["model_type"] == row_of(name).config["model_type"]


def test_training_asks_the_hub_by_its_own_name(empty_hub: Path) -> None:
    with pytest.raises(AssertionError, match=r"asked for meta-llama/Llama-3\.1-8B"):
        find_model("llama-3.1-8b")


def test_overrides_reach_below(empty_hub: Path) -> None:
    source = find_model("minicpm-v-4.6", {"text_config.num_hidden_layers": 4}, catalogue=True)
    assert source.config["text_config"]["num_hidden_layers"] == 4
    assert row_of("minicpm-v-4.6").config["text_config"]["num_hidden_layers"] == 24


def test_a_cached_checkpoint_wins_over_the_row(empty_hub: Path) -> None:
    main = empty_hub / "models--meta-llama--Llama-3.1-8B"
    (main / "refs").mkdir(parents=True)
    (main / "refs" / "main").write_text("abc")
    (main / "snapshots" / "abc").mkdir(parents=True)
    (main / "snapshots" / "abc" / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    assert find_model("llama-3.1-8b", catalogue=True).config["hidden_size"] == 8
    # One that runs on its own code cannot be read: the catalogue's facts stand in.
    text = '{"model_type": "strange", "auto_map": {"AutoModel": "x.Y"}}'
    (main / "snapshots" / "abc" / "config.json").write_text(text)
    assert find_model("llama-3.1-8b", catalogue=True).config["hidden_size"] == 4096


def test_the_hint_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_model("meta-llama/Llama-3.1-8BB", catalogue=True)
    assert "did you mean llama-3.1-8b" in caught.value.hint


def test_minicpm_o_2_6_is_the_textbooks() -> None:
    """What stays on disk is the textbook's audio and speech, and a codec of about 10 million."""
    row, parts = row_of("minicpm-o-2.6"), minicpm_o_2_6()
    codec = row.on_disk - parts["audio"] - parts["tts"]
    assert 5e6 < codec < 15e6
    assert sum(parts.values()) + codec == pytest.approx(row.parameters, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_a_cost(name: str) -> None:
    """The preprocessor's facts are enough for the family's image rule."""
    row = row_of(name)
    family: Family | None = next((f for f in FAMILIES if row.config["model_type"] in f.model_types), None)
    if family is None or family.images is None:
        return
    settings = family.images.budget(row.config, row.preprocessor, ImageBudget())
    cost = family.images.rule(settings, 1344, 1344)
    expected = {"minicpm-v-4.6": 640, "qwen2.5-vl-3b": 48 * 48, "qwen2.5-vl-7b": 48 * 48, "llava-1.5-7b": 576}
    assert cost.tokens == expected.get(name, cost.tokens)
    assert cost.tokens > 0
