"""What is measured: real models at full size, or tiny ones of the same families for the rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memfit.catalog.gpus import parse_hardware
from memfit.families import family_for
from memfit.inputs import machine
from memfit.inputs.model_source import find_model
from memfit.planner.defaults import resolve
from memfit.specs.hardware import Hardware
from memfit.specs.recipe import HardwareKeys, Levers, Lora, Recipe, WorkloadKeys
from memfit.specs.trace import TraceBatch
from memfit.trace.parameters import profile_of
from memfit.trace.prepare import Prepared


@dataclass(frozen=True)
class Cell:
    """One run. `side`: width and height of its picture in pixels, 0 for none. `parts` as in a recipe."""

    model: str
    what: str  # lora | frozen-vision | full
    checkpointing: str
    tokens: int
    side: int = 0

    @property
    def id(self) -> str:
        picture = f"-{self.side}px" if self.side else ""
        return f"{self.model}-{self.what}-{self.checkpointing}-{self.tokens}t{picture}"


# Ordered by what is learned from a cell, so that a run cut short has the most telling ones. The last is meant to be
# out of memory on 80 GB: a forecast must say so.
CELLS = (
    Cell("minicpm-v-4.6", "lora", "full", 2048, 1344),
    Cell("llama-3.1-8b", "lora", "full", 2048),
    Cell("qwen2.5-vl-3b", "lora", "full", 4096, 1344),
    Cell("minicpm-v-4.6", "full", "none", 1024, 448),
    Cell("llama-3.1-8b", "full", "full", 2048),
    Cell("qwen2.5-vl-3b", "frozen-vision", "none", 1024, 448),
    Cell("minicpm-v-4.6", "frozen-vision", "full", 2048, 1344),
    Cell("llama-3.1-8b", "lora", "none", 2048),
    Cell("qwen2.5-vl-3b", "full", "full", 4096, 1344),
    Cell("minicpm-v-4.6", "lora", "none", 2048, 1344),
    Cell("llama-3.1-8b", "lora", "full", 8192),
    Cell("qwen2.5-vl-3b", "full", "none", 1024, 448),
    Cell("minicpm-v-4.6", "full", "full", 2048, 1344),
    Cell("qwen2.5-vl-3b", "lora", "none", 1024, 448),
    Cell("llama-3.1-8b", "full", "none", 2048),
)

REHEARSED = (
    Cell("minicpm-v-4.6", "lora", "full", 128, 64),
    Cell("llama-3.1-8b", "full", "none", 64),
)

# What makes a tiny model of the same family: overrides of the catalogue's config.
_TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
TINY: dict[str, dict[str, Any]] = {
    "minicpm-v-4.6": {
        "text_config": {
            **_TINY_TEXT,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 224,
        },
        "insert_layer_id": 0,
        "image_token_id": 255,
    },
    "llama-3.1-8b": {**_TINY_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def cells(rehearse: bool, only: str = "") -> tuple[Cell, ...]:
    """The cells whose ids contain `only`."""
    return tuple(cell for cell in (REHEARSED if rehearse else CELLS) if only in cell.id)


def hardware_of(gpus: str) -> Hardware:
    """One GPU or CPU rank: `gpus` as a recipe names it, or "auto" for the first GPU of this machine."""
    if gpus != "auto":
        return parse_hardware(gpus)
    found = machine.detect()
    return Hardware(found.gpu, 1, 1, found.host_memory_bytes, found.nvme_bytes, detected=True)


def prepared_of(cell: Cell, gpus: str, rehearse: bool) -> tuple[Prepared, Recipe]:
    """What `memfit.build` and `memfit.trace` take, without a recipe file; and the effective recipe."""
    parts: dict[str, Any] = {"frozen-vision": {"vision": "frozen", "connector": "full", "language": "full"}}
    recipe = Recipe(
        model=cell.model,
        model_config=TINY[cell.model] if rehearse else {},
        method="lora" if cell.what == "lora" else "full",
        parts=parts.get(cell.what, {}),
        lora=Lora(rank=16, alpha=32, dropout=0.05),
        levers=Levers(precision="pure-bf16", checkpointing=cell.checkpointing, micro_batch=1),
        workload=WorkloadKeys(tokens=cell.tokens, images=1 if cell.side else 0, image_size=f"{cell.side}x{cell.side}")
        if cell.side
        else WorkloadKeys(tokens=cell.tokens),
        batch=1,
        hardware=HardwareKeys(gpus=gpus) if gpus != "auto" else "auto",
    )
    source = find_model(recipe.model, recipe.model_config, catalogue=True)
    family = family_for(source.config)
    prepared = Prepared(recipe, source, family, profile_of(source.config, family), hardware_of(gpus))
    effective, _ = resolve(recipe, prepared.hardware, family, prepared.profile)
    return prepared, effective


def batch_of(cell: Cell, prepared: Prepared) -> TraceBatch:
    """One row of `cell.tokens` tokens with its picture, as numbers."""
    images = prepared.family.images
    if not cell.side or images is None:
        return TraceBatch((cell.tokens,))
    settings = images.budget(prepared.source.config, prepared.source.preprocessor, prepared.recipe.image)
    return TraceBatch((cell.tokens,), ((images.rule(settings, cell.side, cell.side),),))


def facts_of(cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """The cell and the work it stands for, as a record keeps them."""
    batch = batch_of(cell, prepared)
    pictures = batch.images[0] if batch.images else ()
    return {
        **asdict(cell),
        "id": cell.id,
        "parameters": sum(prepared.profile.part_numel().values()),
        "crops": sum(len(cost.crops) for cost in pictures),
        "patches": sum(cost.patches for cost in pictures),
        "image_tokens": sum(cost.tokens for cost in pictures),
    }
