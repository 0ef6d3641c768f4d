"""Many growing lists of int32 in one buffer."""

from __future__ import annotations

import numpy as np

from prefixtree.columns import Column, Int32s, Int64s


def spans(starts: Int64s, counts: Int64s) -> Int64s:
    """`counts[i]` consecutive indices from `starts[i]` on, for every i, in one array."""
    ends: Int64s = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    if total == len(starts) == np.count_nonzero(counts):
        return starts  # one each, as in a decode step
    return np.arange(total) + np.repeat(starts - ends + counts, counts)


LEAST = 1 << 18
"""Entries of a buffer: few long lists that come and go do not fill it again and again."""


LONG = 128
"""Entries from which on a list is copied on its own, not by an index for all entries of many."""


class RaggedInts:
    """Lists numbered by their owner's rows; a row never set is an empty list.

    A batch of lists is extended or gathered by a few vector operations. A list that outgrows its
    room moves to the end of the buffer with twice the room. When the buffer is full it is rebuilt
    without holes, with room for as much again at least, so that an entry costs amortised O(1).
    """

    def __init__(self) -> None:
        self._buffer: Int32s = np.empty(LEAST, np.int32)
        self._end = 0
        self.size: Column = np.zeros(64, np.int64).data
        self._start: Column = np.zeros(64, np.int64).data
        self._room: Column = np.zeros(64, np.int64).data

    def get(self, row: int) -> Int32s:
        """A view of the list, good until a list is next given entries."""
        start = self._start[row]
        return self._buffer[start : start + self.size[row]]

    def first(self, row: int) -> int:
        """The first entry of a list that is not empty."""
        return self._buffer.item(self._start[row])

    def last(self, row: int) -> int:
        """The last entry of a list that is not empty."""
        return self._buffer.item(self._start[row] + self.size[row] - 1)

    def set(self, row: int, values: Int32s) -> None:
        """Replaces the list. `values` may be a view of another list."""
        self.reach(row)
        size = len(values)
        if self._room[row] < size:
            if values.base is self._buffer:
                values = values.copy()  # making room may move the list that `values` looks at
            self._room[row] = self.size[row] = 0
            room = size + size // 8  # a prompt's first tokens of output then need no move
            if self._end + room > len(self._buffer):
                self._make_room(room)
            self._start[row] = self._end
            self._room[row] = room
            self._end += room
        start = self._start[row]
        self._buffer[start : start + size] = values
        self.size[row] = size

    def extend(self, rows: Int64s, counts: Int64s, values: Int32s) -> None:
        """Appends `counts[i]` of the packed `values` to list `rows[i]`; rows are distinct."""
        sizes = np.asarray(self.size)[rows]
        grown = sizes + counts
        short = grown > np.asarray(self._room)[rows]
        if short.any():
            self._move(rows[short], 2 * grown[short])
        self._buffer[spans(np.asarray(self._start)[rows] + sizes, counts)] = values
        np.asarray(self.size)[rows] = grown

    def at(self, rows: Int64s, indices: Int64s) -> Int32s:
        """Entry `indices[i]` of list `rows[i]`; the caller keeps to the lists' sizes."""
        return self._buffer[np.asarray(self._start)[rows] + indices]

    def gather(self, rows: Int64s, counts: Int64s, firsts: Int64s | None = None) -> Int32s:
        """`counts[i]` entries of list `rows[i]` from `firsts[i]` (0) on, packed.

        The caller keeps to the lists' sizes.
        """
        starts: Int64s = np.asarray(self._start)[rows]
        if firsts is not None:
            starts += firsts
        if int(counts.sum()) < LONG * len(rows) or not len(rows):
            return self._buffer[spans(starts, counts)]
        places = zip(starts.tolist(), (starts + counts).tolist(), strict=True)
        return np.concatenate([self._buffer[start:end] for start, end in places])

    def hand_front(self, row: int, count: int, other: int) -> None:
        """The first `count` entries become list `other`, which is empty. O(1): none is moved."""
        self.reach(other)
        self._start[other] = self._start[row]
        self.size[other] = self._room[other] = count
        self.drop_front(row, count)

    def drop_front(self, row: int, count: int) -> None:
        self._start[row] += count
        self._room[row] -= count
        self.size[row] -= count

    def truncate(self, row: int, size: int) -> None:
        self.size[row] = size

    def clear(self, row: int) -> None:
        """Empties the list and gives its room back."""
        if row < len(self.size):
            if self._start[row] + self._room[row] == self._end:
                self._end = self._start[row]
            self.size[row] = self._room[row] = 0

    def reach(self, row: int) -> None:
        """Makes `row` a valid list, empty when it is new."""
        if row >= len(self.size):
            self._add_rows(row + 1)

    def _move(self, rows: Int64s, rooms: Int64s) -> None:
        """Gives each of these lists a fresh place of its new room at the buffer's end."""
        total = int(rooms.sum())
        if self._end + total > len(self._buffer):
            self._make_room(total)
        sizes = np.asarray(self.size)[rows]
        starts = self._end + np.cumsum(rooms) - rooms
        self._copy(self._buffer, rows, sizes, starts)
        np.asarray(self._start)[rows] = starts
        np.asarray(self._room)[rows] = rooms
        self._end += total

    def _make_room(self, count: int) -> None:
        """Rebuilds the buffer without holes, with room for `count` more entries at its end."""
        held = np.asarray(self._room)
        rows = np.flatnonzero(held)
        rooms, sizes = held[rows], np.asarray(self.size)[rows]
        starts = np.cumsum(rooms) - rooms
        self._end = int(rooms.sum())
        # Looking through all rows must not be needed more often than as many entries came.
        least = max(LEAST, len(held), 2 * (self._end + count))
        # Memory in use already is faster than new memory, unless it is far too much. New memory
        # has room to spare, so that lists of about the same size in all find room in it again.
        fits = least <= len(self._buffer) <= 12 * least
        buffer = self._buffer if fits else np.empty(least + least // 2, np.int32)
        self._copy(buffer, rows, sizes, starts)
        self._buffer = buffer
        np.asarray(self._start)[rows] = starts

    def _copy(self, buffer: Int32s, rows: Int64s, sizes: Int64s, starts: Int64s) -> None:
        """Copies the lists to these places of a buffer, which may be the one they are in."""
        packed = self.gather(rows, sizes)
        if len(packed) < LONG * len(rows):
            buffer[spans(starts, sizes)] = packed
        else:  # an index for each entry would take longer than the copies
            ends = np.cumsum(sizes)
            pieces = (starts, starts + sizes, ends - sizes, ends)
            for start, stop, first, last in zip(*(p.tolist() for p in pieces), strict=True):
                buffer[start:stop] = packed[first:last]

    def _add_rows(self, count: int) -> None:
        rows = len(self.size)
        for name in ("size", "_start", "_room"):
            column = np.zeros(max(count, 2 * rows), np.int64)
            column[:rows] = np.asarray(getattr(self, name))
            setattr(self, name, column.data)
