"""Write what was learned: safetensors, with the source's own tokenizer and processor files beside them."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from memfit.build.adapters import is_adapter
from memfit.build.build import TRAINED_PARTS
from memfit.engine.gather import whole_state
from memfit.engine.ranks import is_first
from memfit.families import FAMILIES
from memfit.families.names import base_name
from memfit.inputs.run_folder import free_bytes, read_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def save_weights(
    model: nn.Module,
    folder: Path,
    source: Path,
    dtype: torch.dtype | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a loadable model folder: the whole model, or PEFT's adapter with the fully trained parts beside it.

    Every rank must call where the model is split, and the first one writes. `dtype` casts the floating weights of a
    whole model (None keeps each tensor as it lives). `state`: what `saved_state` gathered before. Raises OSError when
    the disk is full, whatever the writer underneath called it.
    """
    state = saved_state(model, dtype, folder.parent) if state is None else state
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _disk_errors(folder):
        if isinstance(model, PeftModel):
            adapters = {name: tensor for name, tensor in state.items() if _is_peft_saved(name)}
            model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False, state_dict=adapters)
            trained = {base_name(n): t.contiguous().cpu() for n, t in state.items() if not _is_peft_saved(n)}
            if trained:
                save_file(trained, folder / TRAINED_PARTS, metadata={"format": "pt"})
        else:
            model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        copy_companions(source, folder)
        keep_agreed(folder, getattr(model, "config", None))


def saved_state(
    model: nn.Module, dtype: torch.dtype | None = None, folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """What is saved of a model, whole, on the first rank: all of it, or with adapters what learns. All ranks call.

    `folder`: where to gather what would be a second model in host memory (`whole_state`).
    """
    if not isinstance(model, PeftModel):
        return whole_state(model, dtype=dtype, folder=folder)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return whole_state(model, lambda name: name in learning or is_adapter(name), folder=folder)


def _is_peft_saved(parameter: str) -> bool:
    return is_adapter(parameter) or ".modules_to_save." in parameter


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, template and processor files of the source, unless the save wrote a file of that name itself."""
    for file in sorted(source.iterdir()):
        name = file.name
        if file.is_file() and name.endswith(_COPIED) and not name.endswith(_WEIGHTS) and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def keep_agreed(folder: Path, config: Any) -> None:
    """Writes what the model's config and its image processor must agree on into the files of both.

    A run may have changed it (`image.downsample_mode`), and the files beside the weights are the source's own.
    """
    model_type = getattr(config, "model_type", None)
    images = next((family.images for family in FAMILIES if model_type in family.model_types), None)
    shared = {name: getattr(config, name) for name in (images.shared if images else ()) if hasattr(config, name)}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if not shared or not (folder / name).exists():
            continue
        saved = read_json(folder / name)
        inner = saved.get("image_processor") if name.startswith("processor") else saved
        if isinstance(inner, dict) and {key: inner.get(key) for key in shared} != shared:
            inner.update(shared)
            (folder / name).write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_or_rescue(write: Callable[[Path], None], folder: Path, rescue: Path) -> tuple[Path, OSError | None]:
    """Write to `folder`; if its disk is full, to `rescue` on another one. Returns where the weights are now.

    Raises the OSError when there is no room in either place.
    """
    try:
        write(folder)
        return folder, None
    except OSError as problem:
        if not is_disk_full(problem):
            raise
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is worse than none: it looks like one
        write(rescue)
        return rescue, problem


def free_name(folder: Path) -> Path:
    """`folder`, or with the first number behind it that is not taken: an earlier rescue is never replaced."""
    number, name = 1, folder
    while name.exists():
        number += 1
        name = folder.with_name(f"{folder.name}-{number}")
    return name


def drop_half_checkpoints(checkpoints: Path) -> None:
    """Remove checkpoint folders that the Trainer did not finish: it writes trainer_state.json last."""
    for folder in checkpoints.glob("checkpoint-*"):
        if not (folder / "trainer_state.json").exists():
            shutil.rmtree(folder, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _disk_errors:  # noqa: N801 - used as a statement
    """Turns the many ways in which writers report a full disk (safetensors, torch.save) into one OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and looks_like_full_disk(error, self._folder) and not is_disk_full(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(self._folder)) from error


def looks_like_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether an error of any class says that there is no space, or comes from a writer while the disk is full."""
    text = str(error)
    if is_disk_full(error) or "No space left" in text or "os error 28" in text or "Disk quota" in text:
        return True
    writer = "write" in text.lower() and isinstance(error, RuntimeError | OSError)
    return writer and free_bytes(folder) < 1 << 20
