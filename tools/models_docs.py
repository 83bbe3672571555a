"""Write docs/models.md: what memfit does with each catalogued model; `--check` compares instead.

A "yes" is read from `tests.supported`, the lists that the tests themselves take their models from; the rest from what
the commands go by: the catalogue, the families, the levers that are refused.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the lists of the tests

from memfit.build.supported import refuse_what_is_not_built  # noqa: E402
from memfit.catalog.models import MODELS, ModelRow  # noqa: E402
from memfit.errors import UserError  # noqa: E402
from memfit.families import family_for  # noqa: E402
from memfit.families.minicpmv2 import KEPT_ON_DISK, query_num  # noqa: E402
from memfit.inputs.recipe_file import load_recipe  # noqa: E402
from memfit.specs.recipe import ImageBudget, Recipe  # noqa: E402
from tests.supported import DUMMY_OF, PARTS, SHOWN, VECTORS  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
# Licences of the weights: read the model card before relying on one. "card": its text was read in a public copy.
_MINICPM = "MiniCPM Model License (memory)"
_APACHE_CARD = "Apache-2.0 (card)"
LICENCES = {
    "minicpm-v-4.6": _APACHE_CARD,
    "minicpm-v-4.5": _APACHE_CARD,
    "minicpm-o-4.5": _APACHE_CARD,
    "minicpm-v-4.0": _MINICPM,
    "minicpm-v-2.6": _MINICPM,
    "minicpm-o-2.6": _MINICPM,
    "minicpm-llama3-v-2.5": _MINICPM,
    "qwen2.5-vl-3b": "Qwen Research (memory)",
    "qwen2.5-vl-7b": "Apache-2.0 (memory)",
    "qwen3-0.6b": "Apache-2.0 (memory)",
    "qwen3-4b": "Apache-2.0 (memory)",
    "qwen3-8b": "Apache-2.0 (memory)",
    "llava-1.5-7b": "Llama 2 Community (memory)",
    "llama-2-7b": "Llama 2 Community (memory)",
    "llama-3.1-8b": "Llama 3.1 Community (memory)",
    "llama-3.2-1b": "Llama 3.2 Community (memory)",
    "llama-3.2-3b": "Llama 3.2 Community (memory)",
}
KNOBS = {"max_slices": 4, "max_tokens": 2000, "max_pixels": 4 * 448 * 448}
ONLY_FORECAST = "forecast"


def runs(recipe: Recipe) -> bool:
    """Whether memfit trains such a recipe, not only forecasts it."""
    try:
        refuse_what_is_not_built(recipe)
    except UserError:
        return False
    return True


def pinned(method: str, parallel: str, gpus: str) -> Recipe:
    """A recipe with nothing left to the planner that `refuse_what_is_not_built` reads."""
    levers = {"optimizer": "adamw", "loss": "full-logits", "attention": "sdpa", "offload": "none"}
    levers |= {"parallel": parallel, "checkpointing": "full", "precision": "fp32"}
    sets = [f"method={method}", f"hardware.gpus={gpus}", *(f"levers.{key}={value}" for key, value in levers.items())]
    return load_recipe(None, sets, model="catalogue")


def knobs(row: ModelRow) -> str:
    """The knobs of the image budget that the model's processor can be told; what it costs where there are none."""
    family = family_for(row.config)
    if family.images is None:
        return "-"
    able = [name for name, value in KNOBS.items() if _budget(row, ImageBudget(**{name: value}))]
    least = family.images.rule(family.images.budget(row.config, row.preprocessor, ImageBudget()), 100, 100)
    most = family.images.rule(family.images.budget(row.config, row.preprocessor, ImageBudget()), 3000, 3000)
    if least.tokens == most.tokens:
        return f"fixed: {most.tokens} tokens a picture"
    return ", ".join(able)


def downsample(row: ModelRow) -> str:
    """Modes of the downsample setting, or what fixes the tokens of a crop."""
    family = family_for(row.config)
    if family.images is None:
        return "-"
    if _budget(row, dataclasses.replace(ImageBudget(), downsample_mode="4x")):
        return shown("downsample", row, "4x, 16x")
    if family.name == "minicpmv2":
        return f"no: {query_num(row.config)} queries a crop, fixed by the checkpoint"
    return "no"


def _budget(row: ModelRow, budget: ImageBudget) -> bool:
    images = family_for(row.config).images
    try:
        return images is not None and bool(images.budget(row.config, row.preprocessor, budget))
    except UserError:
        return False


def shown(column: str, row: ModelRow, yes: str = "yes") -> str:
    """`yes` where a test of that column runs for the model; "untested" where none does."""
    if family_for(row.config).forecast_only:
        return ONLY_FORECAST
    return yes if DUMMY_OF.get(row.name) in SHOWN[column].kinds else "untested"


def parts(row: ModelRow) -> str:
    if family_for(row.config).forecast_only:
        return ONLY_FORECAST
    names = ", ".join(PARTS[DUMMY_OF[row.name]])
    kept = f"; {', '.join(KEPT_ON_DISK)} stay on disk" if row.config.get("model_type") == "minicpmo" else ""
    return shown("parts", row, names) + kept


def numbers(row: ModelRow) -> str:
    """What the model's numbers were held against."""
    family = family_for(row.config)
    if family.forecast_only:
        return "nothing: not at hand"
    if not family.native:
        return "they are transformers' own"
    return "vectors of the original" if DUMMY_OF[row.name] in VECTORS else "the shared parts' vectors only"


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def what_runs() -> str:
    heads = ("name", "full", "LoRA", "QLoRA", "parts", "ZeRO-3", "FSDP2", "image budget", "downsample mode")
    rows = [
        (
            row.name,
            shown("full", row),
            shown("lora", row),
            shown("qlora", row),
            parts(row),
            *(shown(engine, row, "CPU ranks") for engine in ("zero3", "fsdp")),
            knobs(row),
            downsample(row),
        )
        for row in MODELS
    ]
    return table(heads, rows)


def what_it_is() -> str:
    heads = ("name", "hub id", "code", "numbers held against", "facts", "licence of the weights")
    rows = []
    for row in MODELS:
        code = "memfit's own" if family_for(row.config).native else "transformers"
        licence = LICENCES.get(row.name, "see the model card")
        rows.append((row.name, row.hub_id, code, numbers(row), row.verified, licence))
    return table(heads, rows)


def tests() -> str:
    names = {
        "full": "full",
        "lora": "LoRA",
        "qlora": "QLoRA",
        "parts": "parts",
        "zero3": "ZeRO-3",
        "fsdp": "FSDP2",
        "image": "image budget",
        "downsample": "downsample mode",
    }
    return "\n".join(f"  - {name}: `{SHOWN[column].test}`" for column, name in names.items())


TEMPLATE = """\
# Models

Written by `tools/models_docs.py` from the lists that the tests take their models from (`tests/supported.py`), the
catalogue and the families; do not edit. `memfit models` prints the catalogue.

## What is shown to work

{what_runs}

- **A word here is a test** that runs for a tiny model with the same classes, names and files; "untested" means that
  there is none, "forecast" that `memfit estimate` answers and training is refused. Real checkpoints of these sizes were
  not at hand.
{tests}
- **QLoRA** needs the package bitsandbytes, and runs on one GPU or CPU process and under ddp; its test is skipped
  without the package.
- **Engines**: {engines}. On several GPUs, which none of ours has confirmed yet: {on_gpus}.
- **Parts** are `frozen`, `lora` or `full` each on its own, the connector (resampler, merger, projector) too:
  `parts.connector`, `levers.checkpointing: {{connector: full}}`. Adapters outside the language part need
  `lora.targets: all-linear` or names.
- **Image budget**: one of these knobs under `image`, compiled to the processor's own; "fixed" means that every picture
  costs the same. `image.downsample_mode` changes what is learned (tier 3), like all that stands outside `levers`.

## What they are

{what_it_is}

- **facts**: cited, the model's own files were read in a public copy; counted, from memory with a parameter count that
  is the published one; memory, from memory or stored code, with a count that agrees to a few digits. A forecast that
  rests on memory says so in a note.
- **licence**: card, the model card was read in a public copy; memory, not looked up. OpenBMB's read-me has called all
  MiniCPM-o and -V weights Apache-2.0 since V 4.5; older model cards named their own licence. Read the card.

## MiniCPM-V and -o before 4.6

These exist on the hub only with code of their own, for transformers releases that exclude each other. memfit has its
own implementation (`memfit/models/minicpmv/`) on today's transformers. It agrees with vectors made by the originals
(`tests/golden/data/minicpmv`): tower, resampler, logits, loss, gradients, greedy tokens, slices to the byte, ids and
labels. The vectors are of V 2.6 and V 2.5; V 4.0, V 4.5 and o 4.5 differ by their language model and template, and no
vector of theirs was at hand. To use it elsewhere:

```python
import memfit.models, transformers

memfit.models.register()
model = transformers.AutoModel.from_pretrained("openbmb/MiniCPM-V-2_6")  # no trust_remote_code
processor = transformers.AutoProcessor.from_pretrained("openbmb/MiniCPM-V-2_6")
```

- Names are the checkpoint's (`llm.*`, `vpm.*`, `resampler.*`); adapters load in plain PEFT; config.json is saved in its
  flat form. Every name and shape is compared with the checkpoint before loading, and a difference stops it.
- -o: audio (`apm`, `audio_projection_layer`) and speech (`tts`) are not loaded; a saved model has them again, byte for
  byte, from the folder it was loaded from. Without them there, `init_audio` and `init_tts` are saved as false.
- Tokens of a crop are the checkpoint's learned queries and cannot be changed; `image.max_slices` changes how many crops
  there are.
- Training differs from the original script on purpose: pictures are always numbered, no second end target is learned,
  an empty answer leaks nothing into the labels, and nothing is cut in the middle where a sample is longer than
  `max_length`.
- V 2.5 was trained with positions along one row. memfit takes each crop as if it were alone; `model.vpm.joint = True`
  gives the original's results, in which crops of a batch see each other's padding.
- V 4.5's resampler can place pictures in time. Pictures of one time step carry no such place (`temporal_ids` of -1),
  and its resampler is then that of 2.6; video, audio and speech are refused.

## MiniCPM-V 4.6

`image.downsample_mode: 4x` keeps four times the image tokens of `16x`: the window merger inside the tower is passed by,
so that its 105 M parameters get no gradient and are frozen, and all of the tower's layers see every patch. Text,
pixels, model, forecast and the files that a run saves follow the one setting.

## OmniLMM-12B

The project's first model is forecast by its parts, and not trained: its tower is timm's EVA02, its weights are no
safetensors. memfit counts and traces an equivalent (`memfit/models/omnilmm.py`): 63 of EVA02-enormous' 64 blocks, 64
queries, Mistral-7B. What that rests on is said under each forecast.
"""


def page() -> str:
    engines = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
    on_ranks = [name for name in engines[1:] if runs(pinned("lora", name, "2xcpu"))]
    on_gpus = [name for name in engines[1:] if runs(pinned("lora", name, "2xA100-80G"))]
    return TEMPLATE.format(
        what_runs=what_runs(),
        what_it_is=what_it_is(),
        tests=tests(),
        engines=f"one GPU or one CPU process; several CPU ranks with {', '.join(on_ranks)}",
        on_gpus=", ".join(on_gpus) or "forecast only",
    )


def main(arguments: list[str]) -> int:
    text = page()
    if "--check" in arguments:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("docs/models.md is as the code says" if same else "docs/models.md is old: run tools/models_docs.py")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
