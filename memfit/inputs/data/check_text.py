"""A check report as plain lines of text: the verdict first, then what to mend, then what is there."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.specs.check import REASONS, Broken, CheckReport, FieldStats, RankedSample, shortened_text

_BROKEN_SHOWN = 3  # rows shown of each reason
_FIELDS_SHOWN = 20
_KEYS_SHOWN = 6
_BAR = " .:-=+*#%@"


def report_lines(report: CheckReport) -> list[str]:
    """The whole report, one line an entry, none of them ending in white space."""
    sections = [
        _verdict(report),
        _files(report),
        _broken(report),
        _shortened(report),
        _findings(report),
        _distributions(report),
        _worst(report.worst),
        _fields(report.fields, report.fields_left_out),
    ]
    lines: list[str] = []
    for section in sections:
        if section:
            lines += ["", *section] if lines else section
    return [line.rstrip() for line in lines]


def _verdict(report: CheckReport) -> list[str]:
    if report.verdict == "refused":
        return ["data: refused", *(f"  {reason}" for reason in report.refusals)]
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    parts = []
    if report.broken:
        parts.append(f"{_count(len(report.broken), 'broken row')} left out")
    if report.shortened:
        parts.append(f"{_count(len(report.shortened), 'sample')} shortened to max_length")
    if warnings:
        parts.append(_count(warnings, "warning"))
    return [f"data: {'ok' if report.verdict == 'ok' else 'usable, ' + ', '.join(parts)}"]


def _files(report: CheckReport) -> list[str]:
    lines = []
    for file in report.files:
        how = "detected" if file.format_detected else "as given"
        lines.append(
            f"{file.source:<6} {file.path} ({file.format}, {how}): {_count(file.rows, 'row')}, {file.broken:,} broken"
        )
        if file.ignored_keys:
            names = list(file.ignored_keys)
            more = f" and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
            lines.append(f"       keys that the format does not know, ignored: {', '.join(names[:_KEYS_SHOWN])}{more}")
    held = f", {report.eval_samples:,} to evaluate" if report.split.kind != "none" else ", none held out"
    how = f" (share {report.split.share:g}, split by picture, seed {report.split.seed})" if report.split.share else ""
    lines.append(f"use    {report.train_samples:,} samples to train{held}{how}")
    if report.split.note:
        lines.append(f"       {report.split.note}")
    images = report.images
    if images.files:
        sizes = ""
        if images.smallest and images.largest:
            sizes = f", {_size(images.smallest)} to {_size(images.largest)}"
            sizes = f", all {_size(images.smallest)}" if images.smallest == images.largest else sizes
        lines.append(
            f"images {_count(images.files, 'file')}, {images.decoded:,} decoded whole, {images.broken:,} broken{sizes}"
        )
    return lines


def _broken(report: CheckReport) -> list[str]:
    if not report.broken:
        return []
    lines = ["broken rows"]
    for reason, count in report.reason_counts().items():
        lines.append(f"  {reason:<22} {count:>7,}  {REASONS[reason]}")
        lines += [f"    {_broken_row(row)}" for row in _of_reason(report.broken, reason)[:_BROKEN_SHOWN]]
    if report.quarantine:
        lines.append(f"  all of them: {', '.join(report.quarantine)}")
    return lines


def _shortened(report: CheckReport) -> list[str]:
    if not report.shortened:
        return []
    used = report.train_samples + report.eval_samples
    lines = [shortened_text(report.shortened, used, report.max_length)]
    longest = sorted(report.shortened, key=lambda row: -row.tokens)[:_BROKEN_SHOWN]
    return lines + [f"    {row.text}" for row in longest]


def _of_reason(broken: Sequence[Broken], reason: str) -> list[Broken]:
    return [row for row in broken if row.reason == reason]


def _broken_row(row: Broken) -> str:
    line = f" (line {row.line})" if row.line is not None else ""
    return f"{row.source} row {row.row}{line}: {row.detail}"


def _findings(report: CheckReport) -> list[str]:
    if not report.findings:
        return ["quality: nothing found"]
    lines = ["quality"]
    for finding in report.findings:
        lines.append(f"  {finding.severity:<8} {finding.code:<26} {finding.count:>7,}  {finding.summary}")
        lines += [f"    {example}" for example in finding.examples]
    return lines


def _distributions(report: CheckReport) -> list[str]:
    if not report.distributions:
        why = "no model was given" if report.train_samples else "no usable sample"
        return [f"tokens, crops and patches were not counted: {why}"]
    lines = [f"{'per sample':<15}{'mean':>10}{'min':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}  histogram, min to max"]
    for one in report.distributions:
        numbers = "".join(f"{value:>9,.0f}" for value in (one.minimum, one.p50, one.p90, one.p99, one.maximum))
        lines.append(f"  {one.name:<13}{one.mean:>10,.1f}{numbers}  |{_bars(one.counts)}|")
    return lines


def _bars(counts: Sequence[int]) -> str:
    """One character a bin; every bin that is not empty shows."""
    top = max(counts)
    last = len(_BAR) - 1
    return "".join(_BAR[max(1, round(last * count / top))] if count else _BAR[0] for count in counts)


def _worst(worst: Sequence[RankedSample]) -> list[str]:
    if not worst:
        return []
    lines = ["most expensive samples"]
    for one in worst:
        cost = one.cost
        sizes = ", ".join(_size(size) for size in one.image_sizes[:4]) + (" ..." if len(one.image_sizes) > 4 else "")
        figures = f"{cost.tokens:,} tokens, {_count(cost.crops, 'crop')}, {cost.patches:,} patches"
        lines.append(f"  by {one.by:<8} {one.ref.text} (id {one.id}): {figures}{'; ' + sizes if sizes else ''}")
    return lines


def _fields(fields: Sequence[FieldStats], left_out: int) -> list[str]:
    if not fields:
        return []
    width = max(len(stats.path) for stats in fields[:_FIELDS_SHOWN])
    lines = [f"{'JSON field of the answers':<{max(width + 2, 25)}} {'filled':>8} {'distinct':>9}  most frequent value"]
    for stats in fields[:_FIELDS_SHOWN]:
        distinct = f"{'>=' if stats.distinct_capped else ''}{stats.distinct:,}"
        top = f"{stats.top_value} ({stats.top_count:,} x)" if stats.filled else ""
        lines.append(f"  {stats.path:<{max(width, 23)}} {stats.fill_rate:>8.1%} {distinct:>9}  {top}")
    hidden = max(0, len(fields) - _FIELDS_SHOWN) + left_out
    if hidden:
        lines.append(f"  and {_count(hidden, 'further field')}")
    return lines


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
