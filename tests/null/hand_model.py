"""A model small enough to count by hand."""

from __future__ import annotations

from memfit.families.base import Family
from memfit.specs.profile import ParameterRow, Profile

FAMILY = Family(
    name="hand",
    model_types=("hand",),
    auto_class="AutoModelForImageTextToText",
    parts=(("eye.", "vision"), ("bridge.", "connector"), ("lm.", "language"), ("lm_head.", "head")),
    blocks={"vision": "eye.blocks.", "language": "lm.layers."},
    lora_targets=("q_proj", "out_proj"),
)

# (name, shape, kind)
TENSORS = (
    ("eye.blocks.0.fc.weight", (8, 4), "linear"),
    ("eye.blocks.0.fc.bias", (8,), "linear"),
    ("eye.blocks.1.fc.weight", (8, 4), "linear"),
    ("eye.blocks.1.fc.bias", (8,), "linear"),
    ("eye.out_proj.weight", (8, 8), "linear"),
    ("bridge.proj.weight", (16, 8), "linear"),
    ("lm.embed_tokens.weight", (100, 16), "embedding"),
    ("lm.layers.0.q_proj.weight", (16, 16), "linear"),
    ("lm.layers.0.norm.weight", (16,), "norm"),
    ("lm.layers.1.q_proj.weight", (16, 16), "linear"),
    ("lm.layers.1.norm.weight", (16,), "norm"),
    ("lm_head.weight", (100, 16), "linear"),
)
# By hand: 2 x (32 + 8) + 64 = 144; 128; 1600 + 2 x (256 + 16) = 2144; 1600.
NUMEL = {"vision": 144, "connector": 128, "language": 2144, "head": 1600}
BUFFERS = 24


def profile(tied: bool = False) -> Profile:
    """The profile as it would be read from the meta device, with the output head tied to the embeddings or not."""
    rows = []
    for name, shape, kind in TENSORS:
        part = FAMILY.part_of(name)
        prefix = FAMILY.blocks.get(part)
        number = name.removeprefix(prefix).split(".")[0] if prefix and name.startswith(prefix) else ""
        rows.append(
            ParameterRow(
                name=name,
                shape=shape,
                dtype="float32",
                part=part,
                module=name.rpartition(".")[0],
                kind=kind,
                block=int(number) if number else None,
                tied_to="lm.embed_tokens.weight" if tied and part == "head" else None,
            )
        )
    return Profile("hand", "key", tuple(rows), BUFFERS, (("torch", "2"), ("transformers", "5")))
