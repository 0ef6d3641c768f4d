"""What the arrays of a snapshot must be for a tree to be made of them.

A checksum shows damage, not intent: whoever changes a file can compute it again. So the invariants
that matter are found to hold in the arrays, vectorised, before any of them is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int32s, Int64s
from prefixtree.errors import InvalidSnapshot
from prefixtree.preorder import intervals
from prefixtree.ragged import spans

Fields = Mapping[str, npt.NDArray[Any]]

_MOST = 2**62
"""Positions, ticks and counts stay below, so that adding to them cannot overflow."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidSnapshot(message)


def check_nodes(
    fields: Fields,
    usage: Sequence[str],
    namespaces: int,
    tokens: Int32s,
    blocks: Int32s,
    num_blocks: int,
    block_size: int,
    align: int,
) -> None:
    """Raises `InvalidSnapshot` unless the nodes are trees, one a namespace. O(N log N)."""
    parent, start, length, offset = (fields[n] for n in ("parent", "start", "length", "offset"))
    count = len(parent)
    _within("parent", parent, -namespaces, count - 1)
    _within("start", start, 0, _MOST)
    _within("length", length, 1, len(tokens))
    _within("offset", offset, 0, block_size - 1)
    for name in usage:
        _within(name, fields[name], -_MOST, _MOST)
    _within("tokens", tokens, 0, 2**31 - 1)
    _within("blocks", blocks, 0, num_blocks - 1)

    top = parent < 0
    used = len(np.unique(parent[top]))
    expect(used == namespaces, f"{namespaces} namespaces, but nodes in {used} of them")
    # Nodes are not empty, so the starts grow downward, and no path can come back to itself.
    above = np.where(top, 0, start[parent] + length[parent])
    _first(start != above, lambda i: f"node {i} starts at {start[i]}, expected {above[i]}")

    ends = np.cumsum(length)
    total = int(ends[-1]) if count else 0
    expect(total == len(tokens), f"{len(tokens)} tokens, expected {total}")
    held = int(_held(fields, block_size).sum())
    expect(held == len(blocks), f"{len(blocks)} blocks, expected {held}")
    _first(length % align != 0, lambda i: f"length[{i}] is {length[i]}, align is {align}")
    _first((offset > 0) & (align > 1), lambda i: f"offset[{i}] is {offset[i]}, expected 0")
    heads = tokens[(ends - length)[:, None] + np.arange(align)]
    edges = np.column_stack([parent, heads])
    edges = edges[np.lexsort(edges.T[::-1])]
    _first(
        (edges[1:] == edges[:-1]).all(axis=1),
        lambda i: f"two children of node {edges[i, 0]} begin with {edges[i, 1:].tolist()}",
    )


def first_shared(fields: Fields, blocks: Int32s, block_size: int) -> npt.NDArray[np.int8]:
    """[N] 1 for nodes whose first block a node above holds as well.

    Raises `InvalidSnapshot` when a slot belongs to two nodes, or the nodes on a block are not on
    one path, each but the topmost with its first block. O(N log N + blocks), and a Python loop over
    the nodes only if a node shares a block with another one than its parent.
    """
    parent, start = fields["parent"], fields["start"]
    counts = _held(fields, block_size)
    node = np.repeat(np.arange(len(counts)), counts)
    place = spans(np.zeros(len(counts), np.int64), counts)
    low = np.where(place == 0, fields["offset"][node], 0)
    high = np.minimum((fields["offset"] + fields["length"])[node] - place * block_size, block_size)

    order = np.lexsort((start[node], blocks))
    upper, lower = order[:-1], order[1:]
    same = blocks[upper] == blocks[lower]
    upper, lower = upper[same], lower[same]
    above, below = node[upper], node[lower]
    wrong = high[upper] > low[lower]  # always so when it is not the lower one's first block
    far = np.flatnonzero(parent[below] != above)
    if len(far):
        enter, leave = intervals(parent, start)
        top, bottom = enter[above[far]], enter[below[far]]
        wrong[far] |= (bottom <= top) | (bottom >= leave[above[far]])
    _first(
        wrong,
        lambda i: f"block {blocks[lower[i]]} cannot be on both nodes {above[i]} and {below[i]}",
    )
    shared = np.zeros(len(counts), np.int8)
    shared[below] = 1
    return shared


def _held(fields: Fields, block_size: int) -> Int64s:
    held: Int64s = -(-(fields["offset"] + fields["length"]) // block_size)
    return held


def _within(name: str, values: npt.NDArray[Any], low: int, high: int) -> None:
    _first(
        (values < low) | (values > high),
        lambda i: f"{name}[{i}] is {values[i]}, expected {low}..{high}",
    )


def _first(wrong: npt.NDArray[np.bool_], message: Callable[[int], str]) -> None:
    """Raises with the message about the first index that is wrong."""
    if wrong.any():
        raise InvalidSnapshot(message(int(wrong.argmax())))
