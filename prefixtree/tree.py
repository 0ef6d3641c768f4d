"""The radix tree: token sequences mapped to the blocks that hold their KV.

A node is an edge of the tree: its tokens and the slots of their KV, as (blocks, offset of the first
token in the first block, length). A split inside a block leaves both halves on that block, so that
sharing is exact to the token at any block size and nothing is ever copied.

The tree only decides: it changes its own tables and returns what is to be done about blocks (held
once more, let go). It knows neither the pool nor who evicts.

Every open sequence owns one node, its *tail*, that it alone writes: `writer` is the sequence's
serial number. A tail hangs below its parent from the start; it is *linked* (found by walks) once it
has committed tokens. Its `length` counts the committed tokens, its `tail_tokens` all of them, so
that a decode step of a whole batch is a few vector operations; the token bytes that walks compare
are brought up to date when a walk comes by.

Matches, and so nodes, are whole multiples of `align` tokens: 1, or a block for engines whose
kernels read plain block tables. Children of a node differ in their first `align` tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from prefixtree.columns import NOTHING, Column, Columns, FloatColumn, Int32s, Int64s
from prefixtree.errors import InvalidNamespace
from prefixtree.ragged import RaggedInts
from prefixtree.tokens import agreement

if TYPE_CHECKING:
    from prefixtree.journal import Journal

ROOT = 0

Namespace: TypeAlias = "str | tuple[str | int | None, ...]"
"""Who may share: sequences of different namespaces never match each other."""

DEFAULT: Namespace = ""


def as_namespace(value: Namespace) -> Namespace:
    """Raises `InvalidNamespace` for what is neither a string nor a tuple of str, int and None."""
    if isinstance(value, str):
        return value
    # As Python compares, True would be the same tenant as 1.
    kinds = (str, int, type(None))
    if isinstance(value, tuple) and all(type(part) in kinds for part in value):
        return value
    raise InvalidNamespace(f"namespace must be a str or a tuple of str, int, None, got {value!r}")


class NodeTable(Columns):
    """One row a node."""

    FIELDS: ClassVar[dict[str, str]] = {
        "parent": "i",
        "children": "i",
        "start": "q",
        "length": "q",
        "written": "q",
        "offset": "i",
        "shares_first": "b",
        "linked": "b",
        "writer": "q",
        "pins": "i",
        "last_used": "q",
        "clock": "d",
        "created": "q",
        "uses": "q",
        "made_at": "d",
        "idle_since": "d",
        "place": "i",
    }
    parent: Column
    children: Column  # how many linked nodes hang below
    start: Column  # position of the first token in its path
    length: Column  # tokens that walks find
    written: Column  # of a tail: committed tokens, those too that do not fill an `align` yet
    offset: Column  # of the first token in the first block
    shares_first: Column  # 1 when a node above holds the first block as well
    linked: Column  # 1 when walks find the node
    writer: Column  # serial number of the sequence whose tail this is, else 0
    pins: Column  # open sequences, and pins for good, whose path passes through
    last_used: Column  # tick at which the last pin went
    clock: FloatColumn  # the eviction order's clock then
    created: Column  # a number that grows from node to node
    uses: Column  # pins ever
    made_at: FloatColumn  # seconds: when the sequence that wrote it was opened
    idle_since: FloatColumn  # seconds: when the last pin went
    place: Column  # scratch of `build_forest`, 0 outside of it


class Place(NamedTuple):
    """Where a walk ended: behind `node`, and `within` tokens into its child `child`."""

    node: int
    consumed: int  # tokens of the walk up to the end of `node`
    child: int  # -1 when no child begins with the next token, or there is none
    within: int  # 0 when child is -1

    @property
    def matched(self) -> int:
        return self.consumed + self.within


NOWHERE = Place(ROOT, 0, -1, 0)
"""Where a walk ends in a namespace that holds nothing."""


class RadixTree:
    """Nodes by number. Node 0 is the root: empty, always there, on top of the default namespace.

    Every other namespace has a root of its own: an empty node below the root that no walk from
    elsewhere finds. It is pinned by the sequences below like any node, and goes when nothing is
    left below it.
    """

    def __init__(self, block_size: int, align: int = 1) -> None:
        self.block_size = block_size
        self.align = align
        self.nodes = NodeTable()
        # An array of `bytes`, since the garbage collector does not walk through arrays.
        self.tokens: npt.NDArray[np.object_] = np.empty(0, np.object_)
        self.blocks = RaggedInts()
        self.tail_tokens = RaggedInts()
        self.cached_tokens = 0  # in linked nodes
        self.branches = 0  # nodes, and roots, that have children
        self.journal: Journal | None = None  # told of all that walks find, or no longer find
        self._made = 0
        # One dict for all edges, (first tokens of the child, node) -> child, both in one int: a
        # million nodes are then one container for the garbage collector, not a million.
        self._child: dict[int, int] = {}
        self._root_of: dict[Namespace, int] = {}
        self._namespace_of: dict[int, Namespace] = {}
        self.add_root(DEFAULT)

    def add(self, parent: int, writer: int) -> int:
        """An empty, unlinked, unpinned node behind `parent`. O(1)."""
        nodes = self.nodes
        node = nodes.new()
        if node >= len(self.tokens):
            self._reach(2 * node)
        nodes.parent[node] = parent
        nodes.start[node] = 0 if node == ROOT else self.end(parent)
        nodes.writer[node] = writer
        self._made += 1
        nodes.created[node] = self._made
        nodes.children[node] = nodes.linked[node] = nodes.pins[node] = nodes.uses[node] = 0
        nodes.length[node] = nodes.written[node] = nodes.offset[node] = 0
        nodes.shares_first[node] = nodes.last_used[node] = 0
        nodes.clock[node] = nodes.made_at[node] = nodes.idle_since[node] = 0.0
        return node

    def add_root(self, namespace: Namespace) -> int:
        """A root for a namespace that has none, unpinned. O(1)."""
        node = self.add(ROOT, writer=0)
        self.nodes.linked[node] = 1
        self._root_of[namespace] = node
        self._namespace_of[node] = namespace
        return node

    def plant(
        self,
        namespaces: Sequence[Namespace],
        fields: Mapping[str, npt.NDArray[Any]],
        tokens: Int32s,
        blocks: Int32s,
    ) -> None:
        """Fills a tree that has nothing but its root with N nodes that belong to no sequence.

        `fields`: int arrays [N] by column name, 0 for columns not named. Nodes get ascending
        numbers; `parent` counts nodes from 0 or is ~i for the root of `namespaces[i]`. `tokens`
        and `blocks` are those of all nodes, packed. The caller has checked that all this fits
        together. A few vector operations, and a slice and a dictionary entry a node.
        """
        nodes = self.nodes
        roots = [
            ROOT if namespace == DEFAULT else self.add_root(namespace) for namespace in namespaces
        ]
        length, parent = fields["length"], fields["parent"]
        count = len(length)
        first = nodes.extend(count)
        above = parent.astype(np.int64) + first
        top = parent < 0
        above[top] = np.array(roots, np.int64)[~parent[top]]
        for name, values in {**fields, "parent": above}.items():
            np.asarray(getattr(nodes, name))[first : first + count] = values
        np.asarray(nodes.linked)[first : first + count] = 1
        below = np.bincount(above, minlength=first + count)
        np.asarray(nodes.children)[: first + count] = below
        self.branches = int(np.count_nonzero(below))

        ends = np.cumsum(length)
        packed, cuts = tokens.tobytes(), [0, *(4 * ends).tolist()]
        edges = [packed[start:stop] for start, stop in pairwise(cuts)]
        self._reach(first + count)
        self.tokens[first : first + count] = edges
        keys = map(self._key, above.tolist(), edges)
        self._child = dict(zip(keys, range(first, first + count), strict=True))
        held = -(-(fields["offset"] + length) // self.block_size)
        self.blocks.extend(np.arange(first, first + count), held, blocks)
        self.cached_tokens = len(tokens)
        self._made = max(self._made, int(fields["created"].max(initial=0)))

    def _reach(self, node: int) -> None:
        """Makes room for the tokens and blocks of nodes up to this one."""
        tokens = np.full(node + 1, b"", np.object_)
        tokens[: len(self.tokens)] = self.tokens
        self.tokens = tokens
        self.blocks.reach(node)
        self.tail_tokens.reach(node)

    def root_of(self, namespace: Namespace) -> int:
        """The root of a namespace, or -1 when nothing is in it."""
        return self._root_of.get(namespace, -1)

    @property
    def num_roots(self) -> int:
        return len(self._root_of)

    @property
    def num_edges(self) -> int:
        """How many nodes walks can find."""
        return len(self._child)

    def root_above(self, node: int) -> int:
        """The root of the namespace that the node is in. O(depth)."""
        while node not in self._namespace_of:
            node = self.nodes.parent[node]
        return node

    def namespace_above(self, node: int) -> Namespace:
        """The namespace that the node is in. O(depth)."""
        return self._namespace_of[self.root_above(node)]

    def below(self, top: int) -> Int64s:
        """The linked nodes below `top`, deepest first. O(nodes * depth), vectorised."""
        nodes = self.nodes
        parents = np.asarray(nodes.parent)
        linked = np.flatnonzero(np.asarray(nodes.length))
        inside = np.zeros(len(parents), np.bool_)
        level = linked[parents[linked] == top]
        while len(level):
            inside[level] = True
            level = linked[inside[parents[linked]] & ~inside[linked]]
        found = np.flatnonzero(inside)
        return found[np.argsort(-np.asarray(nodes.start)[found], kind="stable")]

    def is_root(self, node: int) -> bool:
        return node in self._namespace_of

    def roots(self) -> Iterator[tuple[Namespace, int]]:
        return iter(self._root_of.items())

    def end(self, node: int) -> int:
        """Position behind the node's last committed token."""
        return self.nodes.start[node] + self.nodes.length[node]

    def child(self, node: int, data: bytes) -> int:
        """The child that begins with the first `align` tokens of `data`, or -1."""
        return self._child.get(self._key(node, data), -1)

    def aligned(self, length: int) -> int:
        """`length` rounded down to what can be a node's."""
        return length - length % self.align

    def edge(self, node: int) -> bytes:
        """The node's tokens as int32 bytes, brought up to date after commits and cuts."""
        known: bytes = self.tokens[node]
        size = 4 * self.nodes.length[node]
        if len(known) < size:
            fresh = self.tail_tokens.get(node)[len(known) // 4 : size // 4]
            known = self.tokens[node] = known + fresh.tobytes()
        elif len(known) > size:
            known = self.tokens[node] = known[:size]
        return known

    def walk(self, wanted: Int32s, node: int = ROOT) -> Place:
        """Follows `wanted` down from the end of `node` as far as the tree goes.

        One dictionary lookup and one comparison in C a node passed; tokens behind the match are
        not read.
        """
        align = self.align
        total = len(wanted)
        at = 0
        tokens, length = self.tokens, self.nodes.length
        memory = wanted.data  # quicker to slice than an array
        while at + align <= total:
            # As in `_key`: of one token the bytes are the same number, since none is negative.
            first = (
                memory[at] if align == 1 else int.from_bytes(memory[at : at + align], sys.byteorder)
            )
            child = self._child.get(first << 32 | node, -1)
            if child < 0:
                break
            edge = tokens[child]
            if len(edge) != 4 * length[child]:
                edge = self.edge(child)
            end = at + len(edge) // 4
            # Of a slice that is as long as the edge, `startswith` tells equality without a copy.
            if end > total or not edge.startswith(memory[at:end]):
                known = np.frombuffer(edge, np.int32)
                return Place(node, at, child, self.aligned(agreement(known, wanted[at:end])))
            at, node = end, child
        return Place(node, at, -1, 0)

    def path(self, node: int) -> list[int]:
        """The nodes from the first below the root down to `node`. O(depth)."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.nodes.parent[node]
        return path[::-1]

    def own_blocks(self, node: int) -> int:
        """Blocks that come free when the node goes, once those below it have gone.

        All nodes that hold a block lie on one path, and the topmost of them outlives the others.
        """
        return self.blocks.size[node] - self.nodes.shares_first[node]

    def blocks_for(self, node: int, length: int) -> int:
        """Blocks that the node needs for `length` tokens."""
        return -(-(self.nodes.offset[node] + length) // self.block_size)

    def token(self, node: int, index: int) -> int:
        """The token id at `index` of a linked node's tokens."""
        # Bytes beyond a cut do no harm here; to drop them would cost a copy of the rest each time.
        known = self.edge(node) if self.nodes.writer[node] else self.tokens[node]
        return int.from_bytes(known[4 * index : 4 * index + 4], sys.byteorder)

    def slots(self, node: int, start: int, stop: int) -> Int64s:
        """Slots of the node's tokens start..stop-1, counted from its first."""
        places = np.arange(start, stop) + self.nodes.offset[node]
        blocks = self.blocks.get(node)[places // self.block_size].astype(np.int64)
        return blocks * self.block_size + places % self.block_size

    def link(self, node: int) -> bool:
        """Makes a node findable that has a length, unless a sibling begins like it; whether so."""
        nodes = self.nodes
        parent = nodes.parent[node]
        if self._child.setdefault(self._key_of(node), node) != node:
            return False
        self.branches += not nodes.children[parent]
        nodes.children[parent] += 1
        nodes.linked[node] = 1
        self.cached_tokens += nodes.length[node]
        if self.journal is not None:
            self.journal.grew(node)
        return True

    def attach(self, parent: int, tokens: Int32s, blocks: Int32s) -> int:
        """A new leaf of whole blocks behind `parent`, unpinned; no child may begin like it."""
        leaf = self.add(parent, writer=0)
        self.nodes.length[leaf] = len(tokens)
        self.tokens[leaf] = tokens.tobytes()
        self.blocks.set(leaf, blocks)
        self.link(leaf)
        return leaf

    def lengthen(self, leaf: int, tokens: Int32s, blocks: Int32s) -> None:
        """Puts whole blocks behind the whole blocks of a leaf that is no tail. O(its tokens)."""
        self.tokens[leaf] = self.edge(leaf) + tokens.tobytes()
        self.nodes.length[leaf] += len(tokens)
        self.blocks.set(leaf, np.concatenate([self.blocks.get(leaf), blocks]))
        self.cached_tokens += len(tokens)
        if self.journal is not None:
            self.journal.grew(leaf)

    def replace(self, node: int, first: int, blocks: Int32s) -> None:
        """Puts the node's tokens on other blocks, from its block `first` on; no node shares any.

        O(blocks); with a journal O(nodes), since what lies behind a block that goes goes with it.
        """
        if self.journal is not None:
            behind = np.append(self.below(node), node)
            for one in behind.tolist():
                kept = first if one == node else 0
                self.journal.cut(one, kept * self.block_size, self.blocks.get(one)[kept:])
            self.journal.all_grew(behind)
        self.blocks.get(node)[first : first + len(blocks)] = blocks

    def split(self, node: int, length: int) -> tuple[int, int]:
        """Puts the first `length` tokens into a new node above `node`.

        `node` keeps the rest, its number, its children and, if it is a tail, its writer. Only a
        tail may keep no committed token; it is then no longer linked. Returns the new node and the
        block that both now hold (to be referenced once more), or -1 where they share none.
        """
        nodes = self.nodes
        edge = self.edge(node)
        upper = self.add(nodes.parent[node], writer=0)
        for column in (
            nodes.offset,
            nodes.shares_first,
            nodes.pins,
            nodes.last_used,
            nodes.created,
            nodes.uses,
        ):
            column[upper] = column[node]
        for moment in (nodes.clock, nodes.made_at, nodes.idle_since):
            moment[upper] = moment[node]
        nodes.length[upper] = length
        nodes.linked[upper] = 1
        self._child[self._key(nodes.parent[node], edge)] = upper
        self.tokens[upper] = edge[: 4 * length]

        whole, rest = divmod(nodes.offset[node] + length, self.block_size)
        if rest:
            self.blocks.set(upper, self.blocks.get(node)[: whole + 1])
            self.blocks.drop_front(node, whole)
        else:
            self.blocks.hand_front(node, whole, upper)
        nodes.parent[node] = upper
        self._advance(node, length)
        nodes.length[node] -= length
        if nodes.length[node]:
            self._child[self._key(upper, self.tokens[node])] = node
            nodes.children[upper] = 1
            self.branches += 1
        else:
            nodes.linked[node] = 0
        if self.journal is not None:
            self.journal.grew(upper)
        if not rest:
            return upper, -1
        nodes.shares_first[node] = 1
        return upper, self.blocks.first(node)

    def mergeable(self, node: int) -> bool:
        """Whether the node and its parent could be one: no sibling, same sequences, slots go on."""
        nodes = self.nodes
        parent = nodes.parent[node]
        return (
            nodes.length[parent] > 0
            and nodes.children[parent] == 1
            and nodes.pins[parent] == nodes.pins[node]
            and not nodes.writer[node]
            and (nodes.offset[parent] + nodes.length[parent]) % self.block_size
            == nodes.offset[node]
            and (not nodes.offset[node] or self.blocks.last(parent) == self.blocks.first(node))
        )

    def merge(self, node: int) -> int:
        """Undoes a split: the node takes its parent's tokens in front of its own.

        The nodes must be `mergeable`. Returns the block that they held twice (one reference is to
        be let go), or -1.
        """
        nodes = self.nodes
        parent = nodes.parent[node]
        shared = self.blocks.first(node) if nodes.offset[node] else -1
        del self._child[self._key(parent, self.tokens[node])]
        self.tokens[node] = self.tokens[parent] + self.tokens[node]
        self.blocks.set(
            node,
            np.concatenate([self.blocks.get(parent), self.blocks.get(node)[int(shared >= 0) :]]),
        )
        nodes.parent[node] = nodes.parent[parent]
        for column in (nodes.start, nodes.offset, nodes.shares_first):
            column[node] = column[parent]
        nodes.length[node] += nodes.length[parent]
        self._child[self._key(nodes.parent[node], self.tokens[node])] = node
        self.branches -= 1
        self._forget(parent)
        return shared

    def drop_front(self, tail: int, count: int) -> Int32s:
        """Drops the first `count` tokens of an unlinked tail; returns a copy of the blocks to let
        go."""
        dropped = (self.nodes.offset[tail] + count) // self.block_size
        gone = self.blocks.get(tail)[:dropped].copy()
        self.blocks.drop_front(tail, dropped)
        self._advance(tail, count)
        self.nodes.length[tail] -= count
        return np.concatenate([gone, self.trim(tail)])

    def trim(self, tail: int) -> Int32s:
        """Takes from a tail the blocks that none of its tokens uses; returns a view of them.

        An empty tail keeps a block only to go on in it behind the node above.
        """
        nodes = self.nodes
        size = self.tail_tokens.size[tail]
        if not size and not nodes.shares_first[tail]:
            nodes.offset[tail] = 0
        needed = self.blocks_for(tail, size)
        if needed == self.blocks.size[tail]:
            return NOTHING
        gone = self.blocks.get(tail)[needed:]
        self.blocks.truncate(tail, needed)
        return gone

    def rehang(self, tail: int, node: int) -> Int32s:
        """Puts an empty tail behind another node; returns the blocks to let go, as `trim`."""
        nodes = self.nodes
        nodes.parent[tail] = node
        nodes.start[tail] = self.end(node)
        nodes.shares_first[tail] = 0
        return self.trim(tail)

    def freeze(self, tail: int) -> None:
        """Makes a linked tail an ordinary node; its uncommitted tokens must be gone."""
        self.edge(tail)
        self.nodes.writer[tail] = 0
        self.tail_tokens.clear(tail)

    def remove(self, node: int) -> Int32s:
        """Takes a leaf or an unlinked tail out; returns a view of the blocks to let go."""
        nodes = self.nodes
        held = self.blocks.get(node)
        if node in self._namespace_of:
            del self._root_of[self._namespace_of.pop(node)]
        elif nodes.linked[node]:
            parent = nodes.parent[node]
            if self.journal is not None:
                self.journal.cut(node, 0, held)
            del self._child[self._key_of(node)]
            nodes.children[parent] -= 1
            self.branches -= not nodes.children[parent]
            self.cached_tokens -= nodes.length[node]
        self._forget(node)
        return held

    def cut_back(self, leaf: int, length: int) -> Int32s:
        """Drops a leaf's tokens from `length` on; returns a view of the blocks to let go.

        O(blocks dropped), amortised: the bytes are cut when a walk comes by or half are of no use.
        """
        nodes = self.nodes
        index, within = divmod(nodes.offset[leaf] + length, self.block_size)
        behind = self.blocks.get(leaf)[index:]
        if self.journal is not None:
            self.journal.cut(leaf, length, behind)
        self.cached_tokens -= nodes.length[leaf] - length
        nodes.length[leaf] = length
        if len(self.tokens[leaf]) > 8 * length:
            self.edge(leaf)
        kept = 1 if within else 0
        self.blocks.truncate(leaf, index + kept)
        return behind[kept:]

    def _advance(self, node: int, count: int) -> None:
        """Moves the node's first token `count` further, in all but its length, parent, blocks."""
        nodes = self.nodes
        whole, nodes.offset[node] = divmod(nodes.offset[node] + count, self.block_size)
        nodes.start[node] += count
        nodes.shares_first[node] = 0 if whole else nodes.shares_first[node]
        self.tokens[node] = self.tokens[node][4 * count :]
        if nodes.writer[node]:
            nodes.written[node] -= count
            self.tail_tokens.drop_front(node, count)

    def _forget(self, node: int) -> None:
        self.blocks.clear(node)
        if self.nodes.writer[node]:
            self.tail_tokens.clear(node)
        self.tokens[node] = b""
        self.nodes.writer[node] = 0  # handles and batches see from it that a sequence has ended
        self.nodes.length[node] = 0
        self.nodes.free(node)

    def _key_of(self, node: int) -> int:
        """What the node is found by."""
        parent = self.nodes.parent[node]
        if not self.nodes.writer[node]:
            return self._key(parent, self.tokens[node])
        if self.align == 1:
            return self.tail_tokens.first(node) << 32 | parent
        return self._key(parent, self.tail_tokens.get(node)[: self.align].tobytes())

    def _key(self, node: int, data: bytes) -> int:
        """What the child of `node` is found by that begins with the first `align` of these."""
        return int.from_bytes(data[: 4 * self.align], sys.byteorder) << 32 | node
