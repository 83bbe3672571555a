"""QLoRA in the trace: nothing kept of a 4-bit product, its weight unpacked for a moment, twice."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import prepare_model_for_kbit_training
from torch import nn

from benchmarks.trace_against_profiler import request_for
from memfit.specs.trace import StepTrace, TraceBatch
from memfit.trace.cuda import ROWS
from memfit.trace.fourbit import LinearInFourBit, LoraOnFourBit
from memfit.trace.model import meta_model
from memfit.trace.step import trace_step

TEXT = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 5, "num_attention_heads": 4}
CONFIG: dict[str, Any] = {"model_type": "llama", **TEXT, "num_key_value_heads": 2, "vocab_size": 100}
TOKENS = 40


def traced(*sets: str, whole: bool = False) -> StepTrace:
    return trace_step(request_for(CONFIG, TraceBatch((TOKENS,)), *sets, device="gpu"), whole)


@pytest.mark.parametrize("precision", ["pure-bf16", "bf16-amp"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_it_keeps_what_lora_keeps(precision: str, dropout: str) -> None:
    """A frozen 16-bit Linear keeps no input either: what is kept belongs to the adapters and the rest."""
    sets = (f"levers.precision={precision}", f"lora.dropout={dropout}")
    lora, qlora = traced("method=lora", *sets), traced("method=qlora", *sets)
    # Under autocast PEFT's ordinary adapters widen their input first, and autocast narrows it again: a copy for each.
    # On 4-bit layers they do not: q, k and v share one input, gate and up another, and o takes what attention keeps.
    copies = 4 if (precision, dropout) == ("bf16-amp", "0") else 0
    kept, other = qlora.saved_by_part(), lora.saved_by_part()
    assert other.pop("language") - kept.pop("language") == 5 * copies * 2 * TOKENS * 64
    assert kept == other
    assert set(qlora.substitutions) - set(lora.substitutions) == {"bnb-4bit"} <= set(ROWS)


def test_a_weight_is_unpacked_in_forward_and_in_backward() -> None:
    """2 bytes a number of every one of 7 matrices a block; backward of the first ones stops at the adapters."""
    sets = ("levers.precision=pure-bf16",)
    lora, qlora = traced("method=lora", *sets), traced("method=qlora", *sets)
    unpacked = 2 * 64 * 320

    def made(trace: StepTrace, phase: str) -> int:
        return sum(e.kind == "alloc" and e.phase == phase and e.bytes == unpacked for e in trace.events)

    # hidden states are 2 x 40 x 64 B, of the MLP 2 x 40 x 320: nothing else is as large as gate, up and down
    assert made(lora, "forward") == made(lora, "backward") == 0
    assert made(qlora, "forward") == made(qlora, "backward") == 3 * 5
    alive = [e.storage for e in qlora.events if e.kind == "alloc" and e.bytes == unpacked]
    freed = {e.storage for e in qlora.events if e.kind == "free"}
    assert set(alive) <= freed


def test_four_bit_weights_are_packed_and_the_head_is_not() -> None:
    request = request_for(CONFIG, TraceBatch((TOKENS,)), "method=qlora", device="gpu")
    model = meta_model(request.family, CONFIG, request.recipe, request.parts).model
    kinds = {name: type(module) for name, module in model.named_modules()}
    down = "base_model.model.model.layers.0.mlp.down_proj"
    assert (kinds[down], kinds[f"{down}.base_layer"]) == (LoraOnFourBit, LinearInFourBit)
    assert kinds["base_model.model.lm_head"] is nn.Linear
    weight = model.get_submodule(f"{down}.base_layer").weight
    assert (weight.numel(), weight.dtype) == (64 * 320 // 2, torch.uint8)
    plain = meta_model(
        request.family, CONFIG, request_for(CONFIG, TraceBatch((TOKENS,)), "method=lora").recipe, request.parts
    )
    assert len(list(plain.model.parameters())) == len(list(model.parameters()))


def test_kbit_upcast_widens_everything_that_is_not_packed() -> None:
    """Hidden states flow in fp32 then: embeddings and norms are, and a 4-bit product gives back its input's dtype."""
    sets = ("method=qlora", "levers.precision=pure-bf16")
    usual, upcast = traced(*sets), traced(*sets, "lora.kbit_upcast=true")
    assert upcast.saved_bytes > 1.3 * usual.saved_bytes
    embeddings = 100 * 64
    norms = (2 * 5 + 1) * 64
    head = 100 * 64
    assert upcast.parameters - usual.parameters == 2 * (embeddings + norms + head)


def test_composed_blocks_equal_the_whole_model() -> None:
    sets = ("method=qlora", "levers.checkpointing=full")
    assert traced(*sets).peaks == traced(*sets, whole=True).peaks


def test_peft_still_does_what_the_stand_in_copies() -> None:
    """The lines that decide what lives: a copy of the base's result, casts only without autocast."""
    spec = importlib.util.find_spec("peft.tuners.lora.bnb")
    assert spec is not None
    source = Path(str(spec.origin)).read_text(encoding="utf-8")
    assert "result = result.clone()" in source
    assert "requires_conversion = not torch.is_autocast_enabled()" in source
    upcast = inspect.getsource(prepare_model_for_kbit_training)
    assert "param.data = param.data.to(torch.float32)" in upcast
