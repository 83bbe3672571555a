"""Finding a model: folders, config.json, the hub's cache, overrides, and one clear line for every failure."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from memfit.errors import UserError
from memfit.inputs.model_source import find_model, require_weights

CONFIG = {"model_type": "llava", "text_config": {"num_hidden_layers": 32, "hidden_size": 4096}, "vocab_size": 7}


def folder_with(path: Path, **files: Any) -> Path:
    """Writes files; the first "__" of a keyword stands for the dot before the ending."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in {"config__json": CONFIG, **files}.items():
        file = path / name.replace("__", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_folder(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path / "model",
        preprocessor_config__json={"max_slice_nums": 4},
        generation_config__json={"eos_token_id": [1, 2]},
        tokenizer_config__json={"eos_token": "</s>", "chat_template": "from the tokenizer"},
        model__safetensors=b"12345678",
    )
    source = find_model(str(folder))
    assert source.config == CONFIG
    assert source.folder == folder
    assert source.preprocessor == {"max_slice_nums": 4}
    assert source.generation == {"eos_token_id": [1, 2]}
    assert source.chat_template == "from the tokenizer"
    assert (source.weights, source.weight_bytes) == (True, 8)
    assert require_weights(source) is source


def test_chat_templates_by_precedence(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        tokenizer_config__json={
            "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
        },
    )
    assert find_model(str(folder)).chat_template == "d"
    folder_with(tmp_path, processor_config__json={"chat_template": "p", "image_processor": {"size": 3}})
    assert find_model(str(folder)).chat_template == "p"
    assert find_model(str(folder)).preprocessor == {"size": 3}
    folder_with(tmp_path, chat_template__json={"chat_template": "j"})
    assert find_model(str(folder)).chat_template == "j"
    folder_with(tmp_path, chat_template__jinja="file")
    assert find_model(str(folder)).chat_template == "file"


def test_sharded_weights_must_all_be_there(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    folder = folder_with(tmp_path / "m", model__safetensors__index__json=index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"123")
    source = find_model(str(folder))
    assert (source.weights, source.weight_bytes) == (False, 3)
    (folder / "model-2.safetensors").write_bytes(b"1234")
    source = find_model(str(folder))
    assert (source.weights, source.weight_bytes) == (True, 7)


def test_a_config_alone_is_enough_to_estimate(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    source = find_model(str(folder / "config.json"), {"vocab_size": 9})
    assert source.folder is None
    assert source.config["vocab_size"] == 9
    with pytest.raises(UserError, match="no weights to train"):
        require_weights(source)


def test_overrides_merge_deep(tmp_path: Path) -> None:
    folder = str(folder_with(tmp_path))
    for overrides in ({"text_config.num_hidden_layers": 4}, {"text_config": {"num_hidden_layers": 4}}):
        source = find_model(folder, overrides)
        assert source.config["text_config"] == {"num_hidden_layers": 4, "hidden_size": 4096}
        assert source.overrides == overrides
    assert find_model(folder, {"vision_config.depth": 2}).config["vision_config"] == {"depth": 2}
    assert find_model(folder, {"layer_types": ["a"]}).config["layer_types"] == ["a"]
    with pytest.raises(UserError, match="vocab_size"):
        find_model(folder, {"vocab_size.x": 1})


def test_wrong_paths_name_the_nearest_folder(tmp_path: Path) -> None:
    folder_with(tmp_path / "tiny-minicpm")
    folder_with(tmp_path / "other")
    with pytest.raises(UserError) as caught:
        find_model(str(tmp_path / "tiny-minicmp"))
    assert str(tmp_path / "tiny-minicmp") in caught.value.problem
    assert str(tmp_path / "tiny-minicpm") in caught.value.hint
    with pytest.raises(UserError) as caught:
        find_model(str(tmp_path / "none" / "model"))
    assert "does not exist either" in caught.value.hint


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[1]", "holds a list"), ("", "is not JSON")])
def test_a_broken_config_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for name in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UserError, match=words):
            find_model(str(name))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json"):
        find_model(str(tmp_path))


def test_remote_code_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, config__json={"model_type": "internvl_chat", "auto_map": {"AutoModel": "x.Y"}})
    with pytest.raises(UserError, match="code of its own repository") as caught:
        find_model(str(folder))
    assert "minicpmv4_6" in caught.value.hint
    folder_with(tmp_path, config__json={**CONFIG, "auto_map": {"AutoModel": "x.Y"}})
    assert find_model(str(folder)).config["model_type"] == "llava"


def test_weights_of_another_kind(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", model__gguf=b"1")
    with pytest.raises(UserError, match=r"no safetensors weights .* \(only model.gguf\)"):
        require_weights(find_model(str(folder)))
    folder_with(tmp_path / "m", pytorch_model__bin=b"1")
    assert require_weights(find_model(str(folder))).weight_bytes == 1  # read as plain tensors when it is loaded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("memfit.inputs.model_source.getproxies", dict)


@pytest.mark.usefixtures("no_network")
def test_the_cache_is_enough_offline(cache: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / "abc"
    folder_with(snapshot, tokenizer__json={}, preprocessor_config__json={"size": 3})
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    source = find_model("owner/name")
    assert source.hub_id == "owner/name"
    assert source.folder == snapshot
    assert source.preprocessor == {"size": 3}
    assert not source.weights
    with pytest.raises(UserError, match="no network"):
        require_weights(source)
    (snapshot / "tokenizer.json").unlink()  # the config alone came once: enough for an estimate
    assert find_model("owner/name").config == CONFIG


@pytest.mark.usefixtures("cache", "no_network")
def test_no_network_is_said_at_once() -> None:
    with pytest.raises(UserError, match="neither a folder here nor in the local hub cache") as caught:
        find_model("owner/unheard-of")
    assert "no network" in caught.value.problem
    assert "owner/unheard-of" in caught.value.problem


class _Answer:
    """The least of an HTTP response that the hub's errors need."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("error", "problem", "hint"),
    [
        (errors.GatedRepoError, "is gated", "hf auth login"),
        (errors.RepositoryNotFoundError, "the hub has no model owner/name", "owner/name"),
        (errors.RemoteEntryNotFoundError, "has no config.json", "saved by transformers"),
    ],
)
def test_what_the_hub_answers(
    error: type[errors.HfHubHTTPError], problem: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("refused", response=_Answer())  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("memfit.inputs.model_source._require_network", lambda endpoint: None)
    with pytest.raises(UserError) as caught:
        find_model("owner/name")
    assert problem in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.usefixtures("cache")
def test_files_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """config.json must come; optional files that the model lacks are passed over."""
    snapshot = folder_with(tmp_path / "snapshot", tokenizer__json={})
    asked = []

    def fetch(hub_id: str, name: str) -> str:
        asked.append(name)
        if not (snapshot / name).is_file():
            raise errors.RemoteEntryNotFoundError("404", response=_Answer())  # type: ignore[arg-type]
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr("memfit.inputs.model_source._require_network", lambda endpoint: None)
    assert find_model("owner/name").folder == snapshot
    assert asked[0] == "config.json"
    assert "tokenizer.json" in asked
    assert not any(name.endswith("safetensors") for name in asked)


@pytest.mark.usefixtures("cache")
def test_names_that_are_no_hub_ids(tmp_path: Path) -> None:
    folder_with(tmp_path / "tiny-model")
    with pytest.raises(UserError) as caught:
        find_model("tiny modell")
    assert "tiny modell" in caught.value.problem
    assert "./tiny-model" in caught.value.hint
