"""The public dummies: small, loadable, trainable; and what the real processors return for a batch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from memfit.inputs.encode import NO_LOSS, Encoded, Encoder
from memfit.inputs.model_source import find_model
from memfit.specs.sample import Sample, Turn
from memfit.testing import KINDS, make_dummy, make_samples

SIZES = ((300, 200), (90, 120), (64, 64))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("dummies")
    return {kind: make_dummy(kind, base / kind) for kind in KINDS}


def picture(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0])
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def sample(encoder: Encoder, sizes: tuple[tuple[int, int], ...], words: str) -> tuple[Encoded, list[Image.Image]]:
    sizes = sizes if encoder.images else ()
    turns = (Turn("user", (*range(len(sizes)), words)), Turn("assistant", (f"about {words}",)))
    encoded = encoder.encode(Sample("s", 0, turns, (Path("x.png"),) * len(sizes)), sizes)
    return encoded, [picture(sizes[index]) for index in encoded.image_order]


def batch_of(encoder: Encoder, rows: list[tuple[Encoded, list[Image.Image]]], folder: Path) -> dict[str, Any]:
    """Right-padded text, and every sample's pictures processed alone and joined as `Images.batch` says."""
    longest = max(len(encoded.input_ids) for encoded, _ in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        lines = [getattr(encoded, name).astype(np.int64) for encoded, _ in rows]
        return torch.stack([torch.from_numpy(np.pad(x, (0, longest - len(x)), constant_values=filler)) for x in lines])

    batch: dict[str, Any] = {"input_ids": padded("input_ids", encoder.pad_id), "labels": padded("labels", NO_LOSS)}
    lengths = torch.tensor([[len(encoded.input_ids)] for encoded, _ in rows])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths).long()
    if encoder.images and any(pictures for _, pictures in rows):
        processor = getattr(transformers, encoder.images.processor)(**encoder.processor_settings)
        outs = [processor(pictures, return_tensors="pt") for _, pictures in rows if pictures]
        for name, (how, dim) in encoder.images.batch.items():
            batch[name] = {"cat": torch.cat, "stack": torch.stack}[how]([out[name] for out in outs], dim)
        if encoder.images.needs_token_types:
            batch["mm_token_type_ids"] = padded("image_mask", 0).int()
    if encoder.family.forward_kwargs:
        batch |= encoder.family.forward_kwargs(find_model(str(folder)).config, encoder.processor_settings)
    return batch


def load(encoder: Encoder, folder: Path) -> Any:
    return getattr(transformers, encoder.family.auto_class).from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_dummies_are_small_and_repeatable(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    files = {file.name: file for file in folders[kind].iterdir()}
    assert sum(file.stat().st_size for file in files.values()) < 2_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    again = make_dummy(kind, tmp_path / "again")
    other = make_dummy(kind, tmp_path / "other", seed=1)
    first, second, third = (load_file(f / "model.safetensors") for f in (folders[kind], again, other))
    assert (again / "tokenizer.json").read_bytes() == files["tokenizer.json"].read_bytes()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_dummies_do_not_touch_the_callers_random_state(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make_dummy(kind, tmp_path / kind)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_padded_batch_is_that_of_its_samples(kind: str, folders: dict[str, Path]) -> None:
    """Two samples, two pictures and one: the joined batch gives each sample its own pictures and no padding."""
    encoder = Encoder(find_model(str(folders[kind])))
    rows = [sample(encoder, SIZES[:2], "the first slip"), sample(encoder, SIZES[2:], "another one, somewhat longer")]
    model = load(encoder, folders[kind]).train()
    losses, counts = [], []
    with torch.no_grad():
        for row in rows:
            losses.append(model(**batch_of(encoder, [row], folders[kind])).loss.item())
            counts.append(encoder.sample_cost(row[0]).trained_tokens)
    batch = batch_of(encoder, rows, folders[kind])
    assert (batch["labels"] != NO_LOSS).sum().item() == sum(counts)
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    start = time.process_time()
    out = model(**batch)
    out.loss.backward()
    assert time.process_time() - start < 1.0
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    # LLaVA reads the last block but one (vision_feature_layer -2): the blocks behind it learn nothing.
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(name.startswith(("model.vision_tower.encoder.layers.2.", "model.vision_tower.post")) for name in idle)
    assert bool(idle) == (kind == "llava")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("llama", "qwen3")])
def test_pictures_reach_the_loss(kind: str, folders: dict[str, Path]) -> None:
    """Other pixels in the second sample's picture change the loss: nothing is dropped when a batch is joined."""
    encoder = Encoder(find_model(str(folders[kind])))
    rows = [sample(encoder, SIZES[:2], "the first slip"), sample(encoder, SIZES[2:], "another one")]
    model = load(encoder, folders[kind]).eval()
    # Random tiny models barely look at pictures: make the connector speak up.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if encoder.family.part_of(name) == "connector" and parameter.ndim == 2:
                parameter.mul_(20)
        before = model(**batch_of(encoder, rows, folders[kind])).loss.item()
        for place in (0, 1):
            changed = [(encoded, list(pictures)) for encoded, pictures in rows]
            blank = Image.new("RGB", changed[place][1][-1].size, (255, 0, 0))
            changed[place][1][-1] = blank
            after = model(**batch_of(encoder, changed, folders[kind])).loss.item()
            assert abs(after - before) > 1e-4, place


def test_processing_a_batch_at_once_equals_joining(folders: dict[str, Path]) -> None:
    for kind in ("minicpmv4_6", "qwen2_5_vl", "llava"):
        encoder = Encoder(find_model(str(folders[kind])))
        assert encoder.images is not None
        processor = getattr(transformers, encoder.images.processor)(**encoder.processor_settings)
        pictures = [picture(size) for size in SIZES]
        together = processor(pictures, return_tensors="pt")
        alone = [processor([one], return_tensors="pt") for one in pictures]
        for name, (how, dim) in encoder.images.batch.items():
            assert how == "cat"
            assert torch.equal(together[name], torch.cat([out[name] for out in alone], dim))


def test_samples_are_real_and_repeatable(tmp_path: Path) -> None:
    paths = [make_samples(tmp_path / name, 5, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    texts = [path.read_text() for path in paths]
    assert texts[0] == texts[1] != texts[2]
    rows = json.loads(texts[0])
    assert len(rows) == 5
    for row in rows:
        with Image.open(paths[0].parent / row["image"]) as image:
            image.load()
            assert image.format == "PNG"
        assert set(json.loads(row["conversations"][1]["content"])) == {"colour", "squares"}
