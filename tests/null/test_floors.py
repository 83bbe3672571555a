"""Imports go down the floors only, and planning never reaches torch or transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "memfit"

# From the top of the list to its end: a floor may import itself and those before it.
FLOORS = (
    ("units", "errors"),
    ("specs",),
    ("catalog",),
    ("families",),
    ("physics",),
    ("strategies",),
    ("inputs",),
    ("planner",),
    # torch lives below
    ("models",),
    ("build",),
    ("trace",),
    ("monitor",),
    ("evaluation",),
    ("engine",),
    ("api", "testing"),
    ("cli", "commands", "web", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}
TORCH_FROM = RANK["models"]
HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes"}
# These speak to people or to files only, so that a report needs no torch either.
TORCH_FREE_BELOW = {"monitor"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append((node.lineno, node.module))
            if node.module == "memfit":
                names += [(node.lineno, f"memfit.{alias.name}") for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    floor = floor_of(path)
    if floor == "__init__":
        return
    assert floor in RANK, f"{path} stands on no floor: add its folder to FLOORS and to the README's picture"
    wrong = []
    for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "memfit" and len(parts) > 1 and parts[1] in RANK and RANK[parts[1]] > RANK[floor]:
            wrong.append(f"{path.name}:{line} imports {name}, which lies below {floor}")
        if parts[0] in HEAVY and (RANK[floor] < TORCH_FROM or floor in TORCH_FREE_BELOW):
            wrong.append(f"{path.name}:{line} imports {name} above the torch line")
    assert not wrong, "\n".join(wrong)


def test_a_planted_upward_import_is_found() -> None:
    names = imported(ast.parse("def f():\n    from memfit.engine import train\n    import torch.nn\n"))
    assert (2, "memfit.engine") in names
    assert (3, "torch.nn") in names
    assert RANK["engine"] > RANK["physics"]


def test_upstream_entry_points_have_one_caller_each() -> None:
    """A forecast of one thing and a run of another is the worst bug this project can have."""
    calls: dict[str, list[str]] = {"get_peft_model": [], "from_pretrained": [], "from_config": []}
    for path in modules():
        if floor_of(path) in {"testing"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                if name in calls:
                    calls[name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert {name: len(places) for name, places in calls.items()} == {
        "get_peft_model": 1,
        "from_pretrained": 1,
        "from_config": 1,
    }, calls


def test_house_limits(capsys: pytest.CaptureFixture[str]) -> None:
    """Files, functions and parameters stay small: an alarm with its counts, rows excepted."""
    longest_file, functions, many_parameters = ("", 0), [], []
    for path in modules():
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if floor_of(path) != "catalog" and lines > longest_file[1]:
            longest_file = (str(path.relative_to(PACKAGE)), lines)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append((node.end_lineno - node.lineno + 1, f"{path.relative_to(PACKAGE)}:{node.name}"))
                count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
                # A model's forward has the parameters that transformers looks for in its signature.
                free = floor_of(path) in {"cli", "api"} or (floor_of(path) == "models" and node.name == "forward")
                if count - ("self" in {a.arg for a in node.args.args}) > 5 and not free:
                    many_parameters.append(f"{path.relative_to(PACKAGE)}:{node.name} takes {count}")
    short = sum(length <= 50 for length, _ in functions) / max(len(functions), 1)
    with capsys.disabled():
        print(
            f"\nhouse: {len(modules())} files, longest {longest_file[1]} lines; {len(functions)} functions, "
            f"{short:.0%} <= 50 lines, longest {max(functions)[0]}; {len(many_parameters)} with > 5 parameters"
        )
    assert longest_file[1] <= 400, longest_file
    assert short >= 0.9
    assert max(functions)[0] <= 120, max(functions)
    assert not many_parameters, "\n".join(many_parameters)
