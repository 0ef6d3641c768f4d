"""The depth-first order of trees given as arrays."""

from __future__ import annotations

import numpy as np

from prefixtree.columns import Int32s, Int64s


def intervals(parent: Int32s, start: Int64s) -> tuple[Int64s, Int64s]:
    """[N] when a depth-first walk enters each node and leaves it: one lies within another's.

    `parent`: [N] index of the node above, negative for those on top. `start`: [N] grows from a node
    to those below it; nodes that begin at the same one are entered in the order of their numbers.
    No recursion: two Python loops over the nodes, at any depth.
    """
    count = len(parent)
    downward = np.argsort(start, kind="stable").tolist()
    parents = parent.tolist()
    sizes = [1] * count
    for node in reversed(downward):
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    enter = [0] * count
    free = [0] * count  # where the walk enters the next child
    outside = 0
    for node in downward:
        above = parents[node]
        if above < 0:
            enter[node] = outside
            outside += sizes[node]
        else:
            enter[node] = free[above]
            free[above] += sizes[node]
        free[node] = enter[node] + 1
    entered = np.array(enter, np.int64)
    return entered, entered + np.array(sizes, np.int64)
