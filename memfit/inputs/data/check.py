"""`memfit check`: read everything, decode everything, count everything, and say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memfit.inputs.data.answers import field_table, parse_answer
from memfit.inputs.data.examine import CheckOptions, Examined, SampleEncoder
from memfit.inputs.data.load import quarantine_files, read_files, refusal
from memfit.inputs.data.quality import Item, find_all
from memfit.inputs.data.scan import ImageFacts
from memfit.inputs.data.stats import distribution
from memfit.specs.check import (
    CheckReport,
    Distribution,
    FileSummary,
    Finding,
    ImageSummary,
    RankedSample,
    Source,
    Split,
    Verdict,
)
from memfit.specs.recipe import Data
from memfit.specs.workload import SampleCost, Workload

_WORST = 3  # samples named for each figure
_FIGURES = ("tokens", "trained_tokens", "image_tokens", "crops", "patches")


def check_data(data: Data, encoder: SampleEncoder | None = None, options: CheckOptions | None = None) -> CheckReport:
    """Examine the training and evaluation data and report; broken rows never stop it.

    Without an encoder tokens are not counted, and control tokens in texts and too long samples are not found.
    Raises UserError when a data file cannot be read at all.
    """
    options = options or CheckOptions()
    files, split = read_files(data, options, encoder, thumbs=True)
    items = [item for file in files for item in _items(file, split)]
    training = [item for item in items if item.source == "train"]
    fields, left_out = field_table(
        value for item in training if (value := parse_answer(item.sample.answer)) is not None
    )
    findings = find_all(items, fields)
    costs = [item.cost for item in training if item.cost is not None]
    refusals = _refusals(files, data, findings)
    return CheckReport(
        verdict=_verdict(refusals, findings, files),
        refusals=refusals,
        files=tuple(_summary(file) for file in files),
        max_broken=data.max_broken,
        train_samples=len(training),
        eval_samples=len(items) - len(training),
        split=split,
        broken=tuple(row for file in files for row in file.broken),
        quarantine=tuple(str(path) for path in quarantine_files(files, options.quarantine)),
        images=_images(files),
        findings=findings,
        fields=fields,
        fields_left_out=left_out,
        distributions=_distributions(costs),
        worst=_worst(training),
        workload=workload_of(costs),
        shortened=tuple(row for file in files for row in file.shortened),
        max_length=options.max_length,
    )


def workload_of(costs: Sequence[SampleCost]) -> Workload | None:
    """The workload of these samples: the worst is the one with the most tokens, patches deciding between equals."""
    if not costs:
        return None
    worst = max(costs, key=lambda cost: (cost.tokens, cost.patches))
    means = {name: round(float(np.mean([getattr(cost, name) for cost in costs]))) for name in _FIGURES}
    return Workload(worst=worst, mean=SampleCost(**means), samples=len(costs), source="data")


def _items(file: Examined, split: Split) -> list[Item]:
    """The usable samples, those that the split holds out as evaluation samples."""
    held = set(split.eval)
    items = []
    for index, sample in enumerate(file.samples):
        side: Source = "eval" if sample.row in held else file.source
        pictures = tuple(file.facts(path) for path in sample.images)
        items.append(Item(side, sample, pictures, file.costs[index] if file.costs else None))
    return items


def _refusals(files: Sequence[Examined], data: Data, findings: Sequence[Finding]) -> tuple[str, ...]:
    reasons = [reason for file in files if (reason := refusal(file, data.max_broken))]
    reasons += [f"{one.code}: {one.count:,} {one.summary}" for one in findings if one.severity == "error"]
    return tuple(reasons)


def _verdict(refusals: Sequence[str], findings: Sequence[Finding], files: Sequence[Examined]) -> Verdict:
    if refusals:
        return "refused"
    warned = any(finding.severity == "warning" for finding in findings)
    warned = warned or any(file.broken or file.shortened for file in files)
    return "warnings" if warned else "ok"


def _summary(file: Examined) -> FileSummary:
    return FileSummary(
        source=file.source,
        path=str(file.path),
        format=file.format,
        format_detected=file.detected,
        rows=file.rows,
        used=len(file.samples),
        broken=len(file.broken),
        ignored_keys=dict(file.ignored.most_common()),
    )


def _images(files: Sequence[Examined]) -> ImageSummary:
    every = {path: found for file in files for path, found in file.scan.items()}
    good = [found for found in every.values() if isinstance(found, ImageFacts)]
    sizes = sorted(((fact.width, fact.height) for fact in good), key=lambda size: size[0] * size[1])
    return ImageSummary(
        files=len(every),
        decoded=len(good),
        broken=len(every) - len(good),
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
    )


def _distributions(costs: Sequence[SampleCost]) -> tuple[Distribution, ...]:
    made = (distribution(name, [getattr(cost, name) for cost in costs]) for name in _FIGURES)
    return tuple(one for one in made if one is not None)


def _worst(training: Sequence[Item]) -> tuple[RankedSample, ...]:
    """The training samples with the most tokens, and those with the most patches."""
    counted = [(item, item.cost) for item in training if item.cost is not None]
    ranked = []
    for figure in ("tokens", "patches"):
        for item, cost in sorted(counted, key=lambda pair: -getattr(pair[1], figure))[:_WORST]:
            if getattr(cost, figure):
                sizes = tuple((fact.width, fact.height) for fact in item.pictures)
                ranked.append(RankedSample(figure, item.ref, item.sample.id, cost, sizes))
    return tuple(ranked)
