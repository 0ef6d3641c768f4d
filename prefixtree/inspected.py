"""What can be looked at in the same way in a cache and in an index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import numpy as np

from allocator.errors import at_least
from prefixtree.check import State, check, check_sample
from prefixtree.evictions import Eviction
from prefixtree.guard import guarded
from prefixtree.pins import Pins
from prefixtree.stats import Stats
from prefixtree.view import TreeView


class Inspected(ABC):
    """Of classes that say what they consist of and what they counted."""

    _pins: Pins
    _lock: AbstractContextManager[object]
    _broken: str

    @abstractmethod
    def stats(self) -> Stats:
        """The numbers of now."""

    @abstractmethod
    def _state(self) -> State: ...

    @guarded
    def evictions(self) -> list[Eviction]:
        """The latest evictions, whatever call they made room for; the last one first."""
        return list(self._pins.log)

    @guarded
    def check(self, sample: int | None = None) -> None:
        """Raises `BrokenInvariant` that names what is wrong.

        Recounts everything, O(nodes + blocks). With `sample`, about so many random nodes and the
        paths to them are checked as far as can be seen from there, O(sample * depth) and a scan of
        the reference counts: for a running engine, again and again. A sample of all nodes recounts
        everything. Raises `InvalidArgument` unless it is an integer >= 1.
        """
        if sample is None:
            check(self._state())
        else:
            check_sample(self._state(), at_least(1, "sample", sample), np.random.default_rng())

    @guarded
    def tree(self) -> TreeView:
        """The tree as it is now, to print and to walk. O(nodes log nodes + blocks)."""
        return TreeView.of(self._state(), self.stats())

    def _repr_html_(self) -> str:
        return self.tree()._repr_html_()
