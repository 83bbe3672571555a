"""LoRA adapters: PEFT is called here and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from memfit.errors import UserError
from memfit.specs.recipe import Lora

ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_adapters(model: nn.Module, lora: Lora, modules: Sequence[str]) -> PeftModel:
    """`model` with adapters on exactly the named modules; everything else is frozen by PEFT.

    Full names rather than endings, so that a module of the same name in another part is not caught.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        init_lora_weights=True if lora.init == "default" else lora.init,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers by a name that 5.23 deprecates
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if is_adapter(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(ADAPTER_DTYPES[lora.dtype])
    return adapted


def load_adapters(model: PeftModel, file: Path) -> None:
    """Put saved adapter weights into a model that `add_adapters` made. Raises UserError when they do not match."""
    found = set_peft_model_state_dict(model, load_file(file))
    wrong = [key for key in (*found.unexpected_keys, *found.missing_keys) if is_adapter(key) or key in load_file(file)]
    if wrong:
        raise UserError(
            f"{file}: {len(wrong)} adapter weights do not match the run's recipe (first: {wrong[0]})",
            "evaluate with the plan.json that trained this adapter",
        )


def merge_adapters(model: PeftModel) -> nn.Module:
    """The model underneath with every adapter added to its weights, which keep their dtype.

    Added in fp32 and rounded once, module by module: PEFT rounds the adapter's product to the weight's dtype before it
    adds. Raises ValueError where the sum is no number.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            weight: torch.Tensor = module.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge(safe_merge=True)
            weight.data = weight.data.to(dtype)
    return model.unload()


def is_adapter(parameter: str) -> bool:
    """Whether a parameter name belongs to an adapter that PEFT added."""
    return any(mark in parameter for mark in (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".lora_embedding_"))
