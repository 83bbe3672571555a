"""V 4.5's places in time: pictures of one time step are what they are in 2.6; video is refused, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from memfit import models
from memfit.errors import UserError
from memfit.inputs.data.check import check_data
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.models.minicpmv.resampler import Resampler
from memfit.specs.recipe import Data
from tests.unit.test_minicpmv import inputs, load, logits

Folder = Callable[[str], Path]
KINDS = ("minicpmv4_5", "minicpmo4_5")
NO_TIME = ([[-1], [-1]], [[-1, -1]], torch.tensor([-1, -1]), [torch.tensor([-1])], [], None)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    models.register()


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_without_a_place_in_time_change_nothing(dummies: Folder, kind: str) -> None:
    """As the checkpoint's own processor writes them: one list for each picture, -1 throughout."""
    model, given = load(dummies(kind)), inputs(dummies(kind))
    wanted = logits(model, given)
    for ids in NO_TIME:
        assert torch.equal(logits(model, {**given, "temporal_ids": ids}), wanted)
    tokens = [
        model.generate(**given, **more, max_new_tokens=4, do_sample=False, num_beams=beams).tolist()
        for beams in (1, 2)
        for more in ({}, {"temporal_ids": [[-1], [-1]]})
    ]
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_resampler_is_that_of_2_6(dummies: Folder, kind: str) -> None:
    """No weight of its own: the resampler whose vectors were checked (tests/golden) takes them by name."""
    one = load(dummies(kind)).resampler
    other = Resampler(*one.query.shape, one.kv_proj.in_features)
    other.load_state_dict(one.state_dict())
    hidden = torch.randn(2, 12, one.kv_proj.in_features)
    with torch.no_grad():
        assert torch.equal(one(hidden, [(3, 4), (2, 5)]), other(hidden, [(3, 4), (2, 5)]))


@pytest.mark.parametrize("ids", [[[0, 1], [-1]], [[-1], [5]], torch.tensor([[-1, 0]]), 3])
def test_a_place_in_time_is_refused(dummies: Folder, ids: Any) -> None:
    folder = dummies("minicpmv4_5")
    model, given = load(folder), inputs(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for call in (
        lambda: model(**given, temporal_ids=ids),
        lambda: model.generate(**given, temporal_ids=ids, max_new_tokens=1),
        lambda: processor("(<image>./</image>)", [Image.new("RGB", (60, 60))], temporal_ids=ids),
    ):
        with pytest.raises(UserError, match="place in time") as caught:
            call()
        assert "frames as pictures" in caught.value.hint


def test_a_video_is_refused_where_it_comes_in(dummies: Folder) -> None:
    processor = transformers.AutoProcessor.from_pretrained(dummies("minicpmv4_5"))
    talk = [{"role": "user", "content": [{"type": "video", "path": "film.mp4"}, {"type": "text", "text": "What?"}]}]
    for call in (
        lambda: processor.apply_chat_template(talk),
        lambda: processor("What?", videos=[[Image.new("RGB", (60, 60))]]),
    ):
        with pytest.raises(UserError, match="sees pictures only") as caught:
            call()
        assert "frames as pictures" in caught.value.hint


def test_rows_with_a_video_are_named(dummies: Folder, tmp_path: Path) -> None:
    """In data they are broken rows with that reason, not rows whose video was dropped."""
    rows = '{"id": "a", "video": "film.mp4", "conversations": [{"role": "user", "content": "What?"}, ' + (
        '{"role": "assistant", "content": "That."}]}'
    )
    (tmp_path / "data.jsonl").write_text(rows + "\n")
    encoder = Encoder(find_model(str(dummies("minicpmv4_5"))))
    report = check_data(Data(train=str(tmp_path / "data.jsonl"), eval=None), encoder)
    assert "video" in str(report.to_json())
    assert report.verdict == "refused"
