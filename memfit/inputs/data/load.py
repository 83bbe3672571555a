"""The samples that training uses, or one error that says why the data is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memfit.errors import UserError
from memfit.inputs.data.examine import CheckOptions, Examined, SampleEncoder, examine
from memfit.inputs.data.quarantine import write_quarantine
from memfit.inputs.data.split import file_keys, pixel_keys, split_share
from memfit.physics.loader import reading_bytes
from memfit.specs.check import Broken, Loaded, Split
from memfit.specs.recipe import Data
from memfit.specs.sample import Sample
from memfit.specs.workload import SampleCost


def load_samples(data: Data, options: CheckOptions | None = None, encoder: SampleEncoder | None = None) -> Loaded:
    """Read, look at every picture, split. The encoder adds costs, and finds too long samples and control tokens.

    Every picture is decoded once, so that a cut-off file is found now and not at step 5,000. Raises UserError when more
    than `data.max_broken` of a file's rows are broken, none is left, or an evaluation file shows trained pictures.
    """
    options = options or CheckOptions()
    files, split = read_files(data, options, encoder)
    quarantine = quarantine_files(files, options.quarantine)
    refused = [reason for file in files if (reason := refusal(file, data.max_broken))]
    if refused:
        broken = [row for file in files for row in file.broken]
        raise UserError("; ".join(refused) + first_reasons(broken), _hint(files, quarantine))
    _refuse_leaks(files)
    return assemble(files, split)


def read_files(
    data: Data, options: CheckOptions, encoder: SampleEncoder | None = None, thumbs: bool = False
) -> tuple[list[Examined], Split]:
    """The training file, the evaluation file where there is one, and which rows are on which side."""
    share = _share(data)
    files = [examine(data, "train", options, encoder, thumbs)]
    rows = [sample.row for sample in files[0].samples]
    if isinstance(data.eval, str):
        files.append(examine(data, "eval", options, encoder, thumbs))
        return files, Split("file", tuple(rows))
    if share is None:
        return files, Split("none", tuple(rows))
    # By whole conversations: what max_length leaves out must not move a sample to the other side.
    whole = [files[0].whole.get(sample.row, sample) for sample in files[0].samples]
    files_shown = [file_keys(sample, files[0].scan) for sample in whole]
    pixels_shown = [pixel_keys(sample, files[0].scan) for sample in whole]
    return files, split_share(rows, files_shown, share, options.seed, pixels_shown)


def _share(data: Data) -> float | None:
    """`data.eval` as a share; None when it is a path or nothing is held out."""
    if data.eval is None or isinstance(data.eval, str) or data.eval == 0:
        return None
    if not 0 < data.eval < 1:
        raise UserError(
            f"data.eval: {data.eval} is no share", "a number above 0 and below 1, or the path of a data file"
        )
    return float(data.eval)


def refusal(file: Examined, max_broken: float) -> str | None:
    """Why a file cannot be used, in one line; None when it can."""
    bad = len(file.broken)
    if not file.samples:
        return f"{file.path}: none of {file.rows:,} rows can be used"
    if bad > max_broken * file.rows:
        share = f"{bad / file.rows:.2%} of {file.rows:,} rows are broken ({bad:,})"
        return f"{file.path}: {share}, data.max_broken allows {max_broken:.2%}"
    return None


def _refuse_leaks(files: Sequence[Examined]) -> None:
    """UserError when the evaluation file shows what is trained on: its figures would measure memory."""
    if len(files) < 2:
        return
    train, evaluation = files
    known = {key for sample in train.samples for key in pixel_keys(sample, train.scan)}
    leaking = [s for s in evaluation.samples if not known.isdisjoint(pixel_keys(s, evaluation.scan))]
    if leaking:
        share = f"{len(leaking):,} of {len(evaluation.samples):,} samples"
        count = f"{share} show a picture (or repeat a text) that is trained on"
        raise UserError(
            f"{evaluation.path}: {count}, the first is row {leaking[0].row}",
            "take them out of one of the files (memfit check lists them), or set data.eval to a share such as 0.1",
        )


def first_reasons(broken: Sequence[Broken], count: int = 3) -> str:
    """The first broken rows as lines, to stand behind a problem."""
    lines = [f"\n  {row.text}" for row in broken[:count]]
    more = f"\n  and {len(broken) - count:,} more" if len(broken) > count else ""
    return "".join(lines) + more


def _hint(files: Sequence[Examined], quarantine: Sequence[Path]) -> str:
    outside = [row for file in files for row in file.broken if row.reason == "outside-root"]
    wider = next((file.wider_root for file in files if file.wider_root), None)
    if wider and 2 * len(outside) > sum(len(file.broken) for file in files):
        return f"data.image_root: {wider}"
    broken = [row for file in files for row in file.broken]
    if 2 * sum(row.reason == "too-long" for row in broken) > len(broken):
        return "max_length: auto takes every sample whole; or fewer slices of each picture (image.max_slices)"
    if quarantine:
        return f"all broken rows with their reasons are in {', '.join(map(str, quarantine))}"
    return "memfit check lists every broken row; mend them, or raise data.max_broken to go on without them"


def quarantine_files(files: Sequence[Examined], folder: Path | None) -> list[Path]:
    """Write the quarantine file of every data file that has broken rows; nothing when `folder` is None."""
    if folder is None:
        return []
    return [write_quarantine(file.broken, file.path, folder) for file in files if file.broken]


def assemble(files: Sequence[Examined], split: Split) -> Loaded:
    """The two sides of `split` as samples with their costs."""
    train = files[0]
    held = set(split.eval)
    kept = [index for index, sample in enumerate(train.samples) if sample.row not in held]
    out = [index for index, sample in enumerate(train.samples) if sample.row in held]
    evaluation = files[1] if len(files) > 1 else None
    shown = [(path, file.facts(path)) for file in files for sample in file.samples for path in sample.images]
    return Loaded(
        train=_pick_samples(train, kept),
        eval=tuple(evaluation.samples) if evaluation else _pick_samples(train, out),
        broken=tuple(row for file in files for row in file.broken),
        split=split,
        train_costs=_pick_costs(train, kept),
        eval_costs=tuple(evaluation.costs) if evaluation else _pick_costs(train, out),
        shortened=tuple(row for file in files for row in file.shortened),
        reading=max((reading_bytes(one.width, one.height, path.suffix) for path, one in shown), default=0),
        most_pixels=max((one.width * one.height for _, one in shown), default=0),
    )


def _pick_samples(file: Examined, indices: Sequence[int]) -> tuple[Sample, ...]:
    return tuple(file.samples[index] for index in indices)


def _pick_costs(file: Examined, indices: Sequence[int]) -> tuple[SampleCost, ...]:
    return tuple(file.costs[index] for index in indices) if file.costs else ()
