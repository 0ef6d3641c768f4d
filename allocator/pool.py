"""The pool: reference-counted block ids."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

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

_FEW = 6
"""Runs up to which some numpy calls for each are quicker than an index for every block."""

_MOST_BLOCKS = 2**31 - 1


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
        self._ids = np.arange(self.num_blocks, dtype=np.int32)  # runs of ids are slices of it
        self._free = FreeExtents(self.num_blocks)

    @property
    def refs(self) -> Int32s:
        """The reference counts, int32 [num_blocks]: a read-only view, always current."""
        view = self._refs.view()
        view.flags.writeable = False
        return view

    @property
    def num_free(self) -> int:
        """Blocks without a reference. O(1)."""
        return self._free.total

    @property
    def num_free_extents(self) -> int:
        """Runs of consecutive free blocks. O(1)."""
        return len(self._free)

    def allocate(self, count: int, after: int | None = None) -> Int32s:
        """Hands out `count` free blocks, int32 [count], each with one reference.

        They continue directly behind the block `after` as far as that space is free. The others
        come from a smallest extent that holds them all, else from the largest ones.
        O(count) in numpy plus O(log extents) for each extent used.

        Raises OutOfBlocks when fewer than `count` are free, ForeignBlock when `after` is no block
        in use, InvalidArgument for a `count` below 0 or no integer; then nothing has changed.
        """
        count = at_least(0, "count", count)
        if after is not None:
            after = as_integer("after", after)
            if not (0 <= after < self.num_blocks and self._refs[after]):
                raise ForeignBlock([after])
        if count > self._free.total:
            raise OutOfBlocks(count, self._free.total)
        runs = self._take(count, after)
        for start, taken in runs:
            self._refs[start : start + taken] = 1
        return self._ids_of(runs)

    def retain(self, blocks: ArrayLike) -> None:
        """Adds a reference to each of `blocks`, an integer array [n]; duplicates count.

        Raises ForeignBlock naming those that are out of range or free, InvalidArgument for an
        array of another kind; then nothing has changed. O(n log n) in numpy.
        """
        ids, times = self._tally(_as_ids(blocks))
        refs: Int32s = self._refs.take(ids)
        if np.count_nonzero(refs) < ids.size:
            raise ForeignBlock(ids[refs == 0])
        self._refs[ids] = refs + times

    def release(self, blocks: ArrayLike) -> Int32s:
        """Takes a reference from each of `blocks`, an integer array [n]; duplicates count.

        Returns the blocks that became free, int32, ascending. O(n log n) in numpy plus
        O(log extents) for each run of consecutive blocks that became free.

        Raises ForeignBlock naming those out of range, DoubleFree naming those released more often
        than they are referenced, InvalidArgument for an array of another kind; then nothing has
        changed.
        """
        ids = _as_ids(blocks)
        # Differences of other integers might wrap around to 1 inside of the pool's range.
        wide = ids.itemsize >= 4 and ids.dtype.kind == "i"
        freed = self._release_runs(_runs(ids)) if wide else None
        return self._release_each(ids) if freed is None else freed

    def check(self) -> None:
        """Raises BrokenInvariant unless exactly the blocks without a reference are free.

        O(num_blocks).
        """
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

    def _take(self, count: int, after: int | None) -> Runs:
        """Takes `count` ids, which must be free."""
        pieces = []
        if after is not None:
            taken = self._free.take_at(after + 1, count)
            pieces.append((after + 1, taken))
            count -= taken
        while count:
            start, taken = self._free.take_best(count)
            pieces.append((start, taken))
            count -= taken
        return pieces

    def _release_runs(self, runs: Runs) -> Int32s | None:
        """`release` of few runs, as the blocks of a node are, by slices in place of an index.

        None, and nothing has changed, for more of them and for what is to be refused.
        """
        if len(runs) > _FEW or any(
            start < 0 or start + length > self.num_blocks for start, length in runs
        ):
            return None
        freed: Runs = []
        for done, (start, length) in enumerate(runs, 1):
            refs = self._refs[start : start + length]
            refs -= 1
            if not np.count_nonzero(refs):
                freed.append((start, length))
            elif np.minimum.reduce(refs) < 0:
                for start, length in runs[:done]:
                    self._refs[start : start + length] += 1
                return None
            else:
                freed += _runs((refs == 0).nonzero()[0] + start)
        for start, length in freed:
            self._free.add(start, length)
        return self._ids_of(sorted(freed))

    def _release_each(self, ids: NDArray[np.integer[Any]]) -> Int32s:
        """`release` of any blocks."""
        distinct, times = self._tally(ids)
        left: Int32s = self._refs.take(distinct) - times
        if left.size and np.minimum.reduce(left) < 0:
            raise DoubleFree(distinct[left < 0])
        self._refs[distinct] = left
        freed = distinct[left == 0] if np.count_nonzero(left) else distinct
        for start, length in _runs(freed):
            self._free.add(start, length)
        return freed

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

    def _ids_of(self, runs: Runs) -> Int32s:
        if not runs:
            return self._ids[:0].copy()
        return np.concatenate([self._ids[start : start + length] for start, length in runs])


def _as_ids(blocks: ArrayLike) -> NDArray[np.integer[Any]]:
    """Block ids as a user gives them, in one dimension."""
    ids = np.asarray(blocks)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise InvalidArgument(
            f"blocks have shape {ids.shape} and dtype {ids.dtype}, "
            "expected one dimension of integers"
        )
    return ids


def _runs(ids: NDArray[np.integer[Any]]) -> Runs:
    """Ids as runs of consecutive ones, in their order."""
    if not ids.size:
        return []
    (breaks,) = (ids[1:] - ids[:-1] != 1).nonzero()
    bounds = [0, *(breaks + 1).tolist(), ids.size]
    return [(ids.item(begin), end - begin) for begin, end in pairwise(bounds)]
