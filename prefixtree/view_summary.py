"""How the nodes of a view are spread: what is too costly to count at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prefixtree.histogram import POWERS, Histogram

if TYPE_CHECKING:
    from prefixtree.view import TreeView


@dataclass(frozen=True)
class TreeSummary:
    """Histograms over the N nodes of a view, one observation a node."""

    depth: Histogram
    """Nodes on the path from a namespace's root, itself counted."""
    fan_out: Histogram
    """Children; tails that have no token yet are among them."""
    length: Histogram
    """Committed tokens."""
    age: Histogram
    """Nodes that have been made since."""
    idle: Histogram
    """Of nodes that nothing uses: ends of use, of any node, since its last one."""


def summarize(view: TreeView) -> TreeSummary:
    """O(nodes), vectorised."""
    below = view.parent[view.parent >= 0]
    return TreeSummary(
        depth=Histogram.of(view.depth, POWERS),
        fan_out=Histogram.of(np.bincount(below, minlength=len(view)), POWERS),
        length=Histogram.of(view.length, POWERS),
        age=Histogram.of(view.age, POWERS),
        idle=Histogram.of(view.idle[view.pins == 0], POWERS),
    )
