"""How long the operations of a cache take, and how often the garbage collector stops it."""

from __future__ import annotations

import gc
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import ParamSpec, TypeVar

import numpy as np

from prefixtree.cache import PrefixCache

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS = "match", "open", "commit", "append", "evict", "close"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one operation over a whole replay."""

    calls: int
    mean_us: float
    median_us: float
    p99_us: float


class Meter:
    """Times calls. What a timed call spends in timed calls inside it counts for these alone."""

    def __init__(self) -> None:
        self._took: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))  # ns
        self._inside = 0  # ns of timed calls within the one that runs

    def call(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`function(*args, **kwargs)`, timed under `name`, also when it raises."""
        outside, self._inside = self._inside, 0
        start = perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            took = perf_counter_ns() - start
            self._took[name].append(took - self._inside)
            self._inside = outside + took

    def timings(self) -> dict[str, Timing]:
        """Of each operation that was called. O(calls)."""
        result = {}
        for name in OPERATIONS:
            if name in self._took:
                us = np.array(self._took[name]) / 1000
                median, p99 = np.percentile(us, [50, 99]).tolist()
                result[name] = Timing(len(us), float(us.mean()), median, p99)
        return result


class MeteredCache(PrefixCache):
    """A cache that times, as "evict", the evictions by which its calls make room."""

    def __init__(self, num_blocks: int, block_size: int, eviction: str, meter: Meter) -> None:
        super().__init__(num_blocks, block_size, eviction=eviction)
        self.meter = meter

    def _free_up(self, needed: int, reason: str) -> None:
        if needed > self._pool.num_free:
            self.meter.call("evict", super()._free_up, needed, reason)


@dataclass
class Pauses:
    """What the garbage collector did."""

    count: int = 0
    longest_ms: float = 0.0


@contextmanager
def gc_pauses() -> Iterator[Pauses]:
    """Counts the garbage collector's runs in this process while the context is open.

    What was there before, the trace and all that was imported, is set aside meanwhile as an engine
    does after loading (`gc.freeze`), so that the collector walks what the run itself made.
    """
    pauses = Pauses()
    started = 0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = perf_counter_ns()
        else:
            pauses.count += 1
            pauses.longest_ms = max(pauses.longest_ms, (perf_counter_ns() - started) / 1e6)

    gc.collect()
    gc.freeze()
    gc.callbacks.append(note)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
