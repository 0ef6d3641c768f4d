"""How long which nodes are worth more, or less, than others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, SupportsFloat, SupportsIndex

from sortedcontainers import SortedList

from allocator import DEFAULT_PRIORITY, MAX_PRIORITY, BrokenInvariant
from allocator.errors import InvalidArgument, as_integer, as_real


class Retained(NamedTuple):
    """A priority, and when it ends."""

    priority: int
    deadline: float  # time of the clock, inf for no end


BY_DEFAULT = Retained(DEFAULT_PRIORITY, math.inf)


class Retention:
    """The nodes that do not have the default priority.

    Who walks or reads never looks here. What has ended is found when somebody asks for it, in the
    order of the deadlines. O(log nodes with a deadline) a change.
    """

    def __init__(self, clock: Callable[[], SupportsFloat]) -> None:
        self._clock = clock
        self._of: dict[int, Retained] = {}
        self._ends: SortedList[tuple[float, int]] = SortedList()

    def of(self, node: int) -> Retained:
        return self._of.get(node, BY_DEFAULT)

    def put(self, node: int, retained: Retained) -> None:
        self.forget(node)
        if retained.priority == DEFAULT_PRIORITY:
            return  # it would end where it begins
        self._of[node] = retained
        if retained.deadline < math.inf:
            self._ends.add((retained.deadline, node))

    def forget(self, node: int) -> None:
        """The node is gone, or of the default priority again."""
        retained = self._of.pop(node, BY_DEFAULT)
        if retained.deadline < math.inf:
            self._ends.remove((retained.deadline, node))

    def ended(self) -> list[int]:
        """Gives the default priority back to the nodes whose time is over; returns them."""
        if not self._ends:
            return []
        over = self._ends.bisect_right((self.now(), math.inf))
        nodes = [node for _, node in self._ends[:over]]
        del self._ends[:over]
        for node in nodes:
            del self._of[node]
        return nodes

    def from_now(self, priority: SupportsIndex, duration: SupportsFloat | None) -> Retained:
        """Checks what a user asks for. Raises `InvalidArgument`."""
        value = as_integer("priority", priority)
        if not 0 <= value <= MAX_PRIORITY:
            raise InvalidArgument(f"priority is {value}, expected 0..{MAX_PRIORITY}")
        if duration is None:
            return Retained(value, math.inf)
        seconds = as_real("duration", duration)
        if seconds <= 0:
            raise InvalidArgument(f"duration is {seconds}, expected more than 0 seconds or None")
        return Retained(value, self.now() + seconds)

    def check_nodes(self) -> set[int]:
        """The nodes that have a priority of their own, for `check`; `BrokenInvariant`."""
        ends = sorted((end, node) for node, (_, end) in self._of.items() if end < math.inf)
        if ends != list(self._ends):
            raise BrokenInvariant("the order of the deadlines is not that of the retained nodes")
        return set(self._of)

    def now(self) -> float:
        """The time, in seconds.

        Raises `BrokenInvariant` when there is none: eviction asks for it in the middle of a call,
        when it is too late to refuse that.
        """
        try:
            time = float(self._clock())
            if not math.isfinite(time):
                raise ValueError(f"the time is {time}, expected a finite number")
            return time
        except Exception as error:
            raise BrokenInvariant(f"the clock failed: {type(error).__name__}: {error}") from error
