"""The path of FlashAttention in tower and language model, with a stand-in that computes the same by sdpa.

The package runs on GPUs only; what is tried here is all that is not its kernel: which calls get which mask, what is
left out as padding, and that answers and gradients are those of sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

from memfit import models
from memfit.build import supported
from memfit.errors import UserError
from memfit.models.minicpmv.model import LANGUAGE_MODELS, MiniCPMO, MiniCPMV
from memfit.specs.recipe import Recipe
from memfit.testing import NATIVE_KINDS

Folder = Callable[[str], Path]
NAME = "test_flash_by_sdpa"
calls: list[SimpleNamespace] = []


def by_sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Variable length semantics: each row's own tokens, or each packed sample, is a sequence of its own.

    query (B, N, T, H), key and value (B, K, S, H); the mask is None or (B, S), true at tokens. Padding gives zeros.
    """
    assert attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[1] == key.shape[2])
    causal = options.get("is_causal")
    causal = bool(module.is_causal if causal is None else causal)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows, length = query.shape[0], query.shape[2]
    pieces = []
    for row in range(rows):
        positions = options.get("position_ids")
        spans = _spans(None if attention_mask is None else attention_mask[row], positions, rows, key.shape[2])
        out = query.new_zeros(query.shape[1:])
        for places in spans:
            mine = places[places >= key.shape[2] - length] - (
                key.shape[2] - length
            )  # with a cache queries are the last
            if not len(mine):
                continue
            q, k, v = query[row][:, mine], key[row][:, places], value[row][:, places]
            mask = (
                torch.ones(len(mine), len(places), dtype=torch.bool).tril(len(places) - len(mine)) if causal else None
            )
            done = functional.scaled_dot_product_attention(
                q[None], k[None], v[None], mask, scale=options.get("scaling")
            )
            out = out.index_copy(1, mine, done[0])
        pieces.append(out)
    part = "vision" if "Siglip" in type(module).__name__ else "language"
    calls.append(SimpleNamespace(part=part, masked=attention_mask is not None, causal=causal))
    return torch.stack(pieces).transpose(1, 2), None


def _spans(mask: Any, positions: Any, rows: int, length: int) -> list[torch.Tensor]:
    if mask is not None:
        return [mask.nonzero().flatten()]
    every = torch.arange(length)
    if positions is not None and rows == 1 and positions.shape[-1] == length:
        starts = (positions.flatten() == 0).nonzero().flatten().tolist()
        return [every[a:b] for a, b in zip(starts, [*starts[1:], length], strict=True)]
    return [every]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    models.register()
    AttentionInterface.register(NAME, by_sdpa)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    del AttentionInterface._global_mapping[NAME]
    del AttentionMaskInterface._global_mapping[NAME]


@pytest.fixture(autouse=True)
def _fresh_calls() -> None:
    calls.clear()


def pair(folder: Path) -> tuple[MiniCPMV, MiniCPMV]:
    """The same model under sdpa and under the stand-in."""
    plain = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    flash = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    for module in flash.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = NAME
    return plain, flash


def talks(folder: Path, side: str = "left") -> dict[str, Any]:
    """Two rows of unequal length with pictures of unequal crops, and one without a picture."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    shown = [Image.effect_noise((150 + 150 * i, 110), 60).convert("RGB") for i in range(3)]
    words = [[shown[0], shown[2], "How many, and which colour?"], [shown[1], "How many?"], ["No picture at all."]]
    turns = [[{"role": "user", "content": content}] for content in words]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    return dict(processor(texts, shown, padding_side=side))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_answers_are_those_of_sdpa(dummies: Folder, kind: str, side: str) -> None:
    plain, flash = pair(dummies(kind))
    given = talks(dummies(kind), side)
    if side == "left":
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted, found = plain(**given).logits, flash(**given).logits
    valid = given["attention_mask"].bool()
    assert not valid.all()
    assert torch.allclose(found[valid], wanted[valid], atol=2e-5)
    vision = [call for call in calls if call.part == "vision"]
    language = [call for call in calls if call.part == "language"]
    # Crops of unequal length: the tower leaves padding out; it is never causal, the language model always is.
    assert len(vision) == 3
    assert all(call.masked and not call.causal for call in vision)
    assert len(language) == 2
    assert all(call.masked and call.causal for call in language)


@pytest.mark.parametrize("kind", ["minicpmv2_5", "minicpmv2_6", "minicpmv4_5"])
def test_gradients_are_those_of_sdpa(dummies: Folder, kind: str) -> None:
    given = talks(dummies(kind), "right")
    labels = torch.where(given["attention_mask"].bool(), given["input_ids"], -100)
    gradients = []
    for model in pair(dummies(kind)):
        model.train()
        model(**given, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, atol=1e-5, rtol=1e-3), name
    assert any(float(g.abs().sum()) > 0 for name, g in gradients[0].items() if name.startswith("vpm.encoder"))


def test_equal_crops_need_no_mask(dummies: Folder) -> None:
    _, flash = pair(dummies("minicpmv2_6"))
    processor = transformers.AutoProcessor.from_pretrained(dummies("minicpmv2_6"))
    turn = [{"role": "user", "content": [Image.new("RGB", (112, 112)), "How many?"]}]
    given = dict(processor.apply_chat_template(turn, tokenize=True))
    given.pop("attention_mask")
    with torch.no_grad():
        flash(**given)
    assert not any(call.masked for call in calls)


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_generation_is_that_of_sdpa(dummies: Folder, kind: str) -> None:
    plain, flash = pair(dummies(kind))
    given = talks(dummies(kind))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(flash.generate(**given, **options), plain.generate(**given, **options))


def test_a_dropped_mask_would_be_seen(dummies: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: padding of short crops attended to."""
    plain, flash = pair(dummies("minicpmv2_6"))
    given = talks(dummies("minicpmv2_6"), "right")
    monkeypatch.setattr(type(flash.vpm), "_for_kernel", lambda self, mask, dtype: None)
    with torch.no_grad():
        found = flash(**given).logits
        monkeypatch.undo()
        wanted = plain(**given).logits
    valid = given["attention_mask"].bool()
    assert not torch.allclose(found[valid], wanted[valid], atol=1e-3)


def test_the_models_say_that_they_can() -> None:
    for model in (MiniCPMV, MiniCPMO, *LANGUAGE_MODELS.values()):
        assert model._supports_flash_attn
        assert model._supports_sdpa
    assert issubclass(MiniCPMV, transformers.PreTrainedModel)


def test_without_the_package_training_is_refused_with_a_way_out(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe("minicpmv2_6", "levers.attention=flash", "levers.precision=pure-bf16")
    monkeypatch.setattr(supported.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package flash-attn") as caught:
        supported.refuse_what_is_not_built(wanted)
    assert "levers.attention: sdpa" in caught.value.hint
    monkeypatch.setattr(supported.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="16 bit only"):
        supported.refuse_what_is_not_built(recipe("minicpmv2_6", "levers.attention=flash"))
