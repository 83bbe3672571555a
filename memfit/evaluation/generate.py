"""Free greedy decoding over samples, in left-padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from memfit.build.build import Built
from memfit.build.data import SampleDataset
from memfit.evaluation.controls import blank_like, shuffled
from memfit.inputs.data.images import open_image
from memfit.specs.sample import Sample


@dataclass(frozen=True)
class Answer:
    """One generated answer. `seconds` is its batch's time shared by the samples in it."""

    text: str
    new_tokens: int
    prompt_tokens: int
    seconds: float
    finished: bool


@dataclass(frozen=True)
class GenerateOptions:
    """How to decode. `images` is one of evaluate.controls.CONTROLS."""

    max_new_tokens: int
    batch: int = 16
    images: str = "as-is"
    seed: int = 0


def generate_answers(
    built: Built, samples: Sequence[Sample], options: GenerateOptions, progress: Callable[[int], None]
) -> list[Answer]:
    """Greedy answers to the last assistant turn of every sample, in order. `progress` gets the number done so far."""
    chosen = shuffled(samples, options.seed) if options.images == "shuffled" else list(samples)
    dataset = SampleDataset(
        chosen,
        built.encoder,
        built.pixels,
        prompts=True,
        read=blank_like if options.images == "blank" else open_image,
    )
    loader = DataLoader(dataset, batch_size=options.batch, collate_fn=lambda rows: built.collator.join(rows, left=True))
    built.model.eval()
    answers: list[Answer] = []
    for batch in loader:
        answers += _decode_batch(built, batch, options.max_new_tokens)
        progress(len(answers))
    return answers


@torch.inference_mode()
def _decode_batch(built: Built, batch: dict, max_new_tokens: int) -> list[Answer]:
    began = time.perf_counter()
    device = next(built.model.parameters()).device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    stops = built.encoder.stop_ids
    # The same arithmetic as in training: a model trained under autocast answers under autocast.
    with torch.autocast(device.type, dtype=built.autocast, enabled=built.autocast is not None):
        ids_BT = built.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=built.encoder.pad_id,
            eos_token_id=list(stops),
        )
    seconds = (time.perf_counter() - began) / len(ids_BT)
    width = inputs["input_ids"].shape[1]
    prompts = inputs["attention_mask"].sum(1).tolist()
    answers = []
    for row, prompt in zip(ids_BT[:, width:].tolist(), prompts, strict=True):
        end = next((place for place, token in enumerate(row) if token in stops), None)
        kept = row if end is None else row[:end]
        answers.append(Answer(built.encoder.decode(kept), len(kept), int(prompt), seconds, end is not None))
    return answers
