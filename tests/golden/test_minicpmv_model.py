"""Our MiniCPM-V against vectors of the original code: tower, resampler, logits, loss, gradients, greedy tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from memfit.models.minicpmv.model import MiniCPMV
from memfit.models.minicpmv.resampler import Resampler, crop_positions
from memfit.models.minicpmv.vision import VisionTower, buckets
from tests.golden import minicpmv_adapter as adapter
from tests.golden.minicpmv_vectors import MODELS, inputs, tensors, text

LOGITS, LOSS, GRADIENT, FEATURES, TABLE = 3e-5, 5e-6, 2e-5, 1.5e-5, 5e-6
CASES = [(model, case) for model in MODELS for case in text(f"model{model}_cases")["cases"] if case != "generate"]


@pytest.fixture(scope="module")
def models() -> dict[str, MiniCPMV]:
    torch.manual_seed(0)
    return {name: adapter.build(text(f"model{name}_config"), tensors(f"model{name}_state")) for name in MODELS}


def error(model: str, case: str, out: Any) -> float:
    """The largest difference of the logits at valid positions."""
    values = tensors(f"model{model}_cases")
    return float((out.logits.detach()[values[f"{case}.valid"].bool()] - values[f"{case}.logits_valid"]).abs().max())


@pytest.mark.parametrize(("model", "case"), CASES)
def test_logits_loss_and_gradients(models: dict[str, MiniCPMV], model: str, case: str) -> None:
    facts, net = text(f"model{model}_cases")["cases"][case], models[model]
    net.train(bool(facts.get("train_mode")))
    net.zero_grad()
    out = net(**inputs(model, case))
    assert error(model, case, out) <= LOGITS
    assert math.isclose(out.loss.item(), facts["loss"], abs_tol=LOSS)
    out.loss.backward()
    net.eval()
    named = dict(net.named_parameters())
    for name, norm in facts.get("grad_norm_all_parameters", {}).items():
        gradient = named[name].grad
        assert gradient is not None, name
        if norm == 0:
            assert not gradient.any(), f"{name}: a dummy picture must move nothing"
        elif name.endswith("k_proj.bias"):
            assert abs(gradient.norm().item() - norm) <= max(1e-6, GRADIENT * norm), name
        else:
            assert math.isclose(gradient.norm().item(), norm, rel_tol=GRADIENT), name
    for key in facts.get("gradients", ()):
        wanted = tensors(f"model{model}_cases")[key]
        got = named[key.removeprefix(f"{case}.grad.")].grad
        assert float((got - wanted).norm() / wanted.norm()) <= GRADIENT, key


def test_tower_and_resampler_inside_the_model(models: dict[str, MiniCPMV]) -> None:
    given, values, net = inputs("26", "batch"), tensors("model26_cases"), models["26"]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        part.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
        for name, part in (("vpm", net.vpm), ("resampler", net.resampler))
    ]
    net(**given)
    for handle in handles:
        handle.remove()
    sizes = torch.cat(given["tgt_sizes"]).tolist()
    for index, (rows, columns) in enumerate(sizes):
        wanted = values[f"batch.vision.{index}"].reshape(rows * columns, -1)
        assert (seen["vpm"][index, : rows * columns] - wanted).abs().max() <= FEATURES
    assert (seen["resampler"] - values["batch.resampled"]).abs().max() <= FEATURES


def tower() -> VisionTower:
    from memfit.models.minicpmv.configuration import vision_config

    facts, values = text("vision26"), tensors("vision26")
    config = vision_config({k: v for k, v in facts["config"].items() if k != "drop_vision_last_layer"})
    config._attn_implementation = "sdpa"
    net = VisionTower(config, facts["layers_kept"], one_row=False)
    net.load_state_dict({k.removeprefix("state."): v for k, v in values.items() if k.startswith("state.")})
    return net.eval()


@torch.no_grad()
def test_tower_with_the_real_position_table() -> None:
    values, sizes = tensors("vision26"), [tuple(size) for size in text("vision26")["tgt_sizes"]]
    crops = [values[f"pixel.{index}"] for index in range(len(sizes))]
    flat = [crop.unflatten(2, (-1, 14)).permute(2, 0, 1, 3).flatten(1) for crop in crops]
    for implementation in ("sdpa", "eager"):
        net = tower()
        net.config._attn_implementation = implementation
        out = net(torch.cat(flat), sizes)
        for index, (rows, columns) in enumerate(sizes):
            assert (out[index, : rows * columns] - values[f"out.{index}"]).abs().max() <= FEATURES
    plain = values["plain.image"][0].unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(24, -1)
    assert (tower()(plain, [(4, 6)])[0] - values["plain.out"]).abs().max() <= FEATURES


def test_position_buckets() -> None:
    table = text("vision26")["position_bucket_of_index"]["table"]
    assert {count: buckets(int(count), 70).tolist() for count in table} == table
    # The plain product, which transformers' Idefics2 takes, goes wrong exactly where the rounding decides.
    assert [int(70 * torch.tensor(i) * torch.tensor(1 / 49)) for i in range(49)] != table["49"]


@pytest.mark.parametrize("side", [8, 10, 14, 20, 27, 70, 71])
def test_position_buckets_are_those_of_torch(side: int) -> None:
    """What the original asks of torch, on this machine; a machine with other vector widths would show here."""
    edges = torch.arange(1 / side, 1.0, 1 / side)
    for count in range(1, 300):
        places = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count, dtype=torch.int32))
        assert torch.bucketize(places, edges, right=True).tolist() == buckets(count, side).tolist(), count


@torch.no_grad()
@pytest.mark.parametrize("case", sorted(text("resampler26")["cases"]))
def test_resampler_alone(models: dict[str, MiniCPMV], case: str) -> None:
    values, sizes = tensors("resampler26"), text("resampler26")["cases"][case]["tgt_sizes"]
    net: Resampler = models["26"].resampler
    given = values[f"{case}.input"]
    assert (net(given, [tuple(size) for size in sizes]) - values[f"{case}.output"]).abs().max() <= FEATURES


def test_position_table() -> None:
    wanted = tensors("resampler26")["pos_embed_samples"]
    places = text("resampler26")["pos_embed_samples"]["row_col"]
    table = crop_positions([(70, 70)], 4900, wanted.shape[1], torch.device("cpu"))[0]
    got = torch.stack([table[row * 70 + column] for row, column in places])
    assert (got - wanted).abs().max() <= TABLE
    swapped = torch.stack([table[column * 70 + row] for row, column in places])
    assert (swapped - wanted).abs().max() > 0.5


def test_greedy_tokens_of_a_left_padded_batch(models: dict[str, MiniCPMV]) -> None:
    facts, values = text("model26_cases")["cases"]["generate"], tensors("model26_cases")
    given = inputs("26", "batch") | {
        "input_ids": values["generate.input_ids"],
        "attention_mask": values["generate.attention_mask"],
        "image_bound": [torch.tensor(rows).reshape(-1, 2) for rows in facts["image_bound"]],
    }
    given.pop("labels")
    tokens = adapter.generate(models["26"], **given, max_new_tokens=8, eos_token_id=facts["eos_token_id"])
    assert tokens.tolist() == facts["new_tokens"] == values["generate.new_tokens"].tolist()
    with torch.no_grad():
        last = models["26"](
            **given | {"input_ids": given["input_ids"].long(), "attention_mask": given["attention_mask"].long()}
        )
    assert (last.logits[:, -1] - values["generate.last_logits"]).abs().max() <= LOGITS


@torch.no_grad()
def test_grouped_mode_of_v25_takes_each_crop_as_if_alone(models: dict[str, MiniCPMV]) -> None:
    """Training's default: equal to the original where nothing is padded, and independent of the batch elsewhere."""
    net = models["25"]
    net.vpm.joint = False
    try:
        assert error("25", "equal", net(**inputs("25", "equal"))) <= LOGITS
        given = inputs("25", "padded")
        together = net(**given)
        assert error("25", "padded", together) > 10 * LOGITS
        crops = [crop for row in given["pixel_values"] for crop in row]
        flat = [crop.unflatten(2, (-1, 14)).permute(2, 0, 1, 3).flatten(1) for crop in crops]
        sizes = [tuple(size) for size in torch.cat(given["tgt_sizes"]).tolist()]
        padded = net.vpm(torch.cat(flat), sizes)
        for index, (pixels, size) in enumerate(zip(flat, sizes, strict=True)):
            alone = net.vpm(pixels, [size])[0]
            assert (padded[index, : len(alone)] - alone).abs().max() <= FEATURES
    finally:
        net.vpm.joint = True


@pytest.mark.parametrize("planted", ["gelu", "no_post_layernorm", "transposed_proj", "one_head", "eps"])
def test_a_planted_error_is_seen(models: dict[str, MiniCPMV], planted: str) -> None:
    net = adapter.build(text("model26_config"), tensors("model26_state"))
    if planted == "gelu":
        for layer in net.vpm.encoder.layers:
            layer.mlp.activation_fn = torch.nn.GELU()
    elif planted == "no_post_layernorm":
        net.vpm.post_layernorm = torch.nn.Identity()
    elif planted == "transposed_proj":
        net.resampler.proj.data = net.resampler.proj.data.T.contiguous()
    elif planted == "one_head":
        net.resampler.attn.heads = 1
    else:
        for layer in net.vpm.encoder.layers:
            layer.layer_norm1.eps = 1e-4
    try:
        with torch.no_grad():
            assert error("26", "single", net(**inputs("26", "single"))) > LOGITS
    except RuntimeError:
        assert planted == "one_head"  # the head width is fixed, so the view fails
