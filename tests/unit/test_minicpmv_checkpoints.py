"""Checkpoints in every form they come in: compared before loading, read without code, -o's other parts kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import memfit
from memfit import models
from memfit.build.load import loaded_model
from memfit.errors import UserError
from memfit.families import family_for
from memfit.inputs.model_source import find_model, require_weights
from memfit.models.minicpmv.checkpoint import other_parts_bytes, shapes_in
from memfit.specs.recipe import Recipe

Folder = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
FORMS = ("safetensors", "safetensors-index", "bin", "bin-index", "pth-index")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    models.register()
    transformers.utils.logging.disable_progress_bar()


def tensors_in(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def put(tensors: Mapping[str, torch.Tensor], folder: Path, form: str) -> None:
    """Write the weights in one of FORMS; an index has three shards."""
    kind, _, indexed = form.partition("-")

    def write(part: Tensors, path: Path) -> None:
        save_file(part, path, {"format": "pt"}) if kind == "safetensors" else torch.save(part, path)

    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", kind)
    if not indexed:
        write(dict(tensors), folder / f"{stem}.{suffix}")
        return
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        own = names[number::3]
        write({name: tensors[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    # The metadata of V 2.5's real index counts twice what is there.
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def stored_as(source: Path, target: Path, form: str, change: Callable[[Tensors], Tensors] = dict) -> Path:
    """A copy of a dummy with its weights in another form, `change`d on the way."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    put(change(tensors_in(source)), target, form)
    return target


def load(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return loaded_model(family_for(config), folder, config)


# ---------------------------------------------------------------- every form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["minicpmv2_5", "minicpmo2_6"])
def test_every_form_loads_the_same_weights(dummies: Folder, tmp_path: Path, kind: str, form: str) -> None:
    folder = stored_as(dummies(kind), tmp_path / "model", form)
    source = find_model(str(folder))
    assert source.weights
    assert require_weights(source) is source
    assert source.weight_bytes >= sum(t.numel() * t.element_size() for t in tensors_in(dummies(kind)).values())
    assert shapes_in(folder) == {name: tuple(t.shape) for name, t in tensors_in(dummies(kind)).items()}
    found, wanted = load(folder).state_dict(), load(dummies(kind)).state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("form", FORMS)
def test_audio_and_speech_are_listed_and_come_back_untouched(dummies: Folder, tmp_path: Path, form: str) -> None:
    source = dummies("minicpmo4_5")
    folder = stored_as(source, tmp_path / "model", form)
    assert other_parts_bytes(folder) == other_parts_bytes(source) != {}
    lines = models.left_on_disk({"model_type": "minicpmo"}, folder)
    assert [line.split(",")[0] for line in lines] == ["audio: 4 tensors", "tts: 2 tensors"]
    model = load(folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    saved, before = tensors_in(tmp_path / "saved"), tensors_in(source)
    others = {name: value for name, value in before.items() if name.startswith(("apm", "audio", "tts"))}
    assert len(others) == 6
    assert all(saved[name].dtype == t.dtype and torch.equal(saved[name], t) for name, t in others.items())
    assert set(saved) == set(before)
    assert saved["llm.lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_differences_stop_the_first_load_in_every_form(dummies: Folder, tmp_path: Path, form: str) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors["resampler.query"] = torch.zeros(5, 128)
        del tensors["llm.model.norm.weight"]
        return tensors | {f"llm.model.extra.{number}.weight": torch.zeros(2) for number in range(20)}

    folder = stored_as(dummies("minicpmo2_6"), tmp_path / "model", form, change)
    with pytest.raises(UserError) as caught:
        load(folder)
    head, *lines = caught.value.problem.splitlines()
    assert head == f"{folder}: 22 tensors do not match config.json:"
    assert len(lines) == 13  # twelve of them, and how many more there are
    assert lines[-1] == "  and 10 more"
    assert "  llm.model.extra.0.weight [2]: no place in the model" in lines
    assert "config.json" in caught.value.hint
    with pytest.raises(UserError, match="22 tensors"):
        transformers.AutoModel.from_pretrained(folder)


def test_other_families_stop_too(dummies: Folder, tmp_path: Path) -> None:
    folder = stored_as(dummies("llama"), tmp_path / "model", "bin-index", lambda t: dict(list(t.items())[1:]))
    with pytest.raises(UserError, match="1 weights are missing"):
        load(folder)


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["bin", "pth-index"])
def test_no_code_of_a_pickle_runs(dummies: Folder, tmp_path: Path, form: str) -> None:
    trap = tmp_path / "ran"
    folder = stored_as(dummies("minicpmv2_6"), tmp_path / "model", form)
    file = sorted(folder.glob("pytorch_model*.*"))[0]
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "trap": Evil(trap)}, file)
    for attempt in (lambda: load(folder), lambda: shapes_in(folder)):
        with pytest.raises(UserError, match="not read as plain tensors") as caught:
            attempt()
        assert "safetensors" in caught.value.hint
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))  # the trap works
    assert trap.exists()


def test_shapes_of_a_pickle_are_read_without_its_numbers(dummies: Folder, tmp_path: Path) -> None:
    """A checkpoint larger than memory can be compared: nothing is allocated."""
    import tracemalloc

    from memfit.models.minicpmv.checkpoint import _unpickled

    torch.save({"large": torch.zeros(1000, 5000)}, tmp_path / "pytorch_model.bin")
    tracemalloc.start()
    found = _unpickled(tmp_path / "pytorch_model.bin", "meta")
    assert found["large"].is_meta
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_shard_that_is_not_there_is_named(dummies: Folder, tmp_path: Path) -> None:
    folder = stored_as(dummies("minicpmv2_6"), tmp_path / "model", "bin-index")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    source = find_model(str(folder))
    with pytest.raises(UserError, match=r"1 of 3 weight files are not in .*first: pytorch_model-00002-of-00003.bin"):
        require_weights(source)
    with pytest.raises(UserError, match=r"1 of 3 weight files that its index names are not there"):
        transformers.AutoModel.from_pretrained(folder)


def test_a_pickled_o_checkpoint_trains_and_is_complete_again(
    dummies: Folder, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = stored_as(dummies("minicpmo2_6"), tmp_path / "model", "bin-index")
    said: list[str] = []
    wanted = recipe("minicpmo2_6", f"model={folder}", "schedule.steps=1")
    result = memfit.train(wanted, say=said.append)
    assert [line.split(",")[0] for line in said if "stay on disk" in line] == ["audio: 4 tensors", "tts: 2 tensors"]
    assert result.model is not None
    before, after = tensors_in(dummies("minicpmo2_6")), tensors_in(result.model)
    assert set(after) == set(before)
    assert all(torch.equal(after[n], t) for n, t in before.items() if n.startswith(("apm", "audio", "tts")))
    assert not list(result.model.glob("*.bin*"))


# ---------------------------------------------------------------- a hub id, from the local cache

AUTO_MAP = {
    "config.json": {"AutoConfig": "x.C", "AutoModel": "x.M", "AutoModelForCausalLM": "x.M"},
    "preprocessor_config.json": {"AutoProcessor": "x.P", "AutoImageProcessor": "x.I"},
    "tokenizer_config.json": {"AutoTokenizer": ["x.T", None]},
}
SCRIPT = """
import json, os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import memfit
import memfit.models
import torch, transformers
from PIL import Image
from memfit.build.load import loaded_model
from memfit.families import family_for
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model, require_weights
memfit.models.register()
for name in sys.argv[2:]:
    saved = os.path.join(sys.argv[1], name.replace("/", "-"))
    config = transformers.AutoConfig.from_pretrained(name)
    model = transformers.AutoModel.from_pretrained(name).eval()
    processor = transformers.AutoProcessor.from_pretrained(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    images = transformers.AutoImageProcessor.from_pretrained(name)
    talk = [{"role": "user", "content": [Image.new("RGB", (150, 120), (9, 90, 200)), "How many?"]}]
    given = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True)
    source = require_weights(find_model(name))
    Encoder(source)
    again = loaded_model(family_for(source.config), source.folder, source.config).eval()
    with torch.no_grad():
        same = torch.equal(again(**given).logits, model(**given).logits)
    model.save_pretrained(saved)
    print(json.dumps({
        "classes": [type(x).__module__.split(".")[0] for x in (config, model, processor, images)],
        "tokenizer": type(tokenizer).__name__,
        "same": same,
        "auto_map": json.loads(open(saved + "/config.json").read()).get("auto_map"),
        "files": sorted(os.listdir(saved)),
        "tokens": given["input_ids"].shape[1],
        "remote": any(module.startswith("transformers_modules") for module in sys.modules),
    }))
"""


def in_hub_cache(source: Path, home: Path, hub_id: str, form: str) -> None:
    """A dummy as huggingface_hub keeps a downloaded repository: blobs, and links to them under a revision."""
    folder = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "blobs").mkdir()
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    staged = stored_as(source, home / f"staged-{folder.name}", form)
    for name, keys in AUTO_MAP.items():
        data = json.loads((staged / name).read_text()) | {"auto_map": keys}
        if name == "tokenizer_config.json":
            data["tokenizer_class"] = "MiniCPMVTokenizerFast"
        (staged / name).write_text(json.dumps(data))
    (staged / "x.py").write_text("raise SystemExit('code of the repository ran')")
    for number, file in enumerate(sorted(path for path in staged.iterdir() if path.is_file())):
        blob = folder / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


HUB = {
    "openbmb/MiniCPM-V-2_6": ("minicpmv2_6", "safetensors-index"),
    "openbmb/MiniCPM-o-2_6": ("minicpmo2_6", "safetensors"),
    "openbmb/MiniCPM-Llama3-V-2_5": ("minicpmv2_5", "bin-index"),
}


def test_a_hub_id_loads_offline_without_code(dummies: Folder, tmp_path: Path) -> None:
    """Every id of HUB in one process that may not ask the network: Auto classes and memfit, weights in three forms."""
    home = tmp_path / "home"
    for hub_id, (kind, form) in HUB.items():
        in_hub_cache(dummies(kind), home, hub_id, form)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "MEMFIT_CACHE": str(tmp_path / "cache")}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), *HUB],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(HUB)
    for found in rows:
        assert found["classes"] == ["memfit"] * 4
        assert found["same"]
        assert not found["remote"]
        assert found["auto_map"] == AUTO_MAP["config.json"]
        assert "x.py" in found["files"]  # written back, unread, for programs that run on it
        assert found["tokens"] > 10
