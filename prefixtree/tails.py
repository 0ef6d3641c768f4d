"""What open sequences do to the tree: grow, share, fork, roll back, end.

A sequence is known here by its tail, the node that it alone writes (see `tree`). This is where what
the tree decides is carried out on the pool. Callers have checked the arguments, and that there are
blocks enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from allocator import BlockPool
from prefixtree.columns import NOTHING, Int32s, Int64s
from prefixtree.pins import Pins
from prefixtree.ragged import spans
from prefixtree.retention import Retained
from prefixtree.tree import Place, RadixTree


class Growth(NamedTuple):
    """What it takes to append to S tails."""

    tails: Int64s
    """[S]"""
    counts: Int64s
    """[S] tokens to append."""
    filled: Int64s
    """[S] slots of the tail's blocks that are behind it or its own."""
    needed: Int64s
    """[S] blocks that it lacks."""
    blocks: int
    """All that lack."""


class Tails:
    """The open sequences' side of the cache."""

    def __init__(self, tree: RadixTree, pool: BlockPool, pins: Pins) -> None:
        self._tree = tree
        self._pool = pool
        self._pins = pins
        self._serial = 0
        self.logical_tokens = 0  # of all open sequences, shared ones counted for each
        self.pending_tokens = 0  # of these, those that walks do not find yet
        self.joins = 0
        self.joined_tokens = 0
        self._retired: dict[int, Int32s] = {}  # tail to the blocks that it will let go of

    def start(self, node: int, tokens: Int32s) -> int:
        """A new sequence behind `node`, whose path it has pinned already; returns its tail.

        `tokens`, uncommitted, are what it has beyond that path.
        """
        tree = self._tree
        self._serial += 1
        tail = tree.add(node, writer=self._serial)
        tree.nodes.pins[tail] = 1
        tree.nodes.made_at[tail] = self._pins.time
        self.logical_tokens += tree.nodes.start[tail]
        self._refill(tail, tokens)
        return tail

    @property
    def retired(self) -> Int32s:
        """Blocks given up at a commit and kept until their sequence goes on."""
        return np.concatenate([NOTHING, *self._retired.values()])

    def retired_by(self, tails: Int64s) -> int:
        """How many blocks come free when these sequences go on."""
        if not self._retired:
            return 0
        return self._freed_by(self._retired[t] for t in self._retired.keys() & tails.tolist())

    def retired_blocks(self) -> int:
        """How many blocks come free when all sequences go on."""
        return self._freed_by(self._retired.values()) if self._retired else 0

    def _freed_by(self, retired: Iterable[Int32s]) -> int:
        # A block is given up once at most: only one tail at a time goes on in it.
        refs = self._pool.refs
        return sum(int(np.count_nonzero(refs[blocks] == 1)) for blocks in retired)

    def committed(self, tail: int) -> int:
        """Tokens of the sequence whose KV is written."""
        return self._tree.nodes.start[tail] + self._tree.nodes.written[tail]

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

    def block_table(self, tail: int) -> Int32s:
        """The blocks of the whole path; a plain table where nodes are whole blocks."""
        tree = self._tree
        return np.concatenate([tree.blocks.get(node) for node in tree.path(tail)])

    def settle(self, tails: Int64s) -> None:
        """These sequences go on: nobody reads the blocks that they gave up any more."""
        if self._retired:
            for tail in self._retired.keys() & tails.tolist():
                self.settle_one(tail)

    def settle_one(self, tail: int) -> None:
        """The sequence goes on, or ends: nobody reads the blocks that it gave up any more."""
        if tail in self._retired:
            self._release(self._retired.pop(tail))

    def growth(self, tails: Int64s, counts: Int64s) -> Growth:
        """What `counts[i]` more tokens for tail i take."""
        tree = self._tree
        sizes: Int64s = np.asarray(tree.tail_tokens.size)[tails]
        filled = sizes + np.asarray(tree.nodes.offset)[tails]
        held = np.asarray(tree.blocks.size)[tails]
        needed = (filled + counts + (tree.block_size - 1)) // tree.block_size - held
        return Growth(tails, counts, filled, needed, int(np.add.reduce(needed)))

    def extend(self, growth: Growth, tokens: Int32s) -> Int64s:
        """Appends the packed `tokens` to the tails; returns their slots."""
        tree = self._tree
        tails, counts = growth.tails, growth.counts
        if growth.blocks:
            growing = np.flatnonzero(growth.needed)
            behind = self._last_block(int(tails[growing[0]]))
            fresh = self._pool.allocate(growth.blocks, after=behind)
            tree.blocks.extend(tails[growing], growth.needed[growing], fresh)
        places = spans(growth.filled, counts)
        tree.tail_tokens.extend(tails, counts, tokens)
        self.logical_tokens += len(tokens)
        self.pending_tokens += len(tokens)
        owners = tails if places is growth.filled else np.repeat(tails, counts)
        index = places // tree.block_size
        return (tree.blocks.at(owners, index) - index) * tree.block_size + places

    def commit_all(self, tails: Int64s) -> Int64s:
        """All tokens of these sequences are written; returns which of them moved.

        No Python work for tails linked already.
        """
        tree, nodes = self._tree, self._tree.nodes
        self.settle(tails)
        sizes = np.asarray(tree.tail_tokens.size)[tails]
        np.asarray(nodes.written)[tails] = sizes
        lengths = np.asarray(nodes.length)
        before = lengths[tails]
        found = sizes if tree.align == 1 else sizes // tree.align * tree.align
        fresh = np.flatnonzero((before == 0) & (found > 0))  # those not linked yet
        first = found[fresh].tolist()
        found[fresh] = 0
        published = int(np.add.reduce(found - before))
        tree.cached_tokens += published
        self.pending_tokens -= published
        lengths[tails] = found
        if tree.journal is not None:
            tree.journal.all_grew(tails)
        moved = map(self._publish, tails[fresh].tolist(), first)
        return fresh[np.fromiter(moved, np.bool_, len(fresh))]

    def commit(self, tail: int, length: int) -> bool:
        """The KV of the sequence's positions below `length` is written; whether it moved."""
        tree, nodes = self._tree, self._tree.nodes
        self.settle_one(tail)
        nodes.written[tail] = length - nodes.start[tail]
        found = tree.aligned(nodes.written[tail])
        if nodes.linked[tail]:
            tree.cached_tokens += found - nodes.length[tail]
            self.pending_tokens -= found - nodes.length[tail]
            nodes.length[tail] = found
            if tree.journal is not None:
                tree.journal.grew(tail)
            return False
        return found > 0 and self._publish(tail, found)

    def seal(self, tail: int) -> int:
        """Moves the tail's findable tokens into a node above it; returns its parent then.

        The tail stays, with what is left, and goes on in the block that it was in.
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
        """Drops the tokens from position `length` on, which no walk finds."""
        tree = self._tree
        kept = length - tree.nodes.start[tail]
        dropped = tree.tail_tokens.size[tail] - kept
        self.logical_tokens -= dropped
        self.pending_tokens -= dropped
        tree.nodes.written[tail] = min(tree.nodes.written[tail], kept)
        tree.tail_tokens.truncate(tail, kept)
        self._release(tree.trim(tail))

    def move_up(self, tail: int, length: int) -> None:
        """Takes a tail back to position `length` of what walks find; the rest stays cached.

        Where that is inside an `align`, its last tokens are to be computed again.
        """
        tree, nodes = self._tree, self._tree.nodes
        self.truncate(tail, tree.end(tail))
        self.logical_tokens -= tree.end(tail)
        left = node = self.seal(tail)
        target = tree.aligned(length)
        again = self.tokens(tail)[target:length] if target < length else tree.tail_tokens.get(tail)
        while nodes.start[node] >= target and target:
            node = nodes.parent[node]
        if not target:
            node = tree.root_above(node)
        elif target < tree.end(node):
            node = self.split(node, target - nodes.start[node])
        self._move_pin(left, node)
        self._release(tree.rehang(tail, node))
        self.logical_tokens += tree.nodes.start[tail]
        self._refill(tail, again)

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
        """Tails of `count` sequences that share this one, which is committed whole.

        Tokens that do not fill an `align` are not shared: each new sequence computes them again.
        """
        node = self.seal(tail)
        self._pins.pin(node, by=count)
        rest = self._tree.tail_tokens.get(tail).copy()
        return [self.start(node, rest) for _ in range(count)]

    def close(self, tail: int) -> None:
        """Ends the sequence: its committed tokens stay as an ordinary node, unpinned."""
        tree, nodes = self._tree, self._tree.nodes
        self.settle_one(tail)
        end = tree.end(tail)
        self.truncate(tail, end)
        self.logical_tokens -= end
        node = tail
        if nodes.linked[tail]:
            tree.freeze(tail)
        else:
            node = nodes.parent[tail]
            self._release(tree.remove(tail))
        self._pins.unpin(node)

    def _publish(self, tail: int, length: int) -> bool:
        """Links a tail that has its first tokens to be found; whether it moved.

        Where the tree has these tokens already (another sequence computed them meanwhile), the
        first copy is kept: the sequence moves over to it. Its own copy is let go when it goes on,
        since whoever was given its block table may still read there.
        """
        tree, nodes = self._tree, self._tree.nodes
        parent = nodes.parent[tail]
        nodes.length[tail] = length
        self.pending_tokens -= length
        if tree.link(tail):
            return False
        place = tree.walk(tree.tail_tokens.get(tail)[:length], parent)
        node = self.land(place)
        self._move_pin(parent, node)
        self.joins += 1
        self.joined_tokens += place.matched
        gone = tree.drop_front(tail, place.matched)
        nodes.parent[tail] = node
        if nodes.length[tail]:
            tree.link(tail)
        if len(gone):
            self._retired[tail] = gone
        # Sequences that agree token after token would otherwise leave a chain of short nodes.
        if self._pins.mergeable(node) and (shared := self._pins.merge(node)) >= 0:
            self._release(np.array([shared], np.int32))
        return True

    def _refill(self, tail: int, tokens: Int32s) -> None:
        """Gives an empty tail tokens whose KV is to be computed, and blocks for them."""
        tree = self._tree
        if len(tokens):
            needed = tree.blocks_for(tail, len(tokens))
            tree.blocks.set(tail, self._pool.allocate(needed, after=self._last_block(tail)))
            tree.tail_tokens.set(tail, tokens)
            self.logical_tokens += len(tokens)
            self.pending_tokens += len(tokens)

    def _move_pin(self, source: int, target: int) -> None:
        # This order: no node of the common path is unpinned in between.
        self._pins.pin(target)
        self._pins.unpin(source)

    def _last_block(self, tail: int) -> int | None:
        tree = self._tree
        for node in (tail, tree.nodes.parent[tail]):
            if tree.blocks.size[node]:
                return tree.blocks.last(node)
        return None

    def _release(self, blocks: Int32s) -> None:
        if len(blocks):
            self._pool.release(blocks)
