"""The recipe: a closed list of keys, YAML 1.2 scalars, every mistake at once with the nearest known name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from memfit.errors import UserError
from memfit.inputs.recipe_file import known_keys, load_recipe, parse_set, recipe_from, recipe_schema

ROOT = Path(__file__).parents[2]

CONTRACT = """
model model_config data data.train data.eval data.image_root data.format data.limit data.max_broken workload
workload.tokens workload.images workload.image_size method parts lora lora.rank lora.alpha lora.dropout
lora.targets lora.variant lora.dtype lora.init lora.modules_to_save lora.kbit_upcast levers levers.precision
levers.autocast levers.optimizer levers.checkpointing levers.loss levers.attention levers.linear_attention
levers.parallel levers.offload levers.offload_to levers.pin_memory levers.activation_offload levers.allocator
levers.micro_batch levers.packing image image.max_slices image.max_pixels image.max_tokens
image.downsample_mode max_length batch
schedule schedule.epochs schedule.steps schedule.learning_rate schedule.warmup schedule.kind schedule.weight_decay
schedule.betas schedule.clip loader loader.workers loader.prefetch loader.pin generate generate.max_new_tokens run
run.folder run.save_every run.keep run.eval_every run.on_oom run.report_to allow goal hardware hardware.gpus
hardware.host_memory hardware.nvme engine seed
""".split()  # noqa: SIM905


def mistakes(data: dict) -> str:
    with pytest.raises(UserError) as caught:
        recipe_from(data)
    return caught.value.problem


def test_the_key_list_is_closed() -> None:
    assert sorted(known_keys()) == sorted(CONTRACT)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e8", 5e8),
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("12:30", "12:30"),
        ("128GiB", "128GiB"),
        ("010", 10),
        ("null", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    assert parse_set(f"engine.x={text}") == (("engine", "x"), value)
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\nmodel_config: {{x: {text}}}\n")
    assert load_recipe(file).model_config["x"] == value


def test_all_mistakes_come_at_once_with_the_nearest_name() -> None:
    problem = mistakes(
        {
            "modle": "x",
            "levers": {"precison": "fp32", "attention": "spda", "autocast": "on"},
            "schedule": {"epochs": "three"},
            "batch": 0,
        }
    )
    for text in (
        "7 mistakes",  # the missing model is the seventh
        "modle: unknown key; did you mean model?",
        "levers.precison: unknown key; did you mean levers.precision?",
        "did you mean sdpa?",
        'levers.autocast: "on" is not allowed',
        'schedule.epochs: "three" is not allowed, expected a number',
        "batch: 0 must be above 0",
    ):
        assert text in problem, (text, problem)


def test_a_key_on_the_wrong_level_is_pointed_to_its_place() -> None:
    assert "did you mean levers.micro_batch?" in mistakes({"model": "m", "micro_batch": 2})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"image": {"max_slices": 4, "max_tokens": 500}}, "one image budget at a time"),
        ({"image": {"downsample_mode": "8x"}}, "image.downsample_mode"),
        ({"parts": {"vision": "last-0"}}, "expected frozen, lora, full or last-N"),
        ({"parts": {"visoin": "full"}}, "visoin"),
        ({"levers": {"checkpointing": "every-x"}}, "every-N"),
        ({"levers": {"checkpointing": {"vision": "full", "head": "none"}}}, "levers.checkpointing.head"),
        ({"data": {"eval": 1.5}}, "data.eval"),
        ({"schedule": {"betas": [0.9, 1.0]}}, "schedule.betas.1"),
        ({"schedule": {"learning_rate": {"vision": -1.0}}}, "schedule.learning_rate.vision"),
        ({"hardware": {"gpus": "2xcpu", "host_memory": "lots"}}, "hardware.host_memory"),
        ({"workload": {"image_size": "big"}}, "workload.image_size"),
        ({"schedule": {"epochs": float("inf")}}, "schedule.epochs"),
    ],
)
def test_wrong_values_are_named(data: dict, text: str) -> None:
    assert text in mistakes({"model": "m"} | data)


def test_a_downsample_mode_stands_beside_an_image_budget() -> None:
    recipe = recipe_from({"model": "m", "image": {"downsample_mode": "4x", "max_tokens": 500}})
    assert (recipe.image.downsample_mode, recipe.image.max_tokens) == ("4x", 500)
    assert recipe_from({"model": "m"}).image.downsample_mode == "auto"


def test_set_overrides_one_key_and_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nlora: {rank: 8}\nlevers: auto_is_not_a_section\n")
    with pytest.raises(UserError, match="levers"):
        load_recipe(file)
    file.write_text("model: m\nlora: {rank: 8}\n")
    recipe = load_recipe(file, ["lora.alpha=16", "schedule.learning_rate.vision=1e-6", "hardware.gpus=2xRTX3090"])
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 16)
    assert recipe.schedule.learning_rate == {"vision": 1e-6}
    assert recipe.hardware != "auto"
    assert recipe.hardware.gpus == "2xRTX3090"


def test_a_whole_float_is_a_whole_number() -> None:
    assert recipe_from({"model": "m", "schedule": {"steps": 2e3}}).schedule.steps == 2000


@pytest.mark.parametrize("text", ["model: [", "a: 1\na: 2\n", "- 1\n", "model: 'x\n", "a: b: c\n"])
def test_broken_yaml_is_one_line_and_a_hint(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert "\n" not in caught.value.problem
    assert caught.value.hint


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("model: m\n")
    with pytest.raises(UserError, match=r"did you mean .*demo\.yaml"):
        load_recipe(tmp_path / "demmo.yaml")


def test_the_recipe_is_frozen_and_json_able() -> None:
    recipe = recipe_from({"model": "m"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    assert recipe_from(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_the_committed_schema_is_the_types_own() -> None:
    committed = json.loads((ROOT / "docs/recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == recipe_schema(), "run `make schema`"


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert recipes()


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_every_recipe_in_the_folder_reads(path: Path) -> None:
    assert load_recipe(path).model
