"""One of several ranks of a plain Trainer script: trains it with and without `memfit.prove` before, and compares.

torchrun --nproc-per-node 2 tests/unit/foreign_rank.py MODEL OUT.json CASE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import memfit
from memfit.engine.ranks import is_first

IGNORED = -100


class Padding:
    """Rows of different lengths as one batch."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


def samples(count: int = 24) -> list[dict[str, list[int]]]:
    """Rows of 6 to 40 ids; the first third carries no loss."""
    rows = []
    for number in range(count):
        ids = [(7 * number + place) % 300 for place in range(6 + (11 * number) % 35)]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]})
    return rows


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed file as users write it."""
    section = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    return {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {**section, "reduce_bucket_size": "auto", **more},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def make(model: str, folder: str, case: str) -> Trainer:
    """A trainer of a case such as "zero3-lora-bf16"."""
    words = set(case.split("-"))
    config = next((zero(stage) for stage in (1, 2, 3) if f"zero{stage}" in words), None)
    if config is not None and "offload" in words:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16="bf16" in words,
        deepspeed=config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        warmup_steps=1,
        gradient_checkpointing="checkpointed" in words,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        ddp_backend="gloo" if "ddp" in words else None,
    )
    if config is not None and not distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    set_seed(3)
    live: Any = AutoModelForCausalLM.from_pretrained(model)
    if "lora" in words:
        live = get_peft_model(live, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    rows = samples()
    return Trainer(model=live, args=args, train_dataset=rows, data_collator=Padding())


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """This rank's share of every parameter."""
    return {
        name: getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in trainer.model.named_parameters()
    }


def trained(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, weights(trainer)


def compared(model: str, folder: Path, case: str) -> dict[str, Any]:
    """Losses and weights of two trainings, one of them after a proof; and what the proof said."""
    plain = trained(make(model, str(folder / "plain"), case))
    trainer = make(model, str(folder / "proved"), case)
    before = weights(trainer)
    said: list[str] = []
    proof = memfit.prove(trainer, say=said.append)
    kept = all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    proved = trained(trainer)
    return {
        "kept": kept,
        "losses": [plain[0], proved[0]],
        "same": plain[0] == proved[0] and all(torch.equal(plain[1][name], proved[1][name]) for name in plain[1]),
        "card": "\n".join(said),
        "proof": proof.to_json(),
    }


def main() -> None:
    model, out, *cases = sys.argv[1:]
    path = Path(out)
    found = {}
    for case in cases:
        found[case] = compared(model, path.parent / case, case)
        if distributed.is_initialized():
            told: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(told, (found[case]["kept"], found[case]["same"]))
            found[case] |= {"kept": all(each[0] for each in told), "same": all(each[1] for each in told)}
    if is_first():
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
