"""The cache: prompts in, slots and forests out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from allocator import BlockPool, EvictionPolicy, OutOfBlocks, make_policy
from prefixtree.check import check
from prefixtree.columns import Int32s, Int64s
from prefixtree.errors import (
    InvalidBatch,
    InvalidLength,
    NotCommitted,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
)
from prefixtree.forest import Forest, build_forest
from prefixtree.pins import Pins
from prefixtree.sequence import Sequence
from prefixtree.stats import Counters, Stats
from prefixtree.tails import Tails
from prefixtree.tokens import TokensLike, as_prompt, as_tokens
from prefixtree.tree import ROOT, Place, RadixTree
from prefixtree.view import TreeView


class Match(NamedTuple):
    """How much of a prompt is there."""

    cached: int
    """Tokens whose KV is written."""
    pending: int
    """Tokens right behind these that an open sequence has in its prompt and will commit: a request
    that waits for it need not compute them again."""


class Batch:
    """Open sequences that take their steps together; saves looking them up each step.

    Made by `PrefixCache.batch`; used with a sequence closed meanwhile it raises `SequenceClosed`.
    """

    __slots__ = ("_cache", "_serials", "_tails", "sequences")

    def __init__(
        self,
        cache: PrefixCache,
        sequences: tuple[Sequence, ...],
        tails: Int64s,
        serials: Int64s,
    ) -> None:
        self._cache = cache
        self.sequences = sequences
        self._tails = tails
        self._serials = serials

    def __len__(self) -> int:
        return len(self.sequences)


class PrefixCache:
    """Shared prefixes of token sequences, mapped to blocks of KV.

    The cache hands out slots and keeps track; the KV itself is written and read by the engine that
    embeds it. One thread uses a cache.
    """

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, eviction: str | EvictionPolicy = "lru"
    ) -> None:
        """A cache of `num_blocks` blocks of `block_size` token slots each.

        Raises `InvalidArgument` unless both are >= 1, ValueError for an unknown policy.
        """
        self._pool = BlockPool(num_blocks, block_size)
        self._tree = RadixTree(block_size)
        self._pins = Pins(self._tree, make_policy(eviction))
        self._tails = Tails(self._tree, self._pool, self._pins)
        self._counters = Counters()
        self._open: dict[int, int] = {}  # serial number to tail
        self._prefilling: dict[int, int] = {}  # tails with a prompt not committed whole: its length

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    def match(self, tokens: TokensLike) -> Match:
        """How much of `tokens` is cached or about to be. Changes nothing, not even the LRU order.

        Raises `InvalidTokens`. O(len(tokens)) in C, plus a lookup a node.
        """
        wanted = as_prompt(tokens)
        place = self._tree.walk(wanted.tobytes())
        return Match(place.matched, self._pending(place, wanted))

    def open(self, tokens: TokensLike) -> Sequence:
        """A sequence of these tokens: the longest match pinned, blocks reserved for all the rest.

        Evicts what it must. All or nothing: raises `OutOfBlocks(needed, free, evictable)` or
        `InvalidTokens` and changes nothing. O(len(tokens)) in C, plus a lookup a node.
        """
        prompt = as_prompt(tokens)
        place = self._tree.walk(prompt.tobytes())
        rest = prompt[place.matched :]
        needed = -(-len(rest) // self.block_size)
        self._require(needed, kept=self._evictable_at(place))
        node = self._tails.land(place)
        self._pins.pin(node)
        self._free_up(needed)
        tail = self._tails.start(node, rest)
        if len(rest):
            self._prefilling[tail] = len(prompt)
        self._counters.opens += 1
        self._counters.query_tokens += len(prompt)
        self._counters.hit_tokens += place.matched
        return self._handle(tail, cached_len=place.matched, fork_len=0)

    def batch(self, sequences: Iterable[Sequence]) -> Batch:
        """A handle on these sequences for `append`, `commit` and `forest`. O(sequences).

        Raises `InvalidBatch` for one that is named twice or of another cache, `SequenceClosed`.
        """
        members = tuple(sequences)
        if any(sequence._cache is not self for sequence in members):
            raise InvalidBatch("a sequence of the batch belongs to another cache")
        serials = [sequence._serial for sequence in members]
        if len(set(serials)) < len(serials):
            raise InvalidBatch("a sequence is in the batch twice")
        tails = np.array([sequence._tail for sequence in members], np.int64)
        batch = Batch(self, members, tails, np.array(serials, np.int64))
        self._require_open(batch)
        return batch

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
        lens = self._per_sequence(batch, counts, 1, "counts")
        if (lens < 0).any():
            raise InvalidLength(f"counts must be >= 0, got {int(lens.min())}")
        if lens.sum() != len(added):
            raise InvalidLength(f"{len(added)} tokens for counts that sum to {int(lens.sum())}")
        needed = int(self._tails.blocks_needed(batch._tails, lens).sum())
        self._require(needed)
        self._free_up(needed)
        return self._tails.extend(batch._tails, lens, added)

    def commit(self, batch: Batch | Iterable[Sequence]) -> None:
        """The KV of all tokens of these sequences is written: from now on others match them.

        As `Sequence.commit` for each. A few vector operations for sequences that go on behind
        tokens of their own; Python work only for those that have none since their last fork or
        since another sequence came to share them.
        """
        batch = self._as_batch(batch)
        self._tails.commit_all(batch._tails)
        for tail in self._prefilling.keys() & batch._tails.tolist():
            del self._prefilling[tail]

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
        starts = np.asarray(self._tree.nodes.start)[batch._tails]
        committed = starts + np.asarray(self._tree.nodes.length)[batch._tails]
        lengths = starts + np.asarray(self._tree.tail_tokens.size)[batch._tails]
        kv = lengths if kv_lens is None else self._per_sequence(batch, kv_lens, 0, "kv_lens")
        queries = self._per_sequence(batch, query_lens, 1, "query_lens")
        wrong = (kv < committed) | (kv > lengths) | (queries < 1) | (queries > kv)
        wrong |= kv - queries > committed
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidLength(
                f"sequence {at} of the batch: kv_len {kv[at]} and query_len {queries[at]} do not"
                f" fit {committed[at]} committed of {lengths[at]} tokens"
            )
        return build_forest(self._tree, batch._tails, kv, queries)

    def evict(self, num_blocks: int) -> int:
        """Evicts unpinned leaves in the policy's order until `num_blocks` blocks came free.

        Returns how many did, fewer when nothing is left to evict. Raises `InvalidLength` for a
        negative number. O(log leaves) a node.
        """
        if num_blocks < 0:
            raise InvalidLength(f"num_blocks must be >= 0, got {num_blocks}")
        gone = self._pins.evict(num_blocks)
        return len(self._pool.release(gone)) if len(gone) else 0

    def clear(self) -> int:
        """Evicts everything that no open sequence uses; returns the blocks that came free."""
        return self.evict(self.num_blocks)

    def stats(self) -> Stats:
        tree, pins = self._tree, self._pins
        tails = np.fromiter(self._open.values(), np.int64, len(self._open))
        starts, sizes = np.asarray(tree.nodes.start), np.asarray(tree.tail_tokens.size)
        linked = int((np.asarray(tree.nodes.linked)[tails]).sum())
        return Stats(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            free_blocks=self._pool.num_free,
            evictable_blocks=pins.evictable_blocks,
            cached_tokens=tree.cached_tokens,
            pinned_tokens=tree.cached_tokens - pins.evictable_tokens,
            evictable_tokens=pins.evictable_tokens,
            nodes=len(tree.nodes) - 1 - len(tails) + linked,
            open_sequences=len(tails),
            logical_tokens=int((starts[tails] + sizes[tails]).sum()),
            evicted_tokens=pins.evicted_tokens,
            evicted_nodes=pins.evicted_nodes,
            **vars(self._counters),
        )

    def check(self) -> None:
        """Recounts everything; raises `BrokenInvariant` that names what is wrong. O(cache)."""
        check(self._tree, self._pool, self._pins, list(self._open.values()))

    def tree(self) -> TreeView:
        """The tree as it is now, to print and to walk. O(nodes)."""
        return TreeView.of(self._tree)

    def _require(self, needed: int, kept: int = 0) -> None:
        """Raises `OutOfBlocks` unless `needed` blocks can be had, `kept` evictable ones spared."""
        evictable = self._pins.evictable_blocks - kept
        if needed > self._pool.num_free + evictable:
            raise OutOfBlocks(needed, self._pool.num_free, evictable)

    def _free_up(self, needed: int) -> None:
        if needed > self._pool.num_free:
            self.evict(needed - self._pool.num_free)

    def _evictable_at(self, place: Place) -> int:
        """Evictable blocks that a sequence opened at `place` would pin."""
        blocks = self._pins.evictable_blocks_on_path(place.node)
        if place.within and not self._tree.nodes.pins[place.child]:
            blocks += self._tree.blocks_for(place.child, place.within)
            blocks -= self._tree.nodes.shares_first[place.child]
        return blocks

    def _pending(self, place: Place, wanted: Int32s) -> int:
        """Tokens behind the match that a prompt being computed has too."""
        nodes = self._tree.nodes
        path = {ROOT, *self._tree.path(place.node)} if self._prefilling else ()
        reached = place.matched
        for tail, prompt_len in self._prefilling.items():
            if nodes.parent[tail] in path:
                start = nodes.start[tail]
                prompt = self._tree.tail_tokens.get(tail)[: prompt_len - start]
                reached = max(reached, start + _agreement(prompt, wanted[start:]))
        return reached - place.matched

    def _handle(self, tail: int, cached_len: int, fork_len: int) -> Sequence:
        serial = self._tree.nodes.writer[tail]
        self._open[serial] = tail
        return Sequence(self, tail, serial, cached_len, fork_len)

    def _as_batch(self, batch: Batch | Iterable[Sequence]) -> Batch:
        if not isinstance(batch, Batch):
            return self.batch(batch)
        self._require_open(batch)
        return batch

    def _require_open(self, batch: Batch) -> None:
        if batch._cache is not self:
            raise InvalidBatch("the batch belongs to another cache")
        closed = np.asarray(self._tree.nodes.writer)[batch._tails] != batch._serials
        if closed.any():
            raise SequenceClosed(f"sequence {int(closed.argmax())} of the batch is closed")

    def _per_sequence(
        self, batch: Batch, values: npt.ArrayLike | None, default: int, name: str
    ) -> Int64s:
        if values is None:
            return np.full(len(batch), default, np.int64)
        array = np.asarray(values)
        if array.shape != (len(batch),) or (array.dtype.kind not in "iu" and len(array)):
            raise InvalidLength(
                f"{name} must be {len(batch)} integers, got {array.dtype} {array.shape}"
            )
        return array.astype(np.int64)

    # What the handles of `sequence` call.

    def _is_open(self, sequence: Sequence) -> bool:
        return self._tree.nodes.writer[sequence._tail] == sequence._serial

    def _tail_of(self, sequence: Sequence) -> int:
        if not self._is_open(sequence):
            raise SequenceClosed("the sequence is closed")
        return sequence._tail

    def _length(self, sequence: Sequence) -> int:
        return self._tails.length(self._tail_of(sequence))

    def _committed(self, sequence: Sequence) -> int:
        return self._tree.end(self._tail_of(sequence))

    def _tokens(self, sequence: Sequence) -> Int32s:
        return self._tails.tokens(self._tail_of(sequence))

    def _slots(self, sequence: Sequence, start: int, stop: int) -> Int64s:
        tail = self._tail_of(sequence)
        if not 0 <= start <= stop <= self._tails.length(tail):
            raise SlotRange(
                f"slots {start}..{stop} of a sequence of {self._tails.length(tail)} tokens"
            )
        return self._tails.slots(tail, start, stop)

    def _commit(self, sequence: Sequence, length: int) -> None:
        tail = self._tail_of(sequence)
        committed, total = self._tree.end(tail), self._tails.length(tail)
        if not committed <= length <= total:
            raise InvalidLength(
                f"commit to {length}, but {committed} of {total} tokens are committed: expected"
                f" {committed}..{total}"
            )
        self._tails.commit(tail, length)
        if length >= self._prefilling.get(tail, length):
            self._prefilling.pop(tail, None)

    def _fork(self, sequence: Sequence, count: int) -> list[Sequence]:
        tail = self._tail_of(sequence)
        if count < 1:
            raise InvalidLength(f"fork needs a count of at least 1, got {count}")
        length = self._tails.length(tail)
        if self._tree.end(tail) < length:
            raise NotCommitted(
                f"fork at {length} tokens, but only {self._tree.end(tail)} committed"
            )
        self._counters.forks += count
        sequence.fork_len = length
        return [self._handle(new, length, length) for new in self._tails.fork(tail, count)]

    def _rollback(self, sequence: Sequence, count: int) -> None:
        tail = self._tail_of(sequence)
        length = self._tails.length(tail)
        if not 0 <= count < length:
            raise InvalidLength(f"rollback of {count} tokens of {length}: expected 0..{length - 1}")
        if length - count < sequence.fork_len:
            raise RollbackPastFork(
                f"rollback of {count} from {length} tokens, but {sequence.fork_len} are shared by"
                f" a fork: expected at most {length - sequence.fork_len}"
            )
        self._counters.rollbacks += 1
        target = length - count
        self._tails.truncate(tail, max(target, self._tree.end(tail)))
        if target < self._tree.end(tail):
            self._tails.seal(tail)
            self._tails.move_up(tail, target)
        if tail in self._prefilling:
            self._prefilling[tail] = min(target, self._prefilling[tail])
            if self._tree.end(tail) >= self._prefilling[tail]:
                del self._prefilling[tail]

    def _close(self, sequence: Sequence) -> None:
        tail = self._tail_of(sequence)
        self._tails.close(tail)
        self._prefilling.pop(tail, None)
        del self._open[sequence._serial]
        self._counters.closes += 1


def _agreement(left: Int32s, right: Int32s) -> int:
    """In how many first tokens the two agree."""
    count = min(len(left), len(right))
    differs = left[:count] != right[:count]
    return int(differs.argmax()) if differs.any() else count
