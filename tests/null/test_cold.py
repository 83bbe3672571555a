"""A cold forecast looks for no cyclic garbage; its record says what was run."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from benchmarks.cold_estimate import CACHED, METHODS, MODELS, PLAYED, SHIPPED, Run, commands, known_commands, page
from memfit.catalog.models import find_row
from memfit.trace.collection import no_collection


def test_collection_is_off_within_and_on_again_after() -> None:
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), no_collection():
        _ = 1 // 0
    assert gc.isenabled()


def test_a_process_that_answers_once_ends_with_nothing_to_look_through() -> None:
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0, gc.isenabled()))\n"
        "from memfit.trace.collection import one_answer\n"
        "one_answer()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_it_takes_unused_packages_for_not_installed_unless_they_are_loaded() -> None:
    code = (
        "import importlib.util, sys\n"
        "from memfit.trace.collection import UNUSED, one_answer\n"
        "if len(sys.argv) > 1:\n"
        "    import scipy\n"
        "one_answer()\n"
        "assert UNUSED == ('scipy',)\n"
        "print(importlib.util.find_spec('scipy') is None)\n"
    )
    for more, said in (((), "True"), (("load",), "False")):
        done = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [said]


def test_the_record_holds_medians_of_strange_models() -> None:
    assert len(commands()) == 1 + len(MODELS) * len(METHODS)
    assert all(find_row(model) is not None for model in MODELS)
    assert all(find_row(model) is not None and how in (SHIPPED, PLAYED, CACHED) for model, _, how in known_commands())
    strange = {("a-model", "lora"): [Run(9.0, 8.0, 0.3), Run(7.0, 6.0, 0.2), Run(20.0, 7.0, 0.4)]}
    text = page(strange, {("a-model", "full", "cached"): [Run(0.9, 0.8, 0.3, "neither"), Run(0.7, 0.8, 0.3, "torch")]})
    assert "| a-model | full | cached | 0.8 | 0.8 | 0.7 to 0.9 | 0.30 | 3 | neither, torch |" in text
    assert "| a-model | lora | 9.0 | 7.0 | 7.0 to 20.0 | 0.30 | 35 |" in text
