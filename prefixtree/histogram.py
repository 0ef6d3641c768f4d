"""How a quantity is spread: counts between bounds, as Prometheus' histograms have them."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from operator import sub
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Bounds = tuple[float, ...]

POWERS: Bounds = (0, *(1 << power for power in range(21)))
"""For numbers of tokens, nodes or uses: 0, then 1, 2, 4 .. 1,048,576."""
TOKENS: Bounds = (0, *(1 << power for power in range(4, 21)))
"""For lengths of matches: 0, then 16, 32, 64 .. 1,048,576 tokens."""
SECONDS: Bounds = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 21600, 86400)
"""From a decode step to a day."""


class Histogram(NamedTuple):
    """What was observed, at one moment."""

    bounds: Bounds
    """Ascending."""
    counts: tuple[int, ...]
    """[len(bounds) + 1] counts[i] are above bounds[i - 1] and at most bounds[i]; the last ones are
    above all bounds."""
    total: float
    """Sum of all that was observed."""

    @classmethod
    def of(cls, values: npt.NDArray[Any], bounds: Bounds) -> Self:
        """That of an array's values. O(values * log bounds), vectorised."""
        places = np.searchsorted(np.array(bounds), values)
        counts = np.bincount(places, minlength=len(bounds) + 1)
        return cls(bounds, tuple(counts.tolist()), values.sum().item())

    @property
    def observed(self) -> int:
        """How many were."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """0.0 when nothing was observed."""
        return self.total / self.observed if self.observed else 0.0

    def cumulative(self) -> list[int]:
        """[len(bounds) + 1] how many were at most each bound; the last is all of them."""
        return list(accumulate(self.counts))

    def as_dict(self) -> dict[str, Any]:
        """Its fields as plain Python values, for `json.dumps`."""
        return {"bounds": [*self.bounds], "counts": [*self.counts], "total": self.total}

    def since(self, earlier: Histogram) -> Self:
        """What was observed after `earlier`, which has the same bounds, was taken."""
        counts = tuple(map(sub, self.counts, earlier.counts))
        return self._replace(counts=counts, total=self.total - earlier.total)


class Observations:
    """Counts into a histogram, one after the other."""

    __slots__ = ("_bounds", "_counts", "_known", "_total")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total: float = 0
        self._known: Histogram | None = None

    def add(self, value: float, times: int = 1) -> None:
        """What is below 0 counts as 0: a clock may go back. O(log bounds) in C."""
        self._counts[bisect_left(self._bounds, value)] += times
        if value > 0:
            self._total += value * times
        self._known = None

    def histogram(self) -> Histogram:
        known = self._known
        if known is None:
            known = self._known = Histogram(self._bounds, tuple(self._counts), self._total)
        return known
