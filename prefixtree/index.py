"""The tree for engines that hand out blocks themselves: tokens mapped to blocks that they name.

`PrefixCache` owns the pool and every sequence's tail. An engine with an allocator of its own that
it cannot give up keeps it, and gives the index what it wants to find again: blocks come in with
`insert` or `extend`, and go back with what `evict` returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator import BlockSet, EvictionPolicy, InvalidArgument, make_policy, uses_priority
from allocator.errors import as_integer, at_least
from prefixtree.check import State, TokenSums
from prefixtree.columns import NOTHING, Int32s
from prefixtree.errors import InvalidLength, NotHeld, PrefixGone, PriorityUnused
from prefixtree.explain import Explanation, explain
from prefixtree.guard import guarded
from prefixtree.histogram import TOKENS, Observations
from prefixtree.inspected import Inspected
from prefixtree.journaled import Journaled
from prefixtree.pins import Pins
from prefixtree.retention import Retention
from prefixtree.stats import Counters, Stats
from prefixtree.tokens import TokensLike, as_prompt, as_tokens
from prefixtree.tree import DEFAULT, NOWHERE, Namespace, Place, RadixTree, as_namespace

_LONGEST = 4096  # tokens of a node that grows in place, since growing copies them


class Prefix:
    """The first `length` tokens of something in the index; made by `match` and `insert`.

    It may be evicted at any time, unless it is held (`PrefixIndex.hold`).
    """

    __slots__ = ("_born", "_grows", "_node", "holds", "length", "namespace")

    def __init__(self, namespace: Namespace, length: int, node: int, born: int) -> None:
        self.namespace = namespace
        self.length = length
        """Tokens, a multiple of the block size."""
        self.holds = 0
        """How often it is held."""
        self._node = node  # contains the last token, or is below the one that does
        self._born = born  # `created` of that node: its number may go to another one
        self._grows = False  # whether `extend` of this prefix made the node

    def __repr__(self) -> str:
        return f"<Prefix {self.length} tokens, {self.holds} holds>"


class Inserted(NamedTuple):
    """What `insert` found and made."""

    prefix: Prefix
    """All the tokens, not held."""
    known: int
    """How many of them had blocks in the index before: the caller's blocks for these are not taken
    (where they are others, they are the caller's to free or to go on with)."""


class Dropped(NamedTuple):
    """What `forget` and `clear` did."""

    blocks: Int32s
    """That are the engine's again."""
    tokens: int
    """That are gone from the index."""
    kept_tokens: int
    """That should have gone but are held."""


class PrefixIndex(Inspected, Journaled):
    """Shared prefixes, mapped to whole blocks that the engine owns and names.

    Matches, splits and inserts are whole blocks of `block_size` tokens, which may be 1. A block is
    the index's from the insert that took it until it is returned by `evict`, `forget` or `clear`.
    Bad input raises and changes nothing, as everywhere in this package; after `BrokenInvariant` or
    `DoubleFree` every call raises `CacheBroken`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        eviction: str | EvictionPolicy = "lru",
        thread_safe: bool = False,
        clock: Callable[[], SupportsFloat] = time.monotonic,
    ) -> None:
        """An index over the blocks 0 .. num_blocks-1 of an engine.

        Raises `InvalidArgument` unless both numbers are >= 1, and for an unknown policy.
        """
        self._lock: AbstractContextManager[object] = RLock() if thread_safe else nullcontext()
        self.thread_safe = thread_safe
        """Whether any thread may call it."""
        self._broken = ""
        self._blocks = BlockSet(num_blocks, block_size)
        self._tree = RadixTree(block_size, align=block_size)
        self._policy = make_policy(eviction)
        self._retention = Retention(clock)
        self._pins = Pins(self._tree, self._policy, self._retention)
        self._counters = Counters()
        self._match_lengths = Observations(TOKENS)
        self._held: dict[int, int] = {}  # node to how often it is held
        self._held_tokens = 0  # of these prefixes, shared ones counted for each

    @property
    def num_blocks(self) -> int:
        return self._blocks.num_blocks

    @property
    def block_size(self) -> int:
        return self._blocks.block_size

    @property
    def cached_blocks(self) -> int:
        """Blocks in the index. O(1)."""
        return len(self._blocks)

    @property
    def evictable_blocks(self) -> int:
        """Those of them that nobody holds. O(1)."""
        return self._pins.evictable_blocks

    @guarded
    def match(self, tokens: TokensLike, *, namespace: Namespace = DEFAULT) -> Prefix:
        """The longest prefix of `tokens` that is here; changes nothing, not even the LRU order.

        Raises `InvalidTokens`, `InvalidNamespace`. O(len(tokens)) in C, plus a lookup a node.
        """
        wanted, namespace = as_tokens(tokens), as_namespace(namespace)
        place = self._find(wanted, namespace)
        return self._prefix(namespace, place.matched, place.child if place.within else place.node)

    @guarded
    def blocks(self, prefix: Prefix, start: int = 0, stop: int | None = None) -> Int32s:
        """The blocks of positions start..stop-1 of a prefix, int32; all of it by default.

        Raises `PrefixGone`, `InvalidLength` unless 0 <= start <= stop <= prefix.length and both are
        whole blocks. O(blocks + depth).
        """
        last = prefix.length if stop is None else as_integer("stop", stop)
        first = as_integer("start", start)
        size = self.block_size
        if not 0 <= first <= last <= prefix.length or first % size or last % size:
            raise InvalidLength(
                f"blocks of positions {first}..{last} of a prefix of {prefix.length} tokens:"
                f" expected whole blocks of {size} tokens within it"
            )
        if first == last:
            return np.empty(0, np.int32)
        tree, nodes = self._tree, self._tree.nodes
        node = self._node_of(prefix)
        parts = []
        while first < last:
            begin = nodes.start[node]
            if last > begin:
                low = max(first, begin)
                parts.append(tree.blocks.get(node)[(low - begin) // size : (last - begin) // size])
                last = low
            node = nodes.parent[node]
        return np.concatenate(parts[::-1])

    @guarded
    def hold(self, prefix: Prefix, query_tokens: int | None = None) -> None:
        """Keeps a prefix from eviction until `release`; may be held several times.

        With `query_tokens` this counts in the statistics as a request of so many tokens, of which
        the prefix was there. Raises `PrefixGone` when it was evicted since it was matched,
        `InvalidArgument` for `query_tokens` below its length. O(depth).
        """
        if query_tokens is not None:
            at_least(prefix.length, "query_tokens", query_tokens)
        node = self._land(prefix)
        self._pins.pin(node)
        self._settle(prefix, node, prefix.length)
        prefix.holds += 1
        if query_tokens is not None:
            self._counters.opens += 1
            self._counters.query_tokens += as_integer("query_tokens", query_tokens)
            self._counters.hit_tokens += prefix.length
            self._match_lengths.add(prefix.length)

    @guarded
    def release(self, prefix: Prefix) -> None:
        """Takes one hold off. Raises `NotHeld` when there is none. O(depth + log leaves)."""
        if not prefix.holds:
            raise NotHeld(f"release of a prefix of {prefix.length} tokens that is not held")
        self._unpin(prefix)
        prefix.holds -= 1

    @guarded
    def touch(self, prefix: Prefix) -> None:
        """Renews a prefix's place in the eviction order, as `hold` and `release` would.

        A node that the prefix ends in is not split for it: it stays or goes as a whole. Raises
        `PrefixGone`. O(depth + log leaves).
        """
        if prefix.length:
            self._pins.touch(self._node_of(prefix))

    @guarded
    def insert(
        self, tokens: TokensLike, blocks: ArrayLike, *, namespace: Namespace = DEFAULT
    ) -> Inserted:
        """Makes the KV of `tokens` findable: block i has the tokens from i * block_size on.

        `blocks`: integers [len(tokens) // block_size]; what of `tokens` does not fill a block is
        not taken. Tokens that are here already keep the blocks that they have.

        Raises `InvalidTokens`, `InvalidNamespace`, `InvalidLength` for another number of blocks,
        `InvalidArgument` and `BlockTaken` for blocks to be taken that are none of the engine's, in
        the index already or named twice. O(len(tokens)) in C, plus a lookup a node.
        """
        wanted, namespace = as_tokens(tokens), as_namespace(namespace)
        wanted = wanted[: self._tree.aligned(len(wanted))]
        ids = self._as_blocks(blocks, len(wanted))
        place = self._find(wanted, namespace)
        fresh = self._take(ids, place)
        if not len(wanted):
            return Inserted(self._prefix(namespace, 0, place.node), 0)
        if place is NOWHERE:
            place = NOWHERE._replace(node=self._root(namespace))
        node = self._land_at(place)
        if len(fresh):
            node = self._pins.attach(node, wanted[place.matched :], fresh)
        else:
            self._pins.touch(node)
        return Inserted(self._prefix(namespace, len(wanted), node), place.matched)

    @guarded
    def extend(self, prefix: Prefix, tokens: TokensLike, blocks: ArrayLike) -> int:
        """As `insert` of the tokens that follow a held prefix, which then is longer by these.

        The hold moves along, and nothing is walked from the root: for chunked prefill and decode.
        Returns `Inserted.known`, counted from the prefix's old end: where that is not 0,
        `blocks(prefix, old_length)` says which blocks the tokens have.

        Raises as `insert`, and `NotHeld` unless the prefix is held just once. O(len(tokens)) in C,
        plus a lookup a node.
        """
        if prefix.holds != 1:
            raise NotHeld(f"extend of a prefix with {prefix.holds} holds, expected one")
        wanted = as_tokens(tokens)
        wanted = wanted[: self._tree.aligned(len(wanted))]
        ids = self._as_blocks(blocks, len(wanted))
        place = self._tree.walk(wanted, prefix._node)
        fresh = self._take(ids, place)
        if not len(wanted):
            return 0
        added = wanted[place.matched :]
        if self._grows_in_place(prefix):
            self._tree.lengthen(prefix._node, added, fresh)
            self._held_tokens += len(wanted)
        else:
            # The new hold first: no node of the common path is free in between.
            node = self._land_at(place)
            self._pins.pin(node)
            self._unpin(prefix)
            self._settle(prefix, self._put(node, added, fresh), prefix.length + len(wanted))
            prefix._grows = bool(len(added))
        prefix.length += len(wanted)
        return place.matched

    @guarded
    def replace(self, prefix: Prefix, blocks: ArrayLike, start: SupportsIndex = 0) -> Int32s:
        """Puts a prefix's tokens from position `start` on into other blocks, with the same KV.

        For engines that computed again what is here, and would rather give up the older copy.
        `blocks`: integers, up to the prefix's end at most; those that are there already stay.
        Returns the blocks that are the engine's again, in the order of their positions.

        Raises `PrefixGone`, `InvalidLength` as `blocks` does, and `InvalidArgument` and
        `BlockTaken` as `insert`, also for blocks that change places. O(blocks + depth); with KV
        events O(nodes of the index), as they tell anew of all that lies behind.
        """
        first, size = as_integer("start", start), self.block_size
        ids = self._as_blocks(blocks, np.size(blocks) * size)
        last = first + len(ids) * size
        old = self.blocks(prefix, first, last)
        other = ids != old
        freed: Int32s = old[other]
        self._blocks.add(ids[other])
        self._blocks.remove(freed)
        if len(freed):
            self._put_into(prefix, first, last, ids.astype(np.int32))
        return freed

    @guarded
    def retain(
        self,
        prefix: Prefix,
        *,
        priority: SupportsIndex,
        duration: SupportsFloat | None = None,
        start: int = 0,
    ) -> None:
        """Gives a prefix's tokens from position `start` on a priority, see `PrefixCache.retain`.

        Raises `PriorityUnused` when the eviction policy does not look at priorities, `PrefixGone`,
        `InvalidLength` unless 0 <= start <= prefix.length, and `InvalidArgument` for a priority
        outside 0..100 or a duration that is not finite and > 0. O(depth + log nodes) a node.
        """
        self._check_priorities()
        first = as_integer("start", start)
        if not 0 <= first <= prefix.length:
            raise InvalidLength(f"start is {first} of a prefix of {prefix.length} tokens")
        retained = self._retention.from_now(priority, duration)
        self._pins.end_retention()
        if first == prefix.length:
            return
        nodes, node = self._tree.nodes, self._land(prefix)
        first = self._tree.aligned(first)
        while self._tree.end(node) > first:
            if nodes.start[node] < first:
                self._pins.split(node, first - nodes.start[node])
            self._pins.retain(node, retained)
            node = nodes.parent[node]

    @guarded
    def promote(self, prefix: Prefix, *, priority: SupportsIndex) -> None:
        """Gives a prefix's tokens that priority, but for those with a higher one.

        For engines whose requests have priorities: what several use has the highest of theirs.
        Raises as `retain`. O(depth + log nodes) a node.
        """
        self._check_priorities()
        retained = self._retention.from_now(priority, None)
        self._pins.end_retention()
        if not prefix.length:
            return
        nodes, node = self._tree.nodes, self._land(prefix)
        while self._tree.end(node):
            if self._retention.priority(node) < retained.priority:
                self._pins.retain(node, retained)
            node = nodes.parent[node]

    @guarded
    def evict(self, num_blocks: int, *, last_first: bool = False) -> Int32s:
        """Drops what nobody holds, leaves first in the policy's order, and returns its blocks.

        `num_blocks` of them, fewer only when nothing is left. The last leaf loses only its end
        where that is enough. The blocks of a node come in the order of their positions: a run of
        neighbours stays one for who is given it next. With `last_first` they come as they go, the
        end of a node before its beginning, as `eviction_order` has it. Raises `InvalidLength` for a
        negative number. O(log leaves) a node.
        """
        num_blocks = as_integer("num_blocks", num_blocks)
        if num_blocks < 0:
            raise InvalidLength(f"num_blocks must be >= 0, got {num_blocks}")
        held = self._pins.evict(num_blocks, "evict").held
        return self._given_back([blocks[::-1] for blocks in held] if last_first else held)

    @guarded
    def eviction_order(self) -> Int32s:
        """The blocks that nobody holds, in the order in which they would go; all of them stay.

        The first n of them are what `evict(n, last_first=True)` would return now. O(evictable
        blocks), and O(log leaves) a node.
        """
        blocks = self._tree.blocks
        order = [blocks.get(node)[::-1] for node in self._pins.forecast()]
        return np.concatenate(order) if order else np.empty(0, np.int32)

    @guarded
    def forget(
        self, tokens: TokensLike | None = None, *, namespace: Namespace = DEFAULT
    ) -> Dropped:
        """Drops all behind the prefix `tokens`, or all of the namespace, as far as nobody holds it.

        Raises `InvalidTokens`, `InvalidNamespace`. O(nodes of the index).
        """
        tree = self._tree
        namespace = as_namespace(namespace)
        top = tree.root_of(namespace)
        if top >= 0 and tokens is not None:
            prefix = as_prompt(tokens)
            place = tree.walk(prefix[: tree.aligned(len(prefix))], top)
            top = self._land_at(place) if place.matched == tree.aligned(len(prefix)) else -1
        if top < 0:
            return Dropped(np.empty(0, np.int32), tokens=0, kept_tokens=0)
        return self._drop(top)

    @guarded
    def clear(self) -> Dropped:
        """Drops all that nobody holds. O(nodes * log leaves)."""
        before = self._tree.cached_tokens
        # One more than there are, so that also the last leaf goes whole.
        blocks = self._given_back(self._pins.evict(self.num_blocks + 1, "clear").held)
        left = self._tree.cached_tokens
        return Dropped(blocks, before - left, left)

    @guarded
    def explain(self, tokens: TokensLike, *, namespace: Namespace = DEFAULT) -> Explanation:
        """What of `tokens` is here, where the match stops and why, see `PrefixCache.explain`."""
        wanted = as_prompt(tokens)
        place = self._find(wanted, as_namespace(namespace))
        known = None if place is NOWHERE else place
        return explain(self._tree, self._pins.log, wanted, namespace, known, pending=0)

    @guarded
    def stats(self) -> Stats:
        """As `PrefixCache.stats`, where a block that is not in the index counts as free, and a held
        prefix as an open sequence. O(num_blocks) in numpy for the free extents."""
        tree, pins = self._tree, self._pins
        gone = pins.counts.total()
        return Stats(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            reserved_blocks=0,
            free_blocks=self._blocks.num_free,
            free_extents=self._blocks.num_free_extents,
            evictable_blocks=pins.evictable_blocks,
            retired_blocks=0,
            cached_tokens=tree.cached_tokens,
            pinned_tokens=tree.cached_tokens - pins.evictable_tokens,
            evictable_tokens=pins.evictable_tokens,
            pending_tokens=0,
            nodes=tree.num_edges,
            branches=tree.branches,
            open_sequences=sum(self._held.values()),
            prefilling_sequences=0,
            logical_tokens=self._held_tokens,
            kept_prefixes=0,
            kept_tokens=0,
            attended_tokens=0,
            attended_logical_tokens=0,
            joins=0,
            joined_tokens=0,
            evicted_tokens=gone.tokens,
            evicted_nodes=gone.nodes,
            trimmed_nodes=gone.trimmed,
            evictions=pins.counts.each(),
            match_lengths=self._match_lengths.histogram(),
            path_nodes=pins.path_nodes.histogram(),
            reuse_gaps=pins.reuse_gaps.histogram(),
            idle_times=pins.idle_times.histogram(),
            block_lifetimes=pins.lifetimes.histogram(),
            **vars(self._counters),
        )

    def _check_priorities(self) -> None:
        if not uses_priority(self._policy):
            raise PriorityUnused(
                f"eviction policy {self._policy.name!r} does not look at priorities, expected"
                " 'priority'"
            )

    def _state(self) -> State:
        kept = [node for node, holds in self._held.items() for _ in range(holds)]
        nothing = np.empty(0, np.int32)
        sums = TokenSums(logical=0, pending=0, kept=self._held_tokens)
        return State(self._tree, self._blocks, self._pins, {}, kept, nothing, sums)

    def _find(self, wanted: Int32s, namespace: Namespace) -> Place:
        root = self._tree.root_of(namespace)
        return NOWHERE if root < 0 else self._tree.walk(wanted, root)

    def _as_blocks(self, blocks: ArrayLike, tokens: int) -> NDArray[np.integer[Any]]:
        """Block ids for so many tokens, not in range yet."""
        ids = np.asarray(blocks)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InvalidArgument(
                f"blocks have shape {ids.shape} and dtype {ids.dtype}, expected one dimension of"
                " integers"
            )
        if len(ids) != tokens // self.block_size:
            raise InvalidLength(
                f"{len(ids)} blocks for {tokens} tokens, expected {tokens // self.block_size}"
            )
        return ids

    def _take(self, ids: NDArray[np.integer[Any]], place: Place) -> Int32s:
        """Those of the blocks that are for tokens behind the place; they are the index's now."""
        fresh = ids[place.matched // self.block_size :]
        self._blocks.add(fresh)
        return fresh.astype(np.int32, copy=False)

    def _prefix(self, namespace: Namespace, length: int, node: int) -> Prefix:
        return Prefix(namespace, length, node, self._tree.nodes.created[node])

    def _root(self, namespace: Namespace) -> int:
        root = self._tree.root_of(namespace)
        return self._tree.add_root(namespace) if root < 0 else root

    def _node_of(self, prefix: Prefix) -> int:
        """The node that has the last token of a prefix that is not empty."""
        tree, nodes = self._tree, self._tree.nodes
        node = prefix._node
        # What is below a node goes before it, so who finds it finds all above. Its end may have
        # been cut off; what was put behind that since hangs in nodes of their own.
        if (
            not nodes.used[node]
            or nodes.created[node] != prefix._born
            or tree.end(node) < prefix.length
        ):
            raise PrefixGone(f"a prefix of {prefix.length} tokens was evicted since it was matched")
        while nodes.start[node] >= prefix.length:
            node = nodes.parent[node]
        return node

    def _land(self, prefix: Prefix) -> int:
        """The node that ends where the prefix does, split off where there is none."""
        if not prefix.length:
            return self._root(prefix.namespace)
        node = self._node_of(prefix)
        if prefix.length < self._tree.end(node):
            node, _ = self._pins.split(node, prefix.length - self._tree.nodes.start[node])
        return node

    def _land_at(self, place: Place) -> int:
        return self._pins.split(place.child, place.within)[0] if place.within else place.node

    def _put(self, node: int, tokens: Int32s, blocks: Int32s) -> int:
        """Puts tokens behind a node that the caller has pinned once; the pin is their leaf's then.

        Returns that leaf, or `node` where there is no token.
        """
        if not len(tokens):
            return node
        nodes, leaf = self._tree.nodes, self._tree.attach(node, tokens, blocks)
        nodes.pins[leaf] = 1
        nodes.made_at[leaf] = self._pins.time
        return leaf

    def _put_into(self, prefix: Prefix, first: int, last: int, blocks: Int32s) -> None:
        """Puts positions first..last-1 of a prefix, whole blocks, into these."""
        tree, nodes = self._tree, self._tree.nodes
        node = self._node_of(prefix)
        while last > first:
            begin = nodes.start[node]
            if last > begin:
                low = max(first, begin)
                above = (low - first) // self.block_size
                tree.replace(node, (low - begin) // self.block_size, blocks[above:])
                blocks, last = blocks[:above], low
            node = nodes.parent[node]

    def _grows_in_place(self, prefix: Prefix) -> bool:
        """Whether the prefix ends with a leaf that it alone holds, and made itself.

        Such a leaf has never been cut, as the prefix would be gone then; so no older `Prefix` can
        take the new tokens for others.
        """
        nodes, node = self._tree.nodes, prefix._node
        return (
            prefix._grows
            and nodes.pins[node] == 1
            and not nodes.children[node]
            and nodes.length[node] < _LONGEST
        )

    def _settle(self, prefix: Prefix, node: int, length: int) -> None:
        """The caller has pinned `node`, where the prefix of so many tokens ends, for a hold."""
        prefix._node, prefix._born = node, self._tree.nodes.created[node]
        self._held[node] = self._held.get(node, 0) + 1
        self._held_tokens += length

    def _unpin(self, prefix: Prefix) -> None:
        """The opposite of `_settle`, and the pin off."""
        node = prefix._node
        self._held[node] -= 1
        if not self._held[node]:
            del self._held[node]
        self._held_tokens -= prefix.length
        self._pins.unpin(node)

    def _drop(self, top: int) -> Dropped:
        tree = self._tree
        below = tree.below(top)
        before = tree.cached_tokens
        total = int(np.asarray(tree.nodes.length)[below].sum())
        blocks = self._given_back(self._pins.drop(below, "forget").held)
        gone = before - tree.cached_tokens
        return Dropped(blocks, gone, total - gone)

    def _given_back(self, held: list[Int32s]) -> Int32s:
        blocks: Int32s = np.concatenate([NOTHING, *held])
        self._blocks.remove(blocks)
        return blocks
