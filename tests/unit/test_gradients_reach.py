"""What is said to learn does get a gradient, and what gets none is not said to learn: held against a real backward."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memfit import api
from memfit.build.build import Materials, build
from memfit.build.data import SampleDataset
from memfit.build.loss import causal_loss
from memfit.inputs.data import load_samples
from memfit.testing import KINDS, NATIVE_KINDS, make_dummy, make_samples
from memfit.trace.prepare import prepare

SEEING = [kind for kind in (*KINDS, *NATIVE_KINDS) if kind not in {"llama", "qwen3"}]


def without_gradient(folder: Path, data: Path, sets: list[str]) -> tuple[set[str], set[str], set[str]]:
    """After one real backward of two samples: names that learn without a gradient, all that learn, and all others."""
    settings = ["hardware.gpus=1xcpu", "levers.precision=fp32", "levers.micro_batch=2", "batch=2", *sets]
    recipe = api.read_recipe(model=str(folder), sets=[*settings, f"data.train={data}"])
    prepared = prepare(recipe)
    built = build(prepared.plan(), Materials(prepared.source, prepared.family, prepared.profile))
    dataset = SampleDataset(
        load_samples(dataclasses.replace(recipe.data, eval=None)).train, built.encoder, built.pixels
    )
    batch: dict[str, Any] = built.collator([dataset[index] for index in range(2)])
    labels = batch.pop("labels")
    with torch.autocast("cpu", built.autocast or torch.float32, enabled=built.autocast is not None):
        causal_loss(built.model(**batch), labels).backward()
    named = dict(built.model.named_parameters())
    learning = {name for name, parameter in named.items() if parameter.requires_grad}
    return {name for name in learning if named[name].grad is None}, learning, set(named) - learning


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", SEEING)
def test_everything_that_learns_gets_a_gradient(tmp_path: Path, kind: str, method: str) -> None:
    folder, data = make_dummy(kind, tmp_path / "model"), make_samples(tmp_path / "data", 2)
    sets = [f"method={method}"]
    if method == "lora":
        sets += ["parts.vision=lora", "parts.connector=full", "lora.targets=all-linear"]
    missed, learning, _ = without_gradient(folder, data, sets)
    assert missed == set()
    assert any(word in name for name in learning for word in ("vision", "visual", "vpm"))


@pytest.mark.parametrize("layer", [-1, -2, -3, [0, -2]])
def test_llava_by_the_layer_that_is_read(tmp_path: Path, layer: int | list[int]) -> None:
    """Full fine-tuning: what is frozen is exactly what lies behind the layer, and would have had no gradient."""
    folder, data = make_dummy("llava", tmp_path / "model"), make_samples(tmp_path / "data", 2)
    config = json.loads((folder / "config.json").read_text())
    config["vision_feature_layer"] = layer
    (folder / "config.json").write_text(json.dumps(config))
    if isinstance(layer, list):  # the projector takes both layers' features side by side
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("multi_modal_projector.linear_1.weight"))
        weights[name] = torch.cat([weights[name]] * len(layer), dim=1).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    missed, _, frozen = without_gradient(folder, data, ["method=full"])
    assert missed == set()
    layers = config["vision_config"]["num_hidden_layers"]
    behind = {-1: 0, -2: 1, -3: 2}[layer if isinstance(layer, int) else layer[-1]]
    blocks = {f"model.vision_tower.encoder.layers.{index}." for index in range(layers - behind, layers)}
    expected = (*blocks, "model.vision_tower.post_layernorm.")
    assert frozen
    assert all(name.startswith(expected) for name in frozen)
    assert all(any(name.startswith(prefix) for name in frozen) for prefix in expected)


def test_full_fine_tuning_under_autocast_keeps_one_dtype_in_the_tower(tmp_path: Path) -> None:
    """A frozen 16-bit block behind an fp32 one would stop torch's LayerNorm on a CPU, which takes one dtype only."""
    folder, data = make_dummy("llava", tmp_path / "model"), make_samples(tmp_path / "data", 2)
    missed, _, frozen = without_gradient(folder, data, ["method=full", "levers.precision=bf16-amp"])
    assert missed == set()
    assert frozen


def test_last_n_counts_blocks_that_can_learn(tmp_path: Path) -> None:
    """The tower's last block gets no gradient in LLaVA: last-1 is the block before it."""
    folder, data = make_dummy("llava", tmp_path / "model"), make_samples(tmp_path / "data", 2)
    sets = ["method=lora", "parts.vision=last-1"]
    missed, learning, _ = without_gradient(folder, data, sets)
    assert missed == set()
    assert {name.split("encoder.layers.")[1][0] for name in learning if "encoder.layers." in name} == {"1"}
