"""OmniLMM-12B: counted and traced by its parts, said to be a forecast only, and refused wherever it would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
from benchmarks.trace_against_profiler import PHASES, measure, request_for, traced_peak
from memfit.build.load import random_model
from memfit.catalog.models import find_row
from memfit.errors import UserError
from memfit.families import family_for, omnilmm
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model, require_weights
from memfit.models.omnilmm import EvaBlock, OmniLMMConfig
from memfit.planner.estimate_text import estimate_text
from memfit.planner.forecast_json import forecast_json
from memfit.specs.trace import TraceBatch
from memfit.specs.workload import ImageCost
from memfit.testing import make_dummy
from memfit.trace.parameters import read_profile
from memfit.trace.step import trace_step

ROW = find_row("openbmb/OmniLMM-12B")
TINY: dict[str, Any] = {
    "model_type": "omnilmm",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "num_query": 4,
    "image_size": 112,
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 112,
    },
}
PICTURE = ImageCost(crops=((8, 8),), crop_tokens=(4,))


def test_parts_are_those_of_the_checkpoints_code() -> None:
    """By hand, from timm's eva.py and omnilmm.py: 63 blocks of 1792 and 15360; queries of 4096; Mistral-7B."""
    assert ROW is not None
    d, f, llm = 1792, 15_360, 4096
    block = 3 * d * d + 2 * d + (d * d + d) + 2 * (2 * d) + (d * f + f) + (f * d + d)
    tower = 63 * block + (3 * 14 * 14 * d + d) + d + 257 * d + 2 * d
    # query, keys' projection, packed attention, its way out, three norms, last product; without the fixed table.
    resampler = 64 * llm + d * llm + 3 * (llm * llm + llm) + llm * llm + llm + 3 * 2 * llm + llm * llm
    layer = llm * llm * 2 + 2 * llm * 1024 + 3 * llm * 14_336 + 2 * llm
    language = 32 * layer + 32_009 * llm + llm
    assert read_profile(ROW.config, omnilmm.FAMILY).part_numel() == {
        "vision": tower,
        "connector": resampler,
        "language": language,
        "head": 32_009 * llm,
    }
    assert tower == 4_280_795_904


def test_a_forecast_is_whole_and_says_what_it_rests_on() -> None:
    forecast = memfit.estimate(model="OmniLMM-12B", sets=["method=lora", "hardware.gpus=1xA100-80G"])
    assert forecast.trace is not None
    assert not {"vision", "connector"} & set(forecast.trace.saved_by_part())  # frozen, behind nothing that learns
    flops = {row.part for row in forecast.trace.flops if row.flops}
    assert {"vision", "connector", "language", "head"} <= flops
    weights = dict.fromkeys(forecast.frozen, 0)
    for term in forecast.ledger.terms:
        if term.part in weights and "weights" in term.id.split("."):
            weights[term.part] += term.bytes
    assert weights["vision"] == 2 * 4_280_795_904
    assert all(weights.values())
    text = estimate_text(forecast)
    assert "note: forecast only. OmniLMM's tower is timm's" in text
    assert "not compared with the original" in text
    assert "omnilmm-12b's sizes are from memory" in text
    assert len(forecast_json(forecast)["notes"]) == 2
    assert memfit.estimate(model="llama-3.2-1b", sets=["hardware.gpus=1xH100"]).notes == ()


@pytest.mark.parametrize("learns", [("method=full",), ("method=lora", "parts.connector=full")])
def test_a_traced_step_is_a_real_one(learns: tuple[str, ...]) -> None:
    """The equivalent really runs: bytes of a step against torch's profiler."""
    request = request_for(TINY, TraceBatch((60, 40), ((PICTURE,), ())), *learns)
    trace, real = trace_step(request), measure(request)
    assert abs(trace.saved_bytes - real.held) <= 256
    for phase in PHASES:
        assert abs(traced_peak(trace, phase) - real.peaks[phase]) <= 256, phase


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_block_is_post_norm_attention_without_a_bias_of_keys(attention: str) -> None:
    """Against torch's own multi-head attention with the same weights."""
    torch.manual_seed(0)
    config = OmniLMMConfig(**{k: v for k, v in TINY.items() if k != "model_type"}).vision_config
    config._attn_implementation = attention
    block, width = EvaBlock(config).double(), config.hidden_size
    torch.nn.init.normal_(block.attn.qkv.q_bias)
    torch.nn.init.normal_(block.attn.qkv.v_bias)
    own = torch.nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True).double()
    packed = block.attn.qkv
    with torch.no_grad():
        own.in_proj_weight.copy_(packed.weight)
        own.in_proj_bias.copy_(torch.cat([packed.q_bias, torch.zeros(width), packed.v_bias]))
        own.out_proj.load_state_dict(block.attn.proj.state_dict())
    x = torch.randn(2, 9, width, dtype=torch.float64)
    middle = x + block.norm1(own(x, x, x)[0])
    wanted = middle + block.norm2(block.fc2(torch.nn.functional.gelu(block.fc1(middle))))
    assert torch.allclose(block(x), wanted, atol=1e-6)


def test_pictures_take_their_places_and_everything_gets_a_gradient() -> None:
    family = family_for(TINY)
    torch.manual_seed(0)
    model = random_model(family, TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, *[299] * 4, 6, 7]])
    pixels = torch.randn(1, 3, 112, 112)
    one, other = model(ids, pixel_values=pixels), model(ids, pixel_values=-pixels)
    assert not torch.allclose(one.logits[:, 5:], other.logits[:, 5:])
    assert torch.equal(one.logits[:, :1], other.logits[:, :1])
    one.logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert {family.part_of(name) for name, _ in model.named_parameters()} == {"vision", "connector", "language", "head"}


def test_the_cost_of_a_picture_is_fixed() -> None:
    sets = ["hardware.gpus=1xA100-80G", "image.max_tokens=32"]
    with pytest.raises(UserError, match=r"image\.max_tokens: 32 is below 64.*64 queries are fixed by the checkpoint"):
        memfit.estimate(model="omnilmm-12b", sets=sets)
    cost = omnilmm.image_cost(omnilmm.processor_settings({}, {}, memfit.specs.recipe.ImageBudget()), 2000, 30)
    assert (cost.patches, cost.tokens) == (1024, 64)


def test_it_is_refused_wherever_it_would_run(tmp_path: Path) -> None:
    folder = make_dummy("llama", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(TINY))
    source = find_model(str(folder))
    for run in (lambda: Encoder(source), lambda: require_weights(source), lambda: memfit.check(model=str(folder))):
        with pytest.raises(UserError, match="omnilmm is forecast only") as caught:
            run()
        assert "memfit estimate" in caught.value.hint
    assert memfit.estimate(model=str(folder), sets=["hardware.gpus=1xT4", "method=lora"]).trace is not None
