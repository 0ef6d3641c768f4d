"""Memory through which what changed goes from the cache's process to the one that sends it.

It is written once and read where it lies, so that neither process makes pages of memory anew each
time, nor waits for the other. Only the note where it lies goes through a socket.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from typing import Any, NamedTuple

LANE_BYTES = 8 << 20
"""Parcels that lie in it before further ones should wait: what fits into a processor's cache."""


class Parcel(NamedTuple):
    """A value whose arrays lie in the lane."""

    head: bytes
    places: list[tuple[int, int]]
    """First byte, and the one behind the last, of each array."""


class Lane:
    """The writing end. Parcels lie one behind the other until all have been read."""

    def __init__(self) -> None:
        """Raises OSError when there is no memory for it."""
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("prefixtree-events")
        else:
            with tempfile.TemporaryFile() as file:  # whose disk may be written to in vain
                self.file = os.dup(file.fileno())
        self._end = 0
        self._map(LANE_BYTES)

    @property
    def is_full(self) -> bool:
        """Whether a parcel should wait until `rewind`."""
        return self._end >= LANE_BYTES

    def put(self, value: object) -> Parcel:
        """Pickles a value; a copy of its arrays and `PickleBuffer`s in the lane is the only one.

        Raises OSError when there is no memory for it.
        """
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, 5, buffer_callback=buffers.append)
        sizes = [memoryview(buffer).nbytes for buffer in buffers]
        places = []
        end = self._end
        for size in sizes:
            places.append((end, end + size))
            end += -(-size // 8) * 8  # so that each array begins where int64 may
        if end > len(self._memory):
            self._map(end)
        memory = self._memory
        for (first, last), buffer in zip(places, buffers, strict=True):
            memory[first:last] = buffer
        self._end = end
        return Parcel(head, places)

    def rewind(self) -> None:
        """All parcels have been read: the next one takes their place."""
        self._end = 0
        if len(self._memory) > 4 * LANE_BYTES:  # a large parcel came in between
            self._map(LANE_BYTES)

    def close(self) -> None:
        """Gives the memory back. More than once does no harm."""
        if self.file >= 0:
            self._memory.close()
            os.close(self.file)
            self.file = -1

    def _map(self, size: int) -> None:
        os.ftruncate(self.file, size)
        self._memory = mmap.mmap(self.file, size)


class LaneReader:
    """The reading end, in the other process."""

    def __init__(self, file: int) -> None:
        """`file`: the number of the lane's, which this process was given."""
        self._file = file
        self._memory = memoryview(b"")

    def open(self, parcel: Parcel) -> Any:
        """The value. Its arrays lie in the lane: they are good until somebody rewinds it."""
        last = max((last for _, last in parcel.places), default=0)
        if last > len(self._memory):
            self._memory = memoryview(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ))
        buffers = [self._memory[first:last] for first, last in parcel.places]
        return pickle.loads(parcel.head, buffers=buffers)
