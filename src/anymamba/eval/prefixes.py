"""Sequences as a tree of what they begin with, so that a text which many of them share is read once.

The state after a shared beginning is forked for everything that follows it: a question for its choices, the examples of
a prompt for all its questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SHORTEST = 8  # tokens: to read fewer once more is cheaper than another call of the model
DEEPEST = 16  # branchings above a node, whose states are all held while it is read


@dataclass(eq=False)
class Node:
    """Tokens [start, stop) of the sequences `members`, which agree up to `stop`."""

    start: int
    stop: int
    members: list[int]  # indices of the sequences
    children: list["Node"] = field(default_factory=list)


def tree(sequences: Sequence[np.ndarray], share: bool = True) -> list[Node]:
    """The roots of a forest in which every sequence (t,), of at least one token, is a path. share=False: each alone."""
    if not share:
        return [Node(0, len(ids), [i]) for i, ids in enumerate(sequences)]
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())
    common = [_common(sequences[i], sequences[j]) for i, j in zip(order, order[1:], strict=False)]
    return _branches(sequences, order, common, 0, 0)


def _branches(sequences, order, common, start, depth) -> list[Node]:
    """Nodes for sorted sequences that agree up to `start`; common[k]: how far those at k and k + 1 agree."""
    if depth == DEEPEST:
        return [Node(start, len(sequences[i]), [i]) for i in order]
    nodes, first = [], 0
    for last in range(len(order)):
        if last < len(common) and _worth_sharing(sequences, order[last : last + 2], common[last], start):
            continue
        members, inner = order[first : last + 1], common[first:last]
        stop = min([*inner, len(sequences[members[0]])])
        rest = [i for i in members if len(sequences[i]) > stop]  # the sorted order has the others first
        ended = len(members) - len(rest)
        children = _branches(sequences, rest, inner[ended:], stop, depth + 1) if rest else []
        nodes.append(Node(start, stop, members, children))
        first = last + 1
    return nodes


def _worth_sharing(sequences, pair, common, start):
    same = all(len(sequences[i]) == common for i in pair)
    return same or common - start >= SHORTEST


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens the two begin with alike."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size
