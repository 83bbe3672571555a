"""The report: what it says, that it stands alone, and that it survives what a crash leaves behind."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memfit.errors import UserError
from memfit.evaluation.results import compare, score
from memfit.monitor import charts, tables
from memfit.monitor.examples import SIDE, choose, picture_uri, pieces
from memfit.monitor.findings import Finding, findings, headline, seed_summary, short_names
from memfit.monitor.glance import glance
from memfit.monitor.report_html import render, report_html
from memfit.monitor.report_text import report_text
from memfit.monitor.run_records import RunRecord, read_run, read_runs, recipe_differences
from memfit.specs.evaluation import Document
from memfit.testing.runs import answers, events, make_run, plan, write

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
VOID = {"meta", "img", "br", "link", "input"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / f"demo-00{seed + 1}", seed, 0.97, steps=90, documents=40) for seed in range(2)]


@pytest.fixture
def run(runs: list[Path]) -> RunRecord:
    return read_run(runs[0])


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def said(rows: list[Finding], tone: str) -> str:
    return "\n".join(row.text for row in rows if row.tone == tone)


# ---------------------------------------------------------------- the page stands alone


def test_the_page_is_whole_and_asks_for_nothing(run: RunRecord, tmp_path: Path) -> None:
    path = report_html([run], tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    names = [name for name, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(names)
    for name, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        for key in ("src", "href", "srcset", "action", "poster"):
            value = attributes.get(key) or ""
            assert value.startswith(("data:image/", "#")) or not value, (name, value[:80])
        assert name != "img" or attributes.get("alt")
        assert name != "svg" or attributes.get("aria-label")
    assert "@import" not in html
    assert "url(" not in html
    policies = [row for name, row in page.tags if name == "meta" and row.get("http-equiv")]
    assert policies[0]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_anchors_lead_somewhere_and_ids_are_unique(runs: list[Path]) -> None:
    for chosen in (runs[:1], runs):
        page = Page(render(read_runs(chosen)))
        ids = [row["id"] for _, row in page.tags if "id" in row]
        assert len(ids) == len(set(ids))
        links = [row["href"] for name, row in page.tags if name == "a"]
        assert {link.removeprefix("#") for link in links} <= set(ids)


def test_texts_of_the_run_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    truth = json.dumps({HOSTILE: HOSTILE, "b": [HOSTILE, "1"]})
    documents = [
        Document(id=HOSTILE, truth=truth, predicted=json.dumps({HOSTILE: HOSTILE[:-3], "b": HOSTILE}), image=HOSTILE),
        Document(id="2", truth=truth, predicted=HOSTILE, image=None),
        Document(id="3\ud800", truth='{"a": "\\ud800"}', predicted='{"a": "\ud800 b"}'),
    ]
    evaluation = dataclasses.replace(score(documents, resamples=10), name="tuned", data=HOSTILE, model=HOSTILE)
    write(folder / "eval/tuned.json", evaluation.to_json())
    broken = plan(0)
    broken["recipe"]["model"] = HOSTILE
    broken["forecast"]["missing"] = [HOSTILE]
    write(folder / "plan.json", broken)
    rows = [*events(0, 5), {"event": "failed", "error": HOSTILE}]
    rows[1]["learning_rate"] = {HOSTILE: 1e-4}
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = read_run(folder)
    html = render([run, dataclasses.replace(run, name=HOSTILE)])
    page = Page(html)
    assert "script" not in [name for name, _ in page.tags]
    assert not any(key.startswith("on") for _, row in page.tags for key in row)
    assert "<script>alert(1)</script>" in page.words
    assert "<script>" in report_text([run])


def test_half_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    documents = [Document(id="a", truth='{"a": "\\ud800"}', predicted="\ud800 no JSON")]
    evaluation = score(documents, resamples=5)
    json.dumps(evaluation.to_json(), ensure_ascii=False).encode("utf-8")
    run = RunRecord(tmp_path, "odd\ud800", evaluations=(dataclasses.replace(evaluation, name="tuned"),))
    report_html([run], tmp_path / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what it says


def test_the_first_sentence_quotes_the_comparison(run: RunRecord) -> None:
    pair = run.comparison
    assert pair is not None
    before, after = (part["normalised"]["micro_f1"].value for part in (pair.before, pair.after))
    assert headline(run) == f"Fine-tuning raised field F1 on 40 documents from {before:.3f} to {after:.3f}."
    page = Page(render([run]))
    assert headline(run) in page.words
    assert headline(run) in report_text([run])


def test_scores_in_the_table_are_those_of_the_evaluations(run: RunRecord) -> None:
    table = tables.scores_table(tables.named_evaluations([run]))
    place = table.heads.index("character error rate")
    for row in table.rows:
        evaluation = run.evaluation(row[0].text)
        assert evaluation is not None
        assert row[1].text == f"{evaluation.score.value:.3f}"
        assert row[place].under == f"{evaluation.strict.scores['cer'].value:.3f}"
    assert [row[0].text for row in table.rows][:2] == ["base", "tuned"]


def test_controls_below_the_limit_are_good_news_and_above_it_a_warning(run: RunRecord) -> None:
    assert "with blank pictures" in said(findings(run), "good")
    tuned = run.evaluation("tuned")
    assert tuned is not None
    cheating = dataclasses.replace(tuned, name="tuned-blank", images="blank")
    others = tuple(row for row in run.evaluations if row.name != "tuned-blank")
    warned = findings(dataclasses.replace(run, evaluations=(*others, cheating)))
    assert "With blank pictures tuned-blank still scores" in said(warned, "warn")


def test_forgetting_is_told(run: RunRecord) -> None:
    assert re.search(
        r"On printed-heldout: base-printed 0\.9\d+, tuned-printed .*forgotten", said(findings(run), "warn")
    )


def test_a_difference_that_may_be_nothing_is_a_warning(run: RunRecord) -> None:
    base = run.evaluation("base")
    assert base is not None
    same = compare(base, dataclasses.replace(base, name="tuned"), resamples=50)
    record = RunRecord(
        run.path, "same", evaluations=(base, dataclasses.replace(base, name="tuned")), comparisons=(same,)
    )
    assert "includes 0" in said(findings(record), "warn")
    assert headline(record).startswith("Fine-tuning moved")


def test_an_interval_without_width_is_explained(tmp_path: Path) -> None:
    """Rule of three: no mistake in 40 documents leaves up to 3 / 40 = 7.5%."""
    documents = [dataclasses.replace(row, predicted=row.truth) for row in answers(tmp_path, 40, 1.0, "x")]
    record = RunRecord(tmp_path, "x", evaluations=(dataclasses.replace(score(documents, resamples=20), name="tuned"),))
    assert "up to 7.5% of documents" in said(findings(record), "note")


def test_overfitting_is_told(run: RunRecord) -> None:
    rows = [{"event": "eval", "step": step, "loss": loss} for step, loss in ((1, 0.5), (2, 0.2), (3, 0.3))]
    assert "lowest at step 2 (0.200) and ends at 0.300" in said(
        findings(dataclasses.replace(run, events=tuple(rows))), "warn"
    )


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["demo/data/hand/data.json", "demo/data/print/data.json"], ["hand", "print"]),
        (["a/b/c.json"], ["b/c.json"]),
        (["x/a.json", "x/b.json"], ["a.json", "b.json"]),
        (["a/d.json", "a/b/d.json"], ["d.json", "b/d.json"]),
        ([""], [""]),
        (["", "a/b"], ["", "a/b"]),
    ],
)
def test_short_names(texts: list[str], names: list[str]) -> None:
    assert list(short_names(texts).values()) == names


# ---------------------------------------------------------------- forecast against measured


def gpu_run(folder: Path, forecast: dict[str, Any]) -> RunRecord:
    rows = events(0, 3)
    for row, peak in zip((row for row in rows if row["event"] == "step"), (900, 1500, 1400), strict=True):
        row.update(peak_bytes=peak << 20, reserved_bytes=1600 << 20, seconds=2.0, wait_seconds=0.5)
    return RunRecord(folder, "gpu", plan={"recipe": {}, "forecast": forecast}, events=tuple(rows))


def cells(run: RunRecord) -> dict[str, tuple[str, str]]:
    table = tables.forecast_table(run)
    assert table is not None
    return {row[0].text: (row[1].text, row[2].text) for row in table.rows}


def test_forecast_beside_measured_and_what_is_unexplained(tmp_path: Path) -> None:
    term = {"part": "language", "place": "gpu", "alive": ["backward"], "source": ""}
    forecast = {
        "gpu": {
            "peak_allocated_bytes": 1200 << 20,
            "peak_reserved_bytes": None,
            "peak_phase": "backward",
            "terms": [
                {**term, "id": "weights.a", "name": "weights, a", "bytes": 500 << 20},
                {**term, "id": "weights.b", "name": "weights, b", "bytes": 200 << 20},
                {**term, "id": "activations", "name": "activations", "bytes": 500 << 20},
                {**term, "id": "late", "name": "only at the step", "alive": ["step"], "bytes": 1},
            ],
        },
        "speed": {"step_seconds": 2.0, "tokens_per_second": None},
    }
    found = cells(gpu_run(tmp_path, forecast))
    assert found["weights"] == ("0.68 GiB", "")  # 700 MiB
    assert "only at the step" not in found
    assert found["peak allocated on the GPU"] == ("1.17 GiB", "1.46 GiB")  # 1200 and 1500 MiB
    assert found["peak reserved on the GPU"] == ("not forecast yet", "1.56 GiB")
    assert found["unexplained"] == ("", "+0.29 GiB")  # 300 MiB
    assert found["seconds a step"] == ("2.0 s", "2.5 s")  # waiting for data counts
    assert found["tokens a second"][0] == "not forecast yet"


def test_what_is_not_forecast_is_never_a_zero(run: RunRecord) -> None:
    found = cells(run)
    for what in ("activations", "logits and loss", "peak of the process (RSS)", "seconds a step", "disk"):
        assert found[what][0] == "not forecast yet"
    # 690 + 60 (1 - e^-4.5) = 749.3 MiB in the process at step 90, 56.8 MiB of states forecast: 0.732 and 0.676 GiB
    assert found["unexplained"][1] == found["peak of the process (RSS)"][1].replace("0.73", "0.68")


def test_nothing_measured_says_so(tmp_path: Path) -> None:
    found = cells(RunRecord(tmp_path, "x", plan=plan(0)))
    assert found["unexplained"] == ("", "not measured")
    assert found["seconds a step"] == ("not forecast yet", "not measured")


# ---------------------------------------------------------------- what a crash leaves behind


def test_half_a_last_line(runs: list[Path], tmp_path: Path) -> None:
    lines = (runs[0] / "run.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    (tmp_path / "run.jsonl").write_text("\n".join([*lines, '{"event": "step", "ste']), encoding="utf-8")
    record = read_run(tmp_path)
    assert len(record.events) == 30
    assert "run.jsonl ends in the middle of line 31: the run was cut off while it wrote." in said(
        findings(record), "warn"
    )
    assert "without an end" in said(findings(record), "warn")
    Page(render([record]))
    assert "not evaluated" in report_text([record])


def test_a_damaged_line_in_the_middle_is_counted(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(b'{"event": "start"}\n\xff\xfe\n[1]\n{"event": "end"}\n')
    record = read_run(tmp_path)
    assert [row["event"] for row in record.events] == ["start", "end"]
    assert any("2 of 4 lines cannot be read, the first is line 2" in problem for problem in record.problems)


def test_every_missing_piece_leaves_a_report(runs: list[Path], tmp_path: Path) -> None:
    pieces_of = {"plan.json": "{}", "run.jsonl": "", "data.json": "[]", "eval/tuned.json": '{"kind": "evaluation"}'}
    for name, content in pieces_of.items():
        folder = tmp_path / name.replace("/", "-")
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(content, encoding="utf-8")
        (folder / "eval").mkdir(exist_ok=True)
        record = read_run(folder)
        assert record.problems
        Page(render([record]))
        report_text([record])


def test_a_loss_that_is_not_a_number_is_counted_not_drawn(tmp_path: Path) -> None:
    rows = events(0, 80)
    next(row for row in rows if row.get("step") == 40)["loss"] = "nan"
    html = render([RunRecord(tmp_path, "x", events=tuple(rows))])
    assert "1 steps have no finite loss" in html
    assert not re.search(r'd="M[^"]*nan', html)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(UserError, match="0 runs"):
        read_runs([])


# ---------------------------------------------------------------- several runs


def test_runs_side_by_side(runs: list[Path]) -> None:
    records = read_runs(runs)
    assert recipe_differences(records) == [("seed", ["0", "1"])]
    scores = [record.tuned.score.value for record in records if record.tuned]
    assert f"mean {sum(scores) / 2:.3f}" in (seed_summary(records) or "")
    page, text = Page(render(records)), report_text(records)
    for words in (page.words, text):
        assert words.index("What differs in the recipes") < words.index("Runs side by side")
        assert "tuned, demo-002" in words
    rows = [row for group in glance(records) for row in group.rows]
    assert [len(row.marks) for row in rows] == [2] * 6


def test_other_differences_are_no_seeds(runs: list[Path]) -> None:
    one, two = read_runs(runs)
    recipe = json.loads(json.dumps(two.recipe))
    recipe["schedule"]["learning_rate"] = {"language": 1e-5}
    changed = dataclasses.replace(two, plan={**two.plan, "recipe": recipe})
    keys = dict(recipe_differences([one, changed]))
    assert keys["schedule.learning_rate"] == ["0.0005", "—"]
    assert keys["schedule.learning_rate.language"] == ["—", "1e-05"]
    assert seed_summary([one, changed]) is None


def test_runs_of_the_same_name_are_told_apart(runs: list[Path]) -> None:
    names = [record.name for record in read_runs([runs[0], runs[0]])]
    assert names == [str(runs[0])] * 2
    assert [record.name for record in read_runs(runs)] == ["demo-001", "demo-002"]


# ---------------------------------------------------------------- documents


def test_mistakes_come_first(run: RunRecord) -> None:
    tuned = run.tuned
    assert tuned is not None
    chosen = choose(tuned)
    exact = [document.normalised.exact for document in chosen]
    assert exact == sorted(exact)
    mistakes = [
        len(document.outcomes) - document.normalised.counts.right
        for document in chosen
        if not document.normalised.exact
    ]
    assert mistakes == sorted(mistakes, reverse=True)
    assert mistakes
    assert exact.count(True) == 2


@given(st.text(alphabet="ab10", max_size=8), st.text(alphabet="ab10", max_size=8))
def test_marked_characters_spell_the_answer(truth: str, predicted: str) -> None:
    found = pieces(truth, predicted)
    assert "".join(piece.text for piece in found if piece.kind != "gap") == predicted
    assert (truth == predicted) == all(piece.kind == "same" for piece in found)


def test_marks_by_hand() -> None:
    assert [(p.text, p.kind) for p in pieces("12.50", "13.5")] == [
        ("1", "same"),
        ("3", "wrong"),
        (".5", "same"),
        ("0", "gap"),
    ]
    assert [(p.text, p.kind) for p in pieces(None, "x")] == [("x", "wrong")]


def test_pictures_are_embedded_small(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((1600, 800), 60).save(path)
    uri, reason, size = picture_uri(str(path))
    assert (reason, size) == ("", (SIDE, SIDE // 2))
    kind, content = uri.removeprefix("data:image/").split(";base64,")
    assert kind == "jpeg"  # noise: PNG would be larger
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == size
    path.write_bytes(b"no picture")
    assert picture_uri(str(path))[0] == ""
    assert "no picture" in picture_uri(str(path))[1]
    assert picture_uri(None) == ("", "no picture is recorded", (0, 0))


def test_a_picture_that_is_gone_is_named(run: RunRecord, tmp_path: Path) -> None:
    tuned = run.tuned
    assert tuned is not None
    gone = [
        dataclasses.replace(row, document=dataclasses.replace(row.document, image="no/such.png"))
        for row in tuned.documents
    ]
    record = RunRecord(tmp_path, "x", evaluations=(dataclasses.replace(tuned, documents=tuple(gone)),))
    page = Page(render([record]))
    assert "no/such.png does not exist" in page.words
    assert "img" not in [name for name, _ in page.tags]


def test_a_report_on_plain_texts(tmp_path: Path) -> None:
    documents = [Document(id=str(n), truth=f"Paris {n}", predicted="Paris 1") for n in range(3)]
    record = RunRecord(tmp_path, "t", evaluations=(dataclasses.replace(score(documents, resamples=5), name="tuned"),))
    page, text = Page(render([record])), report_text([record])
    assert "reaches ANLS*" in text
    assert "valid JSON" not in page.words
    assert "Field by field" not in page.words


# ---------------------------------------------------------------- charts and text


def test_ticks() -> None:
    assert charts.nice_ticks(0, 1) == [0, 0.5, 1.0]
    assert charts.nice_ticks(0, 760) == [0, 200, 400, 600]
    assert charts.nice_ticks(1, 375) == [100, 200, 300]
    assert charts.nice_ticks(3, 3) == [3]
    assert charts.log_ticks(0.03, 3.2) == pytest.approx([0.03, 0.1, 0.3, 1, 3])


def test_smoothing_and_thinning_keep_the_mean() -> None:
    line = [(float(x), float(x % 2)) for x in range(1000)]
    assert charts.smooth([(0, 0.0), (1, 3.0), (2, 6.0)], 3) == ((0, 1.5), (1, 3.0), (2, 4.5))
    thin = charts.thin(line, 100)
    assert len(thin) == 100
    assert {y for _, y in thin} == {0.5}
    assert charts.thin(line[:5]) == tuple(line[:5])


def test_a_chart_places_its_points() -> None:
    """Two points of a chart that starts at zero: the ends of the axis are where the constants say."""
    series = charts.Series("a", ((0.0, 0.0), (10.0, 1.0)))
    picture = charts.svg(charts.Chart("t", (series,), str, zero=True))
    match = re.search(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', picture)
    assert match
    x0, y0, x1, y1 = map(float, match.groups())
    assert (x0, y0, x1) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM, charts.WIDTH - charts.RIGHT)
    assert charts.TOP < y1 < charts.TOP + 15  # 6% of room above the largest value
    assert charts.svg(charts.Chart("t", (), str)) == ""
    assert charts.svg(charts.Chart("t", (charts.Series("a", ((0.0, float("nan")),)),), str)) == ""


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    lines = tuple(charts.Series(f"run {n}", ((0.0, 1.0), (5.0, 2.0 + n / 1000)), n) for n in range(5))
    picture = charts.svg(charts.Chart("t", lines, str))
    heights = sorted(float(y) for y in re.findall(r'class="name c\d" x="[\d.]+" y="([\d.]+)"', picture))
    assert len(heights) == 5
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(heights))


def test_text_columns_align_with_wide_signs() -> None:
    table = tables.Table(
        "T", ("field", "n"), ((tables.Cell("合计"), tables.Cell("5")), (tables.Cell("total"), tables.Cell("15")))
    )
    from memfit.monitor.report_text import table_text

    assert table_text(table).splitlines() == ["T", "  field   n", "  合计    5", "  total  15"]


def test_text_is_plain(run: RunRecord) -> None:
    text = report_text([run])
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 200
