"""Which nodes are in use, and which go when room is needed."""

from __future__ import annotations

import numpy as np

from allocator import EvictionOrder, EvictionPolicy, Usage
from prefixtree.columns import Int32s, Int64s
from prefixtree.evictions import EvictionCounts, EvictionLog, Removed
from prefixtree.histogram import POWERS, SECONDS, Observations
from prefixtree.retention import Retained, Retention
from prefixtree.tree import ROOT, RadixTree


class Pins:
    """Counts the open sequences on each node, and keeps the unpinned leaves in eviction order.

    A sequence pins its whole path, so pins never grow downward and everything below an unpinned
    node is unpinned too: evicting leaves until none is left frees exactly the evictable blocks.
    """

    def __init__(self, tree: RadixTree, policy: EvictionPolicy, retention: Retention) -> None:
        self._tree = tree
        self._policy = policy
        self._retention = retention
        self._now = retention.now
        self.time = 0.0
        """The clock's at the last `pin`, in seconds."""
        self._order = EvictionOrder(policy)
        self.log = EvictionLog(tree)
        self._tick = 0
        self.evictable_tokens = 0
        self.evictable_blocks = 0
        self.counts = EvictionCounts()
        self.path_nodes = Observations(POWERS)
        self.reuse_gaps = Observations(SECONDS)
        self.idle_times = Observations(SECONDS)
        self.lifetimes = Observations(SECONDS)

    def adopt(self) -> None:
        """Takes over a tree that was planted: no node is pinned. O(nodes + leaves * log leaves)."""
        tree, nodes = self._tree, self._tree.nodes
        planted = np.flatnonzero(np.asarray(nodes.length))
        self._tick = int(np.asarray(nodes.last_used)[planted].max(initial=0))
        now = self._now()
        for moment in (nodes.made_at, nodes.idle_since):
            np.asarray(moment)[planted] = now
        self.evictable_tokens = tree.cached_tokens
        shared = np.asarray(nodes.shares_first)[planted]
        self.evictable_blocks = int(np.asarray(tree.blocks.size)[planted].sum() - shared.sum())
        leaves = planted[np.asarray(nodes.children)[planted] == 0].tolist()
        self._order.update((leaf, self._usage(leaf)) for leaf in leaves)

    def pin(self, node: int, by: int = 1) -> None:
        """Pins the path to `node` for `by` more sequences. O(depth)."""
        nodes = self._tree.nodes
        self.time = self._now()
        if nodes.length[node] and not nodes.pins[node]:
            self.reuse_gaps.add(self.time - nodes.idle_since[node])
        depth = 0
        while node != ROOT:
            depth += nodes.length[node] > 0
            if not nodes.pins[node]:
                self._count(node, -1)
                if not nodes.children[node] and not self._tree.is_root(node):
                    self._order.discard(node)
            nodes.pins[node] += by
            nodes.uses[node] += by
            node = nodes.parent[node]
        self.path_nodes.add(depth, by)

    def unpin(self, node: int) -> None:
        """Takes one sequence's pin off the path to `node`. O(depth + log leaves)."""
        nodes = self._tree.nodes
        self._tick += 1
        # No node above has fewer pins.
        now = self._now() if nodes.pins[node] == 1 else 0.0
        while node != ROOT:
            parent = nodes.parent[node]
            nodes.pins[node] -= 1
            if not nodes.pins[node]:
                nodes.last_used[node] = self._tick
                nodes.clock[node] = self._order.clock
                nodes.idle_since[node] = now
                self._count(node, 1)
                if not nodes.children[node]:
                    self._end_of_use(node)
            node = parent

    def touch(self, node: int) -> None:
        """As a sequence that pins the path to `node` and lets go at once. O(depth + log leaves)."""
        nodes, last = self._tree.nodes, node
        self._tick += 1
        self.time = self._now()
        if nodes.length[node] and not nodes.pins[node]:
            self.reuse_gaps.add(self.time - nodes.idle_since[node])
        while node != ROOT:
            nodes.uses[node] += 1
            if not nodes.pins[node]:
                nodes.last_used[node] = self._tick
                nodes.clock[node] = self._order.clock
                nodes.idle_since[node] = self.time
            node = nodes.parent[node]
        self._enqueue_anew(last)

    def attach(self, node: int, tokens: Int32s, blocks: Int32s) -> int:
        """`RadixTree.attach` of a leaf that may go, and `touch` of the path to `node`."""
        nodes = self._tree.nodes
        if node in self._order:
            self._order.discard(node)
        leaf = self._tree.attach(node, tokens, blocks)
        self.touch(node)
        nodes.last_used[leaf] = self._tick
        nodes.clock[leaf] = self._order.clock
        nodes.made_at[leaf] = nodes.idle_since[leaf] = self.time
        self._count(leaf, 1)
        self._enqueue(leaf)
        return leaf

    def split(self, node: int, length: int) -> tuple[int, int]:
        """`RadixTree.split` of a node that may be in the order."""
        upper, shared = self._tree.split(node, length)
        self._retention.inherit(upper, node)
        self._enqueue_anew(node)
        return upper, shared

    def mergeable(self, node: int) -> bool:
        """As `RadixTree.mergeable`, and retained alike."""
        retention, parent = self._retention, self._tree.nodes.parent[node]
        return self._tree.mergeable(node) and retention.of(node) == retention.of(parent)

    def merge(self, node: int) -> int:
        """`RadixTree.merge` of a node that is `mergeable`."""
        self._retention.forget(self._tree.nodes.parent[node])
        return self._tree.merge(node)

    def retain(self, node: int, retained: Retained) -> None:
        """Gives a node that is no tail a priority. O(log leaves)."""
        self._retention.put(node, retained)
        self._enqueue_anew(node)

    def end_retention(self) -> None:
        """Nodes whose time is over move to their place in the order. O(log leaves) a node."""
        for node in self._retention.ended():
            self._enqueue_anew(node)

    def evictable_blocks_on_path(self, node: int) -> int:
        """How many of the evictable blocks pinning the path to `node` would keep. O(depth)."""
        nodes = self._tree.nodes
        blocks = 0
        while node != ROOT and not nodes.pins[node]:
            blocks += self._tree.own_blocks(node)
            node = nodes.parent[node]
        return blocks

    def evict(self, num_blocks: int, reason: str) -> Removed:
        """Removes leaves in order until `num_blocks` blocks come free or none is left.

        Of the last leaf only the tail goes, where that is enough. O(log leaves) a node.
        """
        tree, nodes, order, policy = self._tree, self._tree.nodes, self._order, self._policy.name
        self.end_retention()
        now, evictable = self._now(), self.evictable_blocks
        held: list[Int32s] = []
        tokens = trimmed = 0
        while order and num_blocks > 0:
            leaf = order.first()
            own, size = tree.own_blocks(leaf), nodes.length[leaf]
            self.idle_times.add(now - nodes.idle_since[leaf])
            self.lifetimes.add(now - nodes.made_at[leaf], own if own < num_blocks else num_blocks)
            kept = (tree.blocks.size[leaf] - num_blocks) * tree.block_size - nodes.offset[leaf]
            if num_blocks > own or kept < 0:
                kept = 0
            start, stays = nodes.start[leaf] + kept, leaf if kept else nodes.parent[leaf]
            gone = (start, size - kept, not kept, reason, policy, now)
            self.log.add(stays, tree.token(leaf, kept), gone)
            if kept:
                trimmed = 1
                held.append(self._trim(leaf, kept))
            else:
                order.pop()
                held.append(self._remove(leaf))
            tokens += size - kept
            num_blocks -= own
        removed = Removed(held, len(held) - trimmed, trimmed, tokens)
        self.counts.add(policy, reason, removed, evictable - self.evictable_blocks)
        return removed

    def forecast(self) -> list[int]:
        """The nodes that nobody has pinned, in the order in which `evict` would remove them all.

        O(log leaves) a node.
        """
        nodes, gone = self._tree.nodes, []
        self.end_retention()
        order = self._order.copy()
        children: dict[int, int] = {}  # that would be left
        while order:
            leaf = order.pop()
            gone.append(leaf)
            parent = nodes.parent[leaf]
            children[parent] = left = children.get(parent, nodes.children[parent]) - 1
            if not left and not nodes.pins[parent] and nodes.length[parent]:
                order.add(parent, self._usage(parent))
        return gone

    def drop(self, below: Int64s, reason: str) -> Removed:
        """Removes those of these nodes that are not pinned; they come deepest first."""
        tree, nodes = self._tree, self._tree.nodes
        now, evictable = self._now(), self.evictable_blocks
        held: list[Int32s] = []
        tokens = 0
        for node in below[np.asarray(nodes.pins)[below] == 0].tolist():
            size = nodes.length[node]
            gone = (nodes.start[node], size, True, reason, "", now)
            self.log.add(nodes.parent[node], tree.token(node, 0), gone)
            self._order.discard(node)
            held.append(self._remove(node))
            tokens += size
        removed = Removed(held, len(held), 0, tokens)
        self.counts.add("", reason, removed, evictable - self.evictable_blocks)
        return removed

    @property
    def order(self) -> EvictionOrder:
        """The unpinned leaves. For looking only."""
        return self._order

    def check_retention(self) -> set[int]:
        """The nodes with a priority of their own, for `check`."""
        return self._retention.check_nodes()

    def _trim(self, leaf: int, length: int) -> Int32s:
        """Cuts an unpinned leaf down to its first tokens."""
        self._count(leaf, -1)
        held = self._tree.cut_back(leaf, length)
        self._count(leaf, 1)
        self._order.renew(leaf, self._usage(leaf))
        return held

    def _remove(self, node: int) -> Int32s:
        """Takes an unpinned leaf out; its parent may be the next to go."""
        nodes = self._tree.nodes
        parent = nodes.parent[node]
        self._count(node, -1)
        held = self._tree.remove(node)
        self._retention.forget(node)
        if parent != ROOT and not nodes.pins[parent] and not nodes.children[parent]:
            self._end_of_use(parent)
        return held

    def _end_of_use(self, leaf: int) -> None:
        """The leaf may go; the root of a namespace, which holds nothing, goes at once."""
        if self._tree.is_root(leaf):
            self._tree.remove(leaf)
        else:
            self._enqueue(leaf)

    def _enqueue_anew(self, node: int) -> None:
        if node in self._order:
            self._order.renew(node, self._usage(node))

    def _enqueue(self, node: int) -> None:
        self._order.add(node, self._usage(node))

    def _usage(self, node: int) -> Usage:
        nodes = self._tree.nodes
        return Usage(  # by place: faster than by name
            nodes.last_used[node],
            nodes.created[node],
            nodes.uses[node],
            nodes.length[node],
            nodes.start[node],
            nodes.clock[node],
            self._retention.priority(node),
        )

    def _count(self, node: int, sign: int) -> None:
        self.evictable_tokens += sign * self._tree.nodes.length[node]
        self.evictable_blocks += sign * self._tree.own_blocks(node)
