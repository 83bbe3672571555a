"""The longest samples of a user's own data set: read by their ids, else through the user's collator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.errors import UserError
from memfit.planner.worst import Chosen, worst_batches
from memfit.specs.workload import SampleCost

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index
LOOKED_AT = 2000  # samples that are drawn one by one: each costs what a training step's loading costs
IDS = "input_ids"

Progress = Callable[[str, int, int | None], None]
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The worst micro-batches as samples, as the collator makes them, and what was looked at.

    `places` of each chosen batch are places in `samples`. `mean_share`: tokens of the mean sample as a share of the
    longest. `note`: what was not looked at.
    """

    samples: tuple[Any, ...]
    names: tuple[str, ...]
    chosen: tuple[Chosen, ...]
    batches: tuple[Batch, ...]
    looked_at: int
    longest: int
    mean_share: float
    note: str = ""


def worst_of(trainer: Any, dataset: Any, progress: Progress) -> Found:
    """The worst micro-batch of `dataset`. UserError for data without a sample."""
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    lengths, drawn, note = _lengths(dataset, collate, progress)
    if not lengths:
        raise UserError("the training data hold no sample", "give the Trainer a train_dataset before memfit.prove")
    places = list(lengths)
    costs = [SampleCost(lengths[place], 0, 0, 0, 0) for place in places]
    chosen = worst_batches(costs, int(trainer._train_batch_size))
    needed = list(dict.fromkeys(place for batch in chosen for place in batch.places))
    # Drawn again by its number: a sample that is made anew each time is then the one that the run would get.
    samples = tuple(drawn[places[n]] if places[n] in drawn else dataset[places[n]] for n in needed)
    local = tuple(Chosen(each.reason, tuple(needed.index(p) for p in each.places)) for each in chosen)
    batches = tuple(collate([samples[place] for place in each.places]) for each in local)
    longest = max(lengths.values())
    mean = sum(lengths.values()) / len(lengths)
    names = tuple(str(places[n]) for n in needed)
    return Found(samples, names, local, batches, len(lengths), longest, min(1.0, mean / max(longest, 1)), note)


def _lengths(dataset: Any, collate: Any, progress: Progress) -> tuple[dict[int, int], dict[int, Any], str]:
    """(place -> tokens, samples that cannot be drawn again by their place, what was not looked at)."""
    column = _column(dataset)
    if column is not None:
        return dict(enumerate(column)), {}, ""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        first = dict(enumerate(itertools.islice(iter(dataset), LOOKED_AT)))
        lengths = _measured(first.items(), len(first), collate, progress)
        return lengths, first, f"the first {len(first):,} samples of a stream were looked at: later ones may be longer"
    count = len(dataset)
    looked = sorted({count * place // min(count, LOOKED_AT) for place in range(min(count, LOOKED_AT))})
    lengths = _measured(((place, dataset[place]) for place in looked), len(looked), collate, progress)
    note = f"{len(looked):,} of {count:,} samples were looked at, evenly spread: others may be longer"
    return lengths, {}, "" if len(looked) == count else note


def _measured(samples: Any, count: int, collate: Any, progress: Progress) -> dict[int, int]:
    found = {}
    for done, (place, sample) in enumerate(samples):
        if done % 100 == 0:
            progress("looking for the longest sample", done, count)
        found[place] = _length(sample, collate)
    return found


def _column(dataset: Any) -> Iterator[int] | None:
    """Lengths of a whole column of ids, where the data set is a table that is tokenised already."""
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, Sequence) or IDS not in names:
        return None
    return (len(ids) for ids in dataset[IDS])


def _length(sample: Any, collate: Any) -> int:
    """Tokens of one sample: of its ids, else of the batch that the user's collator makes of it alone."""
    ids = sample.get(IDS) if isinstance(sample, Mapping) else None
    if ids is not None:
        return int(ids.shape[-1]) if hasattr(ids, "shape") else len(ids)
    batch = collate([sample])
    if IDS not in batch:
        raise UserError(
            f"the collator's batches hold {', '.join(map(str, batch))}, no {IDS}",
            "memfit.prove is for models that read token ids",
        )
    return int(batch[IDS].shape[-1])


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch, padding left out."""
    mask = batch.get("attention_mask")
    return int(batch[IDS].numel()) if mask is None or mask.dim() != 2 else int(mask.sum())


def trained_of(batch: Batch) -> int | None:
    """Tokens of a batch that carry loss; None where the batch has no labels."""
    labels = batch.get("labels")
    return None if labels is None or labels.dim() < 2 else int((labels[..., 1:] != IGNORED).sum())
