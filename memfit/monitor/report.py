"""`memfit report`: read run folders, say what happened, and leave the page beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memfit.monitor.report_html import report_html
from memfit.monitor.report_text import report_text
from memfit.monitor.run_records import read_runs


def write_report(runs: Sequence[Path], out: Path | None = None) -> tuple[str, Path]:
    """The report on `runs` as text, and the HTML file it was written to.

    The file is `out`, or in the first run's folder report.html (side-by-side.html for several runs).

    Raises UserError for a folder that holds no run, RunFailed when the file cannot be written.
    """
    records = read_runs(runs)
    # A page on several runs has a name of its own, so that the first run's own page is not replaced.
    name = "report.html" if len(records) == 1 else "side-by-side.html"
    return report_text(records), report_html(records, out or records[0].path / name)
