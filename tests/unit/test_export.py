"""What is handed over answers as what was trained, in programs that know nothing of memfit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import memfit
from memfit.build.load import loaded_model
from memfit.engine.save import save_weights
from memfit.errors import UserError
from memfit.inputs.recipe_file import override
from memfit.inputs.run_folder import RunFolder
from memfit.models import register
from memfit.specs.export import ExportRequest, ExportResult
from memfit.specs.recipe import Recipe
from memfit.trace.prepare import prepare
from tests.unit.test_build import batch_of, built_from, samples_of

Make = Callable[..., Recipe]
LORA = ("method=lora", "schedule.learning_rate=3e-2", "lora.alpha=16")
MIXED = (*LORA, "parts.connector=full", "parts.vision=last-1")
KINDS = ("qwen2_5_vl", "minicpmv4_6", "minicpmv2_6", "llava")


@pytest.fixture
def run(recipe: Make, tmp_path: Path) -> Callable[..., Path]:
    """`run("llava", *sets)`: a run folder, trained for two steps."""

    def train(kind: str, *sets: str) -> Path:
        return memfit.train(recipe(kind, *sets), say=lambda text: None).folder

    return train


def exported(folder: Path, to: str, out: Path | None = None) -> ExportResult:
    return memfit.export(ExportRequest(folder, to, out), say=lambda text: None)


def inputs_of(wanted: Recipe) -> dict[str, Any]:
    batch = batch_of(built_from(wanted), samples_of(wanted), 0, 1)
    return {key: value for key, value in batch.items() if key != "labels"}


def logits(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def plain(wanted: Recipe, folder: Path) -> Any:
    """As any program loads a model folder."""
    register()
    kind = getattr(transformers, prepare(wanted).family.auto_class)
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize(("kind", "method"), [("llava", LORA), *((kind, MIXED) for kind in KINDS)])
def test_a_merged_model_and_an_adapter_answer_as_the_run(
    run: Callable[..., Path], recipe: Make, kind: str, method: tuple[str, ...]
) -> None:
    folder, wanted = run(kind, *method), recipe(kind, *method)
    inputs = inputs_of(wanted)
    tuned = logits(built_from(wanted, folder / "model").model, inputs)
    base = logits(built_from(wanted).model, inputs)
    assert (tuned - base).abs().max() > 1e-2  # else anything would pass

    merged = exported(folder, "merged")
    assert merged.folder == folder / "exported" / "merged"
    assert (logits(plain(wanted, merged.folder), inputs) - tuned).abs().max() < 2e-5

    adapter = exported(folder, "adapter").folder
    alone = PeftModel.from_pretrained(plain(wanted, Path(wanted.model)), adapter)
    assert (logits(alone, inputs) - tuned).abs().max() < 2e-5
    if method is LORA:
        assert not json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"]
    names = {path.name for path in merged.folder.iterdir()} & {path.name for path in adapter.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names


def test_a_full_run_is_handed_over_as_it_is(run: Callable[..., Path], recipe: Make, tmp_path: Path) -> None:
    folder, wanted = run("qwen2_5_vl", "method=full", "run.save_every=1"), recipe("qwen2_5_vl")
    inputs = inputs_of(wanted)
    merged = exported(folder, "merged", tmp_path / "mine").folder
    assert torch.equal(logits(plain(wanted, merged), inputs), logits(plain(wanted, folder / "model"), inputs))
    with pytest.raises(UserError, match="trained no adapter"):
        exported(folder, "adapter")
    # A checkpoint holds the Trainer's state as well, which is nobody else's.
    early = exported(folder / "checkpoints" / "checkpoint-1", "merged", tmp_path / "early").folder
    assert not [path.name for path in early.iterdir() if path.suffix in (".pt", ".bin")]
    assert not torch.equal(logits(plain(wanted, early), inputs), logits(plain(wanted, merged), inputs))


def test_an_empty_folder_that_is_there_stays_the_users_own(run: Callable[..., Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o750)
    before = mine.stat()
    exported(run("llama", *LORA), "adapter", mine)
    after = mine.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert (mine / "adapter_model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".mine")]


def test_a_model_named_by_a_relative_path_is_found_from_elsewhere(
    recipe: Make, dummies: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dummies("llama")
    monkeypatch.chdir(model.parent)
    folder = memfit.train(override(recipe("llama", *LORA), [], model.name), say=lambda text: None).folder
    monkeypatch.chdir(tmp_path)
    assert (exported(folder, "merged").folder / "config.json").is_file()


def test_parts_that_were_never_loaded_come_along(run: Callable[..., Path], dummies: Callable[[str], Path]) -> None:
    """Audio and speech of MiniCPM-o stay on disk in training; the exported folder has them, bit for bit."""
    source = dummies("minicpmo2_6")
    merged = exported(run("minicpmo2_6", *LORA), "merged").folder
    before, after = tensors(source), tensors(merged)
    assert before.keys() == after.keys()
    untouched = [name for name in before if name.startswith(("apm.", "audio_", "tts."))]
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert not all(torch.equal(before[name], after[name]) for name in before)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_a_16_bit_model_is_rounded_once(recipe: Make, tmp_path: Path) -> None:
    """Base weights in bf16 and adapters in fp32 are added in fp32, then rounded."""
    wanted = recipe("llama")
    found = prepare(wanted)
    narrow = loaded_model(found.family, Path(wanted.model), found.source.config).to(torch.bfloat16)
    narrow.config.dtype = torch.bfloat16
    save_weights(narrow, tmp_path / "narrow", Path(wanted.model))
    data = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}" * 3}]}
        for n in range(8)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    lora = override(recipe("llama", f"data.train={data}", *LORA), [], str(tmp_path / "narrow"))
    folder = memfit.train(lora, say=lambda text: None).folder
    merged = tensors(exported(folder, "merged").folder)
    adapter = load_file(folder / "model" / "adapter_model.safetensors")
    key = next(name for name in adapter if name.endswith("lora_A.weight"))
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    delta = 4.0 * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]  # alpha 16 over rank 4
    base = tensors(tmp_path / "narrow")[f"{module}.weight"]
    assert merged[f"{module}.weight"].dtype == torch.bfloat16
    assert torch.equal(merged[f"{module}.weight"], (base.float() + delta).to(torch.bfloat16))


def test_nothing_is_replaced_and_nothing_half_stays(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = run("llava", *LORA), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already and not empty"):
        exported(folder, "merged", out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    monkeypatch.setattr("memfit.engine.export.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="the export needs"):
        exported(folder, "merged")
    monkeypatch.undo()

    def breaks(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memfit.engine.export.save_weights", breaks)
    with pytest.raises(OSError, match="No space left"):
        exported(folder, "merged")
    assert not list((folder / "exported").iterdir())


def test_numbers_that_are_none_are_refused(run: Callable[..., Path]) -> None:
    folder = run("llava", *LORA)
    file = folder / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))] *= float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN"):
        exported(folder, "merged")


def test_what_is_not_there_is_told(run: Callable[..., Path], tmp_path: Path, recipe: Make) -> None:
    for to in ("llama-factory", "ms-swift", "openbmb"):
        with pytest.raises(UserError, match="not there in this version") as caught:
            exported(tmp_path, to)
        assert "--to merged" in caught.value.hint
    with pytest.raises(UserError, match="unknown"):
        exported(tmp_path, "gguf")
    with pytest.raises(UserError, match="no run folder"):
        exported(tmp_path, "merged")
    pilot = memfit.train(override(recipe("llava"), [f"run.folder={tmp_path / 'p'}"]), pilot=True, say=lambda text: None)
    with pytest.raises(UserError, match="holds no trained model"):
        exported(RunFolder(pilot.folder).path, "merged")
