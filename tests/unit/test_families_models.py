"""Families against transformers' own models on the meta device: parts, blocks, LoRA targets, processors."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from memfit import models
from memfit.families import FAMILIES, family_for
from memfit.families.base import Family

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")} | {
    f"linear_{kind}_head_dim": 8 for kind in ("key", "value")
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    # Four layers: three of linear attention and one of full attention, as in the real ratio.
    "minicpmv4_6": {"text_config": {"model_type": "qwen3_5_text", **TEXT, **LINEAR}, "vision_config": VISION},
    "minicpmv4_7": {"text_config": {"model_type": "qwen3_5_text", **TEXT, **LINEAR}, "vision_config": VISION},
    "qwen2_5_vl": {"text_config": TEXT, "vision_config": QWEN_VISION},
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "minicpmv": {**TEXT, "hidden_size": 128, "version": 2.6, "vision_config": VISION},
    "minicpmo": {**TEXT, "hidden_size": 128, "vision_config": VISION},
    "omnilmm": {**TEXT, "hidden_size": 128, "vision_config": VISION},
    "qwen3_5_text": {**TEXT, **LINEAR},
    "phi": {**TEXT, "num_key_value_heads": 4},
}
MODEL_TYPES = [name for family in FAMILIES for name in family.model_types]


def build(model_type: str, **more: Any) -> tuple[Family, torch.nn.Module]:
    models.register()
    config = transformers.AutoConfig.for_model(model_type, **{**CONFIGS.get(model_type, TEXT), **more})
    family = family_for({"model_type": model_type})
    with torch.device("meta"):
        return family, getattr(transformers, family.auto_class).from_config(config)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_parameter_has_one_part_and_no_part_is_empty(model_type: str) -> None:
    family, model = build(model_type, tie_word_embeddings=False)
    owners = {name: family.part_of(name) for name, _ in model.named_parameters()}
    expected = {part for _, part in family.parts}
    assert set(owners.values()) == expected
    # The first prefix wins; no other part may claim the name with a prefix of the same length.
    for name, part in owners.items():
        claims = [(len(prefix), owner) for prefix, owner in family.parts if name.startswith(prefix)]
        assert max(claims)[1] == part, name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_blocks_are_numbered_from_zero(model_type: str) -> None:
    family, model = build(model_type)
    names = [name for name, _ in model.named_parameters()]
    for part, prefix in family.blocks.items():
        numbers = {int(m.group(1)) for name in names if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))}
        assert numbers == set(range(len(numbers)))
        assert numbers, (part, prefix)
        assert all(family.part_of(name) == part for name in names if name.startswith(prefix))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_auto_targets_are_all_projections_of_the_language_blocks(model_type: str) -> None:
    """Every matrix of the language part's blocks is a target, so that `auto` leaves no attention or MLP out."""
    family, model = build(model_type)
    prefix = family.blocks["language"]
    matrices = {
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear | Conv1D)
    }
    assert matrices
    missed = {name for name in matrices if name.rsplit(".", 1)[-1] not in family.lora_targets}
    assert not missed


# A family that is forecast only reads no picture.
READERS = [family for family in FAMILIES if family.images and not family.forecast_only]


@pytest.mark.parametrize("family", READERS, ids=lambda family: family.name)
def test_image_processors_exist_without_torchvision(family: Family) -> None:
    assert family.images is not None
    processor = models.image_processor(family.images.processor)()
    assert processor.backend == "pil"


def test_sources_of_the_defaults_still_hold() -> None:
    """Class attributes and limits that the rules copy from upstream."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    from memfit.families import llava, minicpmv4_6, qwen2_5_vl

    minicpm = transformers.MiniCPMV4_6ImageProcessorPil
    for name, value in minicpmv4_6.DEFAULTS.items():
        assert getattr(minicpm, name) == value, name
    qwen = transformers.Qwen2VLImageProcessorPil
    assert qwen.size == qwen2_5_vl.DEFAULT_SIZE
    for name, value in qwen2_5_vl.DEFAULTS.items():
        assert getattr(qwen, name) == value, name
    assert str(qwen2_5_vl.LONGEST_RATIO) in inspect.getsource(smart_resize)
    for kind, (extra, patch, side) in llava.TOWERS.items():
        config = transformers.AutoConfig.for_model(kind)
        assert (config.patch_size, config.image_size) == (patch, side)
        with torch.device("meta"):
            embeddings = transformers.AutoModel.from_config(config).embeddings
        assert embeddings.num_positions - embeddings.num_patches == extra
    default = transformers.LlavaConfig()
    assert default.vision_config.model_type == llava.DEFAULT_TOWER["model_type"]
    assert (default.vision_config.patch_size, default.vision_config.image_size) == (14, 336)
    assert default.vision_feature_select_strategy == "default"
    for kind, settings in llava.PROCESSORS.items():
        theirs = getattr(transformers, kind + "Pil")
        for name, value in settings.items():
            found = getattr(theirs, name, None)
            assert (list(found) if isinstance(found, tuple) else found or False) == (value or False), (kind, name)
