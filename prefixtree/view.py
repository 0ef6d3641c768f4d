"""The tree to look at: what a cache was at one moment, as arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from allocator.errors import at_least
from prefixtree.columns import Int32s, Int64s
from prefixtree.errors import InvalidNamespace
from prefixtree.preorder import intervals
from prefixtree.ragged import spans
from prefixtree.tokens import TokensLike, as_prompt
from prefixtree.tree import DEFAULT, Namespace
from prefixtree.view_text import Decode, Limits, excerpts, render

if TYPE_CHECKING:
    import networkx
    import pandas

    from prefixtree.check import State
    from prefixtree.stats import Stats
    from prefixtree.view_summary import TreeSummary


class NodeView:
    """One node as it was when the view was taken."""

    __slots__ = ("index", "view")

    def __init__(self, view: TreeView, index: int) -> None:
        self.view = view
        self.index = index
        """Row of the view's arrays; ~i for the empty node on top of `view.namespaces[i]`."""

    def __repr__(self) -> str:
        return f"<NodeView {len(self.tokens)} tokens at {self.start}, {self.pins} pins>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NodeView):
            return NotImplemented
        return self.view is other.view and self.index == other.index

    def __hash__(self) -> int:
        return hash((id(self.view), self.index))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Committed tokens; empty for a root, and for the tail of a sequence that has none yet."""
        return tuple(self._tokens()[: self._of(self.view.length)].tolist())

    @property
    def pending_tokens(self) -> tuple[int, ...]:
        """Those behind them that an open sequence has and others cannot match yet."""
        return tuple(self._tokens()[self._of(self.view.length) :].tolist())

    @property
    def start(self) -> int:
        """Position of the first token in its path."""
        return self._of(self.view.start)

    @property
    def blocks(self) -> Int32s:
        """The blocks that it holds, int32."""
        if self.index < 0:
            return np.empty(0, np.int32)
        ends = self.view.block_ends
        return self.view.blocks[ends[self.index] : ends[self.index + 1]]

    @property
    def slots(self) -> tuple[int, ...]:
        """Of the committed tokens."""
        size = self.view.block_size
        places = np.arange(self._of(self.view.length)) + self._of(self.view.offset)
        slots = self.blocks[places // size].astype(np.int64) * size + places % size
        return tuple(slots.tolist())

    @property
    def pins(self) -> int:
        """Open sequences, and pins for good, whose path passes through."""
        return self._of(self.view.pins)

    @property
    def hits(self) -> int:
        """How often a sequence joined it: by a match, a fork, or the same tokens computed again."""
        return self._of(self.view.hits)

    @property
    def depth(self) -> int:
        """1 for those right below a root."""
        return self._of(self.view.depth)

    @property
    def namespace(self) -> Namespace:
        at = ~self.index if self.index < 0 else self._of(self.view.namespace)
        return self.view.namespaces[at]

    @property
    def users(self) -> tuple[int, ...]:
        """Serial numbers of the open sequences that pass through or end here."""
        writers = self.view.writer[self._range()]
        return tuple(writers[writers > 0].tolist())

    @property
    def parent(self) -> NodeView | None:
        """None for a root."""
        return None if self.index < 0 else NodeView(self.view, int(self.view.parent[self.index]))

    @property
    def children(self) -> tuple[NodeView, ...]:
        """By their first tokens; one that has no token yet comes first. O(children)."""
        inside = self._range()
        at, sizes = inside.start + (self.index >= 0), self.view.size
        found = []
        while at < inside.stop:
            found.append(NodeView(self.view, at))
            at += int(sizes[at])
        return tuple(found)

    def _range(self) -> slice:
        """The rows of the node and all below it."""
        if self.index >= 0:
            return slice(self.index, self.index + int(self.view.size[self.index]))
        first, stop = np.searchsorted(self.view.namespace, [~self.index, ~self.index + 1]).tolist()
        return slice(first, stop)

    def _tokens(self) -> Int32s:
        return np.frombuffer(self.view.edges[self.index] if self.index >= 0 else b"", np.int32)

    def _of(self, column: npt.NDArray[Any]) -> int:
        return int(column[self.index]) if self.index >= 0 else 0


Tier: TypeAlias = Callable[[NodeView], str]
"""Names the tier that a node's KV is in, "host" for example, or "" for none."""


@dataclass(frozen=True, eq=False, repr=False)
class TreeView:
    """A picture of the tree; later changes of the cache do not show in it.

    N nodes in depth-first order, one namespace after the other and siblings by their first tokens:
    node i and all below it are the rows i to i + size[i]. The tails of open sequences are among
    them, also those that have no token yet; the empty nodes on top of the namespaces are not.
    The arrays are read-only.
    """

    stats: Stats
    """The whole cache's, also in a filtered view."""
    namespaces: tuple[Namespace, ...]
    """All that hold anything, and the default one, which is the first."""
    parent: Int32s
    """[N] the row above; ~i for a node that begins in namespaces[i]."""
    size: Int32s
    """[N] nodes, itself and below."""
    depth: Int32s
    """[N] 1 for those that begin in a namespace."""
    namespace: Int32s
    """[N] index into `namespaces`."""
    start: Int64s
    """[N] position of the first token in its path."""
    length: Int64s
    """[N] committed tokens."""
    pending: Int64s
    """[N] tokens behind these that an open sequence has and others cannot match yet."""
    offset: Int32s
    """[N] of the first token in the first block."""
    pins: Int32s
    """[N] open sequences, and pins for good, whose path passes through."""
    hits: Int64s
    """[N] how often a sequence joined it."""
    idle: Int64s
    """[N] how many ends of use, of any node, lie between its last one and the latest; 0 in use.
    The cache counts uses, not seconds."""
    age: Int64s
    """[N] how many nodes have been made since."""
    writer: Int64s
    """[N] serial number of the open sequence whose tail it is, 0 for others."""
    edges: tuple[bytes, ...]
    """[N] each node's tokens, committed ones and then pending ones, as int32. Those of nodes that
    no open sequence writes are the cache's own and not copied, so that a view costs little."""
    blocks: Int32s
    """Of all nodes, packed: those of the tokens, in their order."""
    block_ends: Int64s
    """[N + 1] node i has blocks[block_ends[i] : block_ends[i + 1]]."""
    aside: Int32s
    """Blocks that something else than a node holds, once for each reference: block 0 where it is
    reserved, and what sequences gave up at a commit (`Stats.retired_blocks`)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                view = value.view()
                view.flags.writeable = False
                object.__setattr__(self, name, view)

    @classmethod
    def of(cls, state: State, stats: Stats) -> TreeView:
        """What a cache is now. O(nodes log nodes + blocks), with a few Python calls a node."""
        tree, table = state.tree, state.tree.nodes
        namespaces = dict(tree.roots())
        roots = np.fromiter(namespaces.values(), np.int64, len(namespaces))
        rows = table.rows()
        rows = rows[~np.isin(rows, roots)]
        writer = np.asarray(table.writer)[rows]
        edges = [
            tree.tail_tokens.get(row).tobytes() if tail else tree.edge(row)
            for row, tail in zip(rows.tolist(), writer.tolist(), strict=True)
        ]
        counts = np.fromiter(map(len, edges), np.int64, len(edges)) // 4
        first = np.full(len(rows), -1)
        first[counts > 0] = np.frombuffer(b"".join([edge[:4] for edge in edges]), np.int32)

        # Downward, and siblings by their first tokens; a root begins where those below it do.
        start = np.asarray(table.start)[rows]
        downward = np.lexsort((first, start))
        rows = rows[downward]
        number = np.zeros(table.top, np.int64)
        number[roots] = np.arange(len(roots))
        number[rows] = len(roots) + np.arange(len(rows))
        parent = np.full(len(roots) + len(rows), -1, np.int32)
        parent[len(roots) :] = number[np.asarray(table.parent)[rows]]
        starts = np.concatenate([np.full(len(roots), -1), start[downward]])
        enter, leave = intervals(parent, starts)

        order = np.argsort(enter)
        is_root = order < len(roots)
        namespace = np.cumsum(is_root) - 1
        depth = np.cumsum(1 - np.bincount(leave, minlength=len(order) + 1)[:-1]) - 1
        order, namespace, depth = order[~is_root], namespace[~is_root], depth[~is_root]
        above = parent[order]
        parents = np.where(above < len(roots), ~above, enter[above] - namespace - 1)
        size = (leave - enter)[order]
        rows, packed = rows[order - len(roots)], downward[order - len(roots)]

        counts = counts[packed]
        length, pins = np.asarray(table.length)[rows], np.asarray(table.pins)[rows]
        last_used, created = np.asarray(table.last_used)[rows], np.asarray(table.created)[rows]
        held = np.asarray(tree.blocks.size)[rows]
        return cls(
            stats=stats,
            namespaces=tuple(namespaces),
            parent=parents.astype(np.int32),
            size=size.astype(np.int32),
            depth=depth.astype(np.int32),
            namespace=namespace.astype(np.int32),
            start=np.asarray(table.start)[rows],
            length=length,
            pending=counts - length,
            offset=np.asarray(table.offset)[rows],
            pins=pins,
            hits=np.asarray(table.uses)[rows],
            idle=np.where(pins > 0, 0, last_used.max(initial=0) - last_used),
            age=created.max(initial=0) - created,
            writer=np.asarray(table.writer)[rows],
            edges=tuple([edges[row] for row in packed.tolist()]),
            blocks=tree.blocks.gather(rows, held),
            block_ends=_ends(held),
            aside=state.aside,
        )

    @property
    def block_size(self) -> int:
        return self.stats.block_size

    @property
    def num_blocks(self) -> int:
        return self.stats.num_blocks

    @property
    def roots(self) -> dict[Namespace, NodeView]:
        """The empty node on top of each namespace that holds anything, and of the default one."""
        return {name: NodeView(self, ~at) for at, name in enumerate(self.namespaces)}

    @property
    def root(self) -> NodeView:
        """That of the default namespace."""
        return NodeView(self, ~self.namespaces.index(DEFAULT))

    @cached_property
    def tokens(self) -> Int32s:
        """Those of all nodes, packed, read-only. O(tokens) the first time."""
        return np.frombuffer(b"".join(self.edges), np.int32)

    @cached_property
    def token_ends(self) -> Int64s:
        """[N + 1] node i has tokens[token_ends[i] : token_ends[i + 1]]."""
        return _ends(self.length + self.pending)

    @cached_property
    def below(self) -> Int64s:
        """[N] committed and pending tokens of each node and all below it."""
        return self._summed(self.length + self.pending)

    def __len__(self) -> int:
        """Nodes, without the roots."""
        return len(self.parent)

    def __getitem__(self, index: int) -> NodeView:
        """The node of that row. Raises IndexError."""
        return NodeView(self, range(len(self))[index])

    def __iter__(self) -> Iterator[NodeView]:
        """All nodes but the roots, depth first, namespace after namespace."""
        return (NodeView(self, index) for index in range(len(self)))

    def filter(
        self,
        *,
        min_tokens: int | None = None,
        pinned: bool | None = None,
        namespace: Namespace | None = None,
        depth: int | None = None,
    ) -> TreeView:
        """The nodes that are as said, and those above them, so that it is a tree.

        `min_tokens`: that many committed and pending tokens at least; `pinned`: in use, or not;
        `namespace`: in this one; `depth`: at most that deep, 1 for those that begin a namespace.
        None is for whatever it is. Raises `InvalidArgument` unless the numbers are integers, >= 0
        and >= 1, `InvalidNamespace` for one that the view does not have. O(nodes + blocks).
        """
        wanted = np.ones(len(self), np.bool_)
        if min_tokens is not None:
            wanted &= self.length + self.pending >= at_least(0, "min_tokens", min_tokens)
        if pinned is not None:
            wanted &= (self.pins > 0) == pinned
        if namespace is not None:
            if namespace not in self.namespaces:
                known = ", ".join(map(repr, self.namespaces[:8]))
                more = len(self.namespaces) - 8
                raise InvalidNamespace(
                    f"namespace {namespace!r} holds nothing, expected one of {known}"
                    + (f" and {more} more" if more > 0 else "")
                )
            wanted &= self.namespace == self.namespaces.index(namespace)
        if depth is not None:
            wanted &= self.depth <= at_least(1, "depth", depth)
        return self._only(self._summed(wanted) > 0)

    def find(self, tokens: TokensLike) -> list[NodeView]:
        """The nodes in which this run of tokens begins; it may go on into those below.

        Committed and pending ones, in any namespace, in depth-first order. Raises `InvalidTokens`.
        O(all tokens) in numpy, and a few vector operations for each of `tokens`.
        """
        wanted = as_prompt(tokens)
        at = np.flatnonzero(self.tokens == wanted[0])
        node = np.searchsorted(self.token_ends, at, "right") - 1
        origin = node
        by_parent = np.argsort(self.parent, kind="stable")
        parents = self.parent[by_parent]
        for token in wanted[1:]:
            at = at + 1
            over = at == self.token_ends[node + 1]
            # Those at the end of a node go on in each of its children that has tokens.
            first, stop = (np.searchsorted(parents, node[over], side) for side in ("left", "right"))
            children = by_parent[spans(first, stop - first)]
            at = np.concatenate([at[~over], self.token_ends[children]])
            origin = np.concatenate([origin[~over], np.repeat(origin[over], stop - first)])
            node = np.concatenate([node[~over], children])
            goes_on = at < self.token_ends[node + 1]
            goes_on[goes_on] = self.tokens[at[goes_on]] == token
            at, node, origin = at[goes_on], node[goes_on], origin[goes_on]
        return [NodeView(self, index) for index in np.unique(origin).tolist()]

    def __str__(self) -> str:
        return self.render()

    def render(
        self,
        decode: Decode | None = None,
        *,
        width: int = 80,
        max_children: int = 8,
        max_nodes: int = 40,
        max_depth: int = 8,
    ) -> str:
        """The tree as text, one line a node: tokens, pins, hits and the tokens' text.

        `decode` turns token ids into text; without it the ids are shown. Lines are cut to `width`;
        of more than `max_children` children the most hit are shown, of more than `max_nodes` nodes
        those with the most tokens at and below them, none deeper than `max_depth`, and the rest is
        counted. ▶ marks the hot path: from a root always down to the most hit child. Raises
        `DecodeFailed`, and `InvalidArgument` unless the numbers are integers >= 1.
        """
        limits = Limits(
            width=at_least(1, "width", width),
            children=at_least(1, "max_children", max_children),
            nodes=at_least(1, "max_nodes", max_nodes),
            depth=at_least(1, "max_depth", max_depth),
        )
        return render(self, excerpts(decode), limits)

    def summary(self) -> TreeSummary:
        """How depth, fan-out, length, age and idle time are spread over the nodes. O(nodes)."""
        from prefixtree.view_summary import summarize

        return summarize(self)

    def to_dicts(self, decode: Decode | None = None) -> list[dict[str, Any]]:
        """One dict of plain Python values a node, in the view's order; `json.dumps` takes them.

        `parent` is an index into the list, or None; with `decode` there is a `text`. Raises
        `DecodeFailed`.
        """
        from prefixtree.view_export import to_dicts

        return to_dicts(self, decode)

    def to_pandas(self, decode: Decode | None = None) -> pandas.DataFrame:
        """The same as a DataFrame with the node's number for its index. ImportError without pandas.

        Raises `DecodeFailed`.
        """
        from prefixtree.view_export import to_pandas

        return to_pandas(self, decode)

    def to_networkx(self, decode: Decode | None = None) -> networkx.DiGraph[int]:
        """The same as a graph with edges downward, each node with those values for attributes.

        The roots are in it, too: -1 for that of `namespaces[0]` and so on, with the attribute
        `namespace`. ImportError without networkx, `DecodeFailed`.
        """
        from prefixtree.view_export import to_networkx

        return to_networkx(self, decode)

    def to_html(
        self,
        path: str | os.PathLike[str],
        decode: Decode | None = None,
        *,
        title: str = "prefixtree",
        tier: Tier | None = None,
    ) -> None:
        """Writes a page to look at the tree and the pool in a browser: one file, no network.

        `decode` turns token ids into text; without it the ids are shown. Long text is cut so that
        a page of 100,000 nodes stays below some 20 MB. `tier`, asked once for each node but the
        roots, names where its KV is: the page then colours by tier, too. Raises `DecodeFailed`,
        `TierFailed` and OSError.
        """
        from prefixtree.inspector.page import page
        from prefixtree.inspector.payload import frame

        shown = frame(self, decode, tier=tier)
        Path(path).write_text(page([shown], title=title), encoding="utf-8")

    def _repr_html_(self) -> str:
        from prefixtree.notebook import tree_html

        return tree_html(self)

    def _summed(self, values: npt.NDArray[Any]) -> Int64s:
        """[N] the sum of `values` over each node and all below it."""
        sums = _ends(values)
        first = np.arange(len(self))
        result: Int64s = sums[first + self.size] - sums[first]
        return result

    def _only(self, kept: npt.NDArray[np.bool_]) -> TreeView:
        """These rows; with each comes the one above it."""
        rows = np.flatnonzero(kept)
        number = np.cumsum(kept, dtype=np.int32) - 1
        above = self.parent[rows]
        held = np.diff(self.block_ends)[rows]
        columns = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if field.name in PER_NODE
        }
        columns["parent"] = np.where(above < 0, above, number[np.maximum(above, 0)])
        columns["size"] = self._summed(kept)[rows].astype(np.int32)
        return dataclasses.replace(
            self,
            **columns,
            edges=tuple([self.edges[row] for row in rows.tolist()]),
            blocks=self.blocks[spans(self.block_ends[rows], held)],
            block_ends=_ends(held),
        )


PER_NODE = (
    *["parent", "size", "depth", "namespace", "start", "length", "pending", "offset"],
    *["pins", "hits", "idle", "age", "writer"],
)
"""The fields of a view that have an entry a node."""


def _ends(counts: npt.NDArray[Any]) -> Int64s:
    """[N + 1] 0, then the running sum; read-only."""
    ends = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    ends.flags.writeable = False
    return ends
