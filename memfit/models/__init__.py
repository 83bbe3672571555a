"""memfit's own models, where transformers has none: MiniCPM-V and -o before 4.6.

`register()` makes transformers' Auto classes know them; memfit's own commands call it, a user does in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.families.minicpmv2 import FAMILY as MINICPMV2
from memfit.families.omnilmm import FAMILY as OMNILMM
from memfit.units import gib

# model types that transformers does not know until `register()` is called
NATIVE = (*MINICPMV2.model_types, *OMNILMM.model_types)


def register() -> None:
    """Make AutoConfig, AutoModel..., AutoImageProcessor and AutoProcessor know the models of this package.

    Safe to call again. Afterwards `AutoModel.from_pretrained(folder_or_hub_id)` needs no `trust_remote_code`.
    """
    import transformers
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    from memfit.models import omnilmm
    from memfit.models.minicpmv.configuration import MiniCPMOConfig, MiniCPMVConfig
    from memfit.models.minicpmv.model import MiniCPMO, MiniCPMV
    from memfit.models.minicpmv.processor import MiniCPMOProcessor, MiniCPMVImageProcessor, MiniCPMVProcessor

    for config, model, processor in (
        (MiniCPMVConfig, MiniCPMV, MiniCPMVProcessor),
        (MiniCPMOConfig, MiniCPMO, MiniCPMOProcessor),
    ):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"):
            getattr(transformers, auto).register(config, model, exist_ok=True)
        transformers.AutoImageProcessor.register(
            config, image_processor_classes={"pil": MiniCPMVImageProcessor}, exist_ok=True
        )
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        # tokenizer_config.json names a class of the repository's own code (MiniCPMVTokenizerFast), which adds names of
        # special tokens and nothing to ids; without a class registered here transformers would want to run that code.
        transformers.AutoTokenizer.register(config, fast_tokenizer_class=TokenizersBackend, exist_ok=True)
    transformers.AutoConfig.register(omnilmm.OmniLMMConfig.model_type, omnilmm.OmniLMMConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(omnilmm.OmniLMMConfig, omnilmm.OmniLMM, exist_ok=True)


def image_processor(name: str) -> Any:
    """The image processor class of that name: memfit's own or transformers'. AttributeError for neither."""
    if name == "MiniCPMVImageProcessor":
        from memfit.models.minicpmv.processor import MiniCPMVImageProcessor

        return MiniCPMVImageProcessor
    import transformers

    return getattr(transformers, name)


def left_on_disk(config: Mapping[str, Any], folder: Path | None) -> list[str]:
    """One line for each part of a checkpoint that is not loaded, with its size; saving writes it back unchanged."""
    if config.get("model_type") != "minicpmo" or folder is None:
        return []
    from memfit.models.minicpmv.checkpoint import other_parts_bytes

    return [
        f"{part}: {count:,} tensors, {gib(size)}, stay on disk and are written back as they are"
        for part, (count, size) in other_parts_bytes(folder).items()
    ]
