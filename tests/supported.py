"""What is shown of which model: the tests below take their models from here, and docs/models.md is written from it.

A "yes" on that page is a model in one of these lists; `tests/null/test_models_docs.py` checks that each test named here
exists and takes its models from its list. Imports nothing, so that writing the page needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

# A catalogued model -> the dummy of memfit.testing that has its classes, names and files.
DUMMY_OF = {
    "minicpm-v-4.6": "minicpmv4_6",
    "minicpm-v-2.6": "minicpmv2_6",
    "minicpm-o-2.6": "minicpmo2_6",
    "minicpm-llama3-v-2.5": "minicpmv2_5",
    "minicpm-v-4.0": "minicpmv4_0",
    "minicpm-v-4.5": "minicpmv4_5",
    "minicpm-o-4.5": "minicpmo4_5",
    "qwen2.5-vl-3b": "qwen2_5_vl",
    "qwen2.5-vl-7b": "qwen2_5_vl",
    "llava-1.5-7b": "llava",
    "llama-2-7b": "llama",
    "llama-3.1-8b": "llama",
    "llama-3.2-1b": "llama",
    "llama-3.2-3b": "llama",
    "qwen3-0.6b": "qwen3",
    "qwen3-4b": "qwen3",
    "qwen3-8b": "qwen3",
}
SEEING = (
    *("minicpmv4_6", "minicpmv4_7", "qwen2_5_vl", "llava", "minicpmv2_5", "minicpmv2_6", "minicpmv4_0", "minicpmv4_5"),
    *("minicpmo2_6", "minicpmo4_5"),
)
READING = ("llama", "qwen3")
ALL = (*SEEING, *READING)
# Dummies whose classes another one shares: their slower tests run in `make test-long` only.
LIKE_ANOTHER = frozenset({"minicpmv4_0", "minicpmv4_5", "minicpmo4_5"})
# Dummy -> the part names that `parts` takes.
PARTS = dict.fromkeys(SEEING, ("vision", "connector", "language", "head")) | dict.fromkeys(
    READING, ("language", "head")
)
# Dummies whose head is the embeddings: it learns and freezes with the language part.
TIED = frozenset({"qwen3", "minicpmv4_6", "minicpmv4_7"})


@dataclass(frozen=True)
class Shown:
    """`test` (file::function) runs for each of `kinds`."""

    test: str
    kinds: tuple[str, ...]


SHOWN: dict[str, Shown] = {
    "full": Shown("tests/unit/test_train.py::test_what_was_saved_answers_as_what_was_trained", ALL),
    "lora": Shown("tests/unit/test_train.py::test_adapters_that_were_saved_answer_as_what_was_trained", ALL),
    "parts": Shown("tests/unit/test_supported.py::test_each_part_learns_alone", ALL),
    "qlora": Shown("tests/unit/test_qlora.py::test_live_bytes_are_the_ledgers", ALL),
    "zero3": Shown("tests/invariant/test_supported.py::test_zero3_learns_what_one_process_learns", ALL),
    "fsdp": Shown("tests/invariant/test_supported.py::test_fsdp_learns_what_one_process_learns", ALL),
    "image": Shown("tests/unit/test_supported.py::test_an_image_budget_holds", SEEING),
    "downsample": Shown(
        "tests/unit/test_downsample_mode.py::test_text_pixels_and_model_follow_one_mode",
        ("minicpmv4_6", "minicpmv4_7"),
    ),
}
# Dummies whose numbers were held against vectors of the original code (tests/golden/data/minicpmv/modelNN_*).
VECTORS = {"minicpmv2_5": "25", "minicpmv2_6": "26"}
