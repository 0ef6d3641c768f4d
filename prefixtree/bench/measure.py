"""Timings of several caches, taken in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter, perf_counter_ns, process_time_ns
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

Clock: TypeAlias = Callable[[], int]
"""Nanoseconds."""

CLOCKS: dict[str, Clock] = {"wall": perf_counter_ns, "cpu": process_time_ns}


class Row(NamedTuple):
    """One operation at one size; microseconds by the name of the cache."""

    operation: str
    size: int
    unit: str
    """What `size` counts: nodes, tokens or sequences."""
    median_us: dict[str, float]
    rounds: int


@dataclass(frozen=True)
class Rounds:
    """When to stop, and by which clock operations are timed."""

    most: int
    seconds: float
    clock: Clock = perf_counter_ns

    def __iter__(self) -> Iterator[int]:
        """0, 1, ... `most` - 1, and at least 0; no further once `seconds` have gone by."""
        end = perf_counter() + self.seconds
        for number in range(self.most):
            if number and perf_counter() > end:
                return
            yield number


class Timings:
    """Microseconds of each step of each cache."""

    def __init__(self, clock: Clock = perf_counter_ns) -> None:
        self._clock = clock
        self._taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def time(self, step: str, name: str, call: Callable[..., T], *arguments: Any) -> T:
        """Calls, and notes how long it took."""
        begin = self._clock()
        result = call(*arguments)
        self.note(step, name, (self._clock() - begin) / 1000)
        return result

    def note(self, step: str, name: str, microseconds: float) -> None:
        self._taken[step, name].append(microseconds)

    def last(self, step: str, name: str) -> float:
        return self._taken[step, name][-1]

    def row(self, step: str, operation: str, size: int, unit: str) -> Row:
        taken = {name: times for (which, name), times in self._taken.items() if which == step}
        rounds = max(map(len, taken.values()), default=0)
        return Row(operation, size, unit, {k: median(v) for k, v in taken.items()}, rounds)

    def summary(self, step: str) -> dict[str, dict[str, float]]:
        """By name: how often the step came up, its mean, median, least and total, in us."""
        return {
            name: {
                "count": len(times),
                "mean_us": mean(times),
                "median_us": median(times),
                "least_us": min(times),
                "total_us": sum(times),
            }
            for (which, name), times in self._taken.items()
            if which == step
        }


def in_turn(items: Sequence[T], number: int) -> Sequence[T]:
    """All of them, a different one first from round to round."""
    first = number % len(items)
    return [*items[first:], *items[:first]]
