"""The configuration of MiniCPM-V and -o: one flat JSON on disk, a text and a vision configuration in memory."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, ClassVar

import transformers
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from memfit.families.minicpmv2 import LANGUAGE, QUERIES, generation_of

TEXT: dict[str, type[PreTrainedConfig]] = {"qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}
# The tower's own defaults: SigLIP so400m at 980 px (vision_config of the checkpoints leaves out what equals these).
VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
# The configuration class's own defaults (configuration_minicpm.py of the checkpoints). That the tower's last layer is
# dropped unless the file says otherwise is theirs too: the load compares with the layers that are there.
OWN: dict[str, Any] = {
    "query_num": QUERIES,
    "drop_vision_last_layer": True,
    "batch_vision_input": True,
    "vision_batch_size": 16,
    "use_image_id": True,
}
# Older names of rotary settings, which transformers turns into `rope_parameters`.
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
# What callers hand over beside a file's content.
RUNTIME = (
    *("attn_implementation", "experts_implementation", "name_or_path", "_name_or_path", "_commit_hash"),
    *("output_attentions", "output_hidden_states", "return_dict", "transformers_version", "model_type"),
    *("dtype", "torch_dtype"),
)


def _text_names(kind: type[PreTrainedConfig]) -> set[str]:
    """Names that belong to the language model's configuration."""
    base = {field.name for field in fields(PreTrainedConfig)}
    return {field.name for field in fields(kind)} - base | set(ROPE)


class MiniCPMVConfig(PreTrainedConfig):
    """V 2.5, 2.6, 4.0 and 4.5. `text_config` is Qwen2's, Llama's or Qwen3's, read from the fields at the top level.

    `to_dict` and `save_pretrained` write the flat form back, with every key of the file it came from, so that other
    programs read it too. `generation` is which model it is (`memfit.families.minicpmv2.generation_of`).
    """

    model_type = "minicpmv"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=transformers.AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(config_class=SiglipVisionConfig),
    }
    text_config: Any = None
    vision_config: Any = None
    # None: the file does not say, and the class's own default (OWN) holds.
    query_num: int | None = None
    drop_vision_last_layer: bool | None = None
    batch_vision_input: bool | None = None
    vision_batch_size: int | None = None
    use_image_id: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        file = {name: value for name, value in kwargs.items() if name not in RUNTIME}
        given = (*OWN, "vision_config")
        file |= {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        if isinstance(self.vision_config, PreTrainedConfig):
            file["vision_config"] = self.vision_config.to_diff_dict()
        if isinstance(self.text_config, PreTrainedConfig):  # built from parts rather than from a file
            file |= {k: v for k, v in self.text_config.to_dict().items() if k in _text_names(type(self.text_config))}
        self.generation = generation_of({**file, "model_type": self.model_type})
        for name, default in OWN.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        kind = TEXT[LANGUAGE[self.generation]]
        names = _text_names(kind)
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = kind(**{name: value for name, value in file.items() if name in names})
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = vision_config(self.vision_config or {})
        rest = {name: value for name, value in kwargs.items() if name not in names}
        super().__post_init__(**rest)
        self._file = copy.deepcopy(file)
        self._text_then = self.text_config.to_dict()
        self._own_then = {name: getattr(self, name) for name in OWN}

    @property
    def hidden_size(self) -> int:
        """Width of the language model, read by tools that size buckets by it."""
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.text_config.vocab_size)

    @property
    def queries(self) -> int:
        """Tokens of every crop."""
        return int(self.query_num or QUERIES)

    @property
    def vision_layers(self) -> int:
        """Layers of the tower that the checkpoint holds: without the last one if it was dropped before training."""
        return int(self.vision_config.num_hidden_layers) - int(bool(self.drop_vision_last_layer))

    @property
    def one_row_positions(self) -> bool:
        """V 2.5 was trained with positions along one row, whatever the crop's shape."""
        return bool(self.generation == "2.5")

    def to_dict(self) -> dict[str, Any]:
        """The flat form: what was read, with what has changed since."""
        flat = {name: getattr(self, name, value) for name, value in copy.deepcopy(self._file).items()}
        if "vision_config" in self._file:
            flat["vision_config"] = copy.deepcopy(self._file["vision_config"])
        now = self.text_config.to_dict()
        names = _text_names(type(self.text_config))
        flat |= {name: now[name] for name in now if name in names and now[name] != self._text_then.get(name)}
        flat |= {name: getattr(self, name) for name in self._own_then if getattr(self, name) != self._own_then[name]}
        rope = flat.pop("rope_parameters", None)
        if rope:
            flat["rope_theta"] = rope["rope_theta"]
            if rope.get("rope_type", "default") != "default":
                flat["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        for name in ("architectures", "init_audio", "init_tts"):
            if getattr(self, name, None) is not None:
                flat[name] = getattr(self, name)
        flat = {name: value for name, value in flat.items() if name not in RUNTIME}
        if self.dtype is not None:
            flat["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        flat |= {"model_type": self.model_type, "transformers_version": transformers.__version__}
        return flat

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: other programs have other defaults, so none is left out."""
        return self.to_dict()


class MiniCPMOConfig(MiniCPMVConfig):
    """o 2.6 and o 4.5; what it says of audio and speech is kept and written back."""

    model_type = "minicpmo"


def vision_config(given: dict[str, Any]) -> SiglipVisionConfig:
    """The tower's configuration; `model_type` in the file says "siglip" or "idefics2" and means nothing."""
    return SiglipVisionConfig(**{**VISION, **{k: v for k, v in given.items() if k != "model_type"}})
