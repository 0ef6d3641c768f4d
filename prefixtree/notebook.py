"""What notebooks show of a cache, a tree and a sequence: small pictures without scripts."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from prefixtree.columns import Int64s

if TYPE_CHECKING:
    from prefixtree.sequence import Sequence
    from prefixtree.view import TreeView

WIDTH, ROW = 640, 16
MOST_ROWS = 10
LEAST_PIXELS = 1.5
COLOURS = {"pinned": "#3f86e0", "pending": "#e39a28", "evictable": "#6fae84"}
"""To be seen on a light page and on a dark one."""


def tree_html(view: TreeView) -> str:
    """Figures and an icicle of the largest nodes: width is tokens, a row is a depth."""
    stats = view.stats
    figures = {
        "cached tokens": f"{stats.cached_tokens:,}",
        "in use": f"{stats.pinned_tokens:,}",
        "nodes": f"{stats.nodes:,}",
        "sequences": f"{stats.open_sequences:,}",
        "blocks": f"{stats.used_blocks:,} of {stats.num_blocks:,}",
        "hit rate": f"{stats.hit_rate:.1%}",
    }
    return _table(figures) + _icicle(view) + _legend()


def sequence_html(sequence: Sequence) -> str:
    """Its lengths, and a bar of what was cached, what is written and what is pending."""
    if not sequence.is_open:
        return f"<code>{escape(repr(sequence))}</code>"
    total, cached, committed = len(sequence), sequence.cached_len, sequence.committed
    figures = {
        "tokens": f"{total:,}",
        "cached when opened": f"{cached:,}",
        "committed": f"{committed:,}",
        "shared by forks": f"{sequence.fork_len:,}",
    }
    edges = (("evictable", 0, cached), ("pinned", cached, committed), ("pending", committed, total))
    bars = "".join(
        _box(WIDTH * first / total, 0, WIDTH * (stop - first) / total, name, f"{stop - first:,}")
        for name, first, stop in edges
        if stop > first
    )
    return _table(figures) + _svg(ROW, bars) + _legend(evictable="cached", pinned="written")


def _icicle(view: TreeView) -> str:
    below = view.below
    total = int(below[view.parent < 0].sum())
    if not total:
        return "<p>The tree is empty.</p>"
    left = lefts(view, below)
    scale = WIDTH / total
    wide = np.flatnonzero((below * scale >= LEAST_PIXELS) & (view.depth <= MOST_ROWS))
    boxes = []
    for node in wide.tolist():
        committed, pending = int(view.length[node]), int(view.pending[node])
        state = "pinned" if view.pins[node] else "evictable"
        state = state if committed else "pending"
        note = f"{committed:,} tokens, {pending:,} pending, {view.pins[node]} pins"
        note += f", {view.hits[node]} hits, {int(view.size[node]) - 1:,} nodes below"
        at, row = float(left[node]) * scale, int(view.depth[node]) - 1
        boxes.append(_box(at, row * ROW, float(below[node]) * scale, state, note))
    rows = int(view.depth[wide].max(initial=1))
    return _svg(rows * ROW, "".join(boxes))


def lefts(view: TreeView, below: Int64s) -> Int64s:
    """[N] tokens to the left of each node's: children from the left, behind those before them."""
    # All nodes before it in depth-first order are to its left, but for those above it: their own
    # part lies to the right of what is below them.
    own = view.length + view.pending
    before = np.cumsum(own) - own
    around = np.bincount(np.arange(len(own)), own, len(own) + 1)
    around -= np.bincount(np.arange(len(own)) + view.size, own, len(own) + 1)
    above = np.cumsum(around)[:-1].astype(np.int64) - own
    lefts: Int64s = before - above
    return lefts


def _box(x: float, y: int, width: float, state: str, note: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.5):.1f}" height="{ROW - 1}"'
        f' fill="{COLOURS[state]}"><title>{escape(note)}</title></rect>'
    )


def _svg(height: int, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' style="width:100%;max-width:{WIDTH}px;height:auto" role="img">{content}</svg>'
    )


def _table(figures: dict[str, str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in figures)
    values = "".join(f"<td>{escape(value)}</td>" for value in figures.values())
    return f"<table><tr>{names}</tr><tr>{values}</tr></table>"


def _legend(**names: str) -> str:
    shown = {"pinned": "in use", "pending": "pending", "evictable": "evictable", **names}
    swatch = '<span style="color:{}">&#9632;</span> {}'
    return "<small>" + " ".join(swatch.format(COLOURS[k], v) for k, v in shown.items()) + "</small>"
