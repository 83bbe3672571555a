"""A plain transformers Trainer script, with one line of memfit before it trains.

python examples/prove_trainer.py            (tiny model, CPU, seconds)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import memfit
from memfit.testing import make_dummy

PROMPT, ANSWER = "Question: what is {0} and {0}?\nAnswer:", " it is {1}, " * 3


def make_trainer(folder: Path) -> Trainer:
    model_folder = make_dummy("llama", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)

    def encode(number: int) -> dict[str, list[int]]:
        prompt = tokenizer(PROMPT.format(number))["input_ids"]
        answer = tokenizer(ANSWER.format(number, 2 * number) * (1 + number % 5), add_special_tokens=False)["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    args = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        gradient_checkpointing=True,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=[encode(number) for number in range(48)],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        memfit.prove(trainer, strict=True)
        trainer.train()


if __name__ == "__main__":
    main()
