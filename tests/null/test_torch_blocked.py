"""Planning works where torch and transformers cannot even be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from memfit.families import family_for
from memfit.inputs import cache
from memfit.specs.profile import ParameterRow, Profile
from tests.null.hand_model import TENSORS

BLOCK = """
import sys

class Blocked:
    NAMES = {"torch", "transformers", "peft", "accelerate"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""

PLAN = """
import json
from pathlib import Path
from memfit.catalog.gpus import parse_hardware
from memfit.families import family_for
from memfit.inputs.recipe_file import load_recipe
from memfit.planner.estimate import estimate_states
from memfit.planner.estimate_text import estimate_text, why
from memfit.planner.forecast_json import forecast_json
from memfit.trace.parameters import profile_of

recipe = load_recipe(Path(sys.argv[1]), ["levers.precision=pure-bf16"])
config = json.loads(Path(recipe.model).read_text())
family = family_for(config)
forecast = estimate_states(recipe, profile_of(config, family), family, parse_hardware("2xRTX3090"))
print(estimate_text(forecast), file=sys.stderr)
print(why(forecast, "weights.language"), file=sys.stderr)
print(json.dumps(forecast_json(forecast)))
assert not {"torch", "transformers"} & set(sys.modules), "torch came in"
"""

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 100}


def run(code: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "MEMFIT_CACHE": str(home)},
        check=False,
    )


def test_the_block_works(tmp_path: Path) -> None:
    done = run("import torch", home=tmp_path)
    assert done.returncode != 0
    assert "torch is blocked" in done.stderr


def test_estimate_from_a_cached_profile(tmp_path: Path) -> None:
    family = family_for(LLAMA)
    rows = tuple(
        ParameterRow(name.replace("lm.", "model."), shape, "bfloat16", part, name.rpartition(".")[0], kind)
        for name, shape, kind in TENSORS
        for part in ["head" if name.startswith("lm_head") else "language"]
        if name.startswith("lm")
    )
    profile = Profile("llama", cache.profile_key(LLAMA, family.name), rows, 0, cache.installed_versions())
    cache.store_profile(profile, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "recipe.yaml").write_text(f"model: {tmp_path / 'config.json'}\nbatch: 8\n")
    done = run(PLAN, str(tmp_path / "recipe.yaml"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    terms = {term["id"]: term["bytes"] for term in data["gpu"]["terms"]}
    assert terms["weights.language"] == 2 * 2144
    assert terms["weights.head"] == 2 * 1600
    assert data["recipe"]["batch"] == 8
    assert "unknown: states alone take" in done.stderr
    assert "formula" in done.stderr


def test_everything_above_the_torch_line_imports(tmp_path: Path) -> None:
    package = Path(cache.__file__).parents[1]
    floors = ("specs", "catalog", "families", "physics", "strategies", "inputs", "planner", "monitor")
    names = [
        ".".join(("memfit", *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        for floor in floors
        for path in sorted((package / floor).rglob("*.py"))
    ]
    done = run(f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n", home=tmp_path)
    assert done.returncode == 0, done.stderr
