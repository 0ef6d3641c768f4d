"""Handles on open sequences."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from prefixtree.columns import Int32s, Int64s

if TYPE_CHECKING:
    from prefixtree.cache import PrefixCache
    from prefixtree.tree import Namespace


class Sequence:
    """A running request: its path in the tree, pinned, and a tail that it alone writes.

    Made by `PrefixCache.open` and `fork`. After `close` every call raises `SequenceClosed`.
    """

    __slots__ = (
        "_cache",
        "_namespace",
        "_preempted",
        "_serial",
        "_tail",
        "cached_len",
        "fork_len",
    )

    def __init__(
        self,
        cache: PrefixCache,
        tail: int,
        serial: int,
        namespace: Namespace,
        cached_len: int,
        fork_len: int,
    ) -> None:
        self._cache = cache
        self._tail = tail
        self._serial = serial
        self._namespace = namespace
        self._preempted: Int32s | None = None  # its tokens, while it is preempted
        self.cached_len = cached_len
        """Tokens whose KV was there when the sequence was opened or forked."""
        self.fork_len = fork_len
        """Tokens shared with sequences forked off it, or that it was forked from: no rollback
        goes below."""

    def __len__(self) -> int:
        """All its tokens, committed or not. O(1)."""
        return self._cache._length(self)

    @property
    def committed(self) -> int:
        """Tokens whose KV is written. O(1)."""
        return self._cache._committed(self)

    @property
    def is_open(self) -> bool:
        return self._cache._is_open(self)

    @property
    def is_preempted(self) -> bool:
        return self._preempted is not None

    def tokens(self) -> Int32s:
        """A copy of all its tokens, int32 [len]. O(len)."""
        return self._cache._tokens(self)

    def slots(self, start: int, stop: int) -> Int64s:
        """Where the KV of positions start..stop-1 is, or is to be written: int64 [stop - start].

        Ask anew after a commit: it may move the sequence over to a copy of its tokens that was
        there before. Raises `SlotRange` unless 0 <= start <= stop <= len. O(stop - start + depth).
        """
        return self._cache._slots(self, start, stop)

    def block_table(self) -> Int32s:
        """The blocks of all its tokens, int32 [ceil(len / block_size)]: position p is in entry
        p // block_size at offset p % block_size.

        Ask anew after a commit that says that the sequence moved. Raises `NotAligned` unless the
        cache was made with `align="block"`. O(blocks + depth).
        """
        return self._cache._block_table(self)

    def commit(self, length: int) -> bool:
        """The KV of the positions below `length` is written: from now on others match them.

        Tokens that the tree has meanwhile got from another sequence are not kept twice: this
        sequence then moves over to the first copy, and True is returned: slots and block table are
        others now. Its own copy's blocks come free when it is next appended to, committed, rolled
        back or ended: what was launched with the old ones may still read there.

        Under `align="block"` others match whole blocks only. Raises `InvalidLength` unless
        committed <= length <= len. O(1) but for the first commit behind a node: O(length).
        """
        return self._cache._commit(self, length)

    def fork(self, count: int) -> list[Sequence]:
        """`count` new sequences that share all its tokens; this one stays open and goes on.

        Nothing is copied: each starts its own tokens on a fresh block. Under `align="block"` the
        tokens behind the last whole block are not shared: each new sequence has them uncommitted,
        on a block of its own. Raises `NotCommitted` when KV is missing, `InvalidLength` unless
        count >= 1, `OutOfBlocks`; then nothing has changed. O(count + depth).
        """
        return self._cache._fork(self, count)

    def rollback(self, count: int) -> None:
        """Drops the last `count` tokens, rejected drafts for example.

        Uncommitted tokens give their slots back. Committed ones are computed KV that is worth
        keeping: they stay in the tree, unpinned, for others to match or to be evicted. Raises
        `RollbackPastFork` below `fork_len`, `InvalidLength` for a negative count or when no token
        would be left. O(depth).

        Under `align="block"`, a rollback into the middle of a block that others match leaves the
        tokens from that block's begin on uncommitted, on a block of its own: `committed` says where
        to go on, and `OutOfBlocks` may be raised.
        """
        self._cache._rollback(self, count)

    def preempt(self) -> None:
        """Gives up its pins and all that is uncommitted, to make room for others.

        Its committed KV stays, evictable. Until `resume` every other call but `close` raises
        `SequenceClosed`. O(len).
        """
        self._cache._preempt(self)

    def resume(self) -> None:
        """Goes on after `preempt`, as if opened anew with all its tokens.

        `cached_len` says what is still there; the rest is to be computed again. `fork_len` stays.
        All or nothing: raises `OutOfBlocks` and stays preempted. Raises `NotPreempted`.
        """
        self._cache._resume(self)

    def close(self) -> None:
        """Ends the sequence. Its committed KV stays, evictable, for the next match. O(depth)."""
        self._cache._close(self)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_open or self.is_preempted:
            self.close()

    def __repr__(self) -> str:
        if not self.is_open:
            return f"<Sequence {'preempted' if self.is_preempted else 'closed'}>"
        return f"<Sequence {len(self)} tokens, {self.committed} committed>"

    def _repr_html_(self) -> str:
        from prefixtree.notebook import sequence_html

        return sequence_html(self)
