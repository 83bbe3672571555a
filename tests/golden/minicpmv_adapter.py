"""The few functions through which a set of reference vectors of MiniCPM-V is tried against memfit.

`build`, `process_image`, `placeholder`, `encode` and `generate`; sets of the same layout can be run through them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from memfit.families import minicpmv2
from memfit.inputs.chat import ChatTemplate
from memfit.inputs.data.draft import PLACEHOLDER, Said, picture_first, place_by_name, place_in_order
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import ModelSource
from memfit.inputs.shorten import shortened
from memfit.inputs.tokens import add_missing_tokens, load_tokenizer, special_names
from memfit.models.minicpmv.configuration import MiniCPMOConfig, MiniCPMVConfig
from memfit.models.minicpmv.conversation import DIALECTS, ReferenceEncoder
from memfit.models.minicpmv.images import patches, slices, strip
from memfit.models.minicpmv.model import MiniCPMO, MiniCPMV
from memfit.specs.recipe import ImageBudget
from memfit.specs.sample import Sample

CLASSES = {"minicpmv": (MiniCPMVConfig, MiniCPMV), "minicpmo": (MiniCPMOConfig, MiniCPMO)}


def build(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> MiniCPMV:
    """The model of a flat config.json with these weights, float32, in eval mode.

    V 2.5 runs in its exact mode, in which crops see each other's padding, unless `batch_vision_input` is false. Audio
    and speech weights of an -o checkpoint are passed over; any other difference in names is an error.
    """
    config_class, model_class = CLASSES[str(config.get("model_type", "minicpmv"))]
    read = config_class.from_dict({name: value for name, value in config.items() if name != "model_type"})
    model = model_class(read).float()
    own = {name: value.float() for name, value in state.items() if not _is_passed_over(name)}
    if read.text_config.tie_word_embeddings:
        own.setdefault("llm.lm_head.weight", own["llm.model.embed_tokens.weight"])
    model.load_state_dict(own, strict=True)
    model.vpm.joint = read.one_row_positions and bool(read.batch_vision_input)
    return model.eval()


def _is_passed_over(name: str) -> bool:
    kept = [prefix for prefixes in minicpmv2.KEPT_ON_DISK.values() for prefix in prefixes]
    return name.startswith(tuple(kept)) or name == "resampler.pos_embed"


def generate(
    model: MiniCPMV,
    input_ids: torch.Tensor,
    pixel_values: Any = None,
    tgt_sizes: Any = None,
    image_bound: Any = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 8,
    eos_token_id: Any = None,
    pad_token_id: int = 0,
) -> torch.Tensor:
    """Greedy new tokens (B, max_new_tokens) of left-padded prompts, after the prompt; rows that ended hold the pad."""
    ids = torch.as_tensor(input_ids).long()
    mask = None if attention_mask is None else torch.as_tensor(attention_mask).long()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixel_values,
        tgt_sizes=tgt_sizes,
        image_bound=image_bound,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return out[:, ids.shape[1] :]


def process_image(
    pil_image: Image.Image, max_slice_nums: int = 9, scale_resolution: int = 448
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """float32 (3, 14, 14 * patches) and (rows, columns) of every crop, the overview first."""
    settings = {"max_slice_nums": max_slice_nums, "scale_resolution": scale_resolution}
    crops = slices(pil_image, settings)
    return [strip(patches(crop, 14), 14) for crop in crops], [(c.height // 14, c.width // 14) for c in crops]


def placeholder(
    size_wh: Sequence[int],
    index: int = 0,
    use_image_id: bool = True,
    max_slice_nums: int = 9,
    scale_resolution: int = 448,
    num_queries: int = 64,
    version: Any = 2.6,
) -> str:
    """The text that stands for a picture; `version` 2.5 wraps its slices as that model does."""
    old = minicpmv2.generation_of({"version": version}) == "2.5"
    settings = {
        "max_slice_nums": max_slice_nums,
        "scale_resolution": scale_resolution,
        "query_num": num_queries,
        "use_image_id": bool(use_image_id) and not old,
        "slices_wrapped": old,
    }
    return minicpmv2.placeholder(minicpmv2.image_cost(settings, *size_wh[:2]), index, settings)


def encode(
    conversation: Sequence[Mapping[str, str]],
    images: Any,
    tokenizer_folder: str | Path,
    config: Mapping[str, Any],
    mode: str = "ours",
) -> dict[str, list[Any]]:
    """input_ids, labels (not shifted, -100 without loss) and image_bound of a training conversation.

    `images`: name in the text -> picture or (width, height, ...), or a list of them. `config`: a flat config.json's
    content, or its `query_num`, `version`, `slice_config` (or `slice_settings`) and, for truncation, `max_length`.
    mode "reference" follows the original script, quirks included; "ours" is what memfit trains on.
    """
    folder = Path(tokenizer_folder)
    tokens = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {name: _size(picture) for name, picture in _by_name(images).items()}
    source = _source(folder, tokens, config)
    limit = config.get("max_length", config.get("model_max_length"))
    if mode == "reference":
        return _reference(source, limit).encode(conversation, named)
    if mode != "ours":
        raise ValueError(f"mode {mode!r}: reference or ours")
    # As memfit's reader of this format, which would refuse a row with an empty answer before it got here.
    said = [Said(turn["role"], turn["content"]) for turn in conversation]
    if list(named) == ["<image>"]:
        tagged = any(PLACEHOLDER.search(turn.text) for turn in said)
        turns = place_in_order(said if tagged else picture_first(said, 1, "\n"), 1)
    else:
        turns = place_by_name(said, list(named)) if named else place_in_order(said, 0)
    sample = Sample("0", 0, turns, tuple(map(Path, named)))
    encoder = Encoder(source, ImageBudget())
    sizes = list(named.values())
    encoded = encoder.encode(sample, sizes) if limit is None else shortened(encoder, sample, sizes, int(limit))[1]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.image_mask.astype(np.int8), [0]])))
    return {
        "input_ids": encoded.input_ids.tolist(),
        "labels": encoded.labels.tolist(),
        "image_bound": edges.reshape(-1, 2).tolist(),
    }


def _by_name(images: Any) -> dict[str, Any]:
    if isinstance(images, Mapping):
        return dict(images)
    given = list(images or ())
    if len(given) == 1:
        return {"<image>": given[0]}
    return {f"<image_{index:02d}>": picture for index, picture in enumerate(given)}


def _size(picture: Any) -> tuple[int, int]:
    if isinstance(picture, np.ndarray):
        return int(picture.shape[1]), int(picture.shape[0])
    if isinstance(picture, str | Path):
        with Image.open(picture) as opened:
            return opened.size
    return tuple(int(side) for side in getattr(picture, "size", picture)[:2])  # type: ignore[return-value]


def _source(folder: Path, tokens: Mapping[str, Any], config: Mapping[str, Any]) -> ModelSource:
    """A model's small files as memfit reads them; what `config` leaves out is read off the tokenizer."""
    template = tokens.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    full = {"model_type": "minicpmv", **config}
    if full.get("version") is None and full["model_type"] == "minicpmv":
        full["version"] = "2.5" if "<|start_header_id|>" in str(template) else 2.6
    cut = config.get("slice_settings") or config.get("slice_config") or {}
    names = ("max_slice_nums", "scale_resolution", "patch_size")
    preprocessor = {name: cut.get(name, config.get(name)) for name in names}
    preprocessor = {name: value for name, value in preprocessor.items() if value is not None}
    return ModelSource(
        name=str(folder),
        folder=folder,
        config=full,
        preprocessor=preprocessor or {"patch_size": 14},
        tokenizer=dict(tokens),
        chat_template=template,
    )


def _reference(source: ModelSource, limit: Any) -> ReferenceEncoder:
    tokenizer = load_tokenizer(source)
    names = special_names(source.tokenizer)
    add_missing_tokens(tokenizer, source.tokenizer, names.values())
    return ReferenceEncoder(
        tokenizer=tokenizer,
        template=ChatTemplate(source.chat_template or minicpmv2.CHATML, names),
        settings=minicpmv2.processor_settings(source.config, source.preprocessor, ImageBudget()),
        dialect=DIALECTS[minicpmv2.generation_of(source.config)],
        max_length=None if limit is None else int(limit),
    )
