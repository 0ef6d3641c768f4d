"""The pool: reference-counted block ids."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.errors import (
    BrokenInvariant,
    DoubleFree,
    ForeignBlock,
    InvalidArgument,
    OutOfBlocks,
    as_integer,
    at_least,
)
from allocator.extents import FreeExtents

Int32s = NDArray[np.int32]
Runs: TypeAlias = "list[tuple[int, int]]"
"""Consecutive ids as (start, length)."""

_MOST_BLOCKS = 2**31 - 1

_NONE: Int32s = np.empty(0, np.int32)

_ONCE = np.ones(1 << 16, np.int32).tobytes()
"""Reference counts of blocks that one node holds, as nearly all are; enough for most calls."""


class BlockPool:
    """Hands out the blocks 0 .. num_blocks-1 and counts the references to each.

    Attributes: `num_blocks`; `block_size`, in tokens.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """InvalidArgument unless both are integers >= 1 and all block ids fit int32."""
        self.num_blocks = at_least(1, "num_blocks", num_blocks)
        self.block_size = at_least(1, "block_size", block_size)
        if self.num_blocks > _MOST_BLOCKS:
            raise InvalidArgument(f"num_blocks is {num_blocks}, expected at most {_MOST_BLOCKS}")
        self._refs = np.zeros(self.num_blocks, np.int32)
        self._every = np.arange(self.num_blocks, dtype=np.int32).tobytes()
        self._ids = np.frombuffer(self._every, np.int32)  # runs of ids are slices of it
        self._free = FreeExtents(self.num_blocks)
        self._num_free = self.num_blocks
        # What came free last, ascending: not in an extent yet, and counted as referenced. A full
        # cache evicts just what is lacking and hands out all of it at once; neither its reference
        # counts nor the extents need to be touched for that.
        self._freed = _NONE

    @property
    def refs(self) -> Int32s:
        """The reference counts of now, int32 [num_blocks]; read-only, good until the next call."""
        self._settle()
        view = self._refs.view()
        view.flags.writeable = False
        return view

    @property
    def num_free(self) -> int:
        """Blocks without a reference. O(1)."""
        return self._num_free

    @property
    def num_free_extents(self) -> int:
        """Runs of consecutive free blocks. O(1), but for what came free last."""
        self._settle()
        return len(self._free)

    def allocate(self, count: int, after: int | None = None) -> Int32s:
        """Hands out `count` free blocks, int32 [count], each with one reference.

        They continue directly behind the block `after` as far as that space is free. The others
        come from a smallest extent that holds them all, else from the largest ones. When no more
        are free than asked for, all come in ascending order, from behind `after` on and round.
        O(count) in numpy plus O(log extents) for each extent used.

        Raises OutOfBlocks when fewer than `count` are free, ForeignBlock when `after` is no block
        in use, InvalidArgument for a `count` below 0 or no integer; then nothing has changed.
        """
        count = at_least(0, "count", count)
        if after is not None:
            after = as_integer("after", after)
            if not self._is_used(after):
                raise ForeignBlock([after])
        if count > self._num_free:
            raise OutOfBlocks(count, self._num_free)
        if 0 < count == self._num_free:
            return self._take_all(after)
        return self._take(count, after)

    def retain(self, blocks: ArrayLike) -> None:
        """Adds a reference to each of `blocks`, an integer array [n]; duplicates count.

        Raises ForeignBlock naming those that are out of range or free, InvalidArgument for an
        array of another kind; then nothing has changed. O(n log n) in numpy.
        """
        ids, times = self._tally(_as_ids(blocks))
        self._settle()
        refs: Int32s = self._refs.take(ids)
        if np.count_nonzero(refs) < ids.size:
            raise ForeignBlock(ids[refs == 0])
        self._refs[ids] = refs + times

    def release(self, blocks: ArrayLike) -> Int32s:
        """Takes a reference from each of `blocks`, an integer array [n]; duplicates count.

        Returns the blocks that became free, int32, ascending. O(n log n) in numpy; O(log extents)
        more for each run of them, when they are not all handed out again at once.

        Raises ForeignBlock naming those out of range, DoubleFree naming those released more often
        than they are referenced, InvalidArgument for an array of another kind; then nothing has
        changed.
        """
        ids = _as_ids(blocks)
        self._settle()
        freed = ids.copy() if self._is_run_held_once(ids) else self._let_go(ids)
        self._freed = freed
        self._num_free += len(freed)
        return freed.copy()

    def check(self) -> None:
        """Raises BrokenInvariant unless exactly the blocks without a reference are free.

        O(num_blocks).
        """
        self._settle()
        self._free.check()
        free = np.zeros(self.num_blocks, bool)
        for start, length in self._free:
            if start + length > self.num_blocks:
                raise BrokenInvariant(
                    f"free extent at {start} ends at {start + length} of {self.num_blocks} blocks"
                )
            free[start : start + length] = True
        wrong = np.flatnonzero(np.where(free, self._refs != 0, self._refs < 1))
        if wrong.size:
            block = wrong[0]
            state = "free" if free[block] else "not free"
            raise BrokenInvariant(f"block {block} is {state} with {self._refs[block]} references")
        if self._free.total != self._num_free:
            raise BrokenInvariant(f"{self._num_free} free blocks counted of {self._free.total}")

    def _take(self, count: int, after: int | None) -> Int32s:
        """Takes `count` of the free ids."""
        self._settle()
        runs = []
        left = count
        if after is not None:
            taken = self._free.take_at(after + 1, left)
            runs.append((after + 1, taken))
            left -= taken
        while left:
            start, taken = self._free.take_best(left)
            runs.append((start, taken))
            left -= taken
        self._num_free -= count
        return self._reference(runs)

    def _take_all(self, after: int | None) -> Int32s:
        """Takes all free ids."""
        ids, self._freed, self._num_free = self._freed, _NONE, 0
        if len(self._free):
            ids = np.concatenate([ids, self._reference(self._free.take_all())])
            ids.sort()
        if after is not None:
            at = bisect_left(ids.data, after + 1)
            if at < len(ids) and ids.item(at) == after + 1:
                ids = np.concatenate([ids[at:], ids[:at]])
        return ids

    def _reference(self, runs: Runs) -> Int32s:
        """The ids of these runs, with one reference each."""
        for start, length in runs:
            self._refs[start : start + length] = 1
        ids = self._ids
        return np.concatenate([_NONE, *[ids[start : start + length] for start, length in runs]])

    def _let_go(self, ids: NDArray[np.integer[Any]]) -> Int32s:
        """`release` that leaves each block its last reference; returns the blocks, ascending, of
        which it was that one."""
        freed, times = self._tally(ids)
        refs: Int32s = self._refs.take(freed)
        if isinstance(times, int) and _ONCE.startswith(refs.data):
            return freed
        left: Int32s = refs - times
        if left.size and np.minimum.reduce(left) < 0:
            raise DoubleFree(freed[left < 0])
        self._refs[freed] = np.maximum(left, 1)
        last: Int32s = freed[left == 0]
        return last

    def _is_run_held_once(self, ids: NDArray[np.integer[Any]]) -> TypeGuard[Int32s]:
        """Whether these are consecutive blocks that one node holds: quicker to see than to sort."""
        if not ids.size or ids.item(-1) - ids.item(0) != ids.size - 1:
            return False
        if ids.dtype != np.int32 or not ids.flags.c_contiguous:
            return False
        first = ids.item(0)
        refs = self._refs[first : first + ids.size]
        return self._every.startswith(ids.data, 4 * first) and _ONCE.startswith(refs.data)

    def _is_used(self, block: int) -> bool:
        """Whether the block is one of the pool that is not free."""
        if not (0 <= block < self.num_blocks and self._refs[block]):
            return False
        at = bisect_left(self._freed.data, block)
        return at == len(self._freed) or self._freed.item(at) != block

    def _settle(self) -> None:
        """Makes free blocks like all others of those that came free last."""
        for start, length in _runs(self._freed):
            self._refs[start : start + length] = 0
            self._free.add(start, length)
        self._freed = _NONE

    def _tally(self, ids: NDArray[np.integer[Any]]) -> tuple[Int32s, Int32s | int]:
        """The distinct ids, ascending, and how often each occurs (one number if equal for all)."""
        ids = np.sort(ids)
        if ids.size and (ids.item(0) < 0 or ids.item(-1) >= self.num_blocks):
            raise ForeignBlock(ids[(ids < 0) | (ids >= self.num_blocks)])
        ordered: Int32s = ids.astype(np.int32, copy=False)
        if np.count_nonzero(ordered[1:] == ordered[:-1]):
            distinct, times = np.unique(ordered, return_counts=True)
            return distinct, times.astype(np.int32)
        return ordered, 1


def _as_ids(blocks: ArrayLike) -> NDArray[np.integer[Any]]:
    """Block ids as a user gives them, in one dimension."""
    ids = np.asarray(blocks)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise InvalidArgument(
            f"blocks have shape {ids.shape} and dtype {ids.dtype}, "
            "expected one dimension of integers"
        )
    return ids


def _runs(ids: Int32s) -> Runs:
    """Distinct ascending ids as runs of consecutive ones."""
    if not ids.size:
        return []
    if ids.item(-1) - ids.item(0) == ids.size - 1:
        return [(ids.item(0), ids.size)]
    (breaks,) = (ids[1:] - ids[:-1] != 1).nonzero()
    bounds = [0, *(breaks + 1).tolist(), ids.size]
    return [(ids.item(begin), end - begin) for begin, end in pairwise(bounds)]
