"""Answer samples with a built model and score the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memfit.build.build import Built
from memfit.evaluation.generate import Answer, GenerateOptions, generate_answers
from memfit.evaluation.results import score
from memfit.inputs.data.images import read_size
from memfit.specs.evaluation import Document, Evaluation
from memfit.specs.sample import Sample


@dataclass(frozen=True)
class Subject:
    """Who answers what: the name of the result, the model and the data in words, and the seed of the intervals."""

    name: str
    model: str
    data: str
    seed: int


def answer_and_score(
    built: Built,
    samples: Sequence[Sample],
    subject: Subject,
    options: GenerateOptions,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """Greedy answers to every sample, scored against its last assistant turn."""
    total = len(samples)
    answers = generate_answers(built, samples, options, lambda done: progress(done, total))
    documents = [_document(built, sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    return dataclasses.replace(
        score(documents, seed=subject.seed),
        name=subject.name,
        model=subject.model,
        data=subject.data,
        images=options.images,
        settings={
            "max_new_tokens": options.max_new_tokens,
            "decoding": "greedy",
            "batch": options.batch,
            "image_settings": {
                key: value
                for key, value in built.encoder.processor_settings.items()
                if isinstance(value, int | float | str | bool)
            },
        },
    )


def _document(built: Built, sample: Sample, answer: Answer) -> Document:
    sizes = [read_size(path) for path in sample.images]
    crops = sum(len(built.encoder.cost(*size).crops) for size in sizes) if sizes else None
    return Document(
        id=sample.id,
        truth=sample.answer,
        predicted=answer.text,
        image=str(sample.images[0]) if sample.images else None,
        tokens=answer.prompt_tokens,
        new_tokens=answer.new_tokens,
        finished=answer.finished,
        seconds=answer.seconds,
        width=sizes[0][0] if sizes else None,
        height=sizes[0][1] if sizes else None,
        crops=crops,
    )
