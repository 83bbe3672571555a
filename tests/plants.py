"""Failures that are planted in jobs, one row each: what is done, which check must fail, what would have gone wrong.

`tests/planting.py` plants them and `tests/unit/test_planted_failures.py` shows both columns. Imports nothing, so that
docs/proof.md is written from it without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How the damage is shown: other bytes than forecast, another course of the loss, other tensors that learn or are
# saved, other samples or tokens, another forecast for what really runs, ranks that differ.
Shown = Literal[
    "bytes", "learned", "learning", "saved", "rows", "tokens", "forecast", "drift", "gathered", "host bytes"
]


@dataclass(frozen=True)
class Plant:
    """One failure. `how`: where and what is planted; `lever`: the check that must fail; `harm`: what follows.

    `shown`: what of the run is compared with the healthy one. `sets`: the recipe beside the tests' own; `real`: what
    the job really is, as recipe settings, where its forecast is laid beside the plan's. `layout`: of tests.planting.
    """

    name: str
    how: str
    lever: str
    harm: str
    shown: Shown
    sets: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    layout: str = "none"


LORA = ("method=lora",)
BESIDE = (*LORA, "parts.connector=full")
FROZEN = ("parts.vision=frozen",)
PLAIN = ("levers.checkpointing=none",)
FULL = ("levers.checkpointing=full",)
AMP = ("levers.precision=bf16-amp",)
CHUNKED = ("levers.loss=chunked",)

PLANTS: tuple[Plant, ...] = (
    # ---- adapters
    Plant(
        "adapters on the attention alone",
        "LoraConfig gets a pattern that matches q, k, v and o only",
        "lora.targets",
        "fewer matrices learn than planned",
        "learning",
        LORA,
    ),
    Plant(
        "adapters in the vision tower",
        "LoraConfig gets endings without the part's name, which the tower has too",
        "lora.targets",
        "the tower learns, and keeps activations that no forecast names",
        "learning",
        LORA,
    ),
    Plant(
        "adapters detached",
        "a hook detaches what every adapter adds",
        "dead parameters",
        "no adapter learns",
        "learned",
        BESIDE,
    ),
    Plant(
        "adapters switched off",
        "PEFT's disable_adapter_layers, while the connector learns",
        "adapters in effect",
        "no adapter learns",
        "learned",
        BESIDE,
    ),
    Plant(
        "adapters in bf16",
        "the adapters' weights are cast to bf16",
        "lora.dtype",
        "the weights round at every step",
        "learned",
        LORA,
    ),
    Plant(
        "adapters scaled twice",
        "scaling of every adapter layer is doubled",
        "lora scale",
        "the adapters' steps are twice as long",
        "learned",
        LORA,
    ),
    Plant(
        "adapters of another rank",
        "LoraConfig gets twice the rank",
        "lora.rank",
        "twice the weights learn",
        "learning",
        LORA,
    ),
    Plant(
        "adapter dropout otherwise",
        "p of every adapter's dropout is 0.5 instead of 0",
        "lora.dropout",
        "half of every adapter's input is gone",
        "learned",
        LORA,
    ),
    Plant(
        "whole copies beside adapters",
        "LoraConfig gets modules_to_save for the merger",
        "lora.modules_to_save",
        "whole copies learn that the plan does not have",
        "learning",
        LORA,
    ),
    # ---- what learns
    Plant(
        "frozen tower learns",
        "a callback sets requires_grad on the vision tower as training begins",
        "parts.vision",
        "the tower is trained",
        "learning",
        FROZEN,
    ),
    Plant(
        "connector frozen",
        "requires_grad is taken from the connector after build",
        "parts.connector",
        "the connector never learns",
        "learning",
        FROZEN,
    ),
    Plant(
        "vision detached",
        "a hook detaches what the tower gives",
        "dead parameters",
        "the tower never learns",
        "learned",
    ),
    Plant(
        "frozen tower with a graph",
        "enable_input_require_grads, as transformers' and PEFT's own checkpointing call it",
        "graph of frozen parts",
        "the frozen tower keeps its activations",
        "bytes",
        (*FROZEN, *PLAIN),
    ),
    # ---- memory
    Plant(
        "vision not checkpointed",
        "gradient_checkpointing is false on the tower's blocks",
        "levers.checkpointing (vision)",
        "the tower keeps its activations",
        "bytes",
        FULL,
    ),
    Plant(
        "every second block checkpointed",
        "gradient_checkpointing is false on the second, fourth ... block of the language model",
        "levers.checkpointing (language)",
        "half of the blocks keep their activations",
        "bytes",
        FULL,
    ),
    Plant(
        "checkpointing keeps products",
        "the blocks' checkpoint function has the contexts of selective checkpointing",
        "levers.checkpointing (language)",
        "the blocks keep their products",
        "bytes",
        FULL,
    ),
    Plant(
        "eager attention",
        "set_attn_implementation('eager') on the live model",
        "levers.attention (language)",
        "every layer keeps its attention matrix",
        "bytes",
        PLAIN,
    ),
    Plant(
        "full logits",
        "the head gives logits again and the Trainer gets the loss of full logits",
        "levers.loss",
        "the logits of all tokens are kept",
        "bytes",
        CHUNKED,
    ),
    Plant(
        "logits kept alive",
        "compute_loss keeps the outputs of every micro-batch, as a metric would",
        "forecast",
        "logits pile up",
        "bytes",
        PLAIN,
    ),
    Plant(
        "hidden states kept",
        "output_hidden_states is on, and compute_loss keeps the outputs",
        "forecast",
        "hidden states pile up",
        "bytes",
        FULL,
    ),
    Plant(
        "weights copied",
        "a callback keeps a copy of the weights (an EMA nobody asked for)",
        "forecast",
        "the weights lie in memory twice",
        "bytes",
        FULL,
    ),
    Plant(
        "evaluation keeps logits",
        "compute_metrics is given, and prediction_loss_only taken away",
        "evaluation keeps",
        "the logits of all evaluation samples are kept",
        "gathered",
        ("data.eval=0.5",),
    ),
    # ---- precision
    Plant(
        "weights in fp32",
        "the model is cast to fp32 after build",
        "levers.precision",
        "weights, gradients and states take twice the bytes",
        "bytes",
        ("levers.precision=pure-bf16", *FULL),
    ),
    Plant(
        "autocast off",
        "bf16 is false in TrainingArguments",
        "levers.autocast",
        "everything computes in fp32 and keeps fp32",
        "bytes",
        (*AMP, *PLAIN),
    ),
    Plant(
        "autocast by the environment",
        "ACCELERATE_MIXED_PRECISION=bf16",
        "levers.autocast",
        "products round to bf16",
        "learned",
    ),
    # ---- optimizer and schedule
    Plant(
        "another optimizer",
        "the Trainer is given torch's SGD",
        "levers.optimizer",
        "other steps, no moments",
        "learned",
    ),
    Plant(
        "optimizer without the connector",
        "the optimizer is made before the connector learns",
        "stepped parameters",
        "the connector never moves",
        "learned",
    ),
    Plant("betas otherwise", "adam_beta2 is 0.5 in TrainingArguments", "schedule.betas", "other steps", "learned"),
    Plant(
        "decay on norms and biases",
        "every group of the optimizer decays",
        "schedule.weight_decay",
        "norms and biases shrink",
        "learned",
        ("schedule.weight_decay=0.1",),
    ),
    Plant(
        "no clipping",
        "max_grad_norm is 0 in TrainingArguments",
        "schedule.clip",
        "long gradients are not cut",
        "learned",
        ("schedule.clip=0.01", "levers.optimizer=sgd"),
    ),
    Plant(
        "another schedule",
        "lr_scheduler_type is linear in TrainingArguments",
        "schedule.kind",
        "the rate falls otherwise",
        "learned",
    ),
    Plant(
        "another warm-up",
        "warmup_steps is 4 in TrainingArguments",
        "schedule.kind",
        "the first steps are short",
        "learned",
    ),
    Plant(
        "one part's rate otherwise",
        "the rate of the connector's groups is 10 times as high",
        "schedule.learning_rate",
        "the connector takes longer steps",
        "learned",
    ),
    Plant(
        "no accumulation",
        "gradient_accumulation_steps is 1 in TrainingArguments",
        "batch",
        "a step sees half of the samples",
        "tokens",
    ),
    Plant(
        "another micro-batch",
        "per_device_train_batch_size is 1 in TrainingArguments",
        "levers.micro_batch",
        "a step sees half of the samples",
        "tokens",
    ),
    Plant(
        "another seed",
        "data_seed and seed are 1 in TrainingArguments",
        "seed",
        "other dropout",
        "learned",
        (*LORA, "lora.dropout=0.5"),
    ),
    Plant(
        "evaluation mode",
        "model.eval() in every training step",
        "training mode",
        "no dropout, and no checkpointing",
        "bytes",
        FULL,
    ),
    # ---- data
    Plant("all labels masked", "the collator masks every label", "labels", "no token carries loss", "learned"),
    Plant(
        "prompts trained",
        "the collator's labels are the tokens",
        "what is trained",
        "the prompt is learned too",
        "learned",
    ),
    Plant(
        "labels shifted",
        "the collator shifts the labels by one",
        "labels are the tokens",
        "the wrong token is learned",
        "learned",
    ),
    Plant(
        "placeholders trained",
        "the collator unmasks image placeholders",
        "image placeholders in the loss",
        "the model learns to write placeholders",
        "learned",
    ),
    Plant(
        "pictures cut",
        "the collator drops placeholders and pictures together, as a cut to a length does",
        "image placeholders",
        "the model never sees a picture",
        "learned",
    ),
    Plant(
        "pixel cap ignored",
        "encoder and processor are made with the model's own budget",
        "image budget",
        "more patches than planned go through the tower",
        "bytes",
        FULL,
    ),
    Plant(
        "rows dropped",
        "the Trainer gets all samples but two",
        "data.train (samples)",
        "two samples are never seen",
        "rows",
    ),
    # ---- saving
    Plant(
        "adapters not saved",
        "the checkpoint's adapters are written as they were made",
        "save",
        "the checkpoint answers as the base model",
        "saved",
        LORA,
    ),
    Plant(
        "connector not saved",
        "the checkpoint is written without the trained connector",
        "save",
        "the trained connector is lost",
        "saved",
        BESIDE,
    ),
    # ---- engines, on two ranks
    Plant(
        "misspelt key",
        "gradient_clipping of the engine's configuration is called gradient_cliping",
        "schedule.clip",
        "long gradients are not cut",
        "learned",
        ("schedule.clip=0.01",),
        layout="zero2",
    ),
    Plant(
        "another stage",
        "stage is 1 in the engine's configuration",
        "levers.parallel",
        "gradients are not split",
        "forecast",
        real=("levers.parallel=zero1",),
        layout="zero2",
    ),
    Plant(
        "offload none",
        "offload_optimizer is gone from the engine's configuration",
        "levers.offload",
        "the states lie on the GPU",
        "forecast",
        real=("levers.offload=none",),
        layout="zero3, optimizer offloaded",
    ),
    Plant(
        "parameters not offloaded",
        "offload_param is gone from the engine's configuration",
        "levers.offload",
        "the parameters lie on the GPU",
        "forecast",
        real=("levers.offload=optimizer",),
        layout="zero3, all offloaded",
    ),
    Plant(
        "zero.Init inactive",
        "transformers' ZeRO-3 configuration is gone while the model loads",
        "zero.Init while loading",
        "every rank reads the whole model",
        "host bytes",
        layout="zero3",
    ),
    Plant(
        "nothing split",
        "stage3_param_persistence_threshold is a billion in the engine's configuration",
        "engine.zero.stage3_param_persistence_threshold",
        "every parameter stays gathered",
        "bytes",
        layout="zero3",
    ),
    Plant(
        "a small bucket",
        "reduce_bucket_size is 1,000 in the engine's configuration",
        "engine.zero.reduce_bucket_size",
        "another buffer than priced, and many small sums",
        "bytes",
        layout="zero2",
    ),
    Plant(
        "scheduler of the engine",
        "the engine's configuration has a scheduler block",
        "schedule.kind",
        "the rate follows another schedule",
        "learned",
        layout="zero2",
    ),
    Plant(
        "one rank's rate",
        "rank 1 alone multiplies its rates by 10",
        "schedule.learning_rate",
        "the ranks' weights drift apart",
        "drift",
        layout="ddp",
    ),
    Plant(
        "a parameter kept from DDP",
        "_ddp_params_and_buffers_to_ignore names the connector",
        "summed gradients",
        "the ranks' connectors drift apart",
        "drift",
        (*BESIDE, "lora.dropout=0.5"),
        layout="ddp",
    ),
    Plant(
        "blocks stay gathered",
        "set_reshard_after_forward(False) on the live model",
        "engine.fsdp.reshard_after_forward",
        "every rank holds the whole model at once",
        "bytes",
        layout="fsdp",
    ),
    Plant(
        "tower not wrapped",
        "transformer_cls_names_to_wrap names the language model's blocks only",
        "units of FSDP2",
        "the whole tower is gathered at once",
        "bytes",
        layout="fsdp",
    ),
)
BY_NAME = {plant.name: plant for plant in PLANTS}
