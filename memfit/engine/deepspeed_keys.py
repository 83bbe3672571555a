"""The keys of DeepSpeed's configuration, asked of the DeepSpeed that is installed: the source of the shipped list."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from memfit.catalog.deepspeed_keys import DeepSpeedKeys, keys_from, shipped_keys
from memfit.errors import UserError
from memfit.inputs.processes import prepare_environment
from memfit.inputs.toolchain import version_of

# A key that no section has: a section that is checked refuses it.
PLANTED = "memfit_asks"
ANSWER = "memfit-answer: "  # what comes before it on stdout are DeepSpeed's own lines
# What DeepSpeedConfig cannot do without.
BATCH = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
# Read from a configuration by other code than DeepSpeedConfig, or only when processes have joined.
# Source: deepspeed.runtime.config:DeepSpeedConfig.__init__; deepspeed.runtime.constants.
ELSEWHERE = {"": ("sequence_parallel_size",), "optimizer": ("params",), "scheduler": ("params",)}


def installed_keys() -> DeepSpeedKeys:
    """What the installed DeepSpeed reads. ImportError without it.

    Top-level keys and loose sections are those that its reader asks a mapping for; the others' come from the fields of
    its own pydantic models.
    """
    _quiet()
    import deepspeed
    from deepspeed.runtime import config as upstream

    top = _Asked(BATCH)
    upstream.DeepSpeedConfig(top)
    models = dict(_models(upstream))
    sections: dict[str, dict[str, Any]] = {"": dict.fromkeys(sorted({*top.asked, *ELSEWHERE[""]}))}
    closed: list[str] = []
    aliases: dict[str, str] = {}
    for name in sorted(top.asked):
        asked, title = _ask(upstream, name)
        model = models.get(title)
        if model is not None:
            for path, inner in _nested(name, model):
                sections[path] = {_written(key, field): _default(field) for key, field in inner.model_fields.items()}
                aliases |= {f"{path}.{key}": field.alias for key, field in inner.model_fields.items() if field.alias}
                closed.append(path)
        elif asked or name in ELSEWHERE:
            sections[name] = dict.fromkeys(sorted({*asked, *ELSEWHERE.get(name, ())} - {PLANTED}))
    removed = [*upstream._REMOVED_TOP_LEVEL_CONFIG_KEYS]
    removed += [f"zero_optimization.{key}" for key in upstream._REMOVED_ZERO_CONFIG_KEYS]
    sections[""] = {key: None for key in sections[""] if key not in removed}
    return DeepSpeedKeys(
        version=deepspeed.__version__,
        sections=sections,
        closed=tuple(sorted(closed)),
        aliases=aliases,
        removed=tuple(sorted(removed)),
    )


def keys_here() -> DeepSpeedKeys | None:
    """The installed DeepSpeed's keys where its version is another than the shipped list's; None: the list will do."""
    if version_of("deepspeed") in (None, shipped_keys().version):
        return None
    return keys_from(_apart("keys", {}))


def complaint(config: Mapping[str, Any]) -> str | None:
    """What the installed DeepSpeed refuses in a configuration, in one line; None when it takes it, or is not here."""
    if version_of("deepspeed") is None:
        return None
    said: str | None = _apart("complaint", config)
    return said


def _apart(question: str, config: Mapping[str, Any]) -> Any:
    """Ask in a process of its own: an imported DeepSpeed chooses this process's accelerator once and for all."""
    words = [sys.executable, "-m", "memfit.engine.deepspeed_keys", question]
    done = subprocess.run(words, input=json.dumps(config), capture_output=True, text=True, check=False)
    answer = done.stdout.rpartition(ANSWER)[2] if ANSWER in done.stdout else None
    if answer is None:
        last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
        raise UserError(f"the installed DeepSpeed cannot be asked: {last}", "pip install --force-reinstall deepspeed")
    return json.loads(answer)


def _complaint(config: Mapping[str, Any]) -> str | None:
    _quiet()
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    # Batches are checked against the ranks of the run, of which this process is none.
    alone = {key: value for key, value in config.items() if key not in batches and value != "auto"}
    try:
        DeepSpeedConfig({**alone, **BATCH})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        return "; ".join(wrong)
    except Exception as error:  # asserts, ValueError, DeepSpeedConfigError
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def _quiet() -> None:
    prepare_environment(cpu=True)  # the keys are the same on every accelerator
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class _Asked(dict[str, Any]):
    """A mapping that remembers what it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        """`key in mapping.keys()` asks too."""
        return _AskedKeys(super().keys(), self.asked.add)

    def __copy__(self) -> _Asked:
        return self


class _AskedKeys(list[str]):
    def __init__(self, keys: Any, tell: Callable[[str], None]) -> None:
        super().__init__(keys)
        self._tell = tell

    def __contains__(self, key: Any) -> bool:
        self._tell(key)
        return super().__contains__(key)


def _ask(upstream: Any, name: str) -> tuple[set[str], str]:
    """(keys that a section was asked for, the key of the model that refuses unknown ones; "" for none)."""
    from pydantic import ValidationError

    section = _Asked({PLANTED: 1})
    if name in ("optimizer", "scheduler"):
        section["type"] = "Adam"  # nothing else is read without it
    try:
        upstream.DeepSpeedConfig(_Asked({**BATCH, name: section}))
    except ValidationError as error:
        place = next(tuple(one["loc"]) for one in error.errors() if PLANTED in one["loc"])
        return section.asked, ".".join(map(str, (error.title, *place[:-1])))
    except Exception:  # not a section: DeepSpeed chokes on a mapping there
        return set(), ""
    return section.asked, ""


def _models(upstream: Any) -> Iterator[tuple[str, Any]]:
    """(key, model) of every pydantic model that a configuration holds, those below them included."""
    from pydantic import BaseModel

    live = upstream.DeepSpeedConfig({**BATCH, "weight_quantization": {}})
    for value in vars(live).values():
        if isinstance(value, BaseModel):
            yield type(value).__name__, type(value)
            for name, field in type(value).model_fields.items():
                for inner in _inner_models(field):
                    yield f"{type(value).__name__}.{name}", inner


def _nested(path: str, model: Any) -> Iterator[tuple[str, Any]]:
    yield path, model
    for name, field in model.model_fields.items():
        for inner in _inner_models(field):
            yield from _nested(f"{path}.{_written(name, field)}", inner)


def _inner_models(field: Any) -> list[Any]:
    from typing import get_args

    from pydantic import BaseModel

    candidates = (field.annotation, *get_args(field.annotation))
    return [one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)]


def _written(name: str, field: Any) -> str:
    """The name by which files say it."""
    return str(field.alias or name)


def _default(field: Any) -> Any:
    value = field.default
    return value if isinstance(value, bool | int | float | str) and not field.is_required() else None


if __name__ == "__main__":
    told = installed_keys().to_json() if sys.argv[1] == "keys" else _complaint(json.load(sys.stdin))
    print(f"{ANSWER}{json.dumps(told)}")
