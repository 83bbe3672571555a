"""A TRL SFT script with LoRA, with one line of memfit before it trains.

python examples/prove_sft.py            (tiny model, CPU, seconds; needs trl)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import memfit
from memfit.testing import make_dummy


def make_trainer(folder: Path) -> SFTTrainer:
    model_folder = make_dummy("llama", folder / "model")
    rows = [
        {"prompt": f"What is {number} and {number}? ", "completion": f"It is {2 * number}." * (1 + number % 4)}
        for number in range(32)
    ]
    try:
        from datasets import Dataset
    except ImportError:  # a list of rows will do for trainers that take one
        data = rows
    else:
        data = Dataset.from_list(rows)
    args = SFTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        max_length=128,
        num_train_epochs=1,
        learning_rate=1e-3,
        completion_only_loss=True,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        memfit.prove(trainer, strict=True)
        trainer.train()


if __name__ == "__main__":
    main()
