"""What open sequences do to the tree: grow, share, fork, roll back, end.

A sequence is known here by its tail, the node that it alone writes (see `tree`). This is where what
the tree decides is carried out on the pool. Callers have checked the arguments, and that there are
blocks enough.
"""

from __future__ import annotations

import numpy as np

from allocator import BlockPool
from prefixtree.columns import Int32s, Int64s
from prefixtree.pins import Pins
from prefixtree.ragged import spans
from prefixtree.retention import Retained
from prefixtree.tree import Place, RadixTree


class Tails:
    """The open sequences' side of the cache."""

    def __init__(self, tree: RadixTree, pool: BlockPool, pins: Pins) -> None:
        self._tree = tree
        self._pool = pool
        self._pins = pins
        self._serial = 0

    def start(self, node: int, tokens: Int32s) -> int:
        """A new sequence behind `node`, whose path it has pinned already; returns its tail.

        `tokens`, uncommitted, are what it has beyond that path.
        """
        tree = self._tree
        self._serial += 1
        tail = tree.add(node, writer=self._serial)
        tree.nodes.pins[tail] = 1
        if len(tokens):
            needed = tree.blocks_for(tail, len(tokens))
            tree.blocks.set(tail, self._pool.allocate(needed, after=self._last_block(tail)))
            tree.tail_tokens.set(tail, tokens)
        return tail

    def length(self, tail: int) -> int:
        """Tokens of the sequence, committed or not."""
        return self._tree.nodes.start[tail] + self._tree.tail_tokens.size[tail]

    def tokens(self, tail: int) -> Int32s:
        tree = self._tree
        above = b"".join(tree.tokens[node] for node in tree.path(tree.nodes.parent[tail]))
        return np.concatenate([np.frombuffer(above, np.int32), tree.tail_tokens.get(tail)])

    def slots(self, tail: int, start: int, stop: int) -> Int64s:
        """Slots of positions start..stop-1 of the sequence."""
        tree, nodes = self._tree, self._tree.nodes
        parts = []
        node = tail
        while start < stop:
            first = nodes.start[node]
            if stop > first:
                begin = max(start, first)
                parts.append(tree.slots(node, begin - first, stop - first))
                stop = begin
            node = nodes.parent[node]
        return np.concatenate(parts[::-1]) if parts else np.empty(0, np.int64)

    def blocks_needed(self, tails: Int64s, counts: Int64s) -> Int64s:
        """Blocks that each tail lacks for `counts` more tokens."""
        block_size = self._tree.block_size
        held: Int64s = np.asarray(self._tree.blocks.size)[tails]
        return -(-(self._filled(tails) + counts) // block_size) - held

    def extend(self, tails: Int64s, counts: Int64s, tokens: Int32s) -> Int64s:
        """Appends `counts[i]` of the packed `tokens` to tail i; returns their slots."""
        tree = self._tree
        needed = self.blocks_needed(tails, counts)
        total = int(needed.sum())
        if total:
            growing = np.flatnonzero(needed)
            behind = self._last_block(int(tails[growing[0]]))
            fresh = self._pool.allocate(total, after=behind)
            tree.blocks.extend(tails[growing], needed[growing], fresh)
        places = spans(self._filled(tails), counts)
        tree.tail_tokens.extend(tails, counts, tokens)
        blocks = tree.blocks.at(np.repeat(tails, counts), places // tree.block_size)
        return blocks.astype(np.int64) * tree.block_size + places % tree.block_size

    def commit_all(self, tails: Int64s) -> None:
        """All tokens of these sequences are written. No Python work for tails linked already."""
        tree, nodes = self._tree, self._tree.nodes
        lengths = np.asarray(nodes.length)
        linked = tails[np.asarray(nodes.linked)[tails] != 0]
        sizes = np.asarray(tree.tail_tokens.size)[linked]
        tree.cached_tokens += int((sizes - lengths[linked]).sum())
        lengths[linked] = sizes
        for tail in tails[np.asarray(nodes.linked)[tails] == 0].tolist():
            if tree.tail_tokens.size[tail]:
                self.commit(tail, self.length(tail))

    def commit(self, tail: int, length: int) -> None:
        """The KV of the sequence's positions below `length` is written."""
        tree, nodes = self._tree, self._tree.nodes
        committed = length - nodes.start[tail]
        if nodes.linked[tail]:
            tree.cached_tokens += committed - nodes.length[tail]
            nodes.length[tail] = committed
        elif committed:
            nodes.length[tail] = committed
            self._publish(tail)

    def seal(self, tail: int) -> int:
        """Moves the tail's committed tokens into a node above it; returns its parent then.

        The tail stays, with what is uncommitted, and goes on in the block that it was in.
        """
        nodes = self._tree.nodes
        if nodes.length[tail]:
            self.split(tail, nodes.length[tail])
        return nodes.parent[tail]

    def split(self, node: int, length: int) -> int:
        """Splits a node, returns the upper half."""
        upper, shared = self._pins.split(node, length)
        if shared >= 0:
            self._pool.retain(np.array([shared], np.int32))
        return upper

    def truncate(self, tail: int, length: int) -> None:
        """Drops the tokens from position `length` on; they are uncommitted."""
        tree = self._tree
        tree.tail_tokens.truncate(tail, length - tree.nodes.start[tail])
        self._release(tree.trim(tail))

    def move_up(self, tail: int, length: int) -> None:
        """Takes a sealed, empty tail back to position `length`; what is behind stays cached."""
        tree, nodes = self._tree, self._tree.nodes
        left = node = nodes.parent[tail]
        while nodes.start[node] >= length:
            node = nodes.parent[node]
        if length < tree.end(node):
            node = self.split(node, length - nodes.start[node])
        self._move_pin(left, node)
        self._release(tree.rehang(tail, node))

    def land(self, place: Place) -> int:
        """The node that ends where a walk ended, split off where there is none.

        It is never a tail: what several sequences pass through has no writer.
        """
        if place.within:
            return self.split(place.child, place.within)
        if self._tree.nodes.writer[place.node]:
            return self.seal(place.node)
        return place.node

    def retain(self, place: Place, start: int, retained: Retained) -> None:
        """Gives what a walk matched, from position `start` on, a priority."""
        tree = self._tree
        node = self.land(place)
        while tree.end(node) > start:
            if tree.nodes.start[node] < start:
                self.split(node, start - tree.nodes.start[node])
            self._pins.retain(node, retained)
            node = tree.nodes.parent[node]

    def fork(self, tail: int, count: int) -> list[int]:
        """Tails of `count` sequences that share all of this one, which is committed whole."""
        node = self.seal(tail)
        self._pins.pin(node, by=count)
        nothing = np.empty(0, np.int32)
        return [self.start(node, nothing) for _ in range(count)]

    def close(self, tail: int) -> None:
        """Ends the sequence: its committed tokens stay as an ordinary node, unpinned."""
        tree, nodes = self._tree, self._tree.nodes
        self.truncate(tail, tree.end(tail))
        node = tail
        if nodes.linked[tail]:
            tree.freeze(tail)
        else:
            node = nodes.parent[tail]
            self._release(tree.remove(tail))
        self._pins.unpin(node)

    def _publish(self, tail: int) -> None:
        """Links a tail that has its first committed tokens.

        Where the tree has these tokens already (another sequence computed them meanwhile), the
        first copy is kept: the sequence moves over to it and its own copy is let go.
        """
        tree, nodes = self._tree, self._tree.nodes
        parent = nodes.parent[tail]
        committed = tree.tail_tokens.get(tail)[: nodes.length[tail]]
        if tree.child(parent, int(committed[0])) < 0:
            tree.link(tail)
            return
        place = tree.walk(committed.tobytes(), parent)
        node = self.land(place)
        self._move_pin(parent, node)
        gone = tree.drop_front(tail, place.matched)
        nodes.parent[tail] = node
        if nodes.length[tail]:
            tree.link(tail)
        self._release(gone)
        # Sequences that agree token after token would otherwise leave a chain of short nodes.
        if self._pins.mergeable(node) and (shared := self._pins.merge(node)) >= 0:
            self._release(np.array([shared], np.int32))

    def _move_pin(self, source: int, target: int) -> None:
        # This order: no node of the common path is unpinned in between.
        self._pins.pin(target)
        self._pins.unpin(source)

    def _filled(self, tails: Int64s) -> Int64s:
        """Slots of each tail's blocks that are behind it or its own."""
        sizes: Int64s = np.asarray(self._tree.tail_tokens.size)[tails]
        offsets: Int32s = np.asarray(self._tree.nodes.offset)[tails]
        return sizes + offsets

    def _last_block(self, tail: int) -> int | None:
        tree = self._tree
        for node in (tail, tree.nodes.parent[tail]):
            if tree.blocks.size[node]:
                return int(tree.blocks.get(node)[-1])
        return None

    def _release(self, blocks: Int32s) -> None:
        if len(blocks):
            self._pool.release(blocks)
