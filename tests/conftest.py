"""What all tests share: no network, a cache of their own, and one thread (tiny models gain nothing from more)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# No deadline: a busy machine is no error. The same examples every time: a red test must stay red until it is mended.
settings.register_profile("memfit", deadline=None, derandomize=True)
settings.load_profile("memfit")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MEMFIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _unproved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that train for another reason begin without a proof, which costs several seconds a run.

    Those marked `prove` have it. The read-back at the begin of every run stays.
    """
    if request.node.get_closest_marker("prove") is None and request.path.parent.name in ("unit", "invariant"):
        monkeypatch.setattr("memfit.engine.launch.prove_job", lambda *given, **named: {"checks": [], "seconds": 0.0})


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]
