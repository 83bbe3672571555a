"""Write docs/models.md: what memfit does with each catalogued model; `--check` compares instead.

Every cell is read from what the commands themselves go by: the catalogue, the families, the levers that are refused.
What is only known from memory says so.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from memfit.build.supported import refuse_what_is_not_built
from memfit.catalog.models import MODELS, ModelRow
from memfit.errors import UserError
from memfit.families import family_for
from memfit.families.minicpmv2 import KEPT_ON_DISK
from memfit.inputs.recipe_file import load_recipe
from memfit.specs.recipe import ImageBudget, Recipe

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# Licences of the weights, as the model cards named them when last read; all from memory, so read the card.
LICENCES = {
    "minicpmv2": "MiniCPM Model License; V 4.5, o 4.5: Apache-2.0",
    "minicpmv4_6": "Apache-2.0",
    "qwen2_5_vl": "Apache-2.0 (7B), Qwen Research (3B)",
    "llava": "Llama 2 Community",
}
METHODS = ("full", "lora", "qlora")
KNOBS = {"max_slices": 4, "max_tokens": 2000, "max_pixels": 4 * 448 * 448}


def runs(recipe: Recipe) -> bool:
    """Whether memfit trains such a recipe, not only forecasts it."""
    try:
        refuse_what_is_not_built(recipe)
    except UserError:
        return False
    return True


def pinned(**levers: object) -> Recipe:
    """A recipe with nothing left to the planner that `refuse_what_is_not_built` reads."""
    plain = {"optimizer": "adamw", "loss": "full-logits", "attention": "sdpa", "parallel": "none", "offload": "none"}
    method = str(levers.pop("method", "lora"))
    sets = [
        f"method={method}",
        "levers.checkpointing=full",
        *(f"levers.{k}={v}" for k, v in {**plain, **levers}.items()),
    ]
    return load_recipe(None, sets, model="catalogue")


def knobs(row: ModelRow) -> str:
    """The knobs of the image budget that the model's processor can be told."""
    family = family_for(row.config)
    if family.images is None:
        return "-"
    able = []
    for name, value in KNOBS.items():
        try:
            family.images.budget(row.config, row.preprocessor, dataclasses.replace(ImageBudget(), **{name: value}))
            able.append(name)
        except UserError:
            continue
    return ", ".join(able) or "fixed size"


def table() -> list[str]:
    methods = [method for method in METHODS if runs(pinned(method=method))]
    lines = [
        "| name | hub id | code | parts | trains with | image budget | facts | weights' licence (from memory) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in MODELS:
        family = family_for(row.config)
        code = "memfit's own" if family.native else "transformers"
        parts = ", ".join(dict.fromkeys(part for _, part in family.parts))
        if row.config.get("model_type") == "minicpmo":
            parts += f"; {', '.join(KEPT_ON_DISK)} stay on disk"
        licence = LICENCES.get(family.name, "see the model card")
        cells = (row.name, row.hub_id, code, parts, ", ".join(methods), knobs(row), row.verified, licence)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


TEMPLATE = """\
# Models

Written by `tools/models_docs.py` from the catalogue, the families and the levers that this version runs; do not edit.
`memfit models` prints the same rows.

{table}

- **facts**: cited, the model's own files were read in a public copy; counted, from memory with a parameter count that
  is the published one; memory, from memory or stored code, with a count that agrees to a few digits.
- **Engines that this version trains with**: {engines}. The others are forecast.
- **Connector**: a part of its own everywhere: `parts.connector: frozen | lora | full`, and
  `levers.checkpointing: {{connector: full}}`. Its adapters need `lora.targets: all-linear` or names.

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
  an empty answer leaks nothing into the labels, and a sample above `max_length` is set aside by name and length instead
  of being cut. `memfit.inputs.shorten.shortened` drops whole trailing turns with their pictures.
- V 2.5 was trained with positions along one row. memfit takes each crop as if it were alone; `model.vpm.joint = True`
  gives the original's results, in which crops of a batch see each other's padding.
- Video (V 4.5's time positions), audio and speech are neither trained nor generated.
"""


def page() -> str:
    engines = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
    trained = [name for name in engines if runs(pinned(parallel=name))]
    return TEMPLATE.format(table="\n".join(table()), engines=", ".join(trained))


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
