"""What changed in a tree since somebody asked last, in whole blocks.

A *whole block* is `block_size` tokens of a path that begin at a multiple of it: what the world
outside, that knows paths only, can share. It is there as long as walks find its last token. The KV
of that token lies in one block of the pool, and no other whole block ends in the same one: the
tokens in a block lie on one path, one behind the other, so one multiple of `block_size` at most is
among their positions. There they stay, whatever nodes are split and merged. So a whole block goes
by the id of the block that it ends in, and all there is to remember of each is one bit.

The tree notes only where something changed, in about a microsecond: which nodes grew, and what was
cut off that was told. What came is found out when `take` asks, by the state then: to ask seldom
loses nothing, and what was not told until it went needs no note. Nor do nodes that merge:
what lies behind something untold is untold itself, so the node that remains was noted before.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefixtree.columns import NOTHING, Int32s, Int64s
from prefixtree.tree import DEFAULT, Namespace, RadixTree

NOTES = 1024
"""Notes of nodes that grew that are kept before those of the same node are made one."""


class Changes(NamedTuple):
    """Whole blocks that went, and then those that came in R runs, each a piece of a path."""

    removed: Int32s
    """Those of them that were told went, each once and what lies behind another block on its path
    before it. Some that were not may be among them."""
    parents: Int32s
    """[R] the block in front of a run, told before it; -1 where a path begins."""
    counts: Int64s
    """[R] blocks of each run."""
    namespaces: dict[int, Namespace]
    """Of the runs that begin a path, by index; those in the default namespace are left out."""
    stored: Int32s
    """The blocks of the runs, packed."""
    tokens: list[Int32s]
    """Their tokens, `block_size` each, in pieces of any size. Those of nodes that no open sequence
    writes are not copied."""

    def __bool__(self) -> bool:
        return bool(len(self.removed) or len(self.stored))


class _Runs(NamedTuple):
    """Blocks to tell of in one node each."""

    nodes: Int64s
    firsts: Int64s
    """Index among the node's blocks of the one that the first new whole block ends in."""
    counts: Int64s
    begins: Int64s
    """Position of the first token of the first new whole block."""

    def where(self, chosen: npt.NDArray[np.bool_] | Int64s) -> _Runs:
        return _Runs(*(column[chosen] for column in self))


class Journal:
    """Of one tree, which writes to it while it is the tree's `journal`.

    Notes of the same node are made one now and then, and a block is cut only once, so that notes
    take no more memory than the nodes and the blocks do, however seldom `take` is called.
    """

    def __init__(self, tree: RadixTree) -> None:
        """What is in the tree already counts as having come just now. O(nodes)."""
        self._tree = tree
        self._told: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)  # by block: told, not cut since
        self._grown: list[int] = []
        self._batches = [np.flatnonzero(np.asarray(tree.nodes.length))]
        self._cut: list[Int64s] = []
        self._room = NOTES

    def grew(self, node: int) -> None:
        """Walks find tokens in this node that they did not find there before. O(1)."""
        self._grown.append(node)
        if len(self._grown) > self._room:
            self._unite_grown()

    def all_grew(self, nodes: Int64s) -> None:
        """As `grew` for each of an array that never changes. O(1)."""
        self._batches.append(nodes)
        if len(self._batches) > NOTES:
            self._unite_grown()

    def cut(self, leaf: int, length: int, blocks: Int32s) -> None:
        """Walks will find only the first `length` of this leaf's tokens. O(blocks told).

        `blocks`: the node's from that of the next token on, to be copied.
        """
        nodes, size, told = self._tree.nodes, self._tree.block_size, self._told
        offset = nodes.offset[leaf]
        within = (offset + length) % size
        # The whole block that ends in the first of these may end before what goes.
        if within and (offset - nodes.start[leaf] - 1) % size < within:
            blocks = blocks[1:]
        # Those told come first in a node: where the first one was not, none was.
        if len(blocks) and (first := blocks.item(0)) < len(told) and told.item(first):
            gone = blocks.astype(np.int64)  # numpy is slow with int32 for an index
            self._cut.append(gone)
            try:
                told[gone] = False
            except IndexError:  # the last ones were never told
                told[gone[gone < len(told)]] = False

    def take(self) -> Changes:
        """What changed since the last call; nothing of what came and went in between.

        A few vector operations, and Python work for each run of new blocks that does not lie in the
        tail of an open sequence.
        """
        # The last block of a node first.
        removed = np.concatenate([NOTHING, *self._cut[::-1]])[::-1].astype(np.int32)
        self._cut = []
        self._unite_grown()
        nodes = self._batches.pop()
        self._room = NOTES
        runs = self._untold(nodes)
        tails = np.asarray(self._tree.nodes.writer)[runs.nodes] > 0
        inside = tails & (runs.begins >= np.asarray(self._tree.nodes.start)[runs.nodes])
        return self._tell(removed, runs.where(~inside), runs.where(inside))

    def _unite_grown(self) -> None:
        """Makes one batch of the nodes, each once."""
        if self._grown or len(self._batches) != 1:  # else it is so already
            grown = np.concatenate([np.array(self._grown, np.int64), *self._batches])
            grown.sort()
            self._batches = [grown[np.diff(grown, prepend=-1) > 0]]
        self._grown = []
        self._room = max(NOTES, len(self._batches[0]) // 16)

    def _is_told(self, blocks: Int32s) -> npt.NDArray[np.bool_]:
        self._reach(blocks)
        return self._told[blocks]

    def _reach(self, blocks: Int32s) -> None:
        """Makes room for what is known of these blocks."""
        needed = int(blocks.max(initial=-1)) + 1
        if needed > len(self._told):
            told = np.zeros(max(needed, 2 * len(self._told)), np.bool_)
            told[: len(self._told)] = self._told
            self._told = told

    def _untold(self, nodes: Int64s) -> _Runs:
        """What is new in these nodes, parents before children."""
        tree, size = self._tree, self._tree.block_size
        table = tree.nodes
        starts = np.asarray(table.start)[nodes]
        ends = np.asarray(table.linked)[nodes] * np.asarray(table.length)[nodes] + starts
        counts = ends // size - starts // size
        some = np.flatnonzero(counts)
        nodes, starts, counts = nodes[some], starts[some], counts[some]
        firsts = (np.asarray(table.offset)[nodes] + (size - 1 - starts % size)) // size
        last = tree.blocks.at(nodes, firsts + counts - 1)
        new = np.flatnonzero(~self._is_told(last))
        new = new[np.argsort(starts[new], kind="stable")]
        nodes, starts, counts, firsts = nodes[new], starts[new], counts[new], firsts[new]
        known = self._count_told(nodes, firsts, counts)
        begins = (starts // size + known) * size
        return _Runs(nodes, firsts + known, counts - known, begins)

    def _count_told(self, nodes: Int64s, firsts: Int64s, counts: Int64s) -> Int64s:
        """How many of each node's whole blocks were told: the first ones, and not the last."""
        low, high = np.zeros_like(counts), counts - 1
        # Mostly none of a new node, or all but the last of a tail; otherwise by bisection.
        self._narrow(low, high, nodes, firsts, low)
        if (low < high).any():
            self._narrow(low, high, nodes, firsts, high - 1)
        while (low < high).any():
            self._narrow(low, high, nodes, firsts, (low + high) // 2)
        return low

    def _narrow(self, low: Int64s, high: Int64s, nodes: Int64s, firsts: Int64s, at: Int64s) -> None:
        """Looks whether block `at` was told where that says more: low <= at < high."""
        rows = np.flatnonzero(low < high)
        at = np.maximum(at[rows], low[rows])
        told = self._is_told(self._tree.blocks.at(nodes[rows], firsts[rows] + at))
        low[rows[told]] = at[told] + 1
        high[rows[~told]] = at[~told]

    def _tell(self, removed: Int32s, runs: _Runs, tails: _Runs) -> Changes:
        """`tails`: those whose tokens all lie in one tail, behind which there is nothing."""
        tree, size = self._tree, self._tree.block_size
        tokens: list[Int32s] = []
        lengths = size * runs.counts
        within = runs.begins - np.asarray(tree.nodes.start)[runs.nodes]
        ready = (within >= 0) & (np.asarray(tree.nodes.writer)[runs.nodes] == 0)
        at = within.tolist(), (within + lengths).tolist()
        rows = zip(tree.tokens[runs.nodes].tolist(), *at, ready.tolist(), strict=True)
        for run, (edge, first, last, is_ready) in enumerate(rows):
            if is_ready:
                tokens.append(np.frombuffer(edge, np.int32)[first:last])
            else:
                begin = int(runs.begins[run])
                self._tokens(tokens, int(runs.nodes[run]), begin, begin + int(lengths[run]))
        if len(tails.nodes):
            lengths = size * tails.counts
            within = tails.begins - np.asarray(tree.nodes.start)[tails.nodes]
            tokens.append(tree.tail_tokens.gather(tails.nodes, lengths, within))
            runs = _Runs(*map(np.concatenate, zip(runs, tails, strict=True)))
        stored = tree.blocks.gather(runs.nodes, runs.counts, runs.firsts)
        self._reach(stored)
        self._told[stored.astype(np.int64)] = True
        namespaces = {
            run: namespace
            for run in np.flatnonzero(runs.begins == 0).tolist()
            if tree.num_roots > 1
            and (namespace := tree.namespace_above(int(runs.nodes[run]))) != DEFAULT
        }
        return Changes(removed, self._parents(runs), runs.counts, namespaces, stored, tokens)

    def _parents(self, runs: _Runs) -> Int32s:
        """The blocks that the tokens in front of the runs lie in, -1 where there are none."""
        table = self._tree.nodes
        starts = np.asarray(table.start)
        nodes, before = runs.nodes.copy(), runs.begins - 1
        above = np.flatnonzero(before >= 0)
        while len(above := above[starts[nodes[above]] > before[above]]):
            nodes[above] = np.asarray(table.parent)[nodes[above]]
        parents = np.full(len(nodes), -1, np.int32)
        behind = np.flatnonzero(before >= 0)
        nodes, before = nodes[behind], before[behind]
        places = before - starts[nodes] + np.asarray(table.offset)[nodes]
        parents[behind] = self._tree.blocks.at(nodes, places // self._tree.block_size)
        return parents

    def _tokens(self, to: list[Int32s], node: int, begin: int, end: int) -> None:
        """Adds those at positions begin..end-1 of the path to `node`, which `end` lies in."""
        nodes = self._tree.nodes
        start = nodes.start[node]
        if start > begin:
            self._tokens(to, nodes.parent[node], begin, start)
            begin = start
        if nodes.writer[node]:
            tokens = self._tree.tail_tokens.get(node).copy()
        else:
            tokens = np.frombuffer(self._tree.edge(node), np.int32)
        to.append(tokens[begin - start : end - start])
