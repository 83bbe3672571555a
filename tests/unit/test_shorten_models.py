"""max_length with every family's own encoder: scan, check, estimate and the train loader see the same whole turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import memfit
from memfit.build.data import SampleDataset
from memfit.build.pixels import PixelReader
from memfit.errors import UserError
from memfit.inputs.data import load_samples, read_size
from memfit.inputs.data.options import check_options
from memfit.inputs.data.workload import scan_workload
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.planner.forecast_json import forecast_json
from memfit.specs.recipe import Recipe
from memfit.testing import KINDS, NATIVE_KINDS
from memfit.trace.forecast import worst_rows

Make = Callable[..., Recipe]
Folder = Callable[[str], Path]
QUESTIONS = ("Which colour is the first one?", "And the next, in two words?", "What stands below it?")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Rows of three exchanges; with pictures the first and the last question show one each."""
    root = tmp_path_factory.mktemp("talks")
    for number in range(8):
        values = np.random.default_rng(number).integers(0, 256, (70 + 20 * number, 160, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / f"{number}.png")

    def make(pictures: bool) -> Path:
        path = root / f"{'pictures' if pictures else 'words'}.json"
        rows = []
        for number in range(4):
            turns: list[dict[str, str]] = []
            for index, question in enumerate(QUESTIONS):
                mark = "<image>\n" if pictures and index != 1 else ""
                turns += [
                    {"role": "user", "content": mark + question},
                    {"role": "assistant", "content": f"Answer {number}.{index} " * (2 + number * (index == 1))},
                ]
            images = {"images": [f"{2 * number}.png", f"{2 * number + 1}.png"]} if pictures else {}
            rows.append({"id": str(number), "messages": turns, **images})
        path.write_text(json.dumps(rows))
        return path

    return make


def limited(recipe: Make, kind: str, data: Path, limit: Any = "auto", *sets: str) -> Recipe:
    return recipe(kind, f"data.train={data}", f"max_length={limit}", "data.max_broken=0.99", *sets)


@pytest.mark.parametrize("kind", [*KINDS, *NATIVE_KINDS])
def test_everybody_sees_the_same_turns(dummies: Folder, talks: Callable[[bool], Path], recipe: Make, kind: str) -> None:
    source = find_model(str(dummies(kind)))
    encoder = Encoder(source)
    data = talks(encoder.images is not None)
    pixels = PixelReader(encoder.family, encoder.processor_settings) if encoder.images else None
    whole = load_samples(limited(recipe, kind, data).data, check_options(limited(recipe, kind, data)), encoder)
    longest = max(cost.tokens for cost in whole.train_costs)
    shortened = 0
    for limit in range(longest, 0, -max(1, longest // 12)):
        wanted = limited(recipe, kind, data, limit)
        try:
            loaded = load_samples(wanted.data, check_options(wanted), encoder)
        except UserError:
            with pytest.raises(UserError, match="is below every sample"):
                scan_workload(wanted, encoder)
            continue
        scan = scan_workload(wanted, encoder)
        assert scan.shortened == loaded.shortened
        assert [scan.cost(int(i)) for i in np.flatnonzero(scan.inside())] == list(loaded.train_costs)
        assert scan.batch_rows(3) == worst_rows(loaded.train, loaded.train_costs, encoder, 3)
        assert len(loaded.train) + len(loaded.broken) == 4
        shortened += len(loaded.shortened)
        rows = SampleDataset(loaded.train, encoder, pixels)
        for sample, cost, row in zip(loaded.train, loaded.train_costs, rows, strict=True):  # type: ignore[call-overload]
            assert len(row["input_ids"]) == cost.tokens <= limit
            assert_whole(sample, encoder, row)
    assert shortened >= 4


def assert_whole(sample: Any, encoder: Encoder, row: Any) -> None:
    """Every answer that is there is there to its last word, and as many image tokens as the pictures take."""
    text = encoder.decode(row["input_ids"].numpy())
    turns = [turn for turn in sample.turns if turn.role == "assistant"]
    assert all(turn.text.strip() in text for turn in turns)
    assert text.count("Answer") == sum(turn.text.count("Answer") for turn in turns)
    if encoder.image_token_id is not None:
        places = int((row["input_ids"] == encoder.image_token_id).sum())
        encoded = encoder.encode(sample, [read_size(path) for path in sample.images])
        assert places == sum(cost.tokens for cost in encoded.image_costs)
        assert len(encoded.image_costs) == len(sample.images)


@pytest.mark.parametrize("kind", ["minicpmv2_6", "qwen2_5_vl"])
def test_train_and_estimate_say_what_was_left_out(
    dummies: Folder, talks: Callable[[bool], Path], recipe: Make, tmp_path: Path, kind: str
) -> None:
    data, encoder = talks(True), Encoder(find_model(str(dummies(kind))))
    whole = load_samples(limited(recipe, kind, data).data, None, encoder)
    limit = min(cost.tokens for cost in whole.train_costs) - 1
    wanted = limited(recipe, kind, data, limit, "schedule.steps=1", "batch=2")
    told: list[str] = []
    forecast = memfit.estimate(wanted, say=told.append)
    (line,) = told
    assert line.startswith(f"max_length {limit:,} shortens 4 of 4 samples: ")
    said: list[str] = []
    result = memfit.train(wanted, say=said.append)
    assert line in said
    data_json = json.loads((result.folder / "data.json").read_text())
    assert len(data_json["shortened"]) == 4
    assert {"row", "id", "tokens", "kept_tokens", "turns", "images", "source"} == set(data_json["shortened"][0])
    rows = [json.loads(text) for text in (result.folder / "run.jsonl").read_text().splitlines()]
    (step,) = [row for row in rows if row["event"] == "step"]
    # Two samples a step, padded to the longest of each micro-batch: never above the limit.
    assert step["tokens"] <= step["padded_tokens"] <= 2 * limit
    plan = json.loads((result.folder / "plan.json").read_text())
    assert plan["forecast"]["host"]["peak_bytes"] == forecast_json(forecast)["host"]["peak_bytes"]
