"""How far the sending process is: numbers that it writes and the cache's process reads."""

from __future__ import annotations

import ctypes
import mmap
import os


class Progress(ctypes.Structure):
    """In memory that both processes have mapped, so that to look costs nothing and waits for
    nobody. All zero at the start."""

    _fields_ = (
        ("ready", ctypes.c_int64),
        ("done", ctypes.c_int64),
        ("batches", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("replays", ctypes.c_int64),
        ("resyncs", ctypes.c_int64),
        ("failure", ctypes.c_char * 4048),
    )
    ready: int
    """1 once the endpoints are bound."""
    done: int
    """Works sent."""
    batches: int
    blocks: int
    """That the batches told of."""
    replays: int
    resyncs: int
    failure: bytes
    """Why no more will be sent; empty while it will."""


def create(path: str) -> Progress:
    """In a new file, which may be removed once both have it."""
    with open(path, "xb") as file:
        file.truncate(ctypes.sizeof(Progress))
    return attach(path)


def attach(path: str) -> Progress:
    """In the file that the other process has created."""
    with open(path, "r+b") as file:
        return Progress.from_buffer(mmap.mmap(file.fileno(), os.path.getsize(path)))
