"""Batches as the model gets them: what carries loss, what was cut, how many samples there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rapidfuzz import fuzz

from memfit.build.data import IGNORED, SampleDataset
from memfit.engine.readback.live import Asked, Batch, Live
from memfit.engine.readback.pictures import crops_of, patch_of
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.inputs.data.images import open_image
from memfit.specs.sample import Sample

LOOKED_AT = 4  # samples of the training data, the first ones: a proof puts its worst there
NEAR = 90  # per cent: what decoding may change (normal forms, bytes without a letter)
SHORTEST_PROMPT = 8  # letters; a shorter turn may stand in an answer by chance
OPEN, CLOSE = "[[", "]]"  # around what carries loss, in the text that is shown


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """Labels, placeholders, lengths, counts."""
    batches = list(live.batches) or [batch for batch, _ in drawn(live)]
    if not batches:
        yield stated("labels", "not looked at", "the training data gives no sample by its number")
        return
    yield _labels(batches)
    yield _targets(batches)
    yield from _placeholders(live, batches)
    yield from _answers(live)
    yield _lengths(batches, asked)
    yield _packed(batches, asked)
    yield from _counts(live, asked)


def dataset_of(live: Live) -> Any:
    """The training data inside what fills several ranks up."""
    dataset: Any = live.trainer.train_dataset
    while (
        not isinstance(dataset, SampleDataset) and hasattr(dataset, "samples") and hasattr(dataset.samples, "__len__")
    ):
        if not hasattr(dataset.samples, "__getitem__") or isinstance(dataset.samples, list | tuple):
            break
        dataset = dataset.samples
    return dataset


def drawn(live: Live) -> list[tuple[Batch, Sample | None]]:
    """The first samples of the training data, each collated by the live collator into a batch of its own."""
    dataset, collate = live.trainer.train_dataset, live.trainer.data_collator
    known: Any = getattr(dataset_of(live), "samples", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return []
    count = min(LOOKED_AT, len(dataset))
    samples = [known[place] if isinstance(dataset_of(live), SampleDataset) else None for place in range(count)]
    return [(collate([dataset[place]]), sample) for place, sample in zip(range(count), samples, strict=True)]


def _labels(batches: Sequence[Batch]) -> Reading:
    counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    sizes = [int(batch["input_ids"].numel()) for batch in batches]
    empty = sum(count == 0 for count in counts)
    whole = sum(
        count >= size - batch["input_ids"].shape[0] for count, size, batch in zip(counts, sizes, batches, strict=True)
    )
    found = f"{sum(counts):,} of {sum(sizes):,} tokens"
    if empty:
        found += f"; {empty} of {len(batches)} batches without any"
    if whole:
        found += f"; {whole} of {len(batches)} batches with every token"
    return Reading(
        "labels",
        "answers carry loss, prompts none",
        found,
        not empty and not whole,
        f"labels other than {IGNORED} in {len(batches)} collated batches",
        "the chat template, or a response template of another model, hides the answers or marks none: check the format",
        same=False,
    )


def _targets(batches: Sequence[Batch]) -> Reading:
    """A label must be the token that stands there."""
    wrong = 0
    for batch in batches:
        labels, ids = batch["labels"], batch["input_ids"]
        wrong += int(((labels != IGNORED) & (labels != ids)).sum())
    return Reading(
        "labels are the tokens",
        "0 differ",
        f"{wrong} differ",
        wrong == 0,
        "labels against input_ids at the same places; the loss shifts them by one itself",
        "do not shift labels in the collator: the model's loss does",
        same=False,
    )


def _placeholders(live: Live, batches: Sequence[Batch]) -> Iterator[Reading]:
    token = live.image_token_id
    if token is None:
        return
    trained = sum(int((batch["labels"] == token).sum()) for batch in batches)
    yield Reading(
        "image placeholders in the loss",
        "0",
        str(trained),
        trained == 0,
        f"labels equal to the image token {token}",
        f"mask the image token in the collator: labels[input_ids == {token}] = {IGNORED}",
        same=False,
    )
    if live.encoder is None or live.family is None or live.family.images is None:
        return
    patch, rule = patch_of(live.encoder.source.config), live.family.images.rule
    wanted, found, crops, cut = 0, 0, 0, []
    for batch, sample in drawn(live):
        places = int((batch["input_ids"] == token).sum())
        costs = (
            []
            if sample is None
            else [rule(live.encoder.processor_settings, *_size(sample, i)) for i in sample.picture_order]
        )
        tokens, rows = sum(cost.tokens for cost in costs), crops_of(batch, patch)
        count = sum(len(cost.crops) for cost in costs)
        if places != tokens or (rows is not None and len(rows) != count):
            cut.append(f"{sample.id if sample else '?'} has {places} of {tokens}")
        wanted, found, crops = wanted + tokens, found + places, crops + count
    yield Reading(
        "image placeholders",
        f"{wanted:,} for {crops} crops",
        f"{found:,}" + (f"; {cut[0]}" if cut else f" for {crops} crops"),
        not cut,
        "image tokens of the collated samples against what their pictures' sizes come to",
        "max_length must leave whole turns out, never cut a picture: let memfit shorten, or raise max_length",
        same=False,
    )


def _size(sample: Sample, index: int) -> tuple[int, int]:
    return open_image(sample.images[index]).size


def _answers(live: Live) -> Iterator[Reading]:
    """What carries loss, decoded, must be the answers of the conversation and nothing else."""
    if live.encoder is None:
        return
    wrong, looked = [], 0
    for batch, sample in drawn(live):
        if sample is None:
            continue
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        told = _squeezed(live.encoder.decode(ids[labels != IGNORED].tolist()))
        wanted = _squeezed("".join(turn.text for turn in sample.turns if turn.role == "assistant"))
        looked += 1
        if not _is_the_answer(told, wanted, sample):
            wrong.append(f"{sample.id}: {told[:60]!r} for {wanted[:60]!r}")
    if looked:
        yield Reading(
            "what is trained",
            "the answers",
            "the answers" if not wrong else f"{len(wrong)} of {looked} samples otherwise: {wrong[0]}",
            not wrong,
            f"decoded tokens with loss of {looked} samples against the assistant's turns",
            "labels must follow the chat template's answers: check the format, and that prompts are masked",
            same=False,
        )


def _is_the_answer(told: str, wanted: str, sample: Sample) -> bool:
    """Whether what is trained says the answers, near enough for decoding that normalises, and no turn of the user."""
    asked = [_squeezed(turn.text) for turn in sample.turns if turn.role != "assistant"]
    prompted = any(len(text) >= SHORTEST_PROMPT and text in told and text not in wanted for text in asked)
    return not prompted and fuzz.ratio(told, wanted) >= NEAR


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _lengths(batches: Sequence[Batch], asked: Asked) -> Reading:
    longest = max(int(batch["input_ids"].shape[1]) for batch in batches)
    limit = asked.key("max_length")
    worst = (
        asked.plan.forecast.workload.worst.tokens if asked.plan is not None and asked.plan.forecast.workload else None
    )
    evidence = f"the longest of {len(batches)} batches" + (f"; the forecast counts with {worst:,}" if worst else "")
    if limit is None:
        return Reading("max_length", None, f"{longest:,} tokens", None, evidence, same=False)
    packed = longest if not asked.lever("packing") else 0
    return Reading(
        "max_length",
        f"at most {limit:,} tokens",
        f"{longest:,} tokens",
        packed <= limit,
        evidence,
        "max_length shortens conversations before they are encoded: do not encode them by another path",
        same=False,
    )


def _packed(batches: Sequence[Batch], asked: Asked) -> Reading:
    """Packed rows bring their positions and one row."""
    packed = all("position_ids" in batch and batch["input_ids"].shape[0] == 1 for batch in batches)
    return compared(
        "levers.packing",
        None if asked.plan is None else str(bool(asked.plan.recipe.levers.packing)),
        str(packed),
        "position_ids and rows of the collated batches",
        "the collator must be the one that build made",
    )


def _counts(live: Live, asked: Asked) -> Iterator[Reading]:
    found = {"train": live.train_samples, "eval": live.eval_samples}
    if live.train_samples is None and hasattr(live.trainer.train_dataset, "__len__"):
        found["train"] = len(live.trainer.train_dataset)
    wanted = {"train": asked.facts.train_samples, "eval": asked.facts.eval_samples}
    for name in ("train", "eval"):
        if found[name] is not None:
            yield compared(
                f"data.{name} (samples)",
                None if wanted[name] is None else f"{wanted[name]:,}",
                f"{found[name]:,}",
                "rows that the trainer has, after the split and without what was left out",
                "data.limit, data.max_broken and data.eval decide how many are left: memfit check tells why",
            )


def marked_text(live: Live, limit: int = 4000) -> str:
    """The first sample as it is trained, decoded, what carries loss between [[ and ]]; "" where nobody decodes."""
    if live.decode is None:
        return ""
    batches = list(live.batches[:1]) or [batch for batch, _ in drawn(live)[:1]]
    if not batches:
        return ""
    ids, labels = batches[0]["input_ids"][0].tolist(), batches[0]["labels"][0].tolist()
    pieces: list[str] = []
    first = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or (labels[place] != IGNORED) != (labels[first] != IGNORED):
            text = _decoded(live, ids[first:place])
            pieces.append(f"{OPEN}{text}{CLOSE}" if labels[first] != IGNORED else text)
            first = place
    return "".join(pieces)[:limit]


def _decoded(live: Live, ids: list[int]) -> str:
    """Text of a stretch of tokens; a run of image tokens is told by its number."""
    pieces, at, token = [], 0, live.image_token_id
    while at < len(ids):
        stop = at
        if ids[at] == token:
            while stop < len(ids) and ids[stop] == token:
                stop += 1
            pieces.append(f"<{stop - at} image tokens>")
        else:
            while stop < len(ids) and ids[stop] != token:
                stop += 1
            pieces.append(live.decode(ids[at:stop]) if live.decode is not None else "")
        at = stop
    return "".join(pieces)
