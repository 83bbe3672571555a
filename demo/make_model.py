"""An untrained, tiny model of MiniCPM-V 4.6's own architecture, as an ordinary model folder.

    python demo/make_model.py --out DIR [--seed 0]

The architecture is transformers' ``minicpmv4_6``: a patch-packed vision tower, the 2 x 2 merger and a Qwen3.5
text model (full attention in every layer, which needs no special kernels). It is used in "4x" mode: four
patches of 14 x 14 pixels become one image token. The vision tower always carries ``vit_merger``, which
only "16x" mode uses; it is a quarter of the parameters here and takes no part.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from slips import FIELDS, QUESTION, Form, draw_values
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NAMED = {  # the eight special tokens that MiniCPM-V 4.6's processor asks its tokenizer for
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
VOCABULARY = 352
VISION = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 224,  # the position table: 16 x 16, whatever the size of an image
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "layer_types": ["full_attention"] * 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for item in message.content -%}
{%- if item.type == 'image' %}<|image_pad|>{% elif item.type == 'video' %}<|video_pad|>
{%- else %}{{ item.text }}{% endif -%}
{%- endfor -%}
{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be written; every digit stays a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *NAMED.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    answers = [json.dumps(draw_values(Form(), rng)) for _ in range(200)]
    roles = ["user\n", "assistant\n", "system\n", "\n" + QUESTION] * 100
    tokenizer.train_from_iterator(answers + roles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=NAMED,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT["max_position_embeddings"],
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> MiniCPMV4_6Config:
    """The model's config.json, in 4x mode."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return MiniCPMV4_6Config(
        text_config={"model_type": "qwen3_5_text", "vocab_size": VOCABULARY, **TEXT, **ids},
        vision_config={"model_type": "minicpmv4_6_vision", **VISION},
        insert_layer_id=1,
        image_size=224,
        downsample_mode="4x",
        image_token_id=tokenizer.convert_tokens_to_ids(NAMED["image_token"]),
        video_token_id=tokenizer.convert_tokens_to_ids(NAMED["video_token"]),
        tie_word_embeddings=True,
        **ids,
    )


@torch.no_grad()
def initialise(model: MiniCPMV4_6ForConditionalGeneration) -> None:
    """Start values for training from nothing; transformers' own are meant for loading over.

    Linear layers get 1/sqrt(inputs), those that write into the residual stream less. Position embeddings are
    plane waves as strong as the patches: what keeps such a model from learning is not reading but finding.
    """
    layers = 2 * (VISION["num_hidden_layers"] + TEXT["num_hidden_layers"])
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "position_embedding" in name:
            continue
        if "embed_tokens" in name:
            weight.normal_(0, 0.05)
            continue
        writes = name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
        weight.normal_(0, weight[0].numel() ** -0.5 * (layers**-0.5 if writes else 1.0))
    table = model.model.vision_tower.embeddings.position_embedding.weight
    table.copy_(plane_waves(math.isqrt(len(table)), table.shape[1]))


def plane_waves(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: sines and cosines of the row, then of the column, from slow to fast."""
    waves = math.pi * 2 ** torch.linspace(-1, math.log2(side / 2), width // 4)
    angles = (torch.arange(side)[:, None] / side) * waves
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows = line[:, None].expand(side, side, -1)
    columns = line[None, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width) * 0.7


def write_model(folder: Path, seed: int = 0) -> int:
    """Write the whole model folder; returns the number of parameters."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = MiniCPMV4_6ForConditionalGeneration(make_config(tokenizer))
    initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "MiniCPMV4_6ImageProcessor",
        "scale_resolution": 125,  # keeps 112 x 140 as it is: 125 squared is about its area
        "patch_size": VISION["patch_size"],
        "max_slice_nums": 1,
        "slice_mode": False,
        "downsample_mode": "4x",
        "use_image_id": True,
        "image_mean": [0.93, 0.93, 0.93],  # paper is near 0 and ink far from it: the grain stays quiet
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return sum(weight.numel() for weight in model.parameters())


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write an untrained, tiny MiniCPM-V 4.6 as a model folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    count = write_model(given.out, given.seed)
    size = (given.out / "model.safetensors").stat().st_size
    print(f"{count:,} parameters, {size:,} bytes, fields {', '.join(FIELDS)}: {given.out}")


if __name__ == "__main__":
    main()
