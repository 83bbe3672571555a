"""Several samples in one row: each answers as it does alone, and a trace of the row is the real step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from memfit.build.data import IGNORED, Collator, SampleDataset, refuse_packing
from memfit.build.loss import causal_loss
from memfit.errors import UserError
from memfit.families import family_for
from memfit.specs.recipe import Recipe
from memfit.trace.step import trace_step
from tests.unit.test_build import built_from, samples_of
from tests.unit.test_families_models import CONFIGS, TEXT
from tests.unit.test_loss_heads import MORE
from tests.unit.test_trace import SCALARS, assert_equal, dummy_request

Make = Callable[..., Recipe]
TEXT_TYPES = [name for name in (*family_for({"model_type": "llama"}).model_types, "gpt2") if name != "qwen3_5_text"]


def rows() -> list[dict[str, torch.Tensor]]:
    ids = [torch.randint(10, 200, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 1, 14)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_samples_in_one_row_do_not_see_each_other(model_type: str, attention: str) -> None:
    torch.manual_seed(0)
    family = family_for({"model_type": model_type})
    values = {**CONFIGS.get(model_type, TEXT), **MORE.get(model_type, {})}
    config = transformers.AutoConfig.for_model(model_type, **values)
    if model_type == "gemma2" and attention == "sdpa":
        pytest.skip("gemma2 takes no sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    collate = Collator(family, 0, {}, None, packing=True)
    with torch.no_grad():
        packed_TV = model(**{k: v for k, v in collate(rows()).items() if k != "labels"}).logits[0]
        alone = [model(input_ids=row["input_ids"][None]).logits[0] for row in rows()]
        # A planted error: without positions the second sample sees the first.
        naive_TV = model(input_ids=torch.cat([row["input_ids"] for row in rows()])[None]).logits[0]
    torch.testing.assert_close(packed_TV, torch.cat(alone), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(naive_TV, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_no_sample_learns_to_begin_the_next() -> None:
    batch = Collator(family_for({"model_type": "llama"}), 0, {}, None, packing=True)(rows())
    assert batch["position_ids"].tolist() == [[*range(9), 0, *range(14)]]
    labels = batch["labels"][0]
    assert [place for place in range(24) if labels[place] == IGNORED] == [0, 9, 10]
    assert "attention_mask" not in batch


def test_a_packed_loss_is_that_of_the_padded_batch(recipe: Make) -> None:
    """With pictures, through the whole of build."""
    padded, packed = (built_from(recipe("llava", f"levers.packing={value}")) for value in ("false", "true"))
    samples = samples_of(recipe("llava"))
    losses = []
    for built in (padded, packed):
        dataset = SampleDataset(samples, built.encoder, built.pixels)
        batch: dict[str, Any] = built.collator([dataset[index] for index in range(3)])
        labels = batch.pop("labels")
        losses.append(causal_loss(built.model.eval()(**batch), labels))
    assert batch["input_ids"].shape[0] == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "why"), [("minicpmv4_6", "linear-attention"), ("qwen2_5_vl", "positions from all")])
def test_models_that_cannot_keep_samples_apart_are_refused(recipe: Make, kind: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        built_from(recipe(kind, "levers.packing=true"))


def test_a_text_model_with_linear_attention_is_refused() -> None:
    with pytest.raises(UserError, match="state into the next"):
        refuse_packing(family_for({"model_type": "qwen3_5_text"}), {"model_type": "qwen3_5_text"})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_packed_trace_is_the_real_step(dummies: Callable[[str], Path], kind: str, attention: str) -> None:
    request = dummy_request(dummies(kind), "levers.packing=true", f"levers.attention={attention}")
    assert_equal(trace_step(request), request, SCALARS)
