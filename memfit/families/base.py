"""What a family file states. Facts and pure functions of numbers only: no torch, no transformers, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memfit.errors import UserError
from memfit.specs.recipe import ImageBudget
from memfit.specs.workload import ImageCost

# (processor settings as in preprocessor_config.json with the budget applied, width, height) -> cost
ImageRule = Callable[[Mapping[str, Any], int, int], ImageCost]
# (model config, preprocessor_config.json, budget) -> changed processor settings; UserError if it cannot be met
BudgetRule = Callable[[Mapping[str, Any], Mapping[str, Any], ImageBudget], dict[str, Any]]
# (cost, index of the picture in its sample, processor settings with the tokenizer's names under "tokens")
# -> the text that stands for the picture
PlaceholderRule = Callable[[ImageCost, int, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Images:
    """How a family sees pictures. `processor` is the PIL image processor's class name in transformers.

    `batch` says how the tensors of several samples are joined: name -> ("cat" | "stack", dimension).
    `needs_token_types` asks the collator for `mm_token_type_ids` (1 at image tokens).
    `tokens`: the names of special tokens that `placeholder` writes and their texts where the tokenizer names none.
    `marker` is what a chat template that takes plain text only gets for a picture; empty means `image_token`.
    `newlines`: such a template gets pictures and words joined by newlines, one at each joint.
    `token_in_config`: config.json names the image token's id; otherwise only the tokenizer knows it.
    `shared`: settings of the processor that config.json holds too and that must be the same there.
    """

    processor: str
    rule: ImageRule
    budget: BudgetRule
    placeholder: PlaceholderRule
    image_token: str
    batch: Mapping[str, tuple[str, int]]
    needs_token_types: bool = False
    tokens: Mapping[str, str] = field(default_factory=dict)
    marker: str = ""
    newlines: bool = False
    token_in_config: bool = True
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One family of models that share transformers' classes.

    `parts`: (prefix of the parameter name in transformers' model, part), the first match wins.
    `blocks`: part -> prefix of its numbered blocks. `lora_targets`: module-name endings that `auto` means.
    `chat_template` is used when the tokenizer brings none. `forward_kwargs` go to every forward and generate call.
    `native`: the classes are memfit's own (`memfit.models`), as transformers has none.
    `unreached`: config -> name prefixes of parameters whose output the loss never sees: they get no gradient.
    `forecast_only`: why models of this family are counted and traced but never loaded, encoded for or trained; empty
    for all others.
    """

    name: str
    model_types: tuple[str, ...]
    auto_class: str
    parts: tuple[tuple[str, str], ...]
    blocks: Mapping[str, str]
    lora_targets: tuple[str, ...]
    images: Images | None = None
    chat_template: str | None = None
    forward_kwargs: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    native: bool = False
    unreached: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    forecast_only: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def part_of(self, parameter: str) -> str:
        """The part that owns a parameter or module name. KeyError for a name that no prefix covers."""
        for prefix, part in self.parts:
            if parameter.startswith(prefix):
                return part
        raise KeyError(f"{self.name}: no part owns {parameter!r}")

    def refuse_to_run(self) -> None:
        """UserError for a family that is forecast only."""
        if self.forecast_only:
            raise UserError(
                f"{self.name} is forecast only. {self.forecast_only}",
                "memfit estimate answers for it, with workload: {tokens: ..., images: ...} in place of data",
            )
