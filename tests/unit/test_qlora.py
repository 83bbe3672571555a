"""QLoRA as it runs: what is packed is what is forecast, it learns, and what it saved answers as what was trained."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import memfit
from memfit.build import quantise
from memfit.build.adapters import is_adapter
from memfit.build.quantise import Packing, pack_weights, packing_of
from memfit.build.supported import refuse_what_is_not_built
from memfit.catalog.methods import METHODS, NF4, NF4_DOUBLE, QuantRow
from memfit.errors import UserError
from memfit.specs.export import ExportRequest
from memfit.specs.recipe import Recipe
from memfit.trace.prepare import prepare
from tests.supported import SHOWN
from tests.unit.test_build import batch_of, built_from, loss_of, samples_of

Make = Callable[..., Recipe]
QLORA = ("method=qlora", "levers.precision=pure-bf16")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def live_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by kind, read from the live tensors: packed weights apart from their scales and code books."""
    found = dict.fromkeys(("weights", "adapter", "absmax", "code"), 0)
    for name, parameter in model.named_parameters():
        found["adapter" if is_adapter(name) else "weights"] += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found["absmax"] += state.absmax.numel() * state.absmax.element_size()
            found["code"] += state.code.numel() * state.code.element_size()
            if state.nested:
                found["absmax"] += sum(4 * part.numel() for part in (state.state2.absmax, state.state2.code))
    return found


def forecast_bytes(wanted: Recipe) -> dict[str, int]:
    found = dict.fromkeys(("weights", "adapter", "absmax", "code"), 0)
    for term in prepare(wanted).plan().forecast.ledger.terms:
        pieces = term.id.split(".")
        if pieces[0] == "quant":
            found[pieces[1]] += term.bytes
        elif pieces[:2] == ["adapter", "weights"]:
            found["adapter"] += term.bytes
        elif pieces[0] == "weights":
            found["weights"] += term.bytes
    return found


@needs_bitsandbytes
@pytest.mark.parametrize("kind", SHOWN["qlora"].kinds)
@pytest.mark.parametrize("upcast", ["false", "true"])
def test_live_bytes_are_the_ledgers(recipe: Make, kind: str, upcast: str) -> None:
    wanted = recipe(kind, *QLORA, f"lora.kbit_upcast={upcast}")
    built = built_from(wanted)
    assert live_bytes(built.model) == forecast_bytes(wanted)
    assert live_bytes(built.model)["absmax"] > 0
    loss_of(built, batch_of(built, samples_of(wanted), 0)).backward()
    assert all((p.grad is not None) == is_adapter(name) for name, p in built.model.named_parameters())


@needs_bitsandbytes
def test_only_the_language_parts_linears_are_packed(recipe: Make) -> None:
    built = built_from(recipe("qwen2_5_vl", *QLORA))
    packed = [name for name, p in built.model.named_parameters() if p.dtype == torch.uint8]
    assert {built.part_of(name) for name in packed} == {"language"}
    wide = [name for name, p in built.model.named_parameters() if p.ndim == 2 and p.dtype != torch.uint8]
    assert {built.part_of(name) for name in wide if not is_adapter(name)} >= {"vision", "connector"}
    assert any("embed_tokens" in name for name in wide)


@needs_bitsandbytes
@pytest.mark.parametrize("row", [NF4, NF4_DOUBLE], ids=lambda row: row.name)
def test_a_row_packs_as_it_says(row: QuantRow) -> None:
    """Bytes of one layer by hand: 96 x 128 weights, a scale for 64 of them, with double packing one byte each."""
    model = nn.Sequential(nn.Linear(128, 96, bias=False))
    pack_weights(model, Packing(row, ["0.weight"], torch.bfloat16, torch.bfloat16, torch.device("cpu")))
    found = live_bytes(model)
    blocks = 96 * 128 // 64
    scales = 4 * blocks if row is NF4 else blocks + 4 * math.ceil(blocks / 256) + 4 * 256
    assert found == {"weights": 96 * 128 // 2, "adapter": 0, "absmax": scales, "code": 64}


@needs_bitsandbytes
def test_packing_keeps_the_weights_nearly(recipe: Make) -> None:
    """The error of NF4 on normal weights is about 9% in the 2-norm; of weights put elsewhere it would be 140%."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96))
    before, inputs = model[0].weight.detach().clone(), torch.randn(4, 128)
    wide = model(inputs)
    pack_weights(model, Packing(NF4, ["0.weight"], torch.float32, torch.float32, torch.device("cpu")))
    assert 0 < float((model(inputs) - wide).detach().norm() / wide.norm()) < 0.2
    again = nn.Sequential(nn.Linear(128, 96))
    again[0].weight.data.copy_(before)
    quantise.round_trip(again, Packing(NF4, ["0.weight"], torch.float32, torch.float32, torch.device("cpu")))
    assert 0.05 < float((again[0].weight - before).norm() / before.norm()) < 0.15
    torch.testing.assert_close(again[0](inputs) - again[0].bias, model(inputs) - model[0].bias, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@needs_bitsandbytes
def test_it_learns_and_what_was_saved_answers_as_what_was_trained(recipe: Make, tmp_path: Path) -> None:
    sets = (*QLORA, "schedule.steps=12", "schedule.learning_rate=1e-2", "schedule.warmup=0", "lora.alpha=16")
    wanted = recipe("minicpmv4_6", *sets, "parts.connector=full", "run.save_every=12")
    done = memfit.train(wanted, say=lambda text: None)
    rows = [json.loads(line) for line in (done.folder / "run.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    assert losses[-1] < losses[0] - 0.5

    built = built_from(wanted, done.model)
    inputs = {name: value for name, value in batch_of(built, samples_of(wanted), 0, 1).items() if name != "labels"}

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return model.eval()(**inputs).logits.float()

    tuned, base = logits(built.model), logits(built_from(wanted).model)
    moved = float((tuned - base).norm())
    checkpoint = next((done.folder / "checkpoints").glob("checkpoint-*"))
    torch.testing.assert_close(logits(built_from(wanted, checkpoint).model), tuned)

    merged = memfit.export(ExportRequest(done.folder, "merged"), say=lambda text: None)
    assert any("4 bit" in note for note in merged.notes)
    from tests.unit.test_export import plain

    whole = plain(wanted, merged.folder).to(torch.bfloat16)
    near = float((logits(whole) - tuned).norm())
    assert near < 0.1 * moved, (near, moved)
    adapter = memfit.export(ExportRequest(done.folder, "adapter"), say=lambda text: None).folder
    # Beside 16-bit weights, which it was not trained with, it is further off than the merged model.
    alone = PeftModel.from_pretrained(plain(wanted, Path(wanted.model)).to(torch.bfloat16), adapter)
    assert near < float((logits(alone) - tuned).norm()) < moved


@pytest.mark.parametrize("parallel", ["zero2", "zero3", "fsdp"])
def test_layouts_that_cannot_hold_packed_weights_are_refused(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "bitsandbytes" else found(name))
    precision = "bf16-amp" if parallel == "fsdp" else "bf16-mixed"
    wanted = recipe(
        "llama", "method=qlora", "hardware.gpus=2xcpu", f"levers.precision={precision}", f"levers.parallel={parallel}"
    )
    with pytest.raises(UserError, match=f"method=qlora with levers.parallel={parallel}") as caught:
        refuse_what_is_not_built(prepare(wanted).plan().recipe)
    assert "ddp" in caught.value.problem
    assert METHODS["qlora"].runs_on == {"none", "ddp"}


def test_without_the_package_the_hint_says_how_to_get_it(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match="needs the package bitsandbytes") as caught:
        refuse_what_is_not_built(prepare(recipe("llama", *QLORA)).plan().recipe)
    assert caught.value.hint == "pip install 'memfit[qlora]', or method: lora"


def test_other_methods_pack_nothing(recipe: Make) -> None:
    found = prepare(recipe("llama", "method=lora"))
    from memfit.planner.parts import resolve_parts

    parts = resolve_parts(found.plan().recipe, found.family, found.profile)
    assert packing_of(found.plan().recipe, parts, torch.device("cpu")) is None
