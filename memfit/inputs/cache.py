"""The cache of traced numbers: a profile is read from the meta device once, then from a file and without torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.inputs.shipped import shipped
from memfit.specs.profile import Profile

# Raised when a profile's rows change their meaning, so that old files are not read as new ones.
FORMAT = 1
# Keys of config.json that say nothing of the model's shape.
IRRELEVANT = ("_name_or_path", "transformers_version")


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where traced numbers are kept: $MEMFIT_CACHE, else $XDG_CACHE_HOME/memfit, else ~/.cache/memfit."""
    values = os.environ if environment is None else environment
    if values.get("MEMFIT_CACHE"):
        return Path(values["MEMFIT_CACHE"]).expanduser()
    base = values.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "memfit"


def installed_versions() -> tuple[tuple[str, str], ...]:
    """Versions of torch and transformers as installed, without importing them; "none" where one is missing.

    Without what names the build (2.13.0+cpu): the device that is traced is the recipe's, whatever torch was built for.
    """
    return tuple((name, _version(name)) for name in ("torch", "transformers"))


@functools.cache
def _version(name: str) -> str:
    """Read once: a process keeps the packages that it started with."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def profile_key(config: Mapping[str, Any], family_name: str) -> str:
    """The key of a model's profile: a hash of its config, its family and the versions that build it."""
    shape = {key: value for key, value in config.items() if key not in IRRELEVANT}
    text = json.dumps([FORMAT, family_name, shape, installed_versions()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_profile(key: str, folder: Path | None = None) -> Profile | None:
    """The cached or shipped profile, or None when there is none or it cannot be read: then it is built again."""
    data: Any
    try:
        data = json.loads(_path(key, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = shipped("profiles", key)
    try:
        profile = Profile.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    return profile if profile.key == key else None


def store_profile(profile: Profile, folder: Path | None = None) -> Path | None:
    """Write a profile in one step, so that no reader sees half of it. None when the folder cannot be written."""
    return write_cached(_path(profile.key, folder), profile.to_json())


def write_cached(path: Path, value: Any) -> Path | None:
    """Write a JSON file whole or not at all. None when it cannot be written: a cache may be missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    except OSError:
        return None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(value))  # json.dump would go through Python for every number
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        return None
    return path


def _path(key: str, folder: Path | None) -> Path:
    return (folder or cache_folder()) / "profiles" / f"{key}.json"
