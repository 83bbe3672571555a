"""The torch-free encoder against transformers' own tokenizers, templates and processors."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from memfit.errors import UserError
from memfit.inputs.encode import NO_LOSS, Encoder
from memfit.inputs.model_source import find_model
from memfit.specs.recipe import ImageBudget
from memfit.specs.sample import Sample, Turn
from memfit.testing import KINDS, make_dummy

VISION = ("minicpmv4_6", "minicpmv4_7", "qwen2_5_vl", "llava")
SIZES = [(300, 200), (90, 120), (64, 64)]
ANSWERS = ('{"number": "1024"}', "你好, naïve café 🙂", "  three\nlines \nhere")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("dummies")
    return {kind: make_dummy(kind, base / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, Encoder]:
    return {kind: Encoder(find_model(str(folder))) for kind, folder in folders.items()}


def conversation(rounds: int, pictures: int, system: bool = True) -> Sample:
    """`rounds` questions with answers; pictures stand before the words of the first rounds, two in the first."""
    turns = [Turn("system", ("You read slips.",))] if system else []
    places = {0: list(range(min(pictures, 2))), 1: list(range(2, pictures))}
    for index in range(rounds):
        turns.append(Turn("user", (*places.get(index, []), f"Question {index}: 这是什么?\nAnswer shortly.")))
        turns.append(Turn("assistant", (ANSWERS[index],)))
    return Sample("s", 0, tuple(turns), tuple(Path(f"{i}.png") for i in range(pictures)))


def messages_of(sample: Sample, encoder: Encoder) -> list[dict[str, Any]]:
    """The conversation as a user of transformers writes it: parts for vision models, words for the others."""
    messages = []
    for turn in sample.turns:
        parts = [{"type": "image"} if isinstance(p, int) else {"type": "text", "text": p} for p in turn.pieces]
        messages.append({"role": turn.role, "content": parts if encoder.images else turn.text})
    return messages


def upstream_ids(folder: Path, encoder: Encoder, sample: Sample, generation: bool = False) -> list[int]:
    """AutoTokenizer's template and ids, each image token replaced by the whole placeholder as the processor does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = messages_of(sample, encoder)
    if not encoder.images:
        extra = {"enable_thinking": False} if generation else {}
        out = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, **extra)
        return list(out["input_ids"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    settings = {**encoder.processor_settings, "tokens": {"image_token": encoder.image_token}}
    pieces = text.split(encoder.image_token)
    assert len(pieces) == len(sample.images) + 1
    text = pieces[0]
    for index, piece in enumerate(pieces[1:]):
        text += encoder.images.placeholder(encoder.cost(*SIZES[index]), index, settings) + piece
    if encoder.adds_end_mark:  # LLaVA's template writes none: memfit puts eos behind each answer
        for turn in sample.turns:
            if turn.role == "assistant":
                text = text.replace(turn.text, turn.text + encoder.end_mark)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def cases() -> list[tuple[str, int, int, bool]]:
    found = []
    for kind in KINDS:
        for rounds in (1, 3):
            for pictures in (0, 1, 3) if kind in VISION else (0,):
                if pictures <= 2 or rounds > 1:
                    found += [(kind, rounds, pictures, True), (kind, rounds, pictures, False)]
    return found


@pytest.mark.parametrize(("kind", "rounds", "pictures", "system"), cases())
def test_ids_equal_transformers(
    kind: str, rounds: int, pictures: int, system: bool, folders: dict[str, Path], encoders: dict[str, Encoder]
) -> None:
    encoder, sample = encoders[kind], conversation(rounds, pictures, system)
    encoded = encoder.encode(sample, SIZES[:pictures])
    assert encoded.input_ids.tolist() == upstream_ids(folders[kind], encoder, sample)
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32
    before_last = dataclasses.replace(sample, turns=sample.turns[:-1])
    prompt = encoder.prompt(sample, SIZES[:pictures])
    assert prompt.tolist() == upstream_ids(folders[kind], encoder, before_last, generation=True)


@pytest.mark.parametrize(("kind", "rounds", "pictures", "system"), cases())
def test_loss_is_on_the_answers_and_their_end_marks(
    kind: str, rounds: int, pictures: int, system: bool, folders: dict[str, Path], encoders: dict[str, Encoder]
) -> None:
    encoder, sample = encoders[kind], conversation(rounds, pictures, system)
    encoded = encoder.encode(sample, SIZES[:pictures])
    trained = encoded.labels != NO_LOSS
    np.testing.assert_array_equal(encoded.labels[trained], encoded.input_ids[trained])
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    runs = np.flatnonzero(np.diff(np.concatenate(([False], trained, [False])).astype(int))).reshape(-1, 2)
    said = [tokenizer.decode(encoded.input_ids[a:b].tolist(), skip_special_tokens=False) for a, b in runs]
    stripped = kind == "llama"  # its template trims
    answers = [answer.strip() if stripped else answer for answer in ANSWERS[:rounds]]
    if kind == "llava":  # the space that LLaVA's template writes after "ASSISTANT:"; its decoder drops a first space
        said, answers = [text.lstrip() for text in said], [answer.lstrip() for answer in answers]
    assert said == [answer + encoder.end_mark for answer in answers]


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_runs_into_the_first_trained_token(kind: str, encoders: dict[str, Encoder]) -> None:
    """Generation starts exactly where loss starts: what the model must say is what it was trained to say."""
    pictures = 2 if kind in VISION else 0
    sample = conversation(1, pictures)
    encoded, prompt = (f(sample, SIZES[:pictures]) for f in (encoders[kind].encode, encoders[kind].prompt))
    first = int(np.flatnonzero(encoded.labels != NO_LOSS)[0])
    assert prompt.tolist() == encoded.input_ids[:first].tolist()


@pytest.mark.parametrize("kind", VISION)
def test_pictures_stand_where_the_pieces_say(kind: str, encoders: dict[str, Encoder]) -> None:
    """Spans, masks and costs agree; a picture after words comes after them unless the template moves it."""
    encoder = encoders[kind]
    turns = (
        Turn("user", ("First words ", 1, " middle words ", 0, " last words")),
        Turn("assistant", ("done",)),
    )
    sample = Sample("s", 0, turns, (Path("0.png"), Path("1.png")))
    encoded = encoder.encode(sample, SIZES[:2])
    assert encoded.image_order == (1, 0)
    assert encoded.image_costs == (encoder.cost(*SIZES[1]), encoder.cost(*SIZES[0]))
    ids = encoded.input_ids
    assert (encoded.image_mask == (ids == encoder.image_token_id)).all()
    for cost, (start, stop) in zip(encoded.image_costs, encoded.image_spans, strict=True):
        assert int(encoded.image_mask[start:stop].sum()) == cost.tokens
        assert encoded.image_mask[start]
        assert encoded.image_mask[stop - 1]
    assert int(encoded.image_mask.sum()) == sum(cost.tokens for cost in encoded.image_costs)
    between = encoder.decode(ids[encoded.image_spans[0][1] : encoded.image_spans[1][0]])
    assert ("middle words" in between) == (not encoder.moves_pictures)
    assert encoder.moves_pictures == (kind == "llava")
    cost = encoder.sample_cost(encoded)
    assert cost.tokens == len(ids)
    assert cost.image_tokens == int(encoded.image_mask.sum())
    assert cost.trained_tokens == int((encoded.labels != NO_LOSS).sum())
    assert cost.patches == sum(rows * columns for c in encoded.image_costs for rows, columns in c.crops)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_spelt_out_are_caught(kind: str, encoders: dict[str, Encoder]) -> None:
    encoder = encoders[kind]
    literal = encoder.image_token or encoder.end_mark
    text = f"type {literal} here and {encoder.end_mark} there"
    assert encoder.special_tokens_in(text) == [literal, encoder.end_mark]
    assert encoder.special_tokens_in("a < b > c </imag> <|im_star|>") == []
    for role in ("user", "assistant"):
        words = {"user": "hello", "assistant": "hello", role: text}
        turns = (Turn("user", (words["user"],)), Turn("assistant", (words["assistant"],)))
        with pytest.raises(UserError, match="row 3") as caught:
            encoder.encode(Sample("s", 3, turns, ()), [])
        assert literal in caught.value.problem
        assert role in caught.value.problem


def test_samples_that_cannot_be_encoded_name_their_row(encoders: dict[str, Encoder]) -> None:
    vision, text = encoders["minicpmv4_6"], encoders["llama"]
    ask, answer = Turn("user", ("hello",)), Turn("assistant", ("yes",))
    image = Path("0.png")
    for encoder, turns, images, words in (
        (vision, (ask,), (), "no assistant turn"),
        (vision, (ask, answer), (image,), "1 images, 1 sizes, placeholders []"),
        (vision, (Turn("user", (0, 1)), answer), (image,), r"placeholders [0, 1]"),
        (vision, (ask, Turn("assistant", (0, "yes"))), (image,), "inside an answer"),
        (text, (Turn("user", (0, "x")), answer), (image,), "takes none"),
    ):
        with pytest.raises(UserError) as caught:
            encoder.encode(Sample("s", 12, turns, images), SIZES[: len(images)])
        assert "row 12" in caught.value.problem
        assert words in caught.value.problem


def test_pictures_over_the_budget_are_refused(folders: dict[str, Path]) -> None:
    """The knob holds for ordinary pictures; a strip that goes over even so is refused with its numbers."""
    encoder = Encoder(find_model(str(folders["minicpmv4_6"])), ImageBudget(max_tokens=30))
    assert encoder.processor_settings["max_slice_nums"] == 3
    assert encoder.cost(800, 600).tokens <= 30
    with pytest.raises(ValueError, match=r"6000 x 1 px takes \d+ tokens .* image.max_tokens: 30"):
        encoder.cost(6000, 1)
    sample = Sample("s", 5, (Turn("user", (0, "?")), Turn("assistant", ("yes",))), (Path("0.png"),))
    with pytest.raises(UserError, match=r"row 5: a picture of 6000 x 1 px"):
        encoder.encode(sample, [(6000, 1)])
    with pytest.raises(UserError, match="takes no pictures"):
        Encoder(find_model(str(folders["llama"])), ImageBudget(max_tokens=30))


@pytest.mark.parametrize("kind", KINDS)
def test_ends_padding_and_decoding(kind: str, folders: dict[str, Path], encoders: dict[str, Encoder]) -> None:
    encoder, tokenizer = encoders[kind], AutoTokenizer.from_pretrained(folders[kind])
    assert encoder.pad_id == tokenizer.pad_token_id
    assert encoder.stop_ids == (tokenizer.eos_token_id,)
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids[0]) == encoder.end_mark
    ids = tokenizer.encode("naïve 你好 words", add_special_tokens=False)
    assert encoder.decode([*ids, *encoder.stop_ids]) == "naïve 你好 words"


def test_qwen3_thoughts(encoders: dict[str, Encoder]) -> None:
    """The template cuts thoughts out of earlier answers, so such an answer cannot be trained word for word."""
    turns = (Turn("user", ("2+2?",)), Turn("assistant", ("<think>\nadd\n</think>\n\n4",)))
    with pytest.raises(UserError, match="row 0: the chat template changes the words"):
        encoders["qwen3"].encode(Sample("s", 0, turns, ()), [])


def broken_template(folder: Path, target: Path, template: str) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return target


def test_templates_that_lose_or_refuse_answers(folders: dict[str, Path], tmp_path: Path) -> None:
    head = "{%- for m in messages %}"
    for name, template, words in (
        ("upper", head + "{{ m.content[:5] + '<|eot_id|>' }}{%- endfor %}", "neither plain words nor"),
        ("broken", head, "cannot be read"),
    ):
        folder = broken_template(folders["llama"], tmp_path / name, template)
        with pytest.raises(UserError, match=words):
            Encoder(find_model(str(folder)))
    twice = head + "{{ m.content }}{% if loop.index > 3 %}{{ m.content }}{% endif %}<|eot_id|>{%- endfor %}"
    encoder = Encoder(find_model(str(broken_template(folders["llama"], tmp_path / "twice", twice))))
    encoder.encode(conversation(1, 0), [])
    with pytest.raises(UserError, match="does not keep answer 2"):
        encoder.encode(conversation(3, 0), [])
    strict = "{%- if messages[0].role == 'system' %}{{ raise_exception('No system turns') }}{%- endif %}" + twice
    encoder = Encoder(find_model(str(broken_template(folders["llama"], tmp_path / "strict", strict))))
    with pytest.raises(UserError, match=r"row 0: .*No system turns"):
        encoder.encode(conversation(1, 0), [])


def test_a_model_without_a_template_gets_the_familys(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("llama", "minicpmv4_6", "qwen2_5_vl", "llava"):
        folder = broken_template(folders[kind], tmp_path / kind, "")
        (folder / "chat_template.jinja").unlink()
        encoder = Encoder(find_model(str(folder)))
        pictures = 1 if kind in VISION else 0
        encoded = encoder.encode(conversation(3, pictures), SIZES[:pictures])
        said = encoder._tokenizer.decode([int(i) for i in encoded.labels if i != NO_LOSS], skip_special_tokens=False)
        assert said.count(encoder.end_mark) == 3
        assert all(answer.strip() in said for answer in ANSWERS)
        assert "Question" not in said
        assert not encoder.adds_end_mark


def test_added_tokens_of_the_config_only(folders: dict[str, Path], tmp_path: Path) -> None:
    """A special token that only tokenizer_config.json names gets the id that transformers gives it."""
    folder = broken_template(
        folders["llama"], tmp_path / "added", (folders["llama"] / "chat_template.jinja").read_text()
    )
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["extra_special_tokens"] = {"slip_token": "<|slip|>"}
    path.write_text(json.dumps(settings))
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), Encoder(find_model(str(folder)))
    assert encoder._tokenizer.token_to_id("<|slip|>") == tokenizer.convert_tokens_to_ids("<|slip|>")
    assert encoder.special_tokens_in("a <|slip|>") == ["<|slip|>"]


def test_the_image_token_of_config_tokenizer_and_template_must_agree(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["qwen2_5_vl"]
    with pytest.raises(UserError, match=r"has id 406 in tokenizer.json, the image token 405 in config.json"):
        Encoder(find_model(str(folder), {"image_token_id": 405}))
    template = (folder / "chat_template.jinja").read_text().replace("<|image_pad|>", "<|video_pad|>")
    with pytest.raises(UserError, match=r"writes <\|image_pad\|> 0 times for one picture"):
        Encoder(find_model(str(broken_template(folder, tmp_path / "video", template))))


def test_templates_of_plain_words_get_the_familys_marker(folders: dict[str, Path], tmp_path: Path) -> None:
    words = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    encoder = Encoder(find_model(str(broken_template(folders["qwen2_5_vl"], tmp_path / "words", words))))
    sample = Sample("s", 0, (Turn("user", ("a ", 0, " b")), Turn("assistant", ("yes",))), (Path("0.png"),))
    encoded = encoder.encode(sample, SIZES[:1])
    text = encoder._tokenizer.decode(encoded.input_ids.tolist(), skip_special_tokens=False)
    pads = "<|image_pad|>" * encoder.cost(*SIZES[0]).tokens
    assert f"a <|vision_start|>{pads}<|vision_end|> b<|im_end|>" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_saved_by_transformers_encodes_the_same(
    kind: str, folders: dict[str, Path], encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    folder = broken_template(folders[kind], tmp_path / kind, "")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    AutoTokenizer.from_pretrained(folders[kind]).save_pretrained(folder)
    sample = conversation(3, 3 if kind in VISION else 0)
    sizes = SIZES[: len(sample.images)]
    saved = Encoder(find_model(str(folder)))
    np.testing.assert_array_equal(saved.encode(sample, sizes).input_ids, encoders[kind].encode(sample, sizes).input_ids)
    assert (saved.pad_id, saved.stop_ids) == (encoders[kind].pad_id, encoders[kind].stop_ids)


def test_letters_that_the_tokenizer_normalizes(encoders: dict[str, Encoder]) -> None:
    """NFC joins two characters of the text into one: spans must still follow the original text."""
    encoder = encoders["qwen2_5_vl"]
    turns = (Turn("user", ("e\u0301" * 7 + "?",)), Turn("assistant", ("cafe\u0301 u\u0308ber",)), Turn("user", ("?",)))
    encoded = encoder.encode(Sample("s", 0, (*turns, Turn("assistant", ("no",))), ()), [])
    said = encoder._tokenizer.decode([int(i) for i in encoded.labels if i != NO_LOSS], skip_special_tokens=False)
    assert said == "caf\u00e9 \u00fcber<|im_end|>no<|im_end|>"


def test_encoders_travel_to_worker_processes(encoders: dict[str, Encoder]) -> None:
    sample = conversation(1, 1)
    for kind in VISION:
        copy = pickle.loads(pickle.dumps(encoders[kind]))
        mine, theirs = (e.encode(sample, SIZES[:1]) for e in (encoders[kind], copy))
        np.testing.assert_array_equal(mine.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(mine.labels, theirs.labels)


def least_seconds(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Processor time of the best of five rounds."""
    rounds = []
    for _ in range(5):
        start = time.process_time()
        for item in items:
            work(item)
        rounds.append(time.process_time() - start)
    return min(rounds)


@pytest.mark.long  # two programs' speeds beside each other want a machine that does nothing else
@pytest.mark.parametrize("kind", ["minicpmv4_6", "qwen2_5_vl", "llama"])
def test_speed(kind: str, encoders: dict[str, Encoder], folders: dict[str, Path]) -> None:
    """At most twice the time that transformers takes to render and tokenize alone, without labels and placeholders.

    Measured 1.0 to 1.3 times, at 2,700 to 5,500 short samples a second; a bound in seconds would test the machine.
    """
    pictures = 1 if kind in VISION else 0
    samples, messages = [], []
    for index in range(300):
        words, answer = "What is written on the slip?", f'{{"number": "{index}"}}'
        turns = (Turn("user", (*range(pictures), words)), Turn("assistant", (answer,)))
        samples.append(Sample(str(index), index, turns, (Path("0.png"),) * pictures))
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": words}]
        messages.append(
            [
                {"role": "user", "content": parts if pictures else words},
                {"role": "assistant", "content": [{"type": "text", "text": answer}] if pictures else answer},
            ]
        )
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    theirs = least_seconds(lambda item: tokenizer.apply_chat_template(item, tokenize=True), messages)
    ours = least_seconds(lambda sample: encoders[kind].encode(sample, SIZES[:pictures]), samples)
    assert ours <= 2 * theirs, (len(samples) / ours, len(samples) / theirs)
