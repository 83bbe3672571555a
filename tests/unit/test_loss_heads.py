"""Losses that keep no logits: the same loss and gradients as over full logits, and what each keeps, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.trace_against_profiler import request_for
from memfit.build import loss as losses
from memfit.build.build import Built, Materials, build
from memfit.build.data import SampleDataset
from memfit.build.loss import IGNORED, ChunkedLoss, FusedLoss, causal_loss, defer_head
from memfit.errors import UserError
from memfit.families import family_for
from memfit.inputs.data.load import load_samples
from memfit.inputs.data.options import check_options
from memfit.specs.recipe import Recipe
from memfit.specs.trace import TraceBatch
from memfit.testing.models import KINDS
from memfit.trace.fused import liger_chunk
from memfit.trace.prepare import prepare
from memfit.trace.step import trace_step
from tests.unit.test_families_models import CONFIGS, MODEL_TYPES, TEXT

Make = Callable[..., Recipe]
# Models that bend their logits behind the head.
BENT = {"gemma2"}
MORE: dict[str, Any] = {
    "minicpm3": {"num_key_value_heads": 4},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.1},
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        }
    },
}


def plain_kernel(hidden: Any, weight: Any, targets: Any, bias: Any = None) -> Any:
    """What Liger's kernel computes, in torch's own functions."""
    logits_NV = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.nn.functional.cross_entropy(logits_NV, targets, reduction="sum", ignore_index=IGNORED)


def built_from(recipe: Recipe) -> tuple[Built, dict[str, Any]]:
    """The built model and a batch of three samples of different lengths, one of which shows a picture."""
    found = prepare(recipe)
    torch.manual_seed(0)  # adapters begin at random
    built = build(found.plan(), Materials(found.source, found.family, found.profile))
    if built.pixels is None:
        ids_BT = torch.randint(10, 60, (3, 40), generator=torch.Generator().manual_seed(1))
        labels_BT = ids_BT.clone()
        labels_BT[:, :15], labels_BT[1, 30:] = IGNORED, IGNORED
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, 30:] = 0
        return built, {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
    dataset = SampleDataset(load_samples(recipe.data, check_options(recipe)).train, built.encoder, built.pixels)
    return built, built.collator([dataset[index] for index in range(3)])


def forward(built: Built, batch: dict[str, Any]) -> Any:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if built.autocast is None:
        return built.model(**inputs)
    with torch.autocast("cpu", dtype=built.autocast):
        return built.model(**inputs)


def loss_and_gradients(
    built: Built, loss: Any, batch: dict[str, Any], items: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    built.model.zero_grad(set_to_none=True)
    value = loss(forward(built, batch), batch["labels"], items)
    value.backward()
    return value.detach(), {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "int", "tensor"])
def test_chunks_give_the_loss_and_gradients_of_full_logits(recipe: Make, kind: str, items: Any) -> None:
    """Seven tokens a chunk, with padding and masked answers; tied and untied heads are among the kinds."""
    full, batch = built_from(recipe(kind))
    chunked, _ = built_from(recipe(kind, "levers.loss=chunked"))
    assert isinstance(chunked.loss, ChunkedLoss)
    assert full.loss is causal_loss
    wanted, gradients = loss_and_gradients(full, full.loss, batch, items)
    found, others = loss_and_gradients(chunked, dataclasses.replace(chunked.loss, chunk=7), batch, items)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # A planted error: one chunk left out is seen.
    short = batch | {"labels": batch["labels"].clone()}
    short["labels"][0, -7:] = IGNORED
    assert not torch.isclose(loss_and_gradients(chunked, chunked.loss, short, items)[0], wanted, rtol=1e-4)


def test_under_autocast_the_head_computes_as_inside_the_model(recipe: Make) -> None:
    sets = ("levers.precision=bf16-amp", "method=lora")
    full, batch = built_from(recipe("llama", *sets))
    chunked, _ = built_from(recipe("llama", *sets, "levers.loss=chunked"))
    wanted, gradients = loss_and_gradients(full, full.loss, batch, 20)
    found, others = loss_and_gradients(chunked, chunked.loss, batch, 20)
    # One chunk here, so that nothing is summed in another order: the head's product in fp32 would be off by 1e-3.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=2e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if not family_for({"model_type": name}).native])
def test_every_family_has_a_head_that_can_be_put_off_or_is_refused(model_type: str) -> None:
    torch.manual_seed(0)
    values = {**CONFIGS.get(model_type, TEXT), **MORE.get(model_type, {})}
    config = transformers.AutoConfig.for_model(model_type, **values)
    auto = transformers.AutoModelForCausalLM if "hidden_size" in values else transformers.AutoModelForImageTextToText
    if model_type in BENT:
        with pytest.raises(UserError, match="bends its logits behind the head"):
            defer_head(auto.from_config(config))
        return
    if "vision_config" in values:
        config.text_config.bos_token_id = None
    model = auto.from_config(config).eval()
    ids_BT = torch.randint(10, 200, (2, 9))
    options = {"downsample_mode": "16x"} if model_type.startswith("minicpmv") else {}
    wanted = causal_loss(model(input_ids=ids_BT, **options), ids_BT)
    names = set(model.state_dict())
    loss = ChunkedLoss(defer_head(model), None, chunk=4)
    torch.testing.assert_close(loss(model(input_ids=ids_BT, **options), ids_BT), wanted, rtol=1e-5, atol=0)
    assert set(model.state_dict()) == names


def test_a_batch_without_trained_tokens_teaches_nothing(recipe: Make) -> None:
    built, batch = built_from(recipe("llama", "levers.loss=chunked"))
    batch["labels"].fill_(IGNORED)
    value, gradients = loss_and_gradients(built, built.loss, batch, 10)
    assert value == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_only_trained_positions_reach_the_head(recipe: Make) -> None:
    built, batch = built_from(recipe("qwen2_5_vl", "levers.loss=chunked"))
    seen: list[int] = []
    head = built.loss.head  # type: ignore[attr-defined]
    head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])) if args[0].dim() == 2 else None)
    built.loss(forward(built, batch), batch["labels"])
    assert sum(seen) == int((batch["labels"][:, 1:] != IGNORED).sum()) < batch["labels"].numel()


def test_the_head_is_called_as_often_whatever_is_trained(recipe: Make) -> None:
    """Ranks gather it together: once as the model runs, where it multiplies nothing, and once for all chunks."""
    built, batch = built_from(recipe("llama", "levers.loss=chunked"))
    calls: list[int] = []
    built.loss.head.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    counts = []
    for kept in (0, 2, 30):
        labels = batch["labels"].clone()
        labels[:, kept:] = IGNORED
        loss = dataclasses.replace(built.loss, chunk=4)  # type: ignore[type-var]
        loss(forward(built, batch), labels, 10).backward()
        counts.append(len(calls))
        calls.clear()
    assert counts == [2, 2, 2]


def test_the_fused_loss_hands_its_kernel_what_full_logits_see(recipe: Make) -> None:
    full, batch = built_from(recipe("llama"))
    deferred, _ = built_from(recipe("llama", "levers.loss=chunked"))
    fused = FusedLoss(deferred.loss.head, None, plain_kernel)  # type: ignore[attr-defined]
    wanted, gradients = loss_and_gradients(full, full.loss, batch, 20)
    found, others = loss_and_gradients(deferred, fused, batch, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_missing_kernel_and_an_adapted_head_are_told(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(UserError, match="needs the package liger-kernel"):
        losses.liger_kernel()
    sets = ("method=lora", "parts.head=lora", "lora.targets=[lm_head]", "levers.loss=chunked")
    with pytest.raises(UserError, match="has an adapter"):
        built_from(recipe("qwen2_5_vl", *sets))


def llama(vocabulary: int) -> dict[str, Any]:
    return {"model_type": "llama", **TEXT, "vocab_size": vocabulary, "tie_word_embeddings": False}


def test_chunked_keeps_hidden_states_and_no_logits() -> None:
    """Of the loss: the selected hidden states (T - 1 positions), not T x V logits."""
    length, vocabulary, width = 2000, 5000, TEXT["hidden_size"]
    full, chunked = (
        trace_step(request_for(llama(vocabulary), TraceBatch((length,)), f"levers.loss={lever}"))
        for lever in ("full-logits", "chunked")
    )
    # Full: fp32 logits and log-probabilities are one tensor each while the loss is made; 2 T V fp32 at its peak.
    assert full.peak("loss").bytes - chunked.peak("loss").bytes > 4 * vocabulary * (2 * length - 3 * 512)
    assert full.saved_bytes - chunked.saved_bytes > 4 * vocabulary * length - 4 * width * (3 * length)
    # Three numbers a logit of one chunk: log-probabilities and two gradients.
    assert 0 < chunked.peak("backward").transient - 3 * 4 * vocabulary * 512 < 4 * vocabulary * width * 3


def test_only_the_tokens_that_carry_loss_cost_logits_in_chunks() -> None:
    """100 of 400 tokens trained: the chunk has 100 positions; full logits do not care."""
    vocabulary = 5000

    def peaks(lever: str, trained: tuple[int, ...]) -> tuple[int, int]:
        batch = TraceBatch((400,), trained=trained)
        trace = trace_step(request_for(llama(vocabulary), batch, f"levers.loss={lever}"))
        return trace.peak("backward").bytes, trace.peak("loss").bytes

    # Three numbers of fp32 a logit of the chunk at its peak; 399 positions have a next token.
    assert peaks("chunked", ())[0] - peaks("chunked", (100,))[0] > 0.9 * 3 * 4 * vocabulary * (399 - 100)
    assert peaks("full-logits", ()) == peaks("full-logits", (100,))


def test_fused_keeps_the_gradients_of_hidden_states_and_head() -> None:
    length, vocabulary, width = 2000, 5000, TEXT["hidden_size"]
    sets = ("levers.loss=fused", "levers.precision=pure-bf16")
    trace = trace_step(request_for(llama(vocabulary), TraceBatch((length,)), *sets, device="gpu"))
    assert "liger-loss" in trace.substitutions
    outside = sum(row.bytes for row in trace.saved if row.part in ("model", "head"))
    # gradients of hidden states and head in bf16; 8 B a position for the places; a scalar
    assert abs(outside - 2 * (length - 1) * width - 2 * vocabulary * width) <= 8 * length + 64
    frozen = trace_step(
        request_for(llama(vocabulary), TraceBatch((length,)), *sets, "method=lora", "lora.dtype=bf16", device="gpu")
    )
    assert (
        sum(row.bytes for row in frozen.saved if row.part in ("model", "head"))
        <= 2 * (length - 1) * width + 8 * length + 64
    )


def test_the_chunk_of_liger_by_hand() -> None:
    # Its own comment: BT = 4096 x 4, V = 32000, H = 4096 -> a factor of 8, chunks of 2048.
    assert liger_chunk(4096 * 4, 4096, 32000) == 2048
    assert liger_chunk(100, 4096, 4096) == 100  # one chunk, never longer than the row
    assert liger_chunk(8192, 3584, 151936) == 256  # 8192 / 43 = 191


def test_liger_takes_these_arguments() -> None:
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    names = functional.liger_fused_linear_cross_entropy.__code__.co_varnames[:4]
    assert names == ("input", "weight", "target", "bias")


def test_folders_stay_what_they_were(recipe: Make, tmp_path: Path) -> None:
    """A put-off head has no name of its own in saved files."""
    full, _ = built_from(recipe("llava"))
    chunked, _ = built_from(recipe("llava", "levers.loss=chunked"))
    assert set(full.model.state_dict()) == set(chunked.model.state_dict())
