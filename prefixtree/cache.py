"""The cache: prompts in, slots and forests out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from allocator import (
    BlockPool,
    EvictionPolicy,
    InvalidArgument,
    OutOfBlocks,
    make_policy,
    uses_priority,
)
from allocator.errors import as_integer
from prefixtree.batch import Batch
from prefixtree.check import State, TokenSums
from prefixtree.columns import Int32s, Int64s
from prefixtree.errors import (
    InvalidBatch,
    InvalidLength,
    NotAligned,
    NotCommitted,
    NotPinned,
    NotPreempted,
    PriorityUnused,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
)
from prefixtree.evictions import Evicted
from prefixtree.explain import Explanation, explain
from prefixtree.forest import Forest, build_forest
from prefixtree.guard import guarded
from prefixtree.histogram import TOKENS, Observations
from prefixtree.inspected import Inspected
from prefixtree.journaled import Journaled
from prefixtree.pins import Pins
from prefixtree.retention import Retention
from prefixtree.sequence import Sequence
from prefixtree.stats import Counters, Stats
from prefixtree.tails import Tails
from prefixtree.tokens import TokensLike, agreement, as_prompt, as_tokens
from prefixtree.tree import DEFAULT, NOWHERE, Namespace, Place, RadixTree, as_namespace

if TYPE_CHECKING:
    from allocator import KVStorage


class Match(NamedTuple):
    """How much of a prompt is there."""

    cached: int
    """Tokens whose KV is written."""
    pending: int
    """Tokens right behind these that an open sequence has in its prompt and will commit: a request
    that waits for it need not compute them again."""


class Forgotten(NamedTuple):
    """What `forget` did."""

    blocks: int
    """Blocks that came free."""
    tokens: int
    """Cached tokens that are gone."""
    kept_tokens: int
    """Cached tokens that should have gone but are in use."""


class Pin:
    """Keeps a prefix from eviction; made by `PrefixCache.pin`."""

    __slots__ = ("_cache", "_node", "tokens")

    def __init__(self, cache: PrefixCache, node: int, tokens: int) -> None:
        self._cache = cache
        self._node = node
        self.tokens = tokens
        """How many tokens of the prefix are kept."""

    def unpin(self) -> None:
        """Lets the prefix be evicted again. Raises `NotPinned` the second time."""
        self._cache._unpin(self)


class PrefixCache(Inspected, Journaled):
    """Shared prefixes of token sequences, mapped to blocks of KV.

    The cache hands out slots and keeps track; the KV itself is written and read by the engine that
    embeds it. Sequences of different namespaces (model, adapter, tenant) never share anything.

    Numbers that are no integers raise the allocator's `InvalidArgument`, here and in the handles.

    A reference count or a link found wrong raises at the call that found it (`BrokenInvariant`,
    `DoubleFree`, `ForeignBlock`); every call after that raises `CacheBroken`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        eviction: str | EvictionPolicy = "lru",
        align: Literal["token", "block"] = "token",
        reserve_block_0: bool = False,
        thread_safe: bool = False,
        clock: Callable[[], SupportsFloat] = time.monotonic,
    ) -> None:
        """A cache of `num_blocks` blocks of `block_size` token slots each.

        `align="block"` is for engines whose kernels read plain block tables and know no offsets
        (`Sequence.block_table`): what is shared is then rounded down to whole blocks. With
        `reserve_block_0` block 0 is never handed out: engines write the KV of padding there.
        One thread uses a cache, unless `thread_safe`: then calls wait for each other. `clock` gives
        the seconds in which `retain` counts and `evictions` says when; should it raise or give no
        finite number, the call that asked it raises `BrokenInvariant` and the cache refuses further
        work.

        Raises `InvalidArgument` unless both numbers are >= 1 and `align` is one of the two, for an
        unknown policy, and when no block is left to hand out.
        """
        if align not in ("token", "block"):
            raise InvalidArgument(f"align is {align!r}, expected 'token' or 'block'")
        if reserve_block_0 and num_blocks == 1:
            raise InvalidArgument("num_blocks is 1, expected at least 2 when block 0 is reserved")
        self._lock: AbstractContextManager[object] = RLock() if thread_safe else nullcontext()
        self.thread_safe = thread_safe
        """Whether any thread may call it."""
        self._broken = ""
        self._pool = BlockPool(num_blocks, block_size)
        self._reserved = self._pool.allocate(int(reserve_block_0))
        self._tree = RadixTree(block_size, align=block_size if align == "block" else 1)
        self._policy = make_policy(eviction)
        self._retention = Retention(clock)
        self._pins = Pins(self._tree, self._policy, self._retention)
        self._tails = Tails(self._tree, self._pool, self._pins)
        self._counters = Counters()
        self._match_lengths = Observations(TOKENS)
        self._attended = 0, 0  # tokens of the last forest, and those of its sequences
        self._open: dict[int, int] = {}  # serial number to tail
        self._kept: list[int] = []  # nodes pinned for good, once for each pin
        self._kept_tokens = 0  # of their paths
        self._prefilling: dict[int, int] = {}  # tails with a prompt not committed whole: its length

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    @property
    def align(self) -> int:
        """Matches are whole multiples of this many tokens: 1, or the block size."""
        return self._tree.align

    @guarded
    def match(self, tokens: TokensLike, *, namespace: Namespace = DEFAULT) -> Match:
        """How much of `tokens` is cached or about to be. Changes nothing, not even the LRU order.

        Raises `InvalidTokens`, `InvalidNamespace`. O(len(tokens)) in C, plus a lookup a node.
        """
        wanted = as_prompt(tokens)
        place = self._find(wanted, namespace)
        return Match(place.matched, self._pending(place, wanted))

    @guarded
    def can_open(
        self, tokens: TokensLike, *, namespace: Namespace = DEFAULT, watermark: int = 0
    ) -> bool:
        """Whether `open` would find its blocks and leave `watermark` more free or evictable.

        An engine that admits only what leaves its running sequences room to grow preempts less.
        Changes nothing; raises as `match`, and `InvalidLength` for a negative watermark.
        """
        watermark = as_integer("watermark", watermark)
        if watermark < 0:
            raise InvalidLength(f"watermark must be >= 0 blocks, got {watermark}")
        wanted = as_prompt(tokens)
        place = self._find(wanted, namespace)
        left = self._pool.num_free + self._pins.evictable_blocks - self._evictable_at(place)
        return self._blocks_behind(place, wanted) + watermark <= left

    @guarded
    def open(self, tokens: TokensLike, *, namespace: Namespace = DEFAULT) -> Sequence:
        """A sequence of these tokens: the longest match pinned, blocks reserved for all the rest.

        Evicts what it must. All or nothing: raises `OutOfBlocks(needed, free, evictable)`,
        `InvalidTokens` or `InvalidNamespace` and changes nothing. O(len(tokens)) in C, plus a
        lookup a node.
        """
        prompt = as_prompt(tokens)
        tail, cached_len = self._start(prompt, namespace, "open")
        self._counters.opens += 1
        self._counters.query_tokens += len(prompt)
        self._counters.hit_tokens += cached_len
        self._match_lengths.add(cached_len)
        return self._handle(tail, namespace, cached_len, fork_len=0)

    @guarded
    def pin(self, tokens: TokensLike, *, namespace: Namespace = DEFAULT) -> Pin:
        """Keeps what is cached of `tokens` from eviction until `Pin.unpin`. O(depth).

        Raises `InvalidTokens`, `InvalidNamespace`.
        """
        place = self._find(as_prompt(tokens), namespace)
        node = self._tails.land(place)
        self._pins.pin(node)
        self._kept.append(node)
        self._kept_tokens += place.matched
        return Pin(self, node, place.matched)

    @guarded
    def retain(
        self,
        tokens: TokensLike,
        *,
        priority: SupportsIndex,
        duration: SupportsFloat | None = None,
        start: SupportsIndex = 0,
        stop: SupportsIndex | None = None,
        namespace: Namespace = DEFAULT,
    ) -> int:
        """Gives what is cached of `tokens` from position `start` up to `stop` a priority.

        Returns how many tokens that are: what is not committed yet is not among them and gets
        nothing, so call again after its commit. Everything has priority 35 of 0..100 before. After
        `duration` seconds it has so again; None is for as long as it is cached. The last call
        counts, shorter or longer, higher or lower.

        Priorities order the leaves that may be evicted, and nothing else: what lies above others
        stays as long as they do, pins hold whatever the priority, and the call is no use of the
        tokens. Nodes are split at the ends of the range, without copies; under `align="block"` it
        begins with the block of `start` and ends with the last whole block.

        Raises `PriorityUnused` when the eviction policy does not look at priorities,
        `InvalidTokens`, `InvalidNamespace`, `InvalidLength` unless 0 <= start <= stop <=
        len(tokens), and `InvalidArgument` for a priority outside 0..100 or a duration that is not
        finite and > 0. O(len(tokens)) in C, plus O(log nodes) a node.
        """
        if not uses_priority(self._policy):
            raise PriorityUnused(
                f"eviction policy {self._policy.name!r} does not look at priorities, expected"
                " 'priority'"
            )
        wanted = as_prompt(tokens)
        first = as_integer("start", start)
        last = len(wanted) if stop is None else as_integer("stop", stop)
        if not 0 <= first <= last <= len(wanted):
            raise InvalidLength(f"range {first}..{last} of a prompt of {len(wanted)} tokens")
        place = self._find(wanted[:last], namespace)
        first = self._tree.aligned(first)
        retained = self._retention.from_now(priority, duration)
        self._pins.end_retention()  # here too, so that much of it cannot gather for one eviction
        if place.matched <= first:
            return 0
        self._tails.retain(place, first, retained)
        return place.matched - first

    @guarded
    def forget(
        self, tokens: TokensLike | None = None, *, namespace: Namespace = DEFAULT
    ) -> Forgotten:
        """Drops the KV behind the prefix `tokens`, or all of the namespace, as far as none uses it.

        What open sequences or pins hold stays, and is matched as before; `Forgotten` says how much.
        Raises `InvalidTokens`, `InvalidNamespace`. O(nodes of the cache).
        """
        root = self._tree.root_of(as_namespace(namespace))
        if root < 0:
            return Forgotten(blocks=0, tokens=0, kept_tokens=0)
        top = root
        if tokens is not None:
            prefix = as_prompt(tokens)
            place = self._tree.walk(prefix, root)
            if place.matched < len(prefix):
                return Forgotten(blocks=0, tokens=0, kept_tokens=0)
            top = self._tails.land(place)
        below = self._tree.below(top)
        before = self._tree.cached_tokens
        total = int(np.asarray(self._tree.nodes.length)[below].sum())
        blocks = self._let_go(self._pins.drop(below, "forget").held)
        gone = before - self._tree.cached_tokens
        return Forgotten(blocks=blocks, tokens=gone, kept_tokens=total - gone)

    @guarded
    def batch(self, sequences: Iterable[Sequence]) -> Batch:
        """A handle on these sequences for `append`, `commit` and `forest`. O(sequences).

        Raises `InvalidBatch` for one that is named twice or of another cache, `SequenceClosed`.
        """
        batch = Batch(self, sequences)
        self._require_open(batch)
        return batch

    @guarded
    def append(
        self,
        batch: Batch | Iterable[Sequence],
        tokens: TokensLike,
        counts: npt.ArrayLike | None = None,
    ) -> Int64s:
        """Adds tokens to each sequence of the batch; returns the slots to write their KV to.

        `tokens` is packed in the order of the batch, `counts[i]` of them for sequence i, one each
        by default. Returns int64 [len(tokens)]. Nobody matches the tokens before they are
        committed. All or nothing for the whole batch: raises `OutOfBlocks`, `InvalidTokens`,
        `InvalidLength` or `SequenceClosed` and changes nothing. A few vector operations, however
        large the batch.
        """
        batch = self._as_batch(batch)
        added = as_tokens(tokens)
        lens = batch.per_sequence(counts, 1, "counts")
        if counts is not None and (outside := (lens < 0) | (lens > len(added))).any():
            wrong = int(lens[outside][0])
            raise InvalidLength(f"counts must be 0..{len(added)}, the tokens given, got {wrong}")
        total = len(batch) if counts is None else int(lens.sum())
        if total != len(added):
            raise InvalidLength(f"{len(added)} tokens for counts that sum to {total}")
        growth = self._tails.growth(batch.tails, lens)
        self._require(growth.blocks, coming=self._tails.retired_by(batch.tails))
        self._tails.settle(batch.tails)
        self._free_up(growth.blocks, "append")
        return self._tails.extend(growth, added)

    @guarded
    def commit(self, batch: Batch | Iterable[Sequence]) -> Int64s:
        """The KV of all tokens of these sequences is written: from now on others match them.

        As `Sequence.commit` for each; returns which of the batch moved over to another copy, as
        ascending indices, int64. A few vector operations for sequences that go on behind
        tokens of their own; Python work only for those that have none since their last fork or
        since another sequence came to share them.
        """
        batch = self._as_batch(batch)
        moved = self._tails.commit_all(batch.tails)
        if self._prefilling:
            for tail in self._prefilling.keys() & batch.tails.tolist():
                del self._prefilling[tail]
        return moved

    @guarded
    def forest(
        self,
        batch: Batch | Iterable[Sequence],
        kv_lens: npt.ArrayLike | None = None,
        query_lens: npt.ArrayLike | None = None,
    ) -> Forest:
        """What attention plans a step from: the nodes under these sequences, each once.

        `kv_lens[i]`: tokens of sequence i that are written or will be in this step, all by
        default; `query_lens[i]`: how many of the last of these are queries, 1 by default. Raises
        `InvalidLength` unless committed <= kv_len <= len, 1 <= query_len <= kv_len and no position
        between committed ones and queries is left out (kv_len - query_len <= committed).
        """
        batch = self._as_batch(batch)
        starts = np.asarray(self._tree.nodes.start)[batch.tails]
        committed = starts + np.asarray(self._tree.nodes.written)[batch.tails]
        lengths = starts + np.asarray(self._tree.tail_tokens.size)[batch.tails]
        kv = lengths if kv_lens is None else batch.per_sequence(kv_lens, 0, "kv_lens")
        queries = batch.per_sequence(query_lens, 1, "query_lens")
        wrong = (kv < committed) | (kv > lengths) | (queries < 1) | (queries > kv)
        wrong |= kv - queries > committed
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidLength(
                f"sequence {at} of the batch: kv_len {kv[at]} and query_len {queries[at]} do not"
                f" fit {committed[at]} committed of {lengths[at]} tokens"
            )
        forest = build_forest(self._tree, batch.tails, kv, queries)
        self._attended = int(forest.length.sum()), int(kv.sum())
        return forest

    @guarded
    def evict(self, num_blocks: int) -> Evicted:
        """Evicts unpinned leaves in the policy's order until `num_blocks` blocks came free.

        The last leaf loses only its tail where that is enough: no more blocks come free than were
        asked for, and fewer only when nothing is left to evict. Raises `InvalidLength` for a
        negative number. O(log leaves) a node.
        """
        num_blocks = as_integer("num_blocks", num_blocks)
        if num_blocks < 0:
            raise InvalidLength(f"num_blocks must be >= 0, got {num_blocks}")
        return self._evict(num_blocks, "evict")

    @guarded
    def clear(self) -> Evicted:
        """Evicts all that no open sequence or pin holds."""
        # One more than there are, so that also the last leaf goes whole.
        return self._evict(self.num_blocks + 1, "clear")

    @guarded
    def explain(self, tokens: TokensLike, *, namespace: Namespace = DEFAULT) -> Explanation:
        """What of `tokens` is cached, where the match stops and why.

        For looking into a miss, not for every request. Changes nothing. Raises as `match`.
        O(len(tokens)) in C for each namespace that begins alike; O(nodes) under `align="block"`;
        O(evictions since the last call) of those that are remembered.
        """
        wanted = as_prompt(tokens)
        place = self._find(wanted, namespace)
        known = None if place is NOWHERE else place
        pending = self._pending(place, wanted)
        return explain(self._tree, self._pins.log, wanted, namespace, known, pending)

    @guarded
    def stats(self) -> Stats:
        """The numbers of now. Cheap enough for every step: O(1), but for what came free last and
        O(retired_blocks)."""
        pool, tree, pins, tails = self._pool, self._tree, self._pins, self._tails
        counters, (attended, attended_logical) = self._counters, self._attended
        gone = pins.counts.total()
        # By place: to name the fields would take longer than all the rest.
        return Stats(
            pool.num_blocks,
            pool.block_size,
            len(self._reserved),
            pool.num_free,
            pool.num_free_extents,
            pins.evictable_blocks,
            tails.retired_blocks(),
            tree.cached_tokens,
            tree.cached_tokens - pins.evictable_tokens,
            pins.evictable_tokens,
            tails.pending_tokens,
            tree.num_edges,
            tree.branches,
            len(self._open),
            len(self._prefilling),
            tails.logical_tokens,
            len(self._kept),
            self._kept_tokens,
            attended,
            attended_logical,
            counters.opens,
            counters.forks,
            counters.rollbacks,
            counters.closes,
            counters.preemptions,
            counters.resumes,
            counters.query_tokens,
            counters.hit_tokens,
            tails.joins,
            tails.joined_tokens,
            gone.tokens,
            gone.nodes,
            gone.trimmed,
            pins.counts.each(),
            self._match_lengths.histogram(),
            pins.path_nodes.histogram(),
            pins.reuse_gaps.histogram(),
            pins.idle_times.histogram(),
            pins.lifetimes.histogram(),
        )

    @guarded
    def save(self, path: str | os.PathLike[str], storage: KVStorage | None = None) -> None:
        """Writes a snapshot for `restore`: what is committed, with its K and V from `storage`.

        At any time, also while sequences run: other calls wait. What is in use counts as used last.
        The file is replaced as a whole or not at all. Raises OSError that names `path` when it
        cannot be written, the allocator's `KVMismatch` for a storage of other sizes than the
        cache. O(nodes + tokens + bytes of the blocks in use).
        """
        from prefixtree.snapshot import save

        save(path, self._tree, self._pool, self._reserved, storage)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        storage: KVStorage | None = None,
        *,
        eviction: str | EvictionPolicy = "lru",
        thread_safe: bool = False,
        clock: Callable[[], SupportsFloat] = time.monotonic,
    ) -> Self:
        """A cache of the sizes and the alignment of the saved one, which matches what that one did.

        Everything is in the slots where it was, as often and as lately used. All of it may be
        evicted: sequences and pins are not restored, nor are priorities given by `retain` and the
        ageing of "cost". Statistics begin anew. With `storage`, the
        saved K and V are written to it; without, they must come to their slots by other means.

        Raises OSError when the file cannot be read; `InvalidSnapshot` when it is no snapshot, is
        damaged, of another version, contradicts itself or does not fit `storage`, which is then as
        before; ImportError without safetensors. Nothing in the file is executed.
        """
        from prefixtree.snapshot import fill, fill_storage, read

        snapshot = read(path, storage)
        cache = cls(
            snapshot.num_blocks,
            snapshot.block_size,
            align=snapshot.align,
            reserve_block_0=snapshot.reserve_block_0,
            eviction=eviction,
            thread_safe=thread_safe,
            clock=clock,
        )
        fill(snapshot, cache._tree, cache._pool, cache._pins)
        if storage is not None:
            fill_storage(snapshot, storage)
        return cache

    def _state(self) -> State:
        aside = np.concatenate([self._reserved, self._tails.retired])
        tails = self._tails
        sums = TokenSums(tails.logical_tokens, tails.pending_tokens, self._kept_tokens)
        return State(self._tree, self._pool, self._pins, self._open, self._kept, aside, sums)

    def _find(self, wanted: Int32s, namespace: Namespace) -> Place:
        root = self._tree.root_of(as_namespace(namespace))
        return NOWHERE if root < 0 else self._tree.walk(wanted, root)

    def _start(self, prompt: Int32s, namespace: Namespace, reason: str) -> tuple[int, int]:
        """A pinned tail for a prompt, and how much of it was cached; or `OutOfBlocks`."""
        place = self._find(prompt, namespace)
        matched, needed = place.matched, self._blocks_behind(place, prompt)
        if needed > self._pool.num_free:
            self._require(needed, kept=self._evictable_at(place))
        if place is NOWHERE:
            place = NOWHERE._replace(node=self._tree.add_root(namespace))
        node = self._tails.land(place)
        self._pins.pin(node)
        self._free_up(needed, reason)
        tail = self._tails.start(node, prompt[matched:])
        if matched < len(prompt):
            self._prefilling[tail] = len(prompt)
        return tail, matched

    def _blocks_behind(self, place: Place, wanted: Int32s) -> int:
        return -(-(len(wanted) - place.matched) // self._pool.block_size)

    def _let_go(self, held: list[Int32s]) -> int:
        """Releases what eviction gave; returns how many blocks came free."""
        return len(self._pool.release(np.concatenate(held))) if held else 0

    def _require(self, needed: int, kept: int = 0, coming: int = 0) -> None:
        """Raises `OutOfBlocks` unless `needed` blocks can be had.

        `kept` evictable ones are spared, `coming` ones the call itself frees.
        """
        free, evictable = self._pool.num_free + coming, self._pins.evictable_blocks - kept
        if needed > free + evictable:
            raise OutOfBlocks(needed, free, evictable)

    def _free_up(self, needed: int, reason: str) -> None:
        if needed > self._pool.num_free:
            self._let_go(self._pins.evict(needed - self._pool.num_free, reason).held)

    def _evict(self, num_blocks: int, reason: str) -> Evicted:
        removed = self._pins.evict(num_blocks, reason)
        blocks = self._let_go(removed.held)
        return Evicted(blocks, removed.tokens, removed.nodes, removed.trimmed)

    def _evictable_at(self, place: Place) -> int:
        """Evictable blocks that a sequence opened at `place` would pin."""
        blocks = self._pins.evictable_blocks_on_path(place.node)
        if place.within and not self._tree.nodes.pins[place.child]:
            blocks += self._tree.blocks_for(place.child, place.within)
            blocks -= self._tree.nodes.shares_first[place.child]
        return blocks

    def _pending(self, place: Place, wanted: Int32s) -> int:
        """Tokens behind the match that a prompt being computed has too."""
        if not self._prefilling or place is NOWHERE:
            return 0
        nodes = self._tree.nodes
        path = {*self._tree.path(place.node), self._tree.root_above(place.node)}
        reached = place.matched
        for tail, prompt_len in self._prefilling.items():
            if nodes.parent[tail] in path:
                start = nodes.start[tail]
                prompt = self._tree.tail_tokens.get(tail)[: prompt_len - start]
                reached = max(reached, start + agreement(prompt, wanted[start:]))
        return self._tree.aligned(reached) - place.matched

    def _handle(self, tail: int, namespace: Namespace, cached_len: int, fork_len: int) -> Sequence:
        serial = self._tree.nodes.writer[tail]
        self._open[serial] = tail
        return Sequence(self, tail, serial, namespace, cached_len, fork_len)

    def _as_batch(self, batch: Batch | Iterable[Sequence]) -> Batch:
        if not isinstance(batch, Batch):
            return self.batch(batch)
        self._require_open(batch)
        return batch

    def _require_open(self, batch: Batch) -> None:
        if batch.cache is not self:
            raise InvalidBatch("the batch belongs to another cache")
        closed = np.asarray(self._tree.nodes.writer)[batch.tails] != batch.serials
        if np.count_nonzero(closed):
            at = int(closed.argmax())
            sequence = batch.sequences[at]
            state = "preempted" if sequence.is_preempted else "closed"
            if self._writes(sequence):
                state = "resumed since the batch was made"
            raise SequenceClosed(f"sequence {at} of the batch is {state}")

    # What the handles of `sequence` call.

    @guarded
    def _is_open(self, sequence: Sequence) -> bool:
        return self._writes(sequence)

    def _writes(self, sequence: Sequence) -> bool:
        return self._tree.nodes.writer[sequence._tail] == sequence._serial

    def _tail_of(self, sequence: Sequence) -> int:
        if not self._writes(sequence):
            raise SequenceClosed(
                "the sequence is " + ("closed" if sequence._preempted is None else "preempted")
            )
        return sequence._tail

    @guarded
    def _length(self, sequence: Sequence) -> int:
        return self._tails.length(self._tail_of(sequence))

    @guarded
    def _committed(self, sequence: Sequence) -> int:
        return self._tails.committed(self._tail_of(sequence))

    @guarded
    def _tokens(self, sequence: Sequence) -> Int32s:
        return self._tails.tokens(self._tail_of(sequence))

    @guarded
    def _slots(self, sequence: Sequence, start: int, stop: int) -> Int64s:
        tail = self._tail_of(sequence)
        start, stop = as_integer("start", start), as_integer("stop", stop)
        if not 0 <= start <= stop <= self._tails.length(tail):
            raise SlotRange(
                f"slots {start}..{stop} of a sequence of {self._tails.length(tail)} tokens"
            )
        return self._tails.slots(tail, start, stop)

    @guarded
    def _block_table(self, sequence: Sequence) -> Int32s:
        tail = self._tail_of(sequence)
        if self._tree.align < self.block_size:
            raise NotAligned(
                'a block table needs PrefixCache(align="block"): with align="token" a node may'
                " begin inside a block"
            )
        return self._tails.block_table(tail)

    @guarded
    def _commit(self, sequence: Sequence, length: int) -> bool:
        tail = self._tail_of(sequence)
        length = as_integer("length", length)
        committed, total = self._tails.committed(tail), self._tails.length(tail)
        if not committed <= length <= total:
            raise InvalidLength(
                f"commit to {length}, but {committed} of {total} tokens are committed: expected"
                f" {committed}..{total}"
            )
        moved = self._tails.commit(tail, length)
        if length >= self._prefilling.get(tail, length):
            self._prefilling.pop(tail, None)
        return moved

    @guarded
    def _fork(self, sequence: Sequence, count: int) -> list[Sequence]:
        tail = self._tail_of(sequence)
        count = as_integer("count", count)
        if count < 1:
            raise InvalidLength(f"fork needs a count of at least 1, got {count}")
        length = self._tails.length(tail)
        committed = self._tails.committed(tail)
        if committed < length:
            raise NotCommitted(f"fork at {length} tokens, but only {committed} committed")
        shared = self._tree.aligned(length)
        needed = count if shared < length else 0
        self._require(needed)
        self._free_up(needed, "fork")
        tails = self._tails.fork(tail, count)
        self._counters.forks += count
        sequence.fork_len = length
        return [self._handle(new, sequence._namespace, shared, length) for new in tails]

    @guarded
    def _rollback(self, sequence: Sequence, count: int) -> None:
        tail = self._tail_of(sequence)
        count = as_integer("count", count)
        length = self._tails.length(tail)
        if not 0 <= count < length:
            raise InvalidLength(f"rollback of {count} tokens of {length}: expected 0..{length - 1}")
        if length - count < sequence.fork_len:
            raise RollbackPastFork(
                f"rollback of {count} from {length} tokens, but {sequence.fork_len} are shared by"
                f" a fork: expected at most {length - sequence.fork_len}"
            )
        target = length - count
        if target < self._tree.end(tail):
            needed = int(self._tree.aligned(target) < target)
            self._require(needed)
            self._free_up(needed, "rollback")
            self._tails.settle_one(tail)
            self._tails.move_up(tail, target)
        else:
            self._tails.settle_one(tail)
            self._tails.truncate(tail, target)
        self._counters.rollbacks += 1
        if tail in self._prefilling:
            self._prefilling[tail] = min(target, self._prefilling[tail])
            if self._tails.committed(tail) >= self._prefilling[tail]:
                del self._prefilling[tail]

    @guarded
    def _close(self, sequence: Sequence) -> None:
        if sequence._preempted is None:
            self._end(sequence)
        sequence._preempted = None
        self._counters.closes += 1

    @guarded
    def _preempt(self, sequence: Sequence) -> None:
        self._tail_of(sequence)
        sequence._preempted = self._tokens(sequence)
        self._end(sequence)
        self._counters.preemptions += 1

    @guarded
    def _resume(self, sequence: Sequence) -> None:
        if sequence._preempted is None:
            raise NotPreempted("resume of a sequence that is not preempted")
        tail, sequence.cached_len = self._start(sequence._preempted, sequence._namespace, "resume")
        sequence._tail, sequence._serial = tail, self._tree.nodes.writer[tail]
        self._open[sequence._serial] = tail
        sequence._preempted = None
        self._counters.resumes += 1

    @guarded
    def _unpin(self, pin: Pin) -> None:
        if pin._node < 0:
            raise NotPinned("the prefix is not pinned any more")
        self._kept_tokens -= self._tree.end(pin._node)
        self._pins.unpin(pin._node)
        self._kept.remove(pin._node)
        pin._node = -1

    def _end(self, sequence: Sequence) -> None:
        tail = self._tail_of(sequence)
        self._tails.close(tail)
        self._prefilling.pop(tail, None)
        del self._open[sequence._serial]
