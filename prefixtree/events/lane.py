"""Memory through which tokens and blocks go from the cache's process to the one that sends them.

They are written once and read where they lie; only a note of the place goes through a socket. To
make a page of memory takes longer than to fill it, so all of it is made at the start, and used
again and again.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from prefixtree.columns import Int32s

ROOM = 4 << 20
"""Numbers that it has room for at first: 16 MiB."""

Place: TypeAlias = tuple[int, int]
"""Index of the first number in the lane, and of the one behind the last."""


class Lane:
    """The writing end: one behind the other, until all that was written has been read."""

    def __init__(self) -> None:
        """Raises OSError when there is no memory for it."""
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("prefixtree-events")
        else:
            with tempfile.TemporaryFile() as file:
                self.file = os.dup(file.fileno())
        self._end = 0
        self._memory: Int32s
        self._map(ROOM)

    @property
    def is_full(self) -> bool:
        """Whether what comes should wait until it can be rewound: a quarter of it is taken."""
        return 4 * self._end >= ROOM

    def put(self, pieces: Sequence[Int32s]) -> Place:
        """Copies them there as one array. Makes room for it, however full the lane is.

        Raises OSError when there is no memory for it.
        """
        first = self._end
        last = first + sum(map(len, pieces))
        if last > len(self._memory):
            self._map(last + last // 4)
        if last > first:
            np.concatenate(pieces, out=self._memory[first:last])
        self._end = last
        return first, last

    def rewind(self) -> None:
        """All has been read: what comes takes its place."""
        self._end = 0
        if len(self._memory) > 8 * ROOM:  # as when a full cache was told of
            self._map(ROOM)

    def close(self) -> None:
        """Gives the memory back, as soon as the other process does so too."""
        self._memory = np.empty(0, np.int32)
        os.close(self.file)

    def _map(self, size: int) -> None:
        os.ftruncate(self.file, 4 * size)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._memory = np.frombuffer(mmap.mmap(self.file, 4 * size, flags), np.int32)


class LaneReader:
    """The reading end, in the other process."""

    def __init__(self, file: int) -> None:
        """`file`: the number of the lane's, which this process was given."""
        self._file = file
        self._memory: Int32s = np.empty(0, np.int32)

    def get(self, place: Place) -> Int32s:
        """What lies there: a view, good until the lane is rewound."""
        first, last = place
        if last > len(self._memory):
            self._memory = np.frombuffer(
                mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), np.int32
            )
        return self._memory[first:last]
