"""A stand-in for TRL, which need not be installed: what its SFTTrainer does to a Trainer, as far as a proof meets it.

It makes adapters itself, tokenises prompt and completion, brings a collator that masks prompts, computes the loss in a
`compute_loss` of its own that keeps metrics on the trainer, and logs them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments


@dataclass
class SFTConfig(TrainingArguments):
    """Arguments that TRL adds."""

    max_length: int | None = field(default=1024)
    completion_only_loss: bool | None = field(default=None)


class Collator:
    """Pads ids and masks what is no completion."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        found: dict[str, list[list[int]]] = defaultdict(list)
        for row in rows:
            ids, carries, left = row["input_ids"], row["completion_mask"], width - len(row["input_ids"])
            found["input_ids"].append(ids + [0] * left)
            found["attention_mask"].append([1] * len(ids) + [0] * left)
            found["labels"].append([i if m else -100 for i, m in zip(ids, carries, strict=True)] + [-100] * left)
        return {name: torch.tensor(value) for name, value in found.items()}


class SFTTrainer(Trainer):
    """Trainer with adapters, tokenised rows, a loss and metrics of its own."""

    def __init__(
        self, model: Any, args: SFTConfig, train_dataset: Any, processing_class: Any, peft_config: Any = None
    ) -> None:
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._seen_tokens = 0
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        rows = [self._encoded(row, processing_class, args.max_length) for row in train_dataset]
        super().__init__(
            model=model, args=args, train_dataset=rows, data_collator=Collator(), processing_class=processing_class
        )

    def _encoded(self, row: dict[str, str], tokenizer: Any, limit: int | None) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        carries = [0] * len(prompt) + [1] * len(answer)
        return {"input_ids": (prompt + answer)[:limit], "completion_mask": carries[:limit]}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "completion_mask"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            right = outputs.logits[..., :-1, :].argmax(-1) == inputs["labels"][..., 1:]
            self._metrics["train"]["accuracy"].append(float(right.float().mean()))
        self._seen_tokens += int(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        own = {name: sum(values) / len(values) for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        super().log({**logs, **own, "tokens": float(self._seen_tokens)}, start_time)


def as_trl() -> ModuleType:
    """A module as `import trl` gives it."""
    module = ModuleType("trl")
    module.SFTConfig, module.SFTTrainer = SFTConfig, SFTTrainer  # type: ignore[attr-defined]
    return module
