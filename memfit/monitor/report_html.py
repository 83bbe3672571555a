"""One self-contained HTML file about one run, or several side by side: no script, no font, no request to anywhere.

What the sentences say is decided in findings.py, the figures in tables.py, the pictures in charts.py and examples.py;
this file puts them on the page.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from memfit.inputs.run_folder import write_text
from memfit.monitor import tables
from memfit.monitor.examples import Example, make_examples
from memfit.monitor.findings import (
    Finding,
    facts,
    findings,
    headline,
    score_name,
    seed_summary,
    with_interval,
)
from memfit.monitor.glance import GlanceGroup, glance
from memfit.monitor.learned import SAME, says_what_it_learned
from memfit.monitor.proof_picture import picture
from memfit.monitor.proof_tables import checks_table, groups_table, memory_table, tensors_table, verdict
from memfit.monitor.run_charts import Drawn, overlaid_charts, run_charts
from memfit.monitor.run_records import RunRecord, number
from memfit.specs.evaluation import Score

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ProofSection:
    """What was proved before the run: a sentence, every lever read back, memory, and the picture."""

    verdict: str
    checks: tables.Table
    memory: tuple[tables.Table, ...]
    picture: Markup


@dataclass(frozen=True)
class Page:
    """All about one run. `sections` are the anchors that exist on this page."""

    name: str
    anchor: str
    headline: str
    lead: str
    facts: list[tuple[str, str]]
    findings: list[Finding]
    glance: list[GlanceGroup]
    glance_note: str
    scores: tables.Table | None
    reading: tables.Table | None
    fields: tables.Table | None
    slices: tables.Table | None
    examples: list[Example]
    has_base: bool
    charts: list[Drawn]
    forecast: tables.Table | None
    proof: ProofSection | None
    environment: list[tuple[str, str]]
    recipe: list[tuple[str, str]]
    sections: list[tuple[str, str]]


def report_html(runs: Sequence[RunRecord], out: Path) -> Path:
    """Write the report of `runs` to `out`, whole or not at all, and return `out`. Raises RunFailed on a full disk."""
    write_text(out, render(runs))
    return out


def render(runs: Sequence[RunRecord]) -> str:
    """The page as text. Texts of the runs are escaped; half surrogates become U+FFFD."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages = [_page(run, f"run{place}-") for place, run in enumerate(runs)]
    several = _several(runs) if len(runs) > 1 else None
    html = environment.get_template("report.html").render(
        title=f"memfit report: {', '.join(run.name for run in runs)}",
        kicker=_kicker(runs),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        pages=pages,
        several=several,
        version=_version(),
        sources=", ".join(str(run.path) for run in runs),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def _page(run: RunRecord, anchor: str) -> Page:
    tuned, base = run.tuned, run.base
    named = tables.named_evaluations([run])
    structured = tuned is not None and tuned.task != "text"
    page = Page(
        name=run.name,
        anchor=anchor,
        headline=headline(run),
        lead=_lead(run),
        facts=facts(run),
        findings=findings(run),
        glance=glance([run]),
        glance_note=_glance_note(run),
        scores=tables.scores_table(named) if named else None,
        reading=tables.reading_table(named) if named else None,
        fields=tables.fields_table(base, tuned) if tuned is not None and structured else None,
        slices=tables.slices_table(tuned) if tuned is not None else None,
        examples=make_examples(tuned, base) if tuned is not None else [],
        has_base=base is not None,
        charts=[_safe(chart) for chart in run_charts(run)],
        forecast=tables.forecast_table(run),
        proof=_proof(run.proof) if run.proof else None,
        environment=tables.environment_rows(run),
        recipe=tables.recipe_rows(run),
        sections=[],
    )
    there = [
        ("scores", "Scores", page.scores),
        ("documents", "Documents", page.examples),
        ("training", "Training", page.charts),
        ("forecast", "Forecast against measured", page.forecast),
        ("proof", "Proof", page.proof),
        ("recipe", "Environment and recipe", page.environment or page.recipe),
    ]
    return replace(page, sections=[(key, name) for key, name, content in there if content])


def _several(runs: Sequence[RunRecord]) -> dict[str, Any]:
    named = tables.named_evaluations(runs)
    return {
        "title": f"{len(runs)} runs side by side",
        "summary": seed_summary(runs),
        "findings": [
            replace(row, text=f"{run.name}: {row.text}") for run in runs for row in findings(run) if row.tone == "warn"
        ],
        "differences": tables.differences_table(runs),
        "learned": tables.learned_table(runs),
        "learned_same": SAME if all(map(says_what_it_learned, runs)) else "",
        "runs": tables.runs_table(runs),
        "glance": glance(runs),
        "names": [run.name for run in runs],
        "scores": tables.scores_table(named) if named else None,
        "charts": [_safe(chart) for chart in overlaid_charts(runs)],
    }


def _proof(proof: Mapping[str, Any]) -> ProofSection:
    """The section on a proof; canvas.py escapes every text of its picture."""
    found = (memory_table(proof), groups_table(proof), tensors_table(proof))
    return ProofSection(
        verdict(proof), checks_table(proof), tuple(table for table in found if table), Markup(picture(proof))
    )


def _safe(chart: Drawn) -> Drawn:
    """charts.py escapes every text that it puts into a picture."""
    return replace(chart, picture=Markup(chart.picture))


def _lead(run: RunRecord) -> str:
    pair, tuned = run.comparison, run.tuned
    if pair is None or tuned is None:
        return ""
    gap = pair.difference["normalised"].get(pair.headline, Score(None))
    return f"Difference {with_interval(gap, signed=True)}, both models on the same documents of {tuned.data}."


def _glance_note(run: RunRecord) -> str:
    tuned = run.tuned
    if tuned is None:
        return ""
    of = score_name(tuned.headline)
    return f"{of[0].upper()}{of[1:]}, normalised, by free decoding; the bar is the 95% interval over documents."


def _kicker(runs: Sequence[RunRecord]) -> str:
    times = [value for run in runs for row in run.events if (value := number(row.get("time"))) is not None]
    names = ", ".join(run.name for run in runs)
    if not times:
        return names
    return f"{names} · {datetime.datetime.fromtimestamp(max(times)):%Y-%m-%d %H:%M}"


def _version() -> str:
    import memfit

    return memfit.__version__
