"""What holds for a node by itself, checked for any nodes: all of them, or a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from allocator import BlockPool, BlockSet, BrokenInvariant
from prefixtree.columns import Column, Int64s
from prefixtree.pins import Pins
from prefixtree.tree import ROOT, RadixTree


def num_tokens(tree: RadixTree, nodes: Int64s) -> Int64s:
    """Tokens of each node that have a slot, committed or not."""
    writer, length = np.asarray(tree.nodes.writer)[nodes], np.asarray(tree.nodes.length)[nodes]
    sizes: Int64s = np.where(writer != 0, np.asarray(tree.tail_tokens.size)[nodes], length)
    return sizes


class NodeChecks:
    """Each check takes distinct nodes without the root, and costs O(nodes) in vector operations.

    They raise `BrokenInvariant`, and build on one another in the order in which they stand here.
    """

    def __init__(
        self, tree: RadixTree, pool: BlockPool | BlockSet, pins: Pins, tails: dict[int, int]
    ) -> None:
        """`tails`: those of the open sequences by their serial number."""
        self._tree = tree
        self._pool = pool
        self._pins = pins
        self._tails = tails

    def counters(self) -> None:
        """Free and used blocks are all, and nothing is more than what it is a part of."""
        pool, pins, cached = self._pool, self._pins, self._tree.cached_tokens
        used = int(np.count_nonzero(pool.refs))
        if pool.num_free + used != pool.num_blocks:
            raise BrokenInvariant(
                f"{pool.num_free} free and {used} used blocks are not all {pool.num_blocks}"
            )
        if not 0 <= pins.evictable_blocks <= used:
            raise BrokenInvariant(f"{pins.evictable_blocks} evictable of {used} used blocks")
        if not 0 <= pins.evictable_tokens <= cached:
            raise BrokenInvariant(f"{pins.evictable_tokens} evictable of {cached} cached tokens")
        if cached > used * pool.block_size:
            raise BrokenInvariant(f"{cached} cached tokens on {used} blocks")

    def links(self, nodes: Int64s) -> None:
        """Nodes hang where their parents end; roots are empty, and all others linked or tails."""
        table = self._tree.nodes
        parent, length, linked = self._of(nodes, table.parent, table.length, table.linked)
        start, writer, written = self._of(nodes, table.start, table.writer, table.written)
        for at in np.flatnonzero((parent < 0) | (parent >= len(table.used)) | (parent == nodes)):
            raise BrokenInvariant(f"node {nodes[at]} hangs below {parent[at]}, which is no node")
        used, begin, count, other = self._of(
            parent, table.used, table.start, table.length, table.writer
        )
        for at in np.flatnonzero(used == 0):
            raise BrokenInvariant(f"node {nodes[at]} hangs below {parent[at]}, which is free")
        for node in nodes[length < 0]:
            raise BrokenInvariant(f"node {node} has {table.length[node]} tokens")
        for at in np.flatnonzero(start != begin + count):
            raise BrokenInvariant(
                f"node {nodes[at]} starts at {start[at]}, not where its parent ends,"
                f" {begin[at] + count[at]}"
            )
        for at in np.flatnonzero(other):
            raise BrokenInvariant(f"node {nodes[at]} hangs below the tail {parent[at]}")
        for node in nodes[np.isin(nodes, list(self._tails.values())) != (writer != 0)]:
            raise BrokenInvariant(
                f"node {node} has writer {table.writer[node]}, but open sequences say otherwise"
            )
        # Few are tails or empty: those are looked up one by one.
        for node in nodes[writer != 0].tolist():
            if self._tails.get(table.writer[node]) != node:
                raise BrokenInvariant(f"node {node} is the tail of another open sequence")
        for node in nodes[length == 0].tolist():
            if self._tree.is_root(node):
                if table.parent[node] != ROOT:
                    raise BrokenInvariant(f"node {node}, a namespace's root, is not at the top")
            elif not table.writer[node]:
                raise BrokenInvariant(f"node {node} is neither in the tree nor a tail")
            elif table.linked[node]:
                raise BrokenInvariant(f"node {node} is empty but linked")
        for node in nodes[(length > 0) & (linked == 0)]:
            raise BrokenInvariant(f"node {node} has tokens but is not linked")
        whole = written - written % self._tree.align
        for at in np.flatnonzero((writer != 0) & (whole != length)):
            raise BrokenInvariant(
                f"tail {nodes[at]}: {length[at]} tokens to be found of {written[at]} committed"
            )
        for node in nodes[length % self._tree.align != 0]:
            raise BrokenInvariant(
                f"node {node} has {table.length[node]} tokens, no multiple of {self._tree.align}"
            )

    def sizes(self, nodes: Int64s) -> None:
        """Nodes hold just the blocks that they need, all of them in use."""
        tree, table = self._tree, self._tree.nodes
        offset, length, shares = self._of(nodes, table.offset, table.length, table.shares_first)
        size, held = num_tokens(tree, nodes), np.asarray(tree.blocks.size)[nodes]
        for at in np.flatnonzero(size < length):
            raise BrokenInvariant(
                f"tail {nodes[at]} has {size[at]} tokens, {length[at]} of them committed"
            )
        for at in np.flatnonzero((offset < 0) | (offset >= tree.block_size)):
            raise BrokenInvariant(f"node {nodes[at]} begins at {offset[at]} of a block")
        needed = -(-(offset + size) // tree.block_size)
        for at in np.flatnonzero(held != needed):
            raise BrokenInvariant(
                f"node {nodes[at]} holds {held[at]} blocks but needs {needed[at]}"
            )
        for at in np.flatnonzero((shares != 0) & ((held == 0) | (offset == 0) | (shares != 1))):
            raise BrokenInvariant(f"node {nodes[at]} shares a first block that it does not have")
        blocks, owners = tree.blocks.gather(nodes, held), np.repeat(nodes, held)
        for at in np.flatnonzero((blocks < 0) | (blocks >= self._pool.num_blocks)):
            raise BrokenInvariant(
                f"node {owners[at]} holds block {blocks[at]} of {self._pool.num_blocks}"
            )
        for at in np.flatnonzero(self._pool.refs[blocks] < 1):
            raise BrokenInvariant(
                f"node {owners[at]} holds block {blocks[at]}, which has"
                f" {self._pool.refs[blocks[at]]} references"
            )

    def found(self, nodes: Int64s) -> None:
        """Tokens are as many as said, and walks find the node by the first of them."""
        tree, table = self._tree, self._tree.nodes
        nodes = nodes[np.asarray(table.length)[nodes] > 0]
        listed = nodes.tolist()
        edges = list(map(tree.edge, listed))
        (length,) = self._of(nodes, table.length)
        known = np.fromiter(map(len, edges), np.int64, len(edges))
        for at in np.flatnonzero(known != 4 * length):
            raise BrokenInvariant(
                f"node {nodes[at]} has {length[at]} tokens but {known[at]} bytes of them"
            )
        parents = np.asarray(table.parent)[nodes].tolist()
        found = np.fromiter(map(tree.child, parents, edges), np.int64, len(edges))
        for at in np.flatnonzero(found != nodes):
            raise BrokenInvariant(
                f"node {nodes[at]} is not found from its parent {parents[at]}, which has"
                f" {found[at]} in its place"
            )

    def paths(self, nodes: Int64s) -> None:
        """Pins never grow downward, and who says to share its first block does, with one above."""
        tree, table = self._tree, self._tree.nodes
        pins, shares, parent = self._of(nodes, table.pins, table.shares_first, table.parent)
        for node in nodes[pins < 0]:
            raise BrokenInvariant(f"node {node} has {table.pins[node]} pins")
        count = np.asarray(tree.blocks.size)
        first = np.full(len(nodes), -1)
        holding = np.flatnonzero(count[nodes])
        first[holding] = tree.blocks.at(nodes[holding], np.zeros(len(holding), np.int64))
        shared = np.zeros(len(nodes), np.bool_)
        (climbing,) = np.nonzero(parent != ROOT)
        below, above = nodes[climbing], parent[climbing].astype(np.int64)
        while len(climbing):
            up, begin, length, over = self._of(
                above, table.parent, table.start, table.length, table.pins
            )
            start, under = self._of(below, table.start, table.pins)
            # Where these hold, starts shrink on the way up: there is no way in circles.
            for at in np.flatnonzero((begin + length != start) | ((length < 1) & (up != ROOT))):
                raise BrokenInvariant(
                    f"node {below[at]}, above or at {nodes[climbing[at]]}, does not start where"
                    f" {above[at]} above it ends"
                )
            for at in np.flatnonzero(over < under):
                raise BrokenInvariant(
                    f"node {below[at]} has {under[at]} pins, more than {above[at]} above it:"
                    f" {over[at]}"
                )
            held = count[above]
            full = np.flatnonzero(held)
            last = tree.blocks.at(above[full], held[full] - 1)
            shared[climbing[full]] |= last == first[climbing[full]]
            on = up != ROOT
            climbing, below, above = climbing[on], above[on], up[on].astype(np.int64)
        for at in np.flatnonzero(shared != (shares != 0)):
            raise BrokenInvariant(f"node {nodes[at]} misjudges who holds its first block")

    def order(self, nodes: Int64s) -> None:
        """The unpinned leaves are in the eviction order, and no other node."""
        table, order = self._tree.nodes, self._pins.order
        pins, children, length = self._of(nodes, table.pins, table.children, table.length)
        leaf = (pins == 0) & (children == 0)
        for node in nodes[leaf & (length == 0)]:
            raise BrokenInvariant(f"node {node} is the root of a namespace without anything")
        ordered = np.fromiter(map(order.__contains__, nodes.tolist()), np.bool_, len(nodes))
        for at in np.flatnonzero(ordered != leaf):
            raise BrokenInvariant(
                f"node {nodes[at]} with {pins[at]} pins and {children[at]} children is"
                f" {'' if ordered[at] else 'not '}in the eviction order"
            )

    def _of(self, nodes: Int64s, *columns: Column) -> list[npt.NDArray[Any]]:
        return [np.asarray(column)[nodes] for column in columns]
