"""Checking and loading whole files: every reason code, every finding, quarantine, refusals, the report's text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memfit.errors import UserError
from memfit.inputs.data import CheckOptions, check_data, load_samples, report_lines, write_quarantine
from memfit.inputs.data.quality import KINDS
from memfit.specs.check import REASONS, Broken, CheckReport
from memfit.specs.recipe import Data
from memfit.specs.sample import Sample
from memfit.specs.workload import SampleCost


class CountingEncoder:
    """One token a word, ten a picture, one patch for every 100 pixels. `<|end|>` is its only control token."""

    def encode(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> tuple[Sample, Sequence[tuple[int, int]]]:
        if "refuse me" in sample.turns[0].text:
            raise UserError(f"row {sample.row}: the template says no", "change it")
        return sample, sizes

    def sample_cost(self, encoded: tuple[Sample, Sequence[tuple[int, int]]]) -> SampleCost:
        sample, sizes = encoded
        words = sum(len(turn.text.split()) for turn in sample.turns)
        return SampleCost(
            tokens=words + 10 * len(sizes),
            trained_tokens=len(sample.answer.split()),
            image_tokens=10 * len(sizes),
            crops=len(sizes),
            patches=sum(width * height // 100 for width, height in sizes),
        )

    def special_tokens_in(self, text: str) -> list[str]:
        return ["<|end|>"] * text.count("<|end|>")


class Folder:
    """A data folder in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Any] = []

    def picture(self, name: str, size: tuple[int, int] = (40, 30), seed: int | None = None) -> str:
        seed = len(self.rows) if seed is None else seed
        values = np.random.default_rng([seed, *size]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(self.path / name)
        return name

    def add(self, answer: str = '{"a": 1}', question: str = "<image> Read.", image: Any = None, **more: Any) -> dict:
        """One good row with a picture of its own, unless it is told otherwise."""
        name = self.picture(f"{len(self.rows)}.png") if image is None else image
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self.rows.append({"image": name, "conversations": said, **more})
        return self.rows[-1]

    def write(self, name: str = "data.json") -> Path:
        target = self.path / name
        target.write_text(json.dumps(self.rows, indent=1))
        return target

    def data(self, **more: Any) -> Data:
        return Data(**{"train": str(self.write()), "eval": None, "max_broken": 1.0, **more})

    def check(self, encoder: Any = None, options: CheckOptions | None = None, **more: Any) -> CheckReport:
        return check_data(self.data(**more), encoder, options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "d").mkdir()
    return Folder(tmp_path / "d")


def codes(report: CheckReport) -> dict[str, int]:
    return {finding.code: finding.count for finding in report.findings}


# ---------------------------------------------------------------- broken rows


def cut(folder: Folder) -> None:
    path = folder.path / folder.add()["image"]
    path.write_bytes(path.read_bytes()[:-500])


def oversized(folder: Folder) -> None:
    name = folder.add()["image"]
    header = bytearray((folder.path / name).read_bytes())
    header[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (folder.path / name).write_bytes(bytes(header))


def unreadable(folder: Folder) -> None:
    (folder.path / folder.add()["image"]).write_text("not a picture")


def outside(folder: Folder) -> None:
    folder.picture("../secret.png")
    folder.add(image="../secret.png")


PROVOKE: dict[str, Callable[[Folder], Any]] = {
    "bad-row": lambda folder: folder.rows.append([1]),
    "unknown-key": lambda folder: folder.rows.append({"image": "0.png", "conversation": []}),
    "no-assistant-turn": lambda folder: folder.add().update(conversations=[{"role": "user", "content": "<image>"}]),
    "empty-answer": lambda folder: folder.add(answer=" "),
    "turn-order": lambda folder: folder.add()["conversations"].append({"role": "user", "content": "And?"}),
    "placeholder-count": lambda folder: folder.add(question="<image> <image>"),
    "remote-image": lambda folder: folder.add(image="https://example.org/a.png"),
    "outside-root": outside,
    "missing-image": lambda folder: folder.add(image="none.png"),
    "unreadable-image": unreadable,
    "truncated-image": cut,
    "oversized-image": oversized,
    "special-token-in-text": lambda folder: folder.add(answer="1 <|end|>"),
    "too-long": lambda folder: folder.add(answer="word " * 100),
    "cannot-encode": lambda folder: folder.add(question="<image> refuse me"),
}


@pytest.mark.parametrize("reason", PROVOKE)
def test_every_reason(folder: Folder, reason: str) -> None:
    folder.add()
    PROVOKE[reason](folder)
    folder.add()
    report = folder.check(CountingEncoder(), CheckOptions(max_length=50))
    assert [(row.row, row.reason) for row in report.broken] == [(1, reason)]
    assert report.broken[0].detail
    assert (report.train_samples, report.files[0].used, report.files[0].rows) == (2, 2, 3)
    assert report.verdict == "warnings"
    text = "\n".join(report_lines(report))
    assert reason in text
    assert REASONS[reason] in text
    assert f"train row 1 (line {report.broken[0].line})" in text


def test_bad_json_is_a_reason_of_jsonl(folder: Folder) -> None:
    good = json.dumps(folder.add())
    (folder.path / "data.jsonl").write_text(f"{good}\n{{broken\n{good}\n")
    report = check_data(Data(train=str(folder.path / "data.jsonl"), eval=None, max_broken=0.5))
    assert [(row.row, row.line, row.reason) for row in report.broken] == [(1, 2, "bad-json")]
    assert set(PROVOKE) | {"bad-json"} == set(REASONS)


def test_too_long_gives_the_numbers(folder: Folder) -> None:
    folder.add(answer="word " * 100)
    folder.add()
    detail = folder.check(CountingEncoder(), CheckOptions(max_length=50)).broken[0].detail
    assert detail == "111 tokens, 10 of them pictures; max_length is 50"  # 100 words, "Read.", a picture


def test_several_bad_pictures_of_one_row(folder: Folder) -> None:
    folder.add(question="<image_00> <image_01>", image={"<image_00>": "x.png", "<image_01>": "y.png"})
    folder.add()
    detail = folder.check().broken[0].detail
    assert detail.endswith("x.png does not exist (and 1 more of its pictures)")


# ---------------------------------------------------------------- findings


def test_clean_data_is_ok(folder: Folder) -> None:
    for index in range(30):
        folder.add(json.dumps({"a": index, "b": f"x{index % 7}"}))
    report = folder.check(CountingEncoder(), eval=0.2)
    assert report.verdict == "ok", report.findings
    assert report.findings == ()
    assert (report.train_samples, report.eval_samples) == (24, 6)
    assert report_lines(report)[0] == "data: ok"


def test_pictures_in_train_and_eval_are_an_error(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "d")
    for _ in range(5):
        folder.add()
    Image.open(folder.path / "3.png").save(folder.path / "again.bmp")
    other.rows = []
    other.add(image="again.bmp")
    other.add(image=folder.picture("new.png", seed=99))
    evaluation = other.write("eval.json")
    report = folder.check(eval=str(evaluation), max_broken=0.0)
    assert codes(report)["shared-image"] == 1
    assert report.verdict == "refused"
    assert [ref.text for finding in report.findings if finding.code == "shared-image" for ref in finding.rows] == [
        "eval row 0"
    ]
    assert report.refusals == ("shared-image: 1 " + KINDS["shared-image"][1],)
    with pytest.raises(UserError, match=r"1 of 2 samples show a picture .* first is row 0"):
        load_samples(folder.data(eval=str(evaluation)))


def test_texts_in_train_and_eval_are_an_error(folder: Folder) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    folder.rows = [{"conversations": said}, {"conversations": [said[0], {"role": "assistant", "content": "x"}]}]
    evaluation = folder.write("eval.json")
    folder.rows = folder.rows[:1]
    report = folder.check(eval=str(evaluation))
    assert (report.verdict, codes(report)["shared-text"]) == ("refused", 1)


def test_copies_repetitions_and_contradictions(folder: Folder) -> None:
    for index in range(4):
        folder.add(f"answer {index}")
    folder.picture("copy.png", seed=0)  # the same pixels as 0.png
    folder.add("answer 0", image="copy.png")
    folder.add("another answer", image="1.png")
    folder.add("what else", question="<image> Another question.", image="2.png")
    report = folder.check()
    assert codes(report) == {"duplicate-images": 1, "different-answers": 1, "repeated-samples": 1}
    by_code = {finding.code: finding for finding in report.findings}
    assert by_code["duplicate-images"].examples == ("0.png = copy.png (train row 0, train row 4)",)
    assert [ref.row for ref in by_code["different-answers"].rows] == [1, 5]
    assert [ref.row for ref in by_code["repeated-samples"].rows] == [4]


def test_near_duplicates_on_one_side_and_across(folder: Folder, tmp_path: Path) -> None:
    def spots(name: str, seed: int, quality: int = 95) -> str:
        values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((200, 200), Image.Resampling.BICUBIC).save(
            tmp_path / "d" / name, quality=quality
        )
        return name

    other = Folder(tmp_path / "d")
    other.add(image=spots("far.jpg", 3, 40))
    evaluation = other.write("eval.json")
    for seed in range(6):
        folder.add(str(seed), image=spots(f"{seed}.png", seed))
    folder.add("6", image=spots("near.jpg", 5, 40))
    found = {finding.code: finding.examples for finding in folder.check(eval=str(evaluation)).findings}
    assert found["near-duplicate-images"] == ("5.png ~ near.jpg",)
    assert found["near-duplicate-train-eval"] == ("3.png ~ far.jpg",)
    assert "shared-image" not in found


def test_answers_that_are_not_json_where_most_are(folder: Folder) -> None:
    for index in range(6):
        folder.add(json.dumps({"a": index}))
    folder.add("seven")
    folder.add('```json\n{"a": 8}\n```')
    finding = next(finding for finding in folder.check().findings if finding.code == "answers-not-json")
    assert ([ref.row for ref in finding.rows], finding.count) == ([6, 7], 2)
    assert finding.summary == "answers that are not JSON, while 6 are (1 stand inside ``` marks)"
    folder.rows = folder.rows[4:]  # half and half: no rule to break
    assert "answers-not-json" not in codes(folder.check())
    folder.rows = [
        {**row, "conversations": [row["conversations"][0], {"role": "assistant", "content": "7"}]}
        for row in folder.rows
    ]
    assert "answers-not-json" not in codes(folder.check())  # bare numbers are JSON, and texts


def test_field_statistics(folder: Folder) -> None:
    """Hand-counted: 20 answers; `c.d` stands in 10, `items` hold 30 objects, 20 of them with a price."""
    for index in range(20):
        items = [{"name": f"n{index}", "price": 1.5}, {"name": ""}] if index < 10 else [{"name": "z", "price": index}]
        answer: dict[str, Any] = {"a": "same", "b": index if index % 2 else str(index), "empty": None, "items": items}
        if index < 10:
            answer["c"] = {"d": index // 5}
        folder.add(json.dumps(answer))
    report = folder.check()
    table = {s.path: (s.possible, s.filled, s.distinct, s.top_count) for s in report.fields}
    assert table == {
        "a": (20, 20, 1, 20),
        "b": (20, 20, 20, 1),
        "empty": (20, 0, 0, 0),
        "items": (20, 20, 20, 1),
        "items[].name": (30, 20, 11, 10),
        "items[].price": (30, 20, 11, 10),
        "c": (20, 10, 2, 5),
        "c.d": (10, 10, 2, 5),
    }
    by_code = {finding.code: finding.examples for finding in report.findings}
    assert by_code["constant-field"] == ('a = "same"',)
    assert by_code["seldom-filled"] == ("empty: 0 of 20",)
    assert by_code["mixed-types"] == ("b: 10 x text, 10 x a number",)
    assert next(s for s in report.fields if s.path == "c.d").fill_rate == 1.0


def test_fields_named_by_data_are_capped(folder: Folder) -> None:
    for index in range(3):
        folder.add(json.dumps({f"{index}-{number}": 1 for number in range(100)}))
    report = folder.check()
    assert (len(report.fields), report.fields_left_out) == (200, 100)
    assert "and 280 further fields" in "\n".join(report_lines(report))


def test_odd_pictures_and_sizes(folder: Folder) -> None:
    for index in range(12):
        folder.add(f"answer {index}")
    Image.new("RGB", (40, 30), "white").save(folder.path / "blank.png")
    folder.add("blank", image="blank.png")
    folder.add("huge", image=folder.picture("huge.png", (400, 300)))
    folder.add("word " * 400, image=folder.picture("long.png", (41, 30)))
    frames = [Image.fromarray(np.full((30, 40), value, dtype=np.uint8)) for value in (0, 9)]
    frames[0].putpixel((0, 0), 255)
    frames[0].save(folder.path / "pages.tif", save_all=True, append_images=frames[1:])
    folder.add("pages", image="pages.tif")
    found = {finding.code: finding.examples for finding in folder.check(CountingEncoder()).findings}
    assert found == {
        "blank-images": ("blank.png",),
        "several-pages": ("pages.tif",),
        "outlier-image-sizes": ("huge.png: 400 x 300",),
        "outlier-lengths": ("train row 14: 411 tokens",),
    }


# ---------------------------------------------------------------- figures


def test_distributions_and_worst_samples(folder: Folder) -> None:
    for words in (1, 2, 3, 94):
        folder.add(" ".join(["w"] * words))
    folder.add("x", image=folder.picture("wide.png", (300, 100)))
    report = folder.check(CountingEncoder())
    tokens = next(one for one in report.distributions if one.name == "tokens")
    # "Read.", a picture of 10, and the words: 12, 13, 14, 105, 12.
    assert (tokens.minimum, tokens.p50, tokens.p99, tokens.maximum, tokens.mean) == (12, 13, 105, 105, 31.2)
    assert (sum(tokens.counts), tokens.counts[0], tokens.counts[-1], len(tokens.edges)) == (5, 4, 1, 13)
    assert [(one.by, one.ref.row) for one in report.worst if one.by == "tokens"] == [
        ("tokens", 3),
        ("tokens", 2),
        ("tokens", 1),
    ]
    assert next(one for one in report.worst if one.by == "patches").image_sizes == ((300, 100),)
    assert report.workload is not None
    assert report.workload.worst == SampleCost(tokens=105, trained_tokens=94, image_tokens=10, crops=1, patches=12)
    assert (report.workload.samples, report.workload.source) == (5, "data")
    assert report.images.largest == (300, 100)


def test_without_an_encoder_nothing_is_counted(folder: Folder) -> None:
    folder.add()
    report = folder.check()
    assert (report.distributions, report.worst, report.workload) == ((), (), None)
    assert any("were not counted" in line for line in report_lines(report))


def test_report_is_json(folder: Folder) -> None:
    for index in range(25):
        folder.add(json.dumps({"a": index}), note="x")
    folder.add(image="none.png")
    report = folder.check(CountingEncoder(), eval=0.2)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["reasons"] == {"missing-image": 1}
    assert data["split"] == {"kind": "share", "train": 20, "eval": 5, "share": 0.2, "seed": 0, "note": ""}
    assert data["fields"][0]["fill_rate"] == 1.0
    assert data["files"][0]["ignored_keys"] == {"note": 25}
    assert data["workload"]["source"] == "data"


def test_progress_reaches_the_end(folder: Folder) -> None:
    for _ in range(3):
        folder.add()
    told: list[tuple[str, int, int | None]] = []
    folder.check(CountingEncoder(), CheckOptions(progress=lambda *args: told.append(args)))
    assert {what for what, _, _ in told} == {"rows", "pictures", "tokens"}
    assert ("pictures", 3, 3) in told
    assert told[-1] == ("tokens", 3, 3)


# ---------------------------------------------------------------- refusals and loading


def test_training_refuses_above_max_broken(folder: Folder, tmp_path: Path) -> None:
    for _ in range(6):
        folder.add()
    for index in range(4):
        folder.add(image=f"none{index}.png")
    with pytest.raises(UserError) as caught:
        load_samples(folder.data(max_broken=0.1), CheckOptions(quarantine=tmp_path / "q"))
    first, *more = caught.value.problem.split("\n")
    assert first.endswith("data.json: 40.00% of 10 rows are broken (4), data.max_broken allows 10.00%")
    assert [line.split(" (")[0] for line in more[:3]] == ["  train row 6", "  train row 7", "  train row 8"]
    assert more[3] == "  and 1 more"
    assert str(tmp_path / "q" / "data.broken.jsonl") in caught.value.hint
    loaded = load_samples(folder.data(max_broken=0.4))
    assert ([sample.row for sample in loaded.train], len(loaded.broken)) == ([0, 1, 2, 3, 4, 5], 4)
    report = folder.check(max_broken=0.1)
    assert (report.verdict, report_lines(report)[0]) == ("refused", "data: refused")


def test_no_usable_row_is_refused_whatever_is_allowed(folder: Folder) -> None:
    folder.add(image="none.png")
    with pytest.raises(UserError, match="none of 1 rows can be used"):
        load_samples(folder.data())


def test_pictures_elsewhere_name_the_root_to_set(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    other = Folder(tmp_path / "pictures")
    for index in range(3):
        folder.add(image=str(tmp_path / "pictures" / other.picture(f"{index}.png", seed=index)))
    with pytest.raises(UserError) as caught:
        load_samples(folder.data(max_broken=0.1))
    assert caught.value.hint == f"data.image_root: {tmp_path / 'pictures'}"
    assert len(load_samples(folder.data(image_root=str(tmp_path / "pictures"))).train) == 3


def test_evaluation_file_has_its_own_share(folder: Folder, tmp_path: Path) -> None:
    for _ in range(5):
        folder.add()
    evaluation = Folder(tmp_path / "d")
    evaluation.add(image=folder.picture("e.png", seed=77))
    evaluation.add(image="none.png")
    path = evaluation.write("eval.json")
    with pytest.raises(UserError, match=r"eval\.json: 50\.00% of 2 rows"):
        load_samples(folder.data(eval=str(path), max_broken=0.2))
    loaded = load_samples(folder.data(eval=str(path), max_broken=0.5), None, CountingEncoder())
    assert (len(loaded.train), len(loaded.eval), loaded.split.kind) == (5, 1, "file")
    assert (loaded.broken[0].source, loaded.broken[0].row) == ("eval", 1)
    assert [cost.tokens for cost in loaded.eval_costs] == [13]  # Read. {"a": 1} and a picture
    assert len(loaded.train_costs) == 5


def test_costs_follow_their_samples(folder: Folder) -> None:
    for words in range(1, 21):
        folder.add(" ".join(["w"] * words))
    loaded = load_samples(folder.data(eval=0.3), None, CountingEncoder())
    assert len(loaded.eval) == 6
    for samples, costs in ((loaded.train, loaded.train_costs), (loaded.eval, loaded.eval_costs)):
        assert [len(sample.answer.split()) for sample in samples] == [cost.trained_tokens for cost in costs]


def test_settings_that_cannot_work(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        load_samples(Data())
    folder.add()
    with pytest.raises(UserError, match="image_root"):
        load_samples(folder.data(image_root=str(folder.path / "none")))
    report = folder.check(format="llava")
    assert (report.verdict, report.broken[0].reason) == ("refused", "bad-row")
    assert "'from'" in report.broken[0].detail


# ---------------------------------------------------------------- quarantine


def test_quarantine_holds_the_rows_and_is_never_overwritten(folder: Folder, tmp_path: Path) -> None:
    folder.add()
    folder.add(image="none.png", id="x票")
    folder.rows.append([1])
    target = tmp_path / "q"
    first = folder.check(options=CheckOptions(quarantine=target)).quarantine
    assert first == (str(target / "data.broken.jsonl"),)
    lines = [json.loads(line) for line in Path(first[0]).read_text().splitlines()]
    assert [(line["row"], line["id"], line["reason"]) for line in lines] == [
        (1, "x票", "missing-image"),
        (2, "2", "bad-row"),
    ]
    assert [line["original"] for line in lines] == folder.rows[1:]
    assert "x票" in Path(first[0]).read_text()
    before = Path(first[0]).read_bytes()
    assert folder.check(options=CheckOptions(quarantine=target)).quarantine == first  # the same content: the same file
    folder.rows.append([2])
    second = folder.check(options=CheckOptions(quarantine=target)).quarantine
    assert second == (str(target / "data.broken.2.jsonl"),)
    assert Path(first[0]).read_bytes() == before
    assert sorted(os.listdir(target)) == ["data.broken.2.jsonl", "data.broken.jsonl"]  # nothing half-written is left


def test_quarantine_only_when_asked_and_needed(folder: Folder, tmp_path: Path) -> None:
    folder.add()
    assert folder.check(options=CheckOptions(quarantine=tmp_path / "q")).quarantine == ()
    folder.add(image="none.png")
    assert folder.check().quarantine == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_quarantine_of_odd_rows(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'{"a": "\\ud800"}\n{"a": \xff\n')
    broken = [Broken(0, "0", "bad-row", "x", 1), Broken(1, "1", "bad-json", "y", 2)]
    written = write_quarantine(broken, path, tmp_path)
    originals = [json.loads(line)["original"] for line in written.read_text().splitlines()]
    assert originals == [{"a": "\ud800"}, '{"a": �']


def test_quarantine_folder_that_cannot_be_written(folder: Folder, tmp_path: Path) -> None:
    folder.add(image="none.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the quarantine file"):
        folder.check(options=CheckOptions(quarantine=tmp_path / "file"))
