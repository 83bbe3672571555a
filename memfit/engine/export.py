"""Hand a run's weights over: one model folder that plain transformers loads, or an adapter that plain PEFT loads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from memfit.build.adapters import ADAPTER_DTYPES, add_adapters, load_adapters, merge_adapters
from memfit.build.build import ADAPTER_WEIGHTS, TRAINED_PARTS
from memfit.build.freeze import DTYPES
from memfit.build.load import load_tensors, loaded_model
from memfit.build.quantise import packing_of, round_trip
from memfit.engine.save import save_weights
from memfit.errors import UserError
from memfit.families.names import base_name
from memfit.inputs.machine import host_memory_bytes
from memfit.inputs.model_source import ModelSource, require_weights
from memfit.inputs.processes import prepare_environment
from memfit.inputs.recipe_file import recipe_from
from memfit.inputs.run_folder import RunFolder, free_bytes, is_run_folder, open_run_folder, read_json
from memfit.planner.parts import ResolvedParts, resolve_parts
from memfit.specs.export import ExportRequest, ExportResult
from memfit.specs.recipe import Lora, Recipe
from memfit.trace.prepare import prepare
from memfit.units import gib

Say = Callable[[str], None]
LATER = ("llama-factory", "ms-swift", "openbmb")  # recipes for other programs
SPARE = 1.02  # of the weights: config, tokenizer and headers


@dataclass(frozen=True)
class _Trained:
    """A run's weights and all that is needed to put them on their model."""

    folder: Path
    recipe: Recipe
    source: ModelSource
    family: Any
    parts: ResolvedParts

    @property
    def adapted(self) -> bool:
        return (self.folder / ADAPTER_WEIGHTS).is_file()


def export(request: ExportRequest, say: Say = lambda text: None) -> ExportResult:
    """Write the folder. UserError, before anything is loaded, for what a run does not hold, no room, a full folder."""
    if request.to not in EXPORTS:
        later = request.to in LATER
        raise UserError(
            f"--to {request.to} " + ("is not there in this version" if later else "is unknown"),
            "use --to merged, which every such program loads, or --to adapter"
            if later
            else f"use {' or '.join(EXPORTS)}",
        )
    prepare_environment(cpu=not torch.cuda.is_available())  # else DeepSpeed, once imported, speaks on stdout
    run, weights = _find(request.run)
    out = request.out or run.path / "exported" / request.to
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty", "name another folder with --out")
    trained = _read(run, weights)
    if request.to == "adapter" and not trained.adapted:
        raise UserError(f"{run.path} trained no adapter: whole parts learned", "--to merged")
    _refuse_small_disk(trained, request.to, out)
    part = out.absolute().with_name(f".{out.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted export left
    part.mkdir(parents=True)
    try:
        notes = EXPORTS[request.to](trained, part, say)
        _move_in(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return ExportResult(out, request.to, _size(out), tuple(notes))


def _move_in(part: Path, out: Path) -> None:
    """What was written becomes `out`. A folder that is there already, empty, stays the user's own: with its rights, and
    where it is mounted."""
    if not out.is_dir():
        part.rename(out)
        return
    for file in sorted(part.iterdir()):
        shutil.move(file, out / file.name)


def _merged(trained: _Trained, out: Path, say: Say) -> list[str]:
    """The whole model: as the run saved it, or base weights plus adapters, added in the adapters' own precision."""
    if not trained.adapted:
        say(f"copying {gib(_size(trained.folder))} from {trained.folder}")
        shutil.copytree(trained.folder, out, dirs_exist_ok=True, ignore=_not_for_others)
        return []
    say(f"adding the adapters to {trained.source.name} ({gib(trained.source.weight_bytes)})")
    model, dtype = _base(trained)
    packing = packing_of(trained.recipe, trained.parts, torch.device("cpu"))
    if packing is not None:
        # What 4 bit lost, the adapters have learned to live without: they belong to the weights that were packed.
        round_trip(model, packing)
    adapted = _with_adapters(trained, model)
    tied = _tied_targets(adapted)
    if tied:
        raise UserError(f"{tied} has an adapter and shares its weights with another module", "--to adapter")
    if (trained.folder / TRAINED_PARTS).is_file():
        load_tensors(adapted, trained.folder / TRAINED_PARTS, base_name)
    try:
        whole = merge_adapters(adapted)
    except ValueError as error:
        raise UserError(f"{trained.folder}: {error}", "export an earlier checkpoint of the run") from error
    save_weights(whole, out, _folder(trained.source), dtype)
    width = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    notes = [f"weights are {width}, as the model's own"]
    if packing is not None:
        notes.append(f"{len(packing.names):,} of them have the values that 4 bit left, with which the adapters learned")
    return notes


def _adapter(trained: _Trained, out: Path, say: Say) -> list[str]:
    """PEFT's two files. Parts that were trained in full beside the adapters become PEFT's `modules_to_save`."""
    if not (trained.folder / TRAINED_PARTS).is_file():
        say(f"copying the adapter from {trained.folder}")
        shutil.copytree(trained.folder, out, dirs_exist_ok=True, ignore=_not_for_others)
        return []
    values = load_file(trained.folder / TRAINED_PARTS)
    say(f"{len(values):,} tensors trained in full become modules_to_save of the adapter")
    model, _ = _base(trained)
    modules = _modules_of(model, values)
    lora = dataclasses.replace(_lora(trained), modules_to_save=tuple(modules))
    # PEFT wants the copies' weights in the adapter's file, what did not learn among them included.
    copies = {
        name: p.detach() for name, p in model.named_parameters() if name.startswith(tuple(f"{m}." for m in modules))
    }
    whole = {f"base_model.model.{name}": value.contiguous() for name, value in {**copies, **values}.items()}
    save_file({**load_file(trained.folder / ADAPTER_WEIGHTS), **whole}, out / ADAPTER_WEIGHTS, {"format": "pt"})
    adapted = add_adapters(model, lora, trained.parts.lora_modules)
    load_adapters(adapted, out / ADAPTER_WEIGHTS)
    # Once more as they were trained: the copies took the dtype of the model.
    for name, parameter in adapted.named_parameters():
        if ".modules_to_save." in name and base_name(name) in values:
            parameter.data = values[base_name(name)]
    save_weights(adapted, out, _folder(trained.source))
    size = sum(value.numel() * value.element_size() for value in values.values())
    return [f"{len(modules):,} modules trained in full are in it too ({gib(size)}): PEFT keeps a copy of each"]


EXPORTS: Mapping[str, Callable[[_Trained, Path, Say], list[str]]] = {"merged": _merged, "adapter": _adapter}


def _find(path: Path) -> tuple[RunFolder, Path]:
    """(the run, the folder with its weights): the final model of a run folder, or a checkpoint in one."""
    if is_run_folder(path):
        run = open_run_folder(path)
        if not run.model.is_dir():
            made = sorted(run.checkpoints.glob("checkpoint-*"), key=lambda folder: (len(folder.name), folder.name))
            hint = f"export {made[-1]}" if made else "finish the training"
            raise UserError(f"{path} holds no trained model", hint)
        return run, run.model
    above = next((folder for folder in path.absolute().parents if is_run_folder(folder)), None)
    if above is None or not path.is_dir():
        return open_run_folder(path), path  # which tells that it is none
    return open_run_folder(above), path


def _read(run: RunFolder, weights: Path) -> _Trained:
    if not any(weights.glob("*.safetensors")):
        raise UserError(f"{weights} holds no safetensors", "give a run folder, or a checkpoint folder in one")
    recipe = _from_where_it_ran(recipe_from(read_json(run.plan)["recipe"], str(run.plan)), run)
    found = prepare(recipe)
    parts = resolve_parts(recipe, found.family, found.profile)
    return _Trained(weights, recipe, require_weights(found.source), found.family, parts)


def _from_where_it_ran(recipe: Recipe, run: RunFolder) -> Recipe:
    """A model named by a relative path is looked for where the run was started, unless there is one here."""
    if Path(recipe.model).is_absolute() or Path(recipe.model).exists() or not run.log.is_file():
        return recipe
    for line in run.log.read_text(encoding="utf-8").splitlines():
        if '"event": "start"' in line or '"event":"start"' in line:
            there = Path(str(json.loads(line).get("working_folder") or "")) / recipe.model
            return dataclasses.replace(recipe, model=str(there)) if there.exists() else recipe
    return recipe


def _refuse_small_disk(trained: _Trained, to: str, out: Path) -> None:
    """Room on disk for what is written, and in memory for what is merged."""
    grows = to == "merged" and trained.adapted
    needed = int(SPARE * (trained.source.weight_bytes if grows else _size(trained.folder)))
    free = free_bytes(out)
    if free < needed:
        raise UserError(f"the export needs {gib(needed)}, {out.parent} has {gib(free)} free", "--out on another disk")
    memory = host_memory_bytes()
    if grows and memory is not None and memory < needed:
        raise UserError(f"merging holds {gib(needed)} in host memory, there are {gib(memory)}", "--to adapter")


def _base(trained: _Trained) -> tuple[nn.Module, torch.dtype]:
    """The model that the run started from, in its checkpoint's dtype, on the CPU."""
    model = loaded_model(trained.family, _folder(trained.source), trained.source.config)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return model, dtype if dtype in DTYPES.values() else torch.float32


def _with_adapters(trained: _Trained, model: nn.Module) -> PeftModel:
    adapted = add_adapters(model, _lora(trained), trained.parts.lora_modules)
    load_adapters(adapted, trained.folder / ADAPTER_WEIGHTS)
    return adapted


def _lora(trained: _Trained) -> Lora:
    """The recipe's settings with the dtype that the adapters were saved in: an engine may have cast them."""
    with safe_open(trained.folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = file.get_tensor(next(iter(file.keys()))).dtype
    short = next((name for name, dtype in ADAPTER_DTYPES.items() if dtype == saved), "fp32")
    return dataclasses.replace(trained.recipe.lora, dtype=short)  # type: ignore[arg-type]


def _tied_targets(model: nn.Module) -> str | None:
    """A module whose adapter would change another module when it is merged."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    shared = [names for names in holders.values() if len(names) > 1]
    return next((base_name(name) for names in shared for name in names if ".base_layer." in name), None)


def _modules_of(model: nn.Module, values: Mapping[str, torch.Tensor]) -> list[str]:
    """The modules that hold these tensors, none inside another of them."""
    owners = sorted({name.rpartition(".")[0] for name in values}, key=lambda name: name.count("."))
    chosen: list[str] = []
    for owner in owners:
        if not any(owner.startswith(f"{above}.") for above in chosen):
            chosen.append(owner)
    doubled = set(_tied_names(model)) & values.keys()
    if doubled or "" in chosen:
        first = sorted(doubled)[0] if doubled else "a weight of the model itself"
        raise UserError(f"{first} cannot be a module of its own in an adapter", "--to merged")
    return chosen


def _tied_names(model: nn.Module) -> Iterator[str]:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            yield from (name, seen[id(parameter)])
        seen.setdefault(id(parameter), name)


def _not_for_others(folder: str, names: Sequence[str]) -> list[str]:
    """What a checkpoint holds beside the model: the Trainer's and the engine's own state."""
    own = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "global_step", "latest", "zero_to")
    return [name for name in names if name.startswith(own)]


def _folder(source: ModelSource) -> Path:
    if source.folder is None:
        raise UserError(f"{source.name} has no weights", "name a model folder or a hub id")
    return source.folder


def _size(folder: Path) -> int:
    """Bytes of what a folder hands over."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files if not _not_for_others("", file.relative_to(folder).parts))
