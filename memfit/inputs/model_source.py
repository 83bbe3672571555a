"""Where a model is: a local folder, a config.json, a hub id or a catalogue name; and what its small files say."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from rapidfuzz import process

from memfit.catalog.models import ModelRow, find_row, nearest_rows
from memfit.errors import UserError
from memfit.families import FAMILIES, family_for

# The files that planning and encoding read. Weights are fetched by `require_weights` only.
SMALL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
# Weight files in transformers' order: a single file or the index of several; pickles are read as plain tensors only.
FORMS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class ModelSource:
    """A model before anything heavy is loaded.

    `folder` is None when only a config.json was given, or the facts come from the catalogue's row `catalogued` (both
    enough to estimate). `preprocessor` is the image processor's settings, empty without one. `weights` says whether all
    weight files lie in the folder, `weight_bytes` their size on disk. `overrides` is what `model_config` changed in
    `config`.
    """

    name: str
    folder: Path | None
    config: dict[str, Any]
    preprocessor: dict[str, Any] = field(default_factory=dict)
    weights: bool = False
    weight_bytes: int = 0
    hub_id: str | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    catalogued: str | None = None


def find_model(name: str, overrides: Mapping[str, Any] | None = None, catalogue: bool = False) -> ModelSource:
    """Find the model `name` and read its small files; `overrides` merge deep into its config.

    A catalogue name stands for its hub id. With `catalogue` its facts will do where the hub's files are not in the
    local cache: enough to estimate, and no network is asked. Keys of `overrides` may be nested mappings or dotted
    ("text_config.num_hidden_layers"). UserError for anything that is not there, cannot be read, needs remote code, or
    cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_file():
        config = _with_overrides(_read_json(path), overrides or {})
        _refuse_remote_code(config, name)
        return ModelSource(name=name, folder=None, config=config, overrides=dict(overrides or {}))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} holds no config.json", "name the folder that config.json lies in")
        return _read_folder(name, path, None, overrides or {})
    if _is_path(name):
        raise UserError(f"no model at {name}", _path_hint(path))
    row = find_row(name)
    if row is not None and catalogue:
        return _catalogued(name, row, overrides or {})
    hub_id = row.hub_id if row is not None else name
    return _read_folder(name, _hub_folder(hub_id), hub_id, overrides or {})


def _catalogued(name: str, row: ModelRow, overrides: Mapping[str, Any]) -> ModelSource:
    """The checkpoint's own files where the hub's cache has them, else the catalogue's row."""
    cached = _cached_config(row.hub_id)
    if cached is not None:
        try:
            return _read_folder(name, cached.parent, row.hub_id, overrides)
        except UserError:  # it runs on its own code: the catalogue knows its sizes
            pass
    return ModelSource(
        name=name,
        folder=None,
        config=_with_overrides(dict(row.config), overrides),
        preprocessor=dict(row.preprocessor),
        hub_id=row.hub_id,
        overrides=dict(overrides),
        catalogued=row.name,
    )


def _cached_config(hub_id: str) -> Path | None:
    """config.json of a hub model in the hub's cache, by its layout on disk: the hub's client is slow to import."""
    from huggingface_hub import constants

    main = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (main / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    config = main / "snapshots" / revision / "config.json"
    return config if config.is_file() else None


def overridden(source: ModelSource, changes: Mapping[str, Any]) -> ModelSource:
    """The same source with top-level values of its config changed, as `model_config` would."""
    changes = {name: value for name, value in changes.items() if source.config.get(name) != value}
    if not changes:
        return source
    config = _with_overrides(source.config, changes)
    return dataclasses.replace(source, config=config, overrides={**source.overrides, **changes})


def require_weights(source: ModelSource) -> ModelSource:
    """The same source with its weights on disk: fetched from the hub where they are missing. UserError otherwise."""
    family_for(source.config).refuse_to_run()
    if source.weights and source.folder is not None:
        return source
    if source.folder is None:
        raise UserError(
            f"{source.name} is a config.json alone: there are no weights to train",
            "name a model folder or a hub id",
        )
    if source.hub_id is None:
        raise _no_weights(source.folder)
    from huggingface_hub import constants, snapshot_download

    try:
        _require_network(constants.ENDPOINT)
        # Code that the checkpoint names is fetched to be written back beside what is tuned; memfit runs none of it.
        code = ("*.py", "assets/*") if source.config.get("auto_map") else ()
        for single, index in FORMS:
            patterns = [f"*{Path(single).suffix}", index, *SMALL_FILES, *code]
            folder = Path(snapshot_download(source.hub_id, allow_patterns=patterns))
            if weight_names(folder):
                break
    except Exception as error:
        raise _hub_error(source.hub_id, error) from error
    found = _read_folder(source.name, folder, source.hub_id, source.overrides)
    if not found.weights:
        raise UserError(f"{source.hub_id} offers no weights that memfit reads", "choose a model with safetensors")
    return found


def _no_weights(folder: Path) -> UserError:
    """What is missing in a folder without all of its weights."""
    names = weight_names(folder)
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        return UserError(
            f"{len(gone)} of {len(names)} weight files are not in {folder} (first: {gone[0]})",
            "fetch the model again, or name the folder that is whole",
        )
    other = next((path.name for suffix in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(suffix)), None)
    return UserError(
        f"no safetensors weights in {folder}" + (f" (only {other})" if other else ""),
        "save the model with model.save_pretrained(folder), which writes safetensors",
    )


def _read_folder(name: str, folder: Path, hub_id: str | None, overrides: Mapping[str, Any]) -> ModelSource:
    config = _with_overrides(_read_json(folder / "config.json"), overrides)
    _refuse_remote_code(config, name)
    tokenizer = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / "tokenizer_config.json")}
    processor = _optional(folder / "processor_config.json")
    # transformers 5 saves the image processor inside processor_config.json, which then wins
    # (image_processing_base:ImageProcessingMixin.get_image_processor_dict).
    preprocessor = processor.get("image_processor") or _optional(folder / "preprocessor_config.json")
    present, size = _weights(folder)
    return ModelSource(
        name=name,
        folder=folder,
        config=config,
        preprocessor=dict(preprocessor),
        weights=present,
        weight_bytes=size,
        hub_id=hub_id,
        tokenizer=tokenizer,
        generation=_optional(folder / "generation_config.json"),
        chat_template=_chat_template(folder, processor, tokenizer),
        overrides=dict(overrides),
    )


def _weights(folder: Path) -> tuple[bool, int]:
    """(all weight files are there, their bytes on disk)."""
    files = weight_names(folder)
    sizes = [(folder / name).stat().st_size for name in files if (folder / name).is_file()]
    return bool(files) and len(sizes) == len(files), sum(sizes)


def weight_names(folder: Path) -> list[str]:
    """The weight files that a folder holds or its index names; safetensors before pickles, as transformers reads."""
    for single, index in FORMS:
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return sorted(set(_read_json(folder / index).get("weight_map", {}).values()))
    return []


def _chat_template(folder: Path, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str | None:
    """The model's template. A processor's own wins over the tokenizer's, a file of its own over a JSON entry."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for holder in (_optional(folder / "chat_template.json"), processor, tokenizer):
        found = holder.get("chat_template")
        if isinstance(found, str):
            return found
        if isinstance(found, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in found}
            return str(named.get("default") or next(iter(named.values())))
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "check the file and its permissions") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}", "fetch or save the model again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a JSON object", "fetch or save the model again")
    return data


def _optional(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _refuse_remote_code(config: Mapping[str, Any], name: str) -> None:
    known = {model_type for family in FAMILIES for model_type in family.model_types}
    if config.get("auto_map") and config.get("model_type") not in known:
        raise UserError(
            f"{name} (model_type {config.get('model_type')!r}) runs on code of its own repository, "
            "which memfit does not execute",
            f"model types that need none: {', '.join(sorted(known))}",
        )


def _with_overrides(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overrides` merged in; lists and plain values are replaced."""
    merged = dict(config)
    for key, value in overrides.items():
        head, _, rest = str(key).partition(".")
        nested = {rest: value} if rest else value
        if isinstance(nested, Mapping) and (rest or isinstance(merged.get(head), Mapping)):
            below = merged.get(head) or {}
            if not isinstance(below, Mapping):
                raise UserError(f"model_config: {key} goes below {head}, which is {below!r}", f"model_config: {head}")
            merged[head] = _with_overrides(dict(below), nested)
        else:
            merged[head] = nested
    return merged


def _is_path(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path rather than as a hub id."""
    if name.startswith((".", "/", "~")) or name.endswith((".json", "/")) or name.count("/") > 1 or "\\" in name:
        return True
    parent = Path(name).parent
    return name.count("/") == 1 and parent.is_dir()


def _path_hint(path: Path) -> str:
    """Names the nearest existing sibling of a path that does not exist."""
    parent = path.parent
    if not parent.is_dir():
        return f"{parent} does not exist either; give a model folder, a config.json or a hub id such as owner/name"
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir() and (entry / "config.json").is_file()]
    best = process.extractOne(path.name, siblings)
    if best is None:
        return f"{parent} holds no model folder; give a model folder, a config.json or a hub id such as owner/name"
    return f"did you mean {parent / best[0]}?"


def _hub_folder(hub_id: str) -> Path:
    """The snapshot folder of a hub model with its small files, from the cache where it is, else fetched."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    try:
        cached = hub.try_to_load_from_cache(hub_id, "config.json")
    except Exception as error:
        raise _hub_error(hub_id, error) from error
    if isinstance(cached, str) and (Path(cached).parent / "tokenizer.json").is_file():
        return Path(cached).parent
    try:
        _require_network(constants.ENDPOINT)
        config = hub.hf_hub_download(hub_id, "config.json")
    except Exception as error:
        if isinstance(cached, str):  # offline, and the tokenizer never came: enough for an estimate
            return Path(cached).parent
        raise _hub_error(hub_id, error) from error
    for name in SMALL_FILES[1:]:
        try:
            hub.hf_hub_download(hub_id, name)
        except errors.EntryNotFoundError:
            continue  # an optional file that this model does not have
        except Exception as error:
            raise _hub_error(hub_id, error) from error
    return Path(config).parent


def _require_network(endpoint: str) -> None:
    """OSError at once where the hub's name cannot be resolved; the hub's client would retry for 20 seconds."""
    host = urlsplit(endpoint).hostname
    if host and not getproxies():
        socket.getaddrinfo(host, None)


def _hub_error(hub_id: str, error: Exception) -> UserError:
    """What the user can do about a failed look-up."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{hub_id} is gated on the hub and this login may not read it",
            f"ask for access at https://huggingface.co/{hub_id}, then run: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"the hub has no model {hub_id}", _typo_hint(hub_id))
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(f"{hub_id} on the hub has no config.json", "choose a model saved by transformers")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"no model folder {hub_id!r} here, and it is no hub id either", _typo_hint(hub_id))
    if isinstance(error, socket.gaierror):
        reason = "no network: the hub's name cannot be resolved"
    else:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    return UserError(
        f"{hub_id} is neither a folder here nor in the local hub cache, and could not be fetched ({reason})",
        f"check the network, or give a local folder; {_typo_hint(hub_id)}",
    )


def _typo_hint(hub_id: str) -> str:
    siblings = [entry.name for entry in Path().iterdir() if entry.is_dir() and (entry / "config.json").is_file()]
    best = process.extractOne(hub_id, siblings, score_cutoff=60)
    if best is not None:
        return f"did you mean the folder ./{best[0]}?"
    near = nearest_rows(hub_id, cutoff=75)
    if near:
        return f"did you mean {' or '.join(near)}? `memfit models` lists what needs no network"
    return "a hub id reads owner/name; a local folder reads ./folder; `memfit models` lists what needs no network"
