"""Free ids as extents: maximal runs of consecutive ids, found by either end and by length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from allocator.errors import BrokenInvariant


class FreeExtents:
    """The free ids among 0 .. size-1, at first all of them.

    Neighbours always merge (boundary tags), and allocation is best fit over one stack of extents
    per length (Knuth, The Art of Computer Programming, volume 1, section 2.5). Both ends and the
    stacks are dictionaries, so an operation is O(1) but for finding its length among the distinct
    ones. Those are at most sqrt(2 * size), since their sum is at most `size`: few enough for a
    plain sorted list.

    Attribute: `total`, the number of free ids.
    """

    def __init__(self, size: int) -> None:
        self.total = 0
        self._length: dict[int, int] = {}  # start -> length
        self._start: dict[int, int] = {}  # stop -> start
        self._stacks: dict[int, dict[int, None]] = {}  # length -> starts, the newest last
        self._lengths: list[int] = []  # the keys of _stacks, ascending
        self.add(0, size)

    def __len__(self) -> int:
        """The number of extents."""
        return len(self._length)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(start, length) of every extent, ascending."""
        return iter(sorted(self._length.items()))

    def take_at(self, start: int, count: int) -> int:
        """Takes up to `count` ids from the extent that begins at `start`; returns how many.

        0 when no extent begins there.
        """
        length = self._length.get(start)
        if length is None:
            return 0
        self._remove(start, length)
        return self._keep_rest(start, length, count)

    def take_best(self, count: int) -> tuple[int, int]:
        """Takes `count` ids from a smallest extent that has them, or all of a largest if none has.

        Returns (start, ids taken). There must be a free id.
        """
        place = min(bisect_left(self._lengths, count), len(self._lengths) - 1)
        length = self._lengths[place]
        # Only popitem shrinks a dictionary at its end; looking there first would pass over
        # every entry deleted before.
        start, _ = self._stacks[length].popitem()
        self._forget(start, length)
        return start, self._keep_rest(start, length, count)

    def take_all(self) -> list[tuple[int, int]]:
        """Takes all ids; returns (start, length) of the extents that they were. O(extents)."""
        extents = list(self._length.items())
        for index in (self._length, self._start, self._stacks, self._lengths):
            index.clear()
        self.total = 0
        return extents

    def add(self, start: int, length: int) -> None:
        """Makes the ids start .. start+length-1 free, length >= 1. None may be free already."""
        self.total += length
        stop = start + length
        behind = self._length.get(stop)
        if behind is not None:
            self._remove(stop, behind)
            stop += behind
        before = self._start.get(start)
        if before is not None:
            self._remove(before, start - before)
            start = before
        self._insert(start, stop - start)

    def check(self) -> None:
        """Raises BrokenInvariant when extents overlap, touch or are empty, or an index is wrong."""
        end = -1
        for start, length in self:
            if length < 1:
                raise BrokenInvariant(f"free extent at {start} has length {length}")
            if start <= end:
                raise BrokenInvariant(f"free extent at {start} overlaps or touches one up to {end}")
            end = start + length
        if {start + length: start for start, length in self} != self._start:
            raise BrokenInvariant("free extents by their end differ from those by their start")
        stacked = sorted(
            (start, length) for length in self._stacks for start in self._stacks[length]
        )
        if stacked != list(self):
            raise BrokenInvariant("free extents by length differ from those by their start")
        if sorted(length for length, stack in self._stacks.items() if stack) != self._lengths:
            raise BrokenInvariant(f"lengths of free extents are not {self._lengths}")
        if sum(self._length.values()) != self.total:
            raise BrokenInvariant(f"{self.total} free ids counted, extents hold another number")

    def _keep_rest(self, start: int, length: int, count: int) -> int:
        """Takes up to `count` ids of an extent just removed, puts back the rest."""
        # From the front: the rest lies right behind the ids taken, where they can continue.
        taken = min(length, count)
        self.total -= taken
        if taken < length:
            self._insert(start + taken, length - taken)
        return taken

    def _insert(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length] = start
        stack = self._stacks.get(length)
        if stack is None:
            self._stacks[length] = {start: None}
            insort(self._lengths, length)
        else:
            stack[start] = None

    def _remove(self, start: int, length: int) -> None:
        del self._stacks[length][start]
        self._forget(start, length)

    def _forget(self, start: int, length: int) -> None:
        """The rest of removing an extent that is off its stack already."""
        del self._length[start]
        del self._start[start + length]
        if not self._stacks[length]:
            del self._stacks[length]
            del self._lengths[bisect_left(self._lengths, length)]
