"""The tree as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from unicodedata import combining, east_asian_width

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int32s, Int64s
from prefixtree.errors import DecodeFailed

if TYPE_CHECKING:
    from prefixtree.view import TreeView

Decode: TypeAlias = Callable[[list[int]], str]
"""Turns token ids into text: a tokenizer's `decode`, for example."""

Show: TypeAlias = Callable[[Int32s, int], str]
"""What is shown of a node's tokens in so many columns."""


class Limits(NamedTuple):
    """What fits."""

    width: int
    """Columns of a line."""
    children: int
    """Nodes shown below one, and namespaces."""
    nodes: int
    """Nodes shown in all."""
    depth: int
    """Levels shown."""


def render(view: TreeView, show: Show, limits: Limits) -> str:
    """`TreeView.render` says what this is."""
    drawn = _lines(view, show, limits)
    return "\n".join(_head(line, limits.width).rstrip() for line in drawn)


def excerpts(decode: Decode | None) -> Show:
    """Shows the begin and the end of the text: decoded, or token ids."""
    return lambda tokens, room: _excerpt(tokens, decode, room)


def nothing(tokens: Int32s, room: int) -> str:
    """Shows no text."""
    return ""


def _lines(view: TreeView, show: Show, limits: Limits) -> Iterator[str]:
    """From above. O(nodes log nodes), vectorised."""
    total = view.length + view.pending
    hot = hot_path(view)
    shown = _chosen(view, hot, limits)
    kept = np.flatnonzero(shown)
    hidden = _hidden_below(view, shown)
    last = _last_below(view, kept, hidden)
    filled = _largest_namespaces(view, limits.children)

    ends: list[bool] = []  # for each level above: nothing more comes at it
    namespace = -1
    waiting: list[int] = []  # nodes that still have to say what is hidden below them
    for row in [*kept.tolist(), -1]:
        depth = int(view.depth[row]) if row >= 0 else 0
        while waiting and (row < 0 or _depth(view, waiting[-1]) >= depth):
            yield from _rest(hidden, waiting.pop(), view, ends)
        above = int(view.namespace[row]) if row >= 0 else len(view.namespaces)
        while namespace < above:
            if namespace >= 0 and filled[namespace]:
                yield from _rest(hidden, ~namespace, view, ends)
            namespace += 1
            if namespace < len(view.namespaces) and (filled[namespace] or not len(view)):
                name = view.namespaces[namespace]
                heading = f"namespace {one_line(repr(name))}" if name else "root"
                yield heading
        if row < 0:
            left_out = np.count_nonzero(np.bincount(view.namespace)) - np.count_nonzero(filled)
            if left_out:
                yield f"... {left_out} more namespaces"
            break
        del ends[depth - 1 :]
        ends.append(row in last)
        mark = "▶ " if hot[row] else "─ "
        branch = _indent(ends[:-1]) + ("└" if ends[-1] else "├") + mark
        pending = f"  pending {view.pending[row]}" if view.pending[row] else ""
        label = f"{view.length[row]} tokens{pending}  pins {view.pins[row]}  hits {view.hits[row]}"
        first = int(view.token_ends[row])
        tokens = view.tokens[first : first + int(total[row])]
        room = limits.width - len(branch) - len(label) - 2
        yield f"{branch}{label}  {show(tokens, room)}"
        waiting.append(row)


def hot_path(view: TreeView) -> npt.NDArray[np.bool_]:
    """[N] whether the node is on the path that goes down to the most hit child at each turn.

    One in each namespace; of children hit alike the one with more below it. O(nodes log nodes).
    """
    order = np.lexsort((-view.below, -view.hits, view.parent))
    parents = view.parent[order]
    best = np.ones(len(order), np.bool_)
    best[1:] = parents[1:] != parents[:-1]
    favourite = np.zeros(len(order), np.bool_)
    favourite[order[best]] = view.hits[order[best]] > 0
    # A node is on the path when all the way up are favourites: as many as it is deep.
    steps = np.cumsum(_along_paths(view, favourite))
    hot: npt.NDArray[np.bool_] = favourite & (steps == view.depth)
    return hot


def text_of(tokens: Int32s, decode: Decode | None) -> str:
    """The tokens' text: decoded, or their ids. Raises `DecodeFailed`."""
    ids: list[int] = tokens.tolist()
    if decode is None:
        return " ".join(map(str, ids))
    name = getattr(decode, "__qualname__", repr(decode))
    few = f"{ids[:8]}"[:-1] + (", ...]" if len(ids) > 8 else "]")
    try:
        text = decode(ids)
    except Exception as error:
        raise DecodeFailed(
            f"decode function {name} raised {type(error).__name__} for the {len(ids)} tokens"
            f" {few}: {error}"
        ) from error
    if not isinstance(text, str):
        raise DecodeFailed(
            f"decode function {name} returned a {type(text).__name__} for the {len(ids)} tokens"
            f" {few}, expected a str"
        )
    return text


def one_line(text: str) -> str:
    """Text on one line: control characters and line ends are shown escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _along_paths(view: TreeView, values: npt.NDArray[np.bool_]) -> Int64s:
    """[N] differences whose running sum is, at a node, the sum over the path down to it."""
    marked = np.flatnonzero(values)
    steps = np.bincount(marked, minlength=len(values) + 1)
    steps -= np.bincount(marked + view.size[marked], minlength=len(values) + 1)
    return steps[:-1]


def _chosen(view: TreeView, hot: npt.NDArray[np.bool_], limits: Limits) -> npt.NDArray[np.bool_]:
    """[N] which nodes are shown: each with all those above it."""
    count = len(view)
    by_hits = np.lexsort((-view.below, -view.hits, view.parent))
    parents = view.parent[by_hits]
    rank = np.arange(count)
    begins = np.ones(count, np.bool_)
    begins[1:] = parents[1:] != parents[:-1]
    rank -= np.maximum.accumulate(np.where(begins, rank, 0))
    wanted = np.zeros(count, np.bool_)
    wanted[by_hits[rank < limits.children]] = True
    wanted &= (view.below > 0) & (view.depth <= limits.depth)
    wanted &= _largest_namespaces(view, limits.children)[view.namespace]
    # Both a node with all of those above it, and the largest of these: below is never more.
    whole = wanted & (np.cumsum(_along_paths(view, wanted)) == view.depth)
    candidates = np.flatnonzero(whole)
    first = hot & (view.depth <= max(1, limits.nodes // limits.children))
    sizes = np.where(first[candidates], np.iinfo(np.int64).max, view.below[candidates])
    largest = candidates[np.argsort(-sizes, kind="stable")[: limits.nodes]]
    shown = np.zeros(count, np.bool_)
    shown[largest] = True
    return shown


def _largest_namespaces(view: TreeView, count: int) -> npt.NDArray[np.bool_]:
    """[namespaces] whether it is one of the `count` that hold the most nodes."""
    nodes = np.bincount(view.namespace, minlength=len(view.namespaces))
    chosen = np.zeros(len(nodes), np.bool_)
    chosen[np.argsort(-nodes, kind="stable")[:count]] = True
    return chosen & (nodes > 0)


def _hidden_below(view: TreeView, shown: npt.NDArray[np.bool_]) -> dict[int, tuple[int, int]]:
    """For each shown node, ~i for a root: how many nodes and tokens below it are not shown."""
    # Topmost hidden nodes: each stands for all below it.
    above = view.parent
    below_shown = np.append(shown, True)[np.maximum(above, -1)]
    tops = np.flatnonzero(~shown & below_shown & (view.below > 0))
    found: dict[int, tuple[int, int]] = {}
    parents, which = np.unique(above[tops], return_inverse=True)
    nodes = np.bincount(which, view.size[tops], len(parents))
    tokens = np.bincount(which, view.below[tops], len(parents))
    for parent, number, size in zip(parents.tolist(), nodes.tolist(), tokens.tolist(), strict=True):
        found[parent] = int(number), int(size)
    return found


def _last_below(view: TreeView, kept: Int64s, hidden: dict[int, tuple[int, int]]) -> set[int]:
    """The shown nodes behind which nothing more comes at their level."""
    last = {int(view.parent[row]): row for row in kept.tolist()}
    return {row for parent, row in last.items() if parent not in hidden}


def _rest(
    hidden: dict[int, tuple[int, int]], node: int, view: TreeView, ends: list[bool]
) -> Iterator[str]:
    """The line that counts what is not shown below a node, if there is anything."""
    if node in hidden:
        nodes, tokens = hidden[node]
        branch = _indent(ends[: _depth(view, node)]) + "└─ "
        yield f"{branch}... {nodes} more node{'s' * (nodes > 1)} of {tokens} tokens"


def _depth(view: TreeView, node: int) -> int:
    return int(view.depth[node]) if node >= 0 else 0


def _indent(ends: list[bool]) -> str:
    return "".join("   " if end else "│  " for end in ends)


def _excerpt(tokens: Int32s, decode: Decode | None, room: int) -> str:
    """The first and last of the tokens' text in `room` columns, on one line."""
    if room < 12:
        return ""
    # Only what can be seen is decoded; a token is at least one column in most tokenizers.
    if decode is None:
        text = text_of(tokens[:room], None)
        return text if len(text) <= room else text[: room - 1] + "…"
    if len(tokens) <= room:
        text = one_line(text_of(tokens, decode))
    else:
        half = room // 2
        ends = (text_of(part, decode) for part in (tokens[:half], tokens[-half:]))
        text = "…".join(map(one_line, ends))
    if _columns(text) > room - 2:
        half = (room - 3) // 2
        text = _head(text, half) + "…" + _head(text[::-1], half)[::-1]
    return f"'{text}'"


def _columns(text: str) -> int:
    """Columns that a terminal takes for it."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _head(text: str, columns: int) -> str:
    """As much of its begin as fits."""
    if text.isascii():
        return text[:columns]
    ends = accumulate(map(_width, text))
    return text[: sum(end <= columns for end in ends)]


def _width(char: str) -> int:
    if combining(char):
        return 0
    return 2 if east_asian_width(char) in "WF" else 1
