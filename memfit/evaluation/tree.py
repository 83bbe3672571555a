"""Tree accuracy, 1 - nTED: how much of the nested JSON is right, character by character.

The measure of the Donut paper (Kim et al., ECCV 2022, section 4.1), with these exact rules:
- A tree has a root; an object adds one inner node per key (sorted by length, then alphabetically); a list adds, in its
  order, one inner node per object or list and one leaf per plain value; a plain value is a leaf with its text.
- Empty values (None, blanks, {}, []) and keys that hold only such values are left out.
- Adding or removing an inner node costs 1, a leaf the number of its characters. Renaming an inner node costs 1,
  turning one leaf into another the Levenshtein distance of the two texts, a leaf into an inner node as much as
  removing the one and adding the other.
- 1 - nTED = max(0, 1 - distance(answer, truth) / distance(empty tree, truth)).
The order of list items counts here, unlike in the field scores.

The distance is Zhang and Shasha's (SIAM J. Computing 18(6), 1989), written out here because the tree packages for
Python are too slow for tables; the tests compare it with one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Levenshtein

from memfit.evaluation.normalise import is_empty, leaf_text

# Cells of Zhang and Shasha's tables for one document, about 3 s of pure Python; beyond it the score is None.
MAX_CELLS = 4_000_000


@dataclass
class _Tree:
    """Nodes in postorder. `texts` are leaves' texts or inner nodes' keys; `first` is each subtree's leftmost leaf."""

    texts: list[str] = field(default_factory=list)
    leaf: list[bool] = field(default_factory=list)
    first: list[int] = field(default_factory=list)

    def add(self, text: str, leaf: bool, first: int) -> None:
        self.texts.append(text)
        self.leaf.append(leaf)
        self.first.append(first)

    @property
    def costs(self) -> list[int]:
        """Of adding or removing each node."""
        return [len(text) if leaf else 1 for text, leaf in zip(self.texts, self.leaf, strict=True)]

    @property
    def key_roots(self) -> list[int]:
        """The last node, in postorder, of each group that shares a leftmost leaf."""
        return sorted({first: node for node, first in enumerate(self.first)}.values())

    @property
    def work(self) -> int:
        return sum(node - self.first[node] + 1 for node in self.key_roots)


def tree_accuracy(truth: Any, predicted: Any, view: str) -> float | None:
    """1 - nTED of two JSON values, between 0 and 1; None where they are too large to compare (MAX_CELLS)."""
    goal, answer = _tree(truth, view), _tree(predicted, view)
    whole = sum(goal.costs) - 1  # the root is in every tree
    if (goal.texts, goal.leaf, goal.first) == (answer.texts, answer.leaf, answer.first):
        return 1.0
    if not whole:
        return 0.0
    if goal.work * answer.work > MAX_CELLS:
        return None
    return max(0.0, 1.0 - _distance(answer, goal) / whole)


def tree_distance(first: Any, second: Any, view: str) -> int:
    """The edit distance of two JSON values under the rules above, whatever their size."""
    return _distance(_tree(first, view), _tree(second, view))


def _tree(value: Any, view: str) -> _Tree:
    tree = _Tree()
    _add_children(value, view, tree)
    tree.add("", False, 0)
    return tree


def _add_children(value: Any, view: str, tree: _Tree) -> None:
    """Add what stands below `value`'s own node."""
    if isinstance(value, dict):
        for key in sorted(value, key=lambda key: (len(key), key)):
            _add_inner(key, value[key], view, tree)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                _add_inner("", item, view, tree)
            else:
                _add_children(item, view, tree)
    elif not is_empty(value, view):
        tree.add(leaf_text(value, view), True, len(tree.texts))


def _add_inner(key: str, value: Any, view: str, tree: _Tree) -> None:
    first = len(tree.texts)
    _add_children(value, view, tree)
    if len(tree.texts) > first:
        tree.add(key, False, first)


def _distance(a: _Tree, b: _Tree) -> int:
    """Zhang and Shasha's dynamic programme over pairs of key roots."""
    remove, insert = a.costs, b.costs
    change = [[_change(a, i, b, j) for j in range(len(b.texts))] for i in range(len(a.texts))]
    between = [[0] * len(b.texts) for _ in a.texts]
    for root_a in a.key_roots:
        for root_b in b.key_roots:
            _forests(a, root_a, b, root_b, (remove, insert, change, between))
    return between[-1][-1]


def _change(a: _Tree, i: int, b: _Tree, j: int) -> int:
    """The cost of turning node i of `a` into node j of `b`."""
    if a.leaf[i] != b.leaf[j]:
        return 1 + len(a.texts[i] if a.leaf[i] else b.texts[j])
    if a.leaf[i]:
        return Levenshtein.distance(a.texts[i], b.texts[j])
    return int(a.texts[i] != b.texts[j])


_Costs = tuple[list[int], list[int], list[list[int]], list[list[int]]]


def _forests(a: _Tree, root_a: int, b: _Tree, root_b: int, costs: _Costs) -> None:
    """Fill `between` for all pairs of subtrees on the leftmost paths of the two key roots."""
    remove, insert, change, between = costs
    start_a, start_b = a.first[root_a], b.first[root_b]
    above = [0]
    for j in range(start_b, root_b + 1):
        above.append(above[-1] + insert[j])
    rows = [above]
    for i in range(start_a, root_a + 1):
        row = [above[0] + remove[i]]
        first_i, costs_i, between_i, gone = a.first[i], change[i], between[i], remove[i]
        whole_i = first_i == start_a
        jump = rows[first_i - start_a]
        for place, j in enumerate(range(start_b, root_b + 1)):
            best = min(above[place + 1] + gone, row[place] + insert[j])
            if whole_i and b.first[j] == start_b:
                best = min(best, above[place] + costs_i[j])
                between_i[j] = best
            else:
                best = min(best, jump[b.first[j] - start_b] + between_i[j])
            row.append(best)
        rows.append(row)
        above = row
