"""Which blocks run: one of each kind between like neighbours, each beside what it has beside it in the model."""

from __future__ import annotations

import random

import pytest

from memfit.trace.folds import Fold, fold_of


def kept(blocks: str) -> tuple[int, ...]:
    fold = fold_of("part", blocks)
    return fold.kept if fold else tuple(range(len(blocks)))


def test_by_hand() -> None:
    assert kept("xxxxxx") == (0, 1, 5)
    assert kept("xxx") == (0, 1, 2), "a first, a middle and a last one"
    assert kept("axxxxb") == (0, 1, 2, 4, 5)
    assert kept("abababab") == (0, 1, 2, 7)
    assert kept("lllf" * 6) == (0, 1, 2, 3, 4, 6, 23), "Qwen3.5"
    assert kept("wwwwwwwf" * 4) == (0, 1, 6, 7, 8, 14, 31), "Qwen2.5-VL's tower: two of its four blocks that see all"
    assert fold_of("part", "") is None
    fold = fold_of("part", "axxxxb")
    assert fold == Fold("part", (0, 1, 1, 1, 1, 2), (0, 1, 2, 2, 4, 5))
    assert fold.skipped == (3,)
    assert [fold.count(block) for block in (0, 2, 9)] == [1, 2, 1]


def surroundings(blocks: str, at: int) -> str:
    return f"^{blocks}$"[at : at + 3]


@pytest.mark.parametrize("seed", range(60))
def test_a_block_stands_for_those_between_like_neighbours(seed: int) -> None:
    draw = random.Random(seed)
    period = "".join(draw.choices("abc", k=draw.randint(1, 5)))
    blocks = draw.choice("abc") * draw.randint(0, 4) + period * draw.randint(1, 8)
    fold = fold_of("part", blocks)
    if fold is None:
        return
    ran = "".join(blocks[at] for at in fold.kept)
    for at, block in enumerate(fold.kept):
        assert surroundings(ran, at) == surroundings(blocks, block)
    for block, stand in enumerate(fold.stands):
        assert surroundings(blocks, stand) == surroundings(blocks, block)
        assert fold.stands[stand] == stand


def test_without_any_order_all_run() -> None:
    blocks = "".join(random.Random(1).choices("abcdefgh", k=60))
    assert fold_of("part", blocks) is None
