"""The stopwatch in an engine's process: for each step, what its parts took, as rows of a file.

A file, because an engine may run its scheduler in another process, which is killed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from prefixtree.columns import Int64s

CLOCKS = {"wall": perf_counter_ns, "cpu": thread_time_ns}
"""Nanoseconds; cpu: what the thread that calls has used itself."""

MOST_STEPS = 1_000_000

Part: TypeAlias = Literal["scheduler", "attention"]


class Step(NamedTuple):
    """A row: nanoseconds of the parts, whether all that ran was decoding, and how many ran."""

    scheduler: int
    attention: int
    decoding: int
    sequences: int


def create(file: Path) -> None:
    """An empty file for a watch. Space is taken when rows are written."""
    with file.open("wb") as made:
        made.truncate(8 * len(Step._fields) * (1 + MOST_STEPS))


def read(file: Path) -> Int64s:
    """The steps so far, int64 [steps, fields of Step]."""
    rows = _rows(file, "r")
    return np.array(rows[1 : 1 + rows[0, 0]])


def _rows(file: Path, mode: Literal["r", "r+"]) -> Any:
    """The first row says how many others there are."""
    return np.memmap(file, np.int64, mode, shape=(1 + MOST_STEPS, len(Step._fields)))


class Watch:
    """Times the calls of one engine, which all come from one thread."""

    def __init__(self, file: Path, clock: str) -> None:
        self._rows = _rows(file, "r+")
        self._clock = CLOCKS[clock]
        self._spent: dict[Part, int] = {"scheduler": 0, "attention": 0}
        self._part: Part | None = None
        self._since = 0

    def time(
        self, part: Part, owner: Any, *names: str, idle: Callable[[Any], bool] = lambda _: False
    ) -> None:
        """From now on what `owner`'s functions of these names take is that part of the step.

        A call of one part within one of another counts for its own only; those whose result is
        `idle` do not count.
        """
        for name in names:
            setattr(owner, name, self.timed(part, getattr(owner, name), idle))

    def timed(
        self, part: Part, function: Any, idle: Callable[[Any], bool] = lambda _: False
    ) -> Any:
        """The function, timed, see `time`."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            outer, before = self._part, dict(self._spent)
            self._enter(part)
            try:
                result = function(*args, **kwargs)
            finally:
                self._enter(outer)
            if idle(result):
                self._spent = before
            return result

        return call

    def step(self, *, decoding: bool, sequences: int) -> None:
        """A forward pass is over: what was timed since the one before is its row."""
        number = int(self._rows[0, 0]) + 1
        self._rows[number] = Step(
            self._spent["scheduler"], self._spent["attention"], decoding, sequences
        )
        self._rows[0, 0] = number
        self._spent = dict.fromkeys(self._spent, 0)

    def _enter(self, part: Part | None) -> None:
        now = self._clock()
        if self._part is not None:
            self._spent[self._part] += now - self._since
        self._part, self._since = part, now
