"""Splitting and limiting: no picture on both sides, whatever the order of the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memfit.errors import UserError
from memfit.inputs.data import CheckOptions, load_samples
from memfit.inputs.data.split import split_share
from memfit.specs.recipe import Data

keys = st.lists(st.lists(st.sampled_from("abcdefghijklmnopqrst"), min_size=1, max_size=3), min_size=1, max_size=40)


@given(keys, st.floats(0.01, 0.99), st.integers(0, 5))
def test_nothing_is_lost_and_no_key_is_on_both_sides(keys: list[list[str]], share: float, seed: int) -> None:
    rows = [10 * index for index in range(len(keys))]
    split = split_share(rows, keys, share, seed)
    assert sorted(split.train + split.eval) == rows
    assert list(split.train) == sorted(split.train)
    assert split.train
    shown = {side: {k for row in getattr(split, side) for k in keys[row // 10]} for side in ("train", "eval")}
    assert shown["train"].isdisjoint(shown["eval"])
    assert split.eval or split.note


@given(keys, st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_the_order_of_rows_plays_no_part(keys: list[list[str]], share: float, shuffler: random.Random) -> None:
    order = list(range(len(keys)))
    shuffler.shuffle(order)
    straight = split_share(range(len(keys)), keys, share, 0)
    shuffled = split_share(order, [keys[index] for index in order], share, 0)
    assert (straight.train, straight.eval) == (shuffled.train, shuffled.eval)


def test_share_and_seed() -> None:
    keys = [[str(index)] for index in range(1000)]
    first = split_share(range(1000), keys, 0.1, 0)
    other = split_share(range(1000), keys, 0.1, 1)
    assert (len(first.eval), len(other.eval)) == (100, 100)
    assert len(set(first.eval) & set(other.eval)) < 30  # 10 are expected by chance
    assert first.note == ""


def test_a_growing_data_set_keeps_its_sides() -> None:
    """Ten more samples move hardly any of the old ones: the order of the groups is theirs alone."""
    keys = [[str(index)] for index in range(1010)]
    before, after = split_share(range(1000), keys[:1000], 0.1, 0), split_share(range(1010), keys, 0.1, 0)
    assert len(set(before.eval) - set(after.eval)) <= 3
    assert len(set(after.eval) & set(before.train)) <= 3


def test_pictures_connect_samples() -> None:
    # 0-1-2 hang together through b and c, 3 stands alone: a third of 4 samples is 1.
    split = split_share([0, 1, 2, 3], [["a", "b"], ["b", "c"], ["c"], ["d"]], 0.3, 0)
    assert (split.train, split.eval) == ((0, 1, 2), (3,))


def test_links_connect_but_do_not_draw() -> None:
    """Pixels only join samples: which group is drawn is up to the files, whose hashes no decoder changes."""
    keys = [[str(index)] for index in range(10)]
    plain = split_share(range(10), keys, 0.3, 0)
    assert split_share(range(10), keys, 0.3, 0, [[f"other decoder {index}"] for index in range(10)]) == plain
    one, rest = plain.eval[0], plain.train[0]
    linked = [["same"] if index in (one, rest) else [f"p{index}"] for index in range(10)]
    joined = split_share(range(10), keys, 0.3, 0, linked)
    assert (one in joined.eval) == (rest in joined.eval)


def test_nothing_to_split() -> None:
    split = split_share([], [], 0.1, 0)
    assert (split.train, split.eval, split.note) == ((), (), "")


@pytest.mark.parametrize(("number", "said"), [(1, "one sample"), (5, "all 5 samples")])
def test_what_cannot_be_split_is_said(number: int, said: str) -> None:
    split = split_share(range(number), [["same"]] * number, 0.5, 0)
    assert (len(split.train), split.eval) == (number, ())
    assert said in split.note


def test_large_groups_are_said() -> None:
    keys = [["a"]] * 50 + [["b"]] * 50
    split = split_share(range(100), keys, 0.1, 0)
    assert len(split.eval) == 50
    assert "50 samples are held out instead of 10" in split.note


# ---------------------------------------------------------------- through files


def write_data(folder: Path, rows: list[dict]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def row(name: str, image: str | None, answer: str) -> dict:
    said = [{"role": "user", "content": "Read."}, {"role": "assistant", "content": answer}]
    return {"id": name, "conversations": said} | ({"image": image} if image else {})


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """40 rows about 20 pictures: each stands in two rows, once as PNG and once as BMP. And 10 rows of text."""
    made = []
    for index in range(20):
        image = Image.new("RGB", (8, 8), (index * 10, 0, 0))
        for number, kind in enumerate(("png", "bmp")):
            image.save(tmp_path / f"{index}.{kind}")
            made.append(row(f"{index}.{kind}", f"{index}.{kind}", f"{index} {number}"))
    return made + [row(f"t{index}", None, f"text {index // 2}") for index in range(10)]


def sides(folder: Path, rows: list[dict], **data: object) -> tuple[set[str], set[str]]:
    path = write_data(folder, rows)
    loaded = load_samples(Data(**{"train": str(path), "eval": 0.2, **data}))  # type: ignore[arg-type]
    assert [s.row for s in loaded.train] == [r for r in loaded.split.train if loaded.split.kind != "file"]
    return {sample.id for sample in loaded.train}, {sample.id for sample in loaded.eval}


def test_copies_in_another_format_stay_together(tmp_path: Path, rows: list[dict]) -> None:
    train, held = sides(tmp_path, rows)
    assert len(held) == 10
    assert {name.split(".")[0] for name in train if "." in name}.isdisjoint(name.split(".")[0] for name in held)
    texts = {f"t{index}": index // 2 for index in range(10)}
    assert {texts[n] for n in train if n in texts}.isdisjoint(texts[n] for n in held if n in texts)


def test_split_and_limit_do_not_depend_on_the_order(tmp_path: Path, rows: list[dict]) -> None:
    shuffled = random.Random(1).sample(rows, len(rows))
    assert sides(tmp_path, rows) == sides(tmp_path, shuffled)
    limited = sides(tmp_path, rows, limit=20)
    assert len(limited[0] | limited[1]) == 20
    chosen = {name for side in limited for name in side if "." in name}
    again = {name for side in sides(tmp_path, shuffled, limit=20) for name in side if "." in name}
    assert chosen == again  # of two equal text rows, which have the same key, the file's first is taken
    assert chosen != {r["id"] for r in rows[:20]}


def test_limit_reads_only_its_own_pictures(tmp_path: Path, rows: list[dict]) -> None:
    told: list[int | None] = []
    data = Data(train=str(write_data(tmp_path, rows)), eval=None, limit=5)
    options = CheckOptions(progress=lambda what, done, total: told.append(total) if what == "pictures" else None)
    loaded = load_samples(data, options)
    assert len(loaded.train) == 5
    assert told[-1] is not None
    assert told[-1] <= 5
    assert load_samples(Data(train=data.train, eval=None, limit=500)).split.train == tuple(range(50))


def test_seed_draws_other_rows(tmp_path: Path, rows: list[dict]) -> None:
    data = Data(train=str(write_data(tmp_path, rows)), eval=None, limit=10)
    drawn = [{s.id for s in load_samples(data, CheckOptions(seed=seed)).train} for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("share", [1.0, -0.1, 2])
def test_what_is_no_share(tmp_path: Path, rows: list[dict], share: float) -> None:
    with pytest.raises(UserError, match=r"data\.eval"):
        sides(tmp_path, rows, eval=share)


@pytest.mark.parametrize("nothing", [None, 0, 0.0])
def test_nothing_held_out(tmp_path: Path, rows: list[dict], nothing: float | None) -> None:
    train, held = sides(tmp_path, rows, eval=nothing)
    assert (len(train), len(held)) == (50, 0)
