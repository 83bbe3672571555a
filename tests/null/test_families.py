"""Families: which one a config belongs to, its parts, and the refusals of its image budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memfit.errors import UserError
from memfit.families import FAMILIES, family_for, llava, minicpmv4_6, minicpmv4_7, qwen2_5_vl
from memfit.families import budget as budget_rules
from memfit.families.base import Family
from memfit.specs.recipe import ImageBudget

MINICPM = {"model_type": "minicpmv4_6", "image_token_id": 7}
LLAVA = {
    "model_type": "llava",
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
}
CROP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def test_every_model_type_belongs_to_one_family() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))
    for family in FAMILIES:
        for name in family.model_types:
            assert family_for({"model_type": name}) is family


def test_unknown_model_type_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        family_for({"model_type": "qwen2_5_vll"})
    assert "qwen2_5_vll" in caught.value.problem
    assert "qwen2_5_vl" in caught.value.hint
    with pytest.raises(UserError, match="no model_type"):
        family_for({})


@pytest.mark.parametrize(
    ("family", "name", "part"),
    [
        (minicpmv4_6.FAMILY, "model.vision_tower.vit_merger.linear_1.weight", "vision"),
        (minicpmv4_6.FAMILY, "model.merger.mlp.0.linear_1.weight", "connector"),
        (minicpmv4_6.FAMILY, "model.language_model.layers.0.linear_attn.A_log", "language"),
        (minicpmv4_6.FAMILY, "lm_head.weight", "head"),
        (qwen2_5_vl.FAMILY, "model.visual.merger.mlp.0.weight", "connector"),
        (qwen2_5_vl.FAMILY, "model.visual.blocks.0.attn.qkv.weight", "vision"),
        (llava.FAMILY, "model.multi_modal_projector.linear_1.weight", "connector"),
        (llava.FAMILY, "model.language_model.embed_tokens.weight", "language"),
    ],
)
def test_parts(family: Family, name: str, part: str) -> None:
    assert family.part_of(name) == part


def test_a_name_of_no_part_is_a_key_error() -> None:
    with pytest.raises(KeyError, match=r"audio\.conv"):
        minicpmv4_6.FAMILY.part_of("audio.conv.weight")


# Sizes that were run by hand through the real processor (max_slice_nums 9): crops, patches, tokens 16x, tokens 4x.
HAND = [
    (448, 448, 1, 1024, 64, 256),
    (1024, 768, 5, 5040, 315, 1260),
    (1344, 1344, 10, 10240, 640, 2560),
    (2480, 3508, 9, 9184, 574, 2223),
]


@pytest.mark.parametrize(("width", "height", "crops", "patches", "tokens", "tokens_4x"), HAND)
def test_minicpm_known_sizes(width: int, height: int, crops: int, patches: int, tokens: int, tokens_4x: int) -> None:
    cost = minicpmv4_6.image_cost({}, width, height)
    assert (len(cost.crops), cost.patches, cost.tokens) == (crops, patches, tokens)
    assert minicpmv4_6.image_cost({"downsample_mode": "4x"}, width, height).tokens == tokens_4x


def test_minicpm_placeholder_by_hand() -> None:
    """A 2 x 2 grid, two tokens a slice: slices joined in rows, rows by a newline."""
    cost = dataclasses.replace(
        minicpmv4_6.image_cost({}, 1024, 768), crops=((2, 2),) * 5, crop_tokens=(3, 2, 2, 2, 2), grid=(2, 2)
    )
    pad = "<|image_pad|>"
    piece = f"<slice>{pad}{pad}</slice>"
    expected = f"<image_id>4</image_id><image>{pad}{pad}{pad}</image>{piece}{piece}\n{piece}{piece}"
    assert minicpmv4_6.placeholder(cost, 4, {}) == expected


def test_qwen_by_hand() -> None:
    """640 x 480: 46 x 34 patches of 14 px, so 23 x 17 tokens."""
    settings = qwen2_5_vl.processor_settings({}, {}, ImageBudget())
    cost = qwen2_5_vl.image_cost(settings, 640, 480)
    assert cost.crops == ((34, 46),)
    assert cost.tokens == 391


def test_qwen_refuses_a_strip() -> None:
    settings = qwen2_5_vl.processor_settings({}, {}, ImageBudget())
    with pytest.raises(ValueError, match=r"2010 x 10 px has sides 1 : 201"):
        qwen2_5_vl.image_cost(settings, 2010, 10)


def test_llava_counts_tokens_as_the_model_does() -> None:
    """336 / 14 = 24: 576 patches; the class token is dropped by "default" and kept by "full"."""
    settings = llava.processor_settings(LLAVA, CROP, ImageBudget())
    assert llava.image_cost(settings, 1000, 10).tokens == 576
    settings = llava.processor_settings({**LLAVA, "vision_feature_select_strategy": "full"}, CROP, ImageBudget())
    assert llava.image_cost(settings, 1000, 10).tokens == 577


BUDGET_RULES = {
    "minicpm": lambda budget: minicpmv4_6.processor_settings(MINICPM, {}, budget),
    "qwen": lambda budget: qwen2_5_vl.processor_settings({}, {}, budget),
    "llava": lambda budget: llava.processor_settings(LLAVA, CROP, budget),
}


@pytest.mark.parametrize("family", BUDGET_RULES)
def test_two_pinned_knobs_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="2 knobs pinned") as caught:
        BUDGET_RULES[family](ImageBudget(max_slices=4, max_tokens=640))
    assert "max_slices: 4" in caught.value.problem
    assert "max_tokens: 640" in caught.value.problem


@pytest.mark.parametrize("family", BUDGET_RULES)
@pytest.mark.parametrize("value", [0, -3, True])
def test_a_knob_below_one_is_refused(family: str, value: Any) -> None:
    with pytest.raises(UserError, match="at least 1"):
        BUDGET_RULES[family](ImageBudget(max_slices=value))


@pytest.mark.parametrize("family", BUDGET_RULES)
def test_auto_keeps_the_processors_own_setting(family: str) -> None:
    settings = BUDGET_RULES[family](ImageBudget())
    own = {
        "minicpm": ("max_slice_nums", 9),
        "qwen": ("size", {"shortest_edge": 3136, "longest_edge": 1003520}),
        "llava": ("crop_size", {"height": 336, "width": 336}),
    }[family]
    assert settings[own[0]] == own[1]


@pytest.mark.parametrize(
    ("family", "budget", "key", "value"),
    [
        ("minicpm", ImageBudget(max_slices=4), "max_slice_nums", 4),
        # bounds: 723 tokens for 9 slices, 651 for 8, 579 for 7 (compared with upstream in tests/unit)
        ("minicpm", ImageBudget(max_tokens=723), "max_slice_nums", 9),
        ("minicpm", ImageBudget(max_tokens=722), "max_slice_nums", 8),
        ("minicpm", ImageBudget(max_tokens=75), "max_slice_nums", 1),
        ("minicpm", ImageBudget(max_pixels=723 * 56 * 56), "max_slice_nums", 9),
        ("minicpm", ImageBudget(max_pixels=723 * 56 * 56 - 1), "max_slice_nums", 8),
        ("qwen", ImageBudget(max_pixels=400000), "size", {"shortest_edge": 3136, "longest_edge": 400000}),
        ("qwen", ImageBudget(max_tokens=256), "size", {"shortest_edge": 3136, "longest_edge": 256 * 784}),
        ("llava", ImageBudget(max_tokens=576), "crop_size", {"height": 336, "width": 336}),
    ],
)
def test_budget_compiles_to_the_processors_knob(family: str, budget: ImageBudget, key: str, value: Any) -> None:
    assert BUDGET_RULES[family](budget)[key] == value


@pytest.mark.parametrize(
    ("family", "budget", "words"),
    [
        ("minicpm", ImageBudget(max_tokens=74), ["74", "75"]),
        ("minicpm", ImageBudget(max_pixels=1000), ["1000", str(75 * 56 * 56)]),
        ("qwen", ImageBudget(max_slices=4), ["max_slices: 4", "never slices"]),
        ("qwen", ImageBudget(max_pixels=783), ["783", "28 x 28"]),
        ("llava", ImageBudget(max_tokens=575), ["575", "576", "fixed by this model"]),
        ("llava", ImageBudget(max_pixels=336 * 336 - 1), ["112895", "112896", "fixed by this model"]),
    ],
)
def test_a_budget_that_cannot_be_met_says_so(family: str, budget: ImageBudget, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        BUDGET_RULES[family](budget)
    assert all(word in caught.value.problem for word in words), caught.value.problem


def test_minicpm_needs_its_ids_in_the_config() -> None:
    """Without image_token_id forward drops pictures; 4.7 also lays them out by marker ids."""
    with pytest.raises(UserError, match="image_token_id"):
        minicpmv4_6.processor_settings({"model_type": "minicpmv4_6"}, {}, ImageBudget())
    ids = dict.fromkeys(minicpmv4_7.CONFIG_IDS, 1)
    del ids["newline_id"]
    assert minicpmv4_7.FAMILY.images is not None
    with pytest.raises(UserError, match="newline_id"):
        minicpmv4_7.FAMILY.images.budget({**MINICPM, **ids}, {}, ImageBudget())


def test_downsample_mode_is_one_for_processor_and_model() -> None:
    family = minicpmv4_6.FAMILY
    assert family.forward_kwargs is not None
    for config, preprocessor, mode in (
        ({}, {}, "16x"),
        ({"downsample_mode": "4x"}, {}, "4x"),
        ({"downsample_mode": "4x"}, {"downsample_mode": "16x"}, "16x"),
    ):
        settings = minicpmv4_6.processor_settings({**MINICPM, **config}, preprocessor, ImageBudget())
        assert settings["downsample_mode"] == mode
        assert family.forward_kwargs(config, settings) == {"downsample_mode": mode}
        for pinned in ("4x", "16x"):  # the recipe's goes before both files'
            budget = ImageBudget(downsample_mode=pinned)
            settings = minicpmv4_6.processor_settings({**MINICPM, **config}, preprocessor, budget)
            assert family.forward_kwargs(config, settings) == {"downsample_mode": pinned}


def test_downsample_mode_prices_a_picture() -> None:
    """1344 x 1344 px: ten crops of 32 x 32 patches, 4 or 16 of which become a token."""
    for mode, tokens in (("16x", 640), ("4x", 2560)):
        settings = minicpmv4_6.processor_settings(MINICPM, {}, ImageBudget(downsample_mode=mode))
        cost = minicpmv4_6.image_cost(settings, 1344, 1344)
        assert (cost.patches, cost.tokens) == (10240, tokens)
    settings = minicpmv4_6.processor_settings(MINICPM, {}, ImageBudget(downsample_mode="4x", max_tokens=722))
    assert settings["max_slice_nums"] < 8  # of the 16x mode, for the same tokens


def test_in_4x_mode_the_window_merger_is_not_reached() -> None:
    for family in (minicpmv4_6.FAMILY, minicpmv4_7.FAMILY):
        assert family.unreached is not None
        assert family.unreached({"downsample_mode": "4x"}) == ("model.vision_tower.vit_merger.",)
        assert family.unreached({"downsample_mode": "16x"}) == family.unreached({}) == ()


@pytest.mark.parametrize(
    ("model", "words", "hint"),
    [
        ({"model_type": "minicpmv", "version": 2.6}, "the 64 queries that a crop becomes are fixed by", "max_slices"),
        ({"model_type": "minicpmv", "version": "2.5", "query_num": 96}, "the 96 queries", "max_slices"),
        ({"model_type": "qwen2_5_vl"}, "always merges its patches", "max_tokens"),
        (LLAVA, "fixed by this model", "downsample_mode: auto"),
        ({"model_type": "llama"}, "takes no pictures", "downsample_mode: auto"),
    ],
)
def test_downsample_mode_is_refused_where_there_is_none(model: dict, words: str, hint: str) -> None:
    family = family_for(model)
    crop = CROP if model is LLAVA else {}
    assert budget_rules.picture_settings(family, model, crop, ImageBudget()) is not None
    with pytest.raises(UserError, match=words) as caught:
        budget_rules.picture_settings(family, model, crop, ImageBudget(downsample_mode="4x"))
    assert "image.downsample_mode: 4x has no effect" in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("config", "preprocessor", "words"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, CROP, "pixtral"),
        (LLAVA, {"image_processor_type": "PixtralImageProcessor"}, "PixtralImageProcessor"),
        (LLAVA, {"crop_size": {"height": 224, "width": 224}}, "224 x 224 px, the model takes 336 x 336"),
        (LLAVA, {"do_center_crop": False, "size": {"shortest_edge": 336}}, "open"),
    ],
)
def test_llava_refuses_what_the_tower_cannot_take(config: dict, preprocessor: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        llava.processor_settings(config, preprocessor, ImageBudget())
