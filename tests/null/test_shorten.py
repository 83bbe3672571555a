"""Which turns go under max_length, and that nothing goes silently; with an encoder of counted words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memfit.errors import UserError
from memfit.inputs.data import CheckOptions, check_data, load_samples, report_lines
from memfit.inputs.data.workload import cut_by_length, scan_workload
from memfit.inputs.shorten import TooLongError, leaving, shortened, split_turns
from memfit.specs.check import Shortened, loaded_lines, shortened_text
from memfit.specs.recipe import Data, Recipe
from memfit.specs.sample import Sample, Turn
from memfit.specs.workload import ImageCost, SampleCost


@dataclasses.dataclass
class Encoded:
    sample: Sample
    image_costs: tuple[ImageCost, ...]
    image_order: tuple[int, ...]


class WordEncoder:
    """A word is a token; a picture takes as many as its width has tens of pixels."""

    def encode(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Encoded:
        assert len(sizes) == len(sample.images)
        order = sample.picture_order
        assert sorted(order) == list(range(len(sample.images)))
        return Encoded(sample, tuple(ImageCost(((1, 1),), (sizes[i][0] // 10,)) for i in order), order)

    def sample_cost(self, encoded: Encoded) -> SampleCost:
        words = sum(len(turn.text.split()) for turn in encoded.sample.turns)
        images = sum(cost.tokens for cost in encoded.image_costs)
        return SampleCost(words + images, words // 2, images, len(encoded.image_costs), len(encoded.image_costs))

    def special_tokens_in(self, text: str) -> Sequence[str]:
        return ()


def talk(*exchanges: int, head: int = 0, tail: int = 0, pictures: dict[int, list[int]] | None = None) -> Sample:
    """Exchange i has as many words as `exchanges[i]` says, half of them the answer; pictures of 10 tokens each."""
    turns = [Turn("system", ("s " * head,))] if head else []
    shown = pictures or {}
    for index, words in enumerate(exchanges):
        turns.append(Turn("user", (*shown.get(index, ()), f"q{index} " * (words - words // 2))))
        turns.append(Turn("assistant", (f"a{index} " * (words // 2),)))
    if tail:
        turns.append(Turn("user", ("t " * tail,)))
    count = sum(map(len, shown.values()))
    return Sample("s", 7, tuple(turns), tuple(Path(f"{index}.png") for index in range(count)))


def kept_of(sample: Sample) -> str:
    """The numbers of the answers that are there."""
    return "".join(turn.text.split()[0][1:] for turn in sample.turns if turn.role == "assistant")


def short(sample: Sample, limit: int) -> Sample:
    part, encoded = shortened(WordEncoder(), sample, [(100, 20)] * len(sample.images), limit)
    assert encoded.sample == part
    assert WordEncoder().sample_cost(encoded).tokens <= limit
    return part


@pytest.mark.parametrize(
    ("pictured", "order"),
    [
        ("", []),
        ("-", []),
        ("---", [0, 1]),
        ("P", []),
        ("P--", [1, 2]),  # follow-ups without their picture would be answered blind
        ("PP", [0]),
        ("P--P--", [1, 2, 0, 4, 5]),
        ("-P-", [0, 2]),
        ("P-P", [1, 0]),
        ("--P", [0, 1]),
    ],
)
def test_the_order_in_which_exchanges_go(pictured: str, order: list[int]) -> None:
    assert leaving([mark == "P" for mark in pictured]) == order


def test_no_answer_outlives_its_picture_whatever_is_left_out() -> None:
    """All conversations of up to seven exchanges: a follow-up is never kept without the picture before it."""
    for length in range(1, 8):
        for bits in range(2**length):
            pictured = [bool(bits >> index & 1) for index in range(length)]
            order = leaving(pictured)
            assert len(set(order)) == len(order) == length - 1
            for gone in range(length):
                kept = [index for index in range(length) if index not in order[:gone]]
                for index in kept:
                    before = [other for other in range(index + 1) if pictured[other]]
                    assert not before or before[-1] in kept, (pictured, kept)


def test_turns_are_told_apart() -> None:
    roles = ["system", "user", "assistant", "system", "user", "user", "assistant", "assistant", "user"]
    turns = [Turn(role, ("x",)) for role in roles]  # type: ignore[arg-type]
    assert split_turns(turns) == ((0,), [(1, 2), (3, 4, 5, 6, 7)])
    assert split_turns([Turn("assistant", ("hello",)), *turns[1:3]]) == ((), [(0,), (1, 2)])


@pytest.mark.parametrize(
    ("limit", "kept"), [(100, "0123"), (99, "123"), (74, "123"), (73, "23"), (49, "23"), (48, "3"), (25, "3"), (24, "")]
)
def test_the_oldest_exchanges_go_first(limit: int, kept: str) -> None:
    """By hand: 26 + 25 + 24 + 25 words."""
    sample = talk(26, 25, 24, 25)
    if not kept:
        with pytest.raises(TooLongError, match="row 7: 26 tokens up to its first answer; max_length is 24") as caught:
            short(sample, limit)
        assert (caught.value.tokens, caught.value.hint.split(",")[0]) == (26, "max_length: 26")
        return
    assert kept_of(short(sample, limit)) == kept


def test_what_stands_behind_the_last_answer_goes_first() -> None:
    sample = talk(10, 10, head=5, tail=7)
    assert short(sample, 32) == sample
    assert kept_of(short(sample, 31)) == "01"
    assert short(sample, 31).turns[-1].role == "assistant"
    assert [turn.role for turn in short(sample, 24).turns] == ["system", "user", "assistant"]


def test_a_first_answer_is_kept_where_the_last_does_not_fit() -> None:
    assert kept_of(short(talk(10, 90), 60)) == "0"
    assert kept_of(short(talk(10, 12, 90), 60)) == "01"


def test_pictures_go_with_their_turns_and_are_counted_anew() -> None:
    sample = talk(10, 10, 10, 10, pictures={0: [1], 1: [2, 0]})  # pictures not in the order of their appearance
    part = short(sample, 50)  # without exchange 0 (20 tokens): 30 + 10 + 10
    assert kept_of(part) == "123"
    assert part.images == (Path("0.png"), Path("2.png"))
    assert part.turns[0].pieces[:2] == (1, 0)
    assert kept_of(short(sample, 49)) == "13"  # the follow-up before the last one, not the pictures
    assert kept_of(short(sample, 39)) == "1"
    assert kept_of(short(sample, 29)) == "0"  # two pictures do not fit, one does
    with pytest.raises(TooLongError, match="20 tokens up to"):
        short(sample, 19)


def test_encoding_is_not_repeated_for_every_turn() -> None:
    calls = []

    class Counting(WordEncoder):
        def encode(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Encoded:
            calls.append(sample)
            return super().encode(sample, sizes)

    shortened(Counting(), talk(*[4] * 200), [], 100)
    assert len(calls) <= 10


# ---------------------------------------------------------------- from the file to the report


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Four rows: short; three exchanges, the first with a picture; one long exchange; two long ones."""
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    for name in "abcd":
        values = np.random.default_rng(ord(name)).integers(0, 256, (20, 100, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{name}.png")

    def row(image: str, *words: int) -> dict[str, Any]:
        turns = []
        for index, count in enumerate(words):
            mark = "<image>\n" if index == 0 else ""
            turns += [
                {"role": "user", "content": mark + f"{image}{index} " * count},
                {"role": "assistant", "content": f"{image} " * count},
            ]
        return {"image": f"{image}.png", "conversations": turns}

    rows = [row("a", 2), row("b", 5, 20, 5), row("c", 200), row("d", 10, 30)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Data(train=str(tmp_path / "data.json"), eval=None, max_broken=0.5)


def test_check_load_and_scan_agree_and_tell(data: Data, tmp_path: Path) -> None:
    """By hand: rows of 14, 10 + 60, 410 and 10 + 80 tokens under 40."""
    encoder, options = WordEncoder(), CheckOptions(max_length=40, quarantine=tmp_path / "q")
    loaded = load_samples(data, options, encoder)
    assert [cost.tokens for cost in loaded.train_costs] == [14, 30, 30]
    assert [kept_of(sample) for sample in loaded.train] == ["", "", ""]
    assert [len(sample.turns) for sample in loaded.train] == [2, 4, 2]
    assert [len(sample.images) for sample in loaded.train] == [1, 1, 1]
    assert loaded.shortened == (Shortened(1, "1", 70, 30, 2, 0), Shortened(3, "3", 90, 30, 2, 0))
    assert [(row.row, row.reason) for row in loaded.broken] == [(2, "too-long")]
    assert loaded.broken[0].detail == "410 tokens, 10 of them pictures; max_length is 40"
    assert loaded_lines(loaded, 40) == [
        "1 broken row is left out (1 too-long); memfit check lists them",
        "max_length 40 shortens 2 of 3 samples: 4 whole turns (100 tokens) are left out",
    ]
    written = (tmp_path / "q" / "data.broken.jsonl").read_text()
    assert json.loads(written)["reason"] == "too-long"

    report = check_data(data, encoder, options)
    assert report.shortened == loaded.shortened
    assert (report.verdict, report.train_samples, len(report.broken)) == ("warnings", 3, 1)
    assert report.to_json()["shortened"][0]["kept_tokens"] == 30
    lines = report_lines(report)
    assert lines[0] == "data: usable, 1 broken row left out, 2 samples shortened to max_length"
    assert "max_length 40 shortens 2 of 3 samples: 4 whole turns (100 tokens) are left out" in lines
    assert "    train row 3: 90 tokens, 30 used; left out: 2 turns" in lines

    scan = scan_workload(Recipe(model="m", data=data, max_length=40), encoder)
    assert scan.shortened == loaded.shortened
    assert [scan.cost(index).tokens for index in np.flatnonzero(scan.inside())] == [14, 30, 30]
    assert [row.tokens for row in scan.batch_rows(9)] == [30, 30, 14]
    assert (scan.samples, scan.to_json()["shortened"]) == (3, 2)


def test_without_a_limit_nothing_is_shortened(data: Data) -> None:
    loaded = load_samples(data, CheckOptions(), WordEncoder())
    assert loaded.shortened == loaded.broken == ()
    assert loaded_lines(loaded, None) == []
    assert report_lines(check_data(data, WordEncoder()))[0] == "data: ok"


def test_what_a_length_takes_is_counted_as_it_is_used(data: Data) -> None:
    recipe = Recipe(model="m", data=data)
    scan = scan_workload(recipe, WordEncoder())
    cut = cut_by_length(scan, recipe, WordEncoder(), 40)
    total = 14 + 70 + 410 + 90
    assert (cut.samples, cut.tokens) == (3, 40 + 410 + 60)
    assert cut.token_share == (40 + 410 + 60) / total
    assert scan.cut_by_length(40).tokens == 70 + 410 + 90  # the most that it can take
    assert cut_by_length(scan, recipe, WordEncoder(), 5).tokens == total


def test_the_length_does_not_move_samples_between_the_sides(data: Data) -> None:
    """The split goes by whole conversations, or a smaller max_length would evaluate on what a larger one trained on."""
    part = dataclasses.replace(data, train=str(_two_pictures(Path(str(data.train)).parent)), eval=0.3)
    for seed in range(6):
        loaded = [load_samples(part, CheckOptions(seed=seed, max_length=n), WordEncoder()) for n in (None, 30)]
        assert loaded[0].split == loaded[1].split
        assert (len(loaded[0].shortened), len(loaded[1].shortened)) == (0, 2)
        assert len({0, 1} & set(loaded[1].split.eval)) in (0, 2)  # the rows that share a picture


def _two_pictures(folder: Path) -> Path:
    """Two rows that share their first picture, which a max_length of 30 leaves out, and three of their own."""

    def row(*names: str) -> dict[str, Any]:
        texts = [text for name in names for text in ("<image>\n" + f"{name} " * 12, "yes")]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return {"images": [f"{name}.png" for name in names], "messages": turns}

    for name in ("e", "f"):
        Image.new("RGB", (100, 20), (200, ord(name), 0)).save(folder / f"{name}.png")
    rows = [row("a", "b"), row("a", "c"), row("d"), row("e"), row("f")]
    path = folder / "two.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_line_of_counts() -> None:
    rows = [Shortened(1, "1", 3000, 2000, 4, 1), Shortened(2, "2", 2500, 2000, 1, 1)]
    assert shortened_text(rows, 1200, 2048) == (
        "max_length 2,048 shortens 2 of 1,200 samples: 5 whole turns with 2 pictures (1,500 tokens) are left out"
    )
    assert rows[0].text == "train row 1: 3,000 tokens, 2,000 used; left out: 4 turns with 1 picture"
    assert shortened_text([], 3, 10) == ""


def test_a_limit_below_everything_is_refused(data: Data) -> None:
    with pytest.raises(UserError, match="the shortest has 14 tokens, and none can be brought under it"):
        scan_workload(Recipe(model="m", data=data, max_length=5), WordEncoder())
    with pytest.raises(UserError, match="none of 4 rows can be used"):
        load_samples(data, CheckOptions(max_length=5), WordEncoder())
