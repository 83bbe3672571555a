"""One row in each format: what it becomes, and what is said of rows that are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from memfit.errors import UserError
from memfit.inputs.data.draft import RowError
from memfit.inputs.data.formats import READERS, detect_format, file_path
from memfit.specs.check import REASONS
from memfit.specs.sample import Turn

ASK, ANSWER = {"role": "user", "content": "<image>\nRead."}, {"role": "assistant", "content": "12"}


def turns(*said: tuple[Any, ...]) -> tuple[Turn, ...]:
    return tuple(Turn(role, tuple(pieces)) for role, *pieces in said)


GOOD: dict[str, tuple[str, dict[str, Any], tuple[Turn, ...], tuple[str, ...]]] = {
    "openbmb, one picture": (
        "openbmb",
        {"id": 7, "image": "a.png", "conversations": [ASK, ANSWER]},
        turns(("user", 0, "\nRead."), ("assistant", "12")),
        ("a.png",),
    ),
    "openbmb, no placeholder: the picture first": (
        "openbmb",
        {"image": "a.png", "conversations": [{"role": "user", "content": "Read."}, ANSWER]},
        turns(("user", 0, "\nRead."), ("assistant", "12")),
        ("a.png",),
    ),
    "openbmb, the picture in a later turn": (
        "openbmb",
        {
            "image": "a.png",
            "conversations": [
                {"role": "user", "content": "Hello"},
                ANSWER,
                ASK,
                {"role": "assistant", "content": "13"},
            ],
        },
        turns(("user", "Hello"), ("assistant", "12"), ("user", 0, "\nRead."), ("assistant", "13")),
        ("a.png",),
    ),
    "openbmb, named pictures in another order than the text": (
        "openbmb",
        {
            "image": {"<image_00>": "a.png", "<image_01>": "b.png"},
            "conversations": [{"role": "user", "content": "A <image_01> B<image_00>"}, ANSWER],
        },
        turns(("user", "A ", 1, " B", 0), ("assistant", "12")),
        ("a.png", "b.png"),
    ),
    "openbmb, one named picture": (
        "openbmb",
        {"image": {"<image>": "a.png"}, "conversations": [{"role": "user", "content": "Read."}, ANSWER]},
        turns(("user", 0, "\nRead."), ("assistant", "12")),
        ("a.png",),
    ),
    "openbmb, text only": (
        "openbmb",
        {"conversations": [{"role": "user", "content": "Hi"}, ANSWER]},
        turns(("user", "Hi"), ("assistant", "12")),
        (),
    ),
    "llava": (
        "llava",
        {"image": "a.png", "conversations": [{"from": "human", "value": "x<image>"}, {"from": "gpt", "value": "y"}]},
        turns(("user", "x", 0), ("assistant", "y")),
        ("a.png",),
    ),
    "sharegpt with a system text and two pictures": (
        "sharegpt",
        {
            "images": ["a.png", "b.png"],
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "y"}],
        },
        turns(("system", "Be brief."), ("user", 0, 1, "?"), ("assistant", "y")),
        ("a.png", "b.png"),
    ),
    "openai, content parts": (
        "openai",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "file:///d/a%20b.png"}},
                        {"type": "text", "text": "Literal <image> stays."},
                        {"type": "image_url", "image_url": "b.png"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "y"}]},
            ]
        },
        turns(("system", "Be brief."), ("user", 0, "Literal <image> stays.", 1), ("assistant", "y")),
        ("file:///d/a%20b.png", "b.png"),
    ),
    "openai, image parts that take from images": (
        "openai",
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, ANSWER],
        },
        turns(("user", 0, "?"), ("assistant", "12")),
        ("a.png",),
    ),
    "swift": (
        "swift",
        {"images": ["a.png", {"path": "b.png"}], "messages": [{"role": "user", "content": "<image>or<image>"}, ANSWER]},
        turns(("user", 0, "or", 1), ("assistant", "12")),
        ("a.png", "b.png"),
    ),
    "swift, no tag: the pictures first, behind the system": (
        "swift",
        {
            "images": ["a.png"],
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Read."}, ANSWER],
        },
        turns(("system", "s"), ("user", 0, "Read."), ("assistant", "12")),
        ("a.png",),
    ),
    "swift, query and response": (
        "swift",
        {"query": "<image>b", "response": "c", "history": [["q", "a"]], "system": "s", "images": ["a.png"]},
        turns(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", 0, "b"), ("assistant", "c")),
        ("a.png",),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_rows(name: str) -> None:
    form, row, said, images = GOOD[name]
    draft = READERS[form].read(row)
    assert draft.turns == said
    assert draft.images == images
    assert draft.id == (None if "id" not in row else str(row["id"]))


@pytest.mark.parametrize("name", GOOD)
def test_detection(name: str) -> None:
    form, row, _, _ = GOOD[name]
    # A text-only row, or one whose pictures are content parts, reads the same in either format.
    assert detect_format([row]) == form


def conversation(question: Any = "<image>", answer: Any = "12", **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"image": "a.png", "conversations": said, **more}


BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "misspelt key": (
        "openbmb",
        {"image": "a.png", "conversation": [ASK, ANSWER]},
        "unknown-key",
        "'conversation'; did you mean 'conversations'",
    ),
    "misspelt picture": (
        "openbmb",
        {"imgae": "a.png", "conversations": [ASK, ANSWER]},
        "unknown-key",
        "'imgae'; did you mean 'image'",
    ),
    "usual other name": (
        "llava",
        {"image_path": "a.png", "conversations": [{"from": "human", "value": "?"}]},
        "unknown-key",
        "did you mean 'image'",
    ),
    "misspelt turn key": (
        "openbmb",
        {"conversations": [{"role": "user", "contnt": "x"}]},
        "unknown-key",
        "turn 0: unknown key 'contnt'",
    ),
    "missing turn key": ("openbmb", {"conversations": [{"role": "user"}]}, "bad-row", "turn 0: no key 'content'"),
    "misspelt role": (
        "openbmb",
        {"conversations": [ASK, {"role": "asistant", "content": "x"}]},
        "bad-row",
        "did you mean 'assistant'",
    ),
    "tool role": ("openai", {"messages": [{"role": "tool", "content": "x"}]}, "bad-row", "role 'tool'"),
    "empty list": ("openbmb", {"conversations": []}, "bad-row", "an empty list"),
    "no list": ("openbmb", {"conversations": "x"}, "bad-row", "it is text"),
    "turn is text": ("openbmb", {"conversations": ["x"]}, "bad-row", "turn 0 must be an object"),
    "answer is an object": ("openbmb", conversation(answer={"a": 1}), "bad-row", "write the answer as a JSON string"),
    "answer is a number": ("openbmb", conversation(answer=12), "bad-row", "it is a number"),
    "half a surrogate pair": ("openbmb", conversation(answer="\ud83d"), "bad-row", "surrogate"),
    "no answer": ("openbmb", {"conversations": [{"role": "user", "content": "x"}]}, "no-assistant-turn", "1 turn"),
    "empty answer": ("openbmb", conversation(answer=" \n"), "empty-answer", "turn 1"),
    "openai null answer": (
        "openai",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        "empty-answer",
        "turn 1",
    ),
    "empty question": (
        "openbmb",
        {"conversations": [{"role": "user", "content": ""}, ANSWER]},
        "bad-row",
        "turn 0 (user)",
    ),
    "assistant first": (
        "openbmb",
        {"conversations": [ANSWER, {"role": "user", "content": "x"}]},
        "turn-order",
        "turn 0",
    ),
    "user last": (
        "openbmb",
        {"conversations": [{"role": "user", "content": "x"}, ANSWER, {"role": "user", "content": "y"}]},
        "turn-order",
        "last turn (2)",
    ),
    "two placeholders": (
        "openbmb",
        conversation("<image><image>"),
        "placeholder-count",
        "2 placeholders for 1 picture",
    ),
    "placeholder without picture": (
        "openbmb",
        conversation(image=None),
        "placeholder-count",
        "1 placeholder for 0 pictures",
    ),
    "picture without placeholder": (
        "llava",
        {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "y"}]},
        "placeholder-count",
        "0 placeholders for 1 picture",
    ),
    "unnamed placeholder": (
        "openbmb",
        conversation("<image_00> <image_01>", image={"<image_00>": "a.png"}),
        "placeholder-count",
        "<image_01> without a picture",
    ),
    "unused picture": (
        "openbmb",
        conversation("<image_00>", image={"<image_00>": "a.png", "<image_01>": "b.png"}),
        "placeholder-count",
        "<image_01> not in the text",
    ),
    "picture used twice": (
        "openbmb",
        conversation("<image_00><image_00>", image={"<image_00>": "a.png"}),
        "placeholder-count",
        "<image_00> more than once",
    ),
    "picture in an answer": ("openbmb", conversation("?", "<image>"), "placeholder-count", "assistant turn"),
    "numbered placeholder, single picture": ("openbmb", conversation("<image_00>"), "placeholder-count", "<image_00>"),
    "swift, a part of the tags": (
        "swift",
        {"images": ["a", "b"], "messages": [{"role": "user", "content": "<image>"}, ANSWER]},
        "placeholder-count",
        "1 placeholder for 2 pictures",
    ),
    "openai, images left over": (
        "openai",
        {"images": ["a"], "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}, ANSWER]},
        "placeholder-count",
        "1 of 'images'",
    ),
    "openai, swift's row": (
        "openai",
        {"images": ["a"], "messages": [{"role": "user", "content": "<image>"}, ANSWER]},
        "bad-row",
        "data.format: swift",
    ),
    "both keys": ("swift", {"image": "a", "images": ["a"], "messages": [ASK, ANSWER]}, "bad-row", "both 'image'"),
    "empty path": ("openbmb", conversation(image=" "), "missing-image", "empty path"),
    "path is a number": ("openbmb", conversation(image=3), "bad-row", "must be a path, it is a number"),
    "picture inside the row": (
        "swift",
        {"images": [{"bytes": "xx"}], "messages": [ASK, ANSWER]},
        "remote-image",
        "write it",
    ),
    "video": ("swift", {"videos": ["a.mp4"], "messages": [ASK, ANSWER]}, "bad-row", "'videos'"),
    "tools": ("openai", {"messages": [{"role": "user", "content": "x"}, ANSWER], "tools": ["t"]}, "bad-row", "'tools'"),
    "audio part": (
        "openai",
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]},
        "bad-row",
        "'input_audio'",
    ),
    "history": ("swift", {"query": "x", "response": "y", "history": ["z"]}, "bad-row", "pairs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    form, row, reason, detail = BAD[name]
    with pytest.raises(RowError) as caught:
        READERS[form].read(row)
    assert caught.value.reason == reason
    assert reason in REASONS
    assert detail in caught.value.detail


def test_notes_of_the_users_own_are_ignored_and_named() -> None:
    # "page" resembles "image", and "images" is absent: still no slip, because "image" is there.
    draft = READERS["openbmb"].read(conversation(page=3, source="scan", img="x"))
    assert draft.ignored == ("page", "source", "img")


def test_format_of_the_majority() -> None:
    llava = {"image": "a", "conversations": [{"from": "human", "value": "<image>"}]}
    text = {"conversations": [{"from": "human", "value": "?"}]}
    assert detect_format([text, text, llava]) == "llava"  # LLaVA's reader reads both
    plain = {"messages": [{"role": "user", "content": "?"}]}
    assert detect_format([plain]) == "openai"
    assert detect_format([plain, plain, {**plain, "images": ["a"]}]) == "swift"
    assert detect_format([{"x": 1}, {"conversations": [ASK]}, {"conversations": [ASK]}]) == "openbmb"


@pytest.mark.parametrize(
    ("rows", "problem", "hint"),
    [
        ([{"id": 1, "conversation": []}], "id, conversation", "did you mean 'conversations' by 'conversation'"),
        ([{"data": [1, 2]}], "data", "the list that stands under 'data'"),
        ([{"prompt": "x"}], "prompt", "openbmb, llava, sharegpt, swift, openai"),
        (["x"], "the first is text", "openbmb"),
    ],
)
def test_no_known_format(rows: list[Any], problem: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        detect_format(rows, "d.json")
    assert problem in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("a/b.png", "a/b.png"),
        ("file:///d/a%20b.png", "/d/a b.png"),
        ("file://localhost/d/a.png", "/d/a.png"),
        ("file://rel/a.png", "rel/a.png"),
        ("file:a.png", "a.png"),
        ("a:b.png", "a:b.png"),
    ],
)
def test_file_path(reference: str, path: str) -> None:
    assert file_path(reference) == path


@pytest.mark.parametrize(
    "reference", ["http://x/a.png", "HTTPS://x/a.png", "data:image/png;base64,AAAA", "s3://b/a.png"]
)
def test_what_is_no_file(reference: str) -> None:
    with pytest.raises(RowError) as caught:
        file_path(reference)
    assert caught.value.reason == "remote-image"
    assert len(caught.value.detail) < 200
