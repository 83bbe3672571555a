"""memfit's own MiniCPM-V and -o: Auto classes, checkpoints, round trips, -o's other parts, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memfit import models
from memfit.errors import UserError
from memfit.families import minicpmv2
from memfit.inputs.chat import ChatTemplate, always_opens, joined_by_newlines
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.models.minicpmv.checkpoint import other_parts_bytes, shapes_in
from memfit.models.minicpmv.configuration import MiniCPMVConfig
from memfit.models.minicpmv.model import MiniCPMO, MiniCPMV
from memfit.specs.recipe import ImageBudget
from memfit.testing import NATIVE_KINDS
from memfit.testing.minicpmv import add_other_parts

Folder = Callable[[str], Path]
# The names that the checkpoints' own code needs in config.json beside the language model's.
FLAT = ("rope_theta", "architectures", "slice_config", "vision_config", "hidden_size", "query_num", "torch_dtype")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    models.register()
    transformers.utils.logging.disable_progress_bar()


def load(folder: Path) -> MiniCPMV:
    return transformers.AutoModel.from_pretrained(folder).eval()


def inputs(folder: Path, pictures: int = 2, text: str = "How many?") -> dict[str, Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    shown = [Image.new("RGB", (150 + 90 * i, 120), (40 * i, 90, 200)) for i in range(pictures)]
    talk = [{"role": "user", "content": [*shown, text]}]
    return dict(processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True))


def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


# ---- Auto classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_auto_classes_need_no_remote_code(dummies: Folder, tmp_path: Path, kind: str) -> None:
    """Also with an auto_map in every file, as the checkpoints have it."""
    folder = shutil.copytree(dummies(kind), tmp_path / "model")
    for name, keys in (
        ("config.json", ("AutoConfig", "AutoModel", "AutoModelForCausalLM")),
        ("preprocessor_config.json", ("AutoImageProcessor", "AutoProcessor")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        data = json.loads((folder / name).read_text())
        data["auto_map"] = {key: ["x.Y", None] if key == "AutoTokenizer" else "modeling_x.Y" for key in keys}
        (folder / name).write_text(json.dumps(data))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.auto_map["AutoModel"] == "modeling_x.Y"
    wanted = MiniCPMO if "minicpmo" in kind else MiniCPMV
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        assert type(auto.from_pretrained(folder)) is wanted
    given = inputs(folder)
    out = load(folder).generate(**given, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= given["input_ids"].shape[1] + 3
    models.register()  # twice does no harm


def test_a_processor_is_found_by_the_config_alone(dummies: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(dummies("minicpmv2_5"), tmp_path / "model")
    data = json.loads((folder / "preprocessor_config.json").read_text())
    for name in ("processor_class", "image_processor_type"):
        data.pop(name)
    (folder / "preprocessor_config.json").write_text(json.dumps(data))
    assert inputs(folder)["pixel_values"].dtype == torch.uint8


def test_without_a_preprocessor_file_the_config_says_how_to_cut(dummies: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(dummies("minicpmv2_5"), tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with_file, without = Encoder(find_model(str(dummies("minicpmv2_5")))), Encoder(find_model(str(folder)))
    assert without.cost(300, 200) == with_file.cost(300, 200)
    assert len(without.cost(300, 200).crops) > 1


def test_importing_the_package_registers_nothing() -> None:
    import subprocess
    import sys

    code = "import memfit.models, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"version": "2.5"}, "2.5"),
        ({"version": 2.6}, "2.6"),
        ({"version": 4}, "4.0"),
        ({"version": "4.5"}, "4.5"),
        ({"hidden_size": 4096, "query_num": 96}, "2.5"),
        ({"model_type": "minicpmo"}, "o-2.6"),
        ({"model_type": "minicpmo", "audio_pool_step": 5}, "o-4.5"),
        ({"model_type": "minicpmo", "version": "2.6"}, "o-2.6"),
    ],
)
def test_generations_are_told_apart(config: dict[str, Any], generation: str) -> None:
    assert minicpmv2.generation_of({"model_type": "minicpmv", **config}) == generation


@pytest.mark.parametrize("config", [{"hidden_size": 2304, "query_num": 64}, {"version": 3.1}])
def test_an_unknown_generation_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is not supported"):
        minicpmv2.generation_of({"model_type": "minicpmv", **config})


# ---- what is saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_a_saved_model_is_the_same_and_its_config_stays_flat(dummies: Folder, tmp_path: Path, kind: str) -> None:
    before = json.loads((dummies(kind) / "config.json").read_text())
    model = load(dummies(kind))
    model.save_pretrained(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == before
    assert all(name in after for name in FLAT)
    assert "text_config" not in after
    assert "rope_parameters" not in after
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(dummies(kind) / file, tmp_path / file)
    given = inputs(tmp_path)
    assert torch.equal(logits(load(tmp_path), given), logits(model, given))


def test_changes_reach_the_saved_config(dummies: Folder, tmp_path: Path) -> None:
    model = load(dummies("minicpmv2_6")).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 10)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size + 10
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["vocab_size"], saved["torch_dtype"]) == (size + 10, "bfloat16")
    assert {name.split(".")[0] for name in shapes_in(tmp_path)} == {"llm", "vpm", "resampler"}
    assert load(tmp_path).llm.lm_head.weight.shape[0] == size + 10


def test_old_rope_and_dtype_fields_are_read() -> None:
    config = MiniCPMVConfig.from_dict({"version": "2.5", "rope_theta": 500000.0, "torch_dtype": "float16"})
    assert config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert config.dtype == torch.float16
    assert config.vision_config.image_size == 980
    assert config.vision_layers == 26  # the class drops the last layer unless the file says otherwise
    assert config.to_dict()["rope_theta"] == 500000.0
    assert config.to_dict()["torch_dtype"] == "float16"


def test_adapters_fit_plain_peft_and_merge(dummies: Folder, tmp_path: Path) -> None:
    given = inputs(dummies("minicpmv2_6"))
    names = ["llm.model.layers.0.self_attn.q_proj", "vpm.encoder.layers.1.mlp.fc1", "resampler.attn.out_proj"]
    names += ["resampler.kv_proj"]
    adapted = get_peft_model(
        load(dummies("minicpmv2_6")), LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    )
    tuned = logits(adapted, given)
    assert not torch.allclose(tuned, logits(load(dummies("minicpmv2_6")), given), atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(dummies("minicpmv2_6")), tmp_path / "adapter")
    assert torch.equal(logits(again, given), tuned)
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged, given), tuned, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged"), given), tuned, atol=1e-4)
    assert set(shapes_in(tmp_path / "merged")) == set(shapes_in(dummies("minicpmv2_6")))


# ---- -o's other parts ----------------------------------------------------------------------------------------------


def raw_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def other(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in raw_tensors(folder).items() if name.startswith(("apm", "audio", "tts"))}


@pytest.mark.parametrize("kind", ["minicpmo2_6", "minicpmo4_5"])
def test_audio_and_speech_come_back_byte_for_byte(dummies: Folder, tmp_path: Path, kind: str) -> None:
    before = other(dummies(kind))
    assert len(before) == 6
    model = load(dummies(kind))
    assert not any(name.startswith(("apm", "tts")) for name, _ in model.named_parameters())
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="200KB")
    after = other(tmp_path)
    assert {name: (value.dtype, value.tolist()) for name, value in after.items()} == {
        name: (value.dtype, value.tolist()) for name, value in before.items()
    }
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(raw_tensors(tmp_path))
    for name, file in index.items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert json.loads((tmp_path / "config.json").read_text())["init_tts"] is True
    load(tmp_path).save_pretrained(tmp_path / "again")  # a tuned -o model is complete again
    assert set(other(tmp_path / "again")) == set(before)


def test_o_weights_of_the_reference_set_come_back(dummies: Folder, tmp_path: Path) -> None:
    extra = Path(__file__).parents[1] / "golden" / "data" / "minicpmv" / "o26_extra_state.safetensors"
    folder = tmp_path / "source"
    load(dummies("minicpmv2_6")).save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "model_type": "minicpmo"}))
    save_file(
        {**load_file(folder / "model.safetensors"), **load_file(extra)}, folder / "model.safetensors", {"format": "pt"}
    )
    model = load(folder)
    assert isinstance(model, MiniCPMO)
    model.save_pretrained(tmp_path / "saved")
    found, wanted = raw_tensors(tmp_path / "saved"), load_file(extra)
    assert len(wanted) == 41
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items())


def test_what_stays_on_disk_is_listed(dummies: Folder) -> None:
    assert other_parts_bytes(dummies("minicpmo2_6")) == {
        "audio": (4, (96 + 64 + 128 + 16) * 2),
        "tts": (2, (96 + 6) * 2),
    }
    assert other_parts_bytes(dummies("minicpmv2_6")) == {}
    lines = models.left_on_disk({"model_type": "minicpmo"}, dummies("minicpmo2_6"))
    assert [line.split(",")[0] for line in lines] == ["audio: 4 tensors", "tts: 2 tensors"]


def test_code_and_assets_that_the_config_names_are_copied_unread(dummies: Folder, tmp_path: Path) -> None:
    folder = edited(dummies("minicpmo2_6"), tmp_path / "model", auto_map={"AutoModel": "modeling_minicpmo.MiniCPMO"})
    (folder / "modeling_minicpmo.py").write_text("raise SystemExit('memfit ran code of a checkpoint')")
    (folder / "assets").mkdir()
    (folder / "assets" / "vocos.bin").write_bytes(b"sound")
    load(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_minicpmo.py").read_text().startswith("raise")
    assert (tmp_path / "saved" / "assets" / "vocos.bin").read_bytes() == b"sound"
    load(folder).save_pretrained(folder)  # into the folder that it came from
    assert len(other(folder)) == 6


def test_a_config_does_not_claim_parts_that_are_gone(dummies: Folder, tmp_path: Path, caplog: Any) -> None:
    """As after the original finetuning script, which loads without audio and speech and saves what it has."""
    model = load(dummies("minicpmo2_6"))
    poor = tmp_path / "poor"
    model.save_pretrained(poor)
    kept = {name: value for name, value in raw_tensors(poor).items() if name not in other(poor)}
    for file in poor.glob("model*"):
        file.unlink()
    save_file(kept, poor / "model.safetensors", {"format": "pt"})
    load(poor).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["init_audio"], saved["init_tts"]) == (False, False)
    assert saved["audio_config"] == {"d_model": 8}


# ---- what is refused -----------------------------------------------------------------------------------------------


def edited(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**data, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "words", "hint"),
    [
        ({"drop_vision_last_layer": True}, "16 tensors", "drop_vision_last_layer: false"),
        ({"query_num": 7}, r"resampler.query: \[4, 128\] in the checkpoint, \[7, 128\] by config.json", "config.json"),
        ({"version": 4.5}, "q_norm", "version"),
        ({"vocab_size": 500}, "embed_tokens", "config.json"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_stops_the_load(
    dummies: Folder, tmp_path: Path, changes: dict[str, Any], words: str, hint: str
) -> None:
    folder = edited(dummies("minicpmv2_6"), tmp_path / "model", **changes)
    with pytest.raises(UserError, match=words) as caught:
        load(folder)
    assert hint in caught.value.hint


def test_places_and_pictures_must_match(dummies: Folder) -> None:
    model, given = load(dummies("minicpmv2_6")), inputs(dummies("minicpmv2_6"))
    with pytest.raises(ValueError, match="picture places"):
        model(**{**given, "image_bound": [given["image_bound"][0][:-1]]})
    with pytest.raises(ValueError, match="nothing says where"):
        model(**{name: value for name, value in given.items() if name != "image_bound"})


def test_a_dummy_picture_that_is_not_finite_is_told(dummies: Folder) -> None:
    model = load(dummies("minicpmv2_6")).train()
    model.vpm.post_layernorm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity on a grey picture"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long))


def test_a_processor_counts_markers(dummies: Folder) -> None:
    processor = transformers.AutoProcessor.from_pretrained(dummies("minicpmv2_6"))
    with pytest.raises(ValueError, match="1 markers"):
        processor("(<image>./</image>)", None)


@pytest.mark.parametrize(
    ("knob", "value", "slices"),
    [("max_slices", 3, 3), ("max_tokens", 4, 1), ("max_tokens", 20, 4), ("max_pixels", 448 * 448 * 3, 2)],
)
def test_the_image_budget_becomes_slices(knob: str, value: int, slices: int) -> None:
    config = {"model_type": "minicpmv", "version": 2.6, "query_num": 4}
    settings = minicpmv2.processor_settings(config, {}, ImageBudget(**{knob: value}))
    assert settings["max_slice_nums"] == slices


def test_a_budget_below_one_crop_names_the_fixed_query_count() -> None:
    with pytest.raises(UserError, match="its 64 queries are fixed by the checkpoint"):
        minicpmv2.processor_settings({"model_type": "minicpmv", "version": 2.6}, {}, ImageBudget(max_tokens=63))


@pytest.mark.parametrize("wrong", [{"image_feature_size": 63}, {"patch_size": 16}])
def test_two_files_that_disagree_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"config\.json says"):
        minicpmv2.processor_settings({"model_type": "minicpmv", "version": 2.6}, wrong, ImageBudget())


# ---- the same whatever the form of the inputs ----------------------------------------------------------------------


def test_bytes_floats_and_lists_give_one_result(dummies: Folder) -> None:
    model, given = load(dummies("minicpmv2_6")), inputs(dummies("minicpmv2_6"))
    wanted = logits(model, given)
    floats = (given["pixel_values"].float() / 255 - 0.5) / 0.5
    assert torch.equal(logits(model, {**given, "pixel_values": floats}), wanted)
    lengths = given["tgt_sizes"].prod(1).tolist()
    strips = [crop.unflatten(1, (3, 14, 14)).permute(1, 2, 0, 3).flatten(2) for crop in floats.split(lengths)]
    as_lists = {**given, "pixel_values": [strips], "tgt_sizes": [given["tgt_sizes"]]}
    assert torch.allclose(logits(model, as_lists), wanted, atol=1e-6)
    types = torch.zeros_like(given["input_ids"])
    for start, stop in given.pop("image_bound")[0].tolist():
        types[0, start:stop] = 1
    assert torch.equal(logits(model, {**given, "mm_token_type_ids": types}), wanted)


def test_evaluation_shows_a_few_crops_at_a_time(dummies: Folder) -> None:
    model, given = load(dummies("minicpmv2_6")), inputs(dummies("minicpmv2_6"), pictures=3)
    wanted = logits(model, given)
    calls: list[int] = []
    model.vpm.register_forward_hook(lambda _, args, __: calls.append(len(args[1])))
    model.config.vision_batch_size = 4
    assert torch.allclose(logits(model, given), wanted, atol=1e-5)
    assert sum(calls) == len(given["tgt_sizes"]) > 4 >= max(calls)
    calls.clear()
    model(**given)  # with a graph: one call, whatever the number of crops
    assert calls == [len(given["tgt_sizes"])]


def test_attention_implementations_agree(dummies: Folder) -> None:
    given = inputs(dummies("minicpmv2_6"))
    assert len({int(length) for length in given["tgt_sizes"].prod(1)}) > 1  # so that keys are masked
    eager = transformers.AutoModel.from_pretrained(dummies("minicpmv2_6"), attn_implementation="eager").eval()
    assert eager.vpm.config._attn_implementation == eager.llm.config._attn_implementation == "eager"
    assert torch.allclose(logits(eager, given), logits(load(dummies("minicpmv2_6")), given), atol=1e-5)


def test_checkpointing_changes_nothing_but_memory(dummies: Folder) -> None:
    given = inputs(dummies("minicpmv2_6"))
    given["labels"] = given["input_ids"]
    plain, saving = load(dummies("minicpmv2_6")).train(), load(dummies("minicpmv2_6")).train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in saving.modules() if getattr(module, "gradient_checkpointing", False)]
    assert {type(module).__name__ for module in layers} >= {"SiglipEncoderLayer", "Resampler", "Qwen2DecoderLayer"}
    for model in (plain, saving):
        model(**given).loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6), name


def test_no_buffer_holds_positions(dummies: Folder) -> None:
    names = {name for name, _ in load(dummies("minicpmv2_6")).named_buffers()}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"inv_freq", "original_inv_freq"}


def test_beams_repeat_pictures_row_by_row(dummies: Folder) -> None:
    folder = dummies("minicpmv2_6")
    processor, model = transformers.AutoProcessor.from_pretrained(folder), load(folder)
    shown = [Image.new("RGB", (200, 150)), Image.new("RGB", (90, 200), "red")]
    texts = ["(<image>./</image>)\na", "no picture", "(<image>./</image>)\nlonger words"]
    batch = dict(processor(texts, shown))
    for width in (1, 3):
        together = model.generate(**batch, max_new_tokens=4, num_beams=width, do_sample=False)
        for row, (words, picture) in enumerate(zip(texts, (shown[0], None, shown[1]), strict=True)):
            alone = dict(processor(words, picture))
            own = model.generate(**alone, max_new_tokens=4, num_beams=width, do_sample=False)
            assert own[0, -4:].tolist() == together[row, -4:].tolist()


# ---- templates -----------------------------------------------------------------------------------------------------


def test_a_template_that_always_opens_is_cut_for_training(dummies: Folder) -> None:
    encoder = Encoder(find_model(str(dummies("minicpmv2_5"))))
    from memfit.specs.sample import Sample, Turn

    sample = Sample("0", 0, (Turn("user", ("Hi",)), Turn("assistant", (" Yes ",))), ())
    text = encoder._tokenizer.decode(encoder.encode(sample, ()).input_ids.tolist(), skip_special_tokens=False)
    assert text.endswith("Yes<|eot_id|>")
    prompt = encoder._tokenizer.decode(encoder.prompt(sample, ()).tolist(), skip_special_tokens=False)
    assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    never = ChatTemplate("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", {})
    assert not always_opens(never, "text")
    assert not always_opens(ChatTemplate(minicpmv2.CHATML, {}), "text")


@pytest.mark.parametrize("kind", ["minicpmv4_5", "minicpmo4_5"])
def test_the_empty_thought_carries_no_loss(dummies: Folder, kind: str) -> None:
    """Qwen3's template opens the last answer with it, in training and in generation alike."""
    from memfit.specs.sample import Sample, Turn

    encoder = Encoder(find_model(str(dummies(kind))))
    said = (Turn("user", ("One?",)), Turn("assistant", ("1",)), Turn("user", ("Two?",)), Turn("assistant", ("2",)))
    sample = Sample("0", 0, said, ())
    encoded, prompt = encoder.encode(sample, ()), encoder.prompt(sample, ())
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    opening = encoder._tokenizer.decode(prompt.tolist()[-8:], skip_special_tokens=False)
    assert opening.endswith("<think>\n\n</think>\n\n")
    trained = [int(label) for label in encoded.labels if label != -100]
    decoded = encoder._tokenizer.decode(trained, skip_special_tokens=False)
    assert decoded.replace(" ", "") == "1<|im_end|>2<|im_end|>"


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((0, "\nWhat?"), "P\nWhat?"),
        (("Look: ", 0), "Look: \nP"),
        ((0, "\n", 1, "\nBoth?"), "P\nP\nBoth?"),
        ((0, "\n\nTwo lines"), "P\n\nTwo lines"),
        (("no picture\n",), "no picture\n"),
    ],
)
def test_pictures_and_words_are_joined_by_one_newline(pieces: tuple[str | int, ...], text: str) -> None:
    assert joined_by_newlines(pieces, "P") == text


def test_dummies_hold_their_parts(dummies: Folder) -> None:
    assert callable(add_other_parts)
    sizes = [sum(f.stat().st_size for f in dummies(kind).glob("*.safetensors")) for kind in NATIVE_KINDS]
    assert max(sizes) < 2 << 20
