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


class Retention:
    """The nodes that do not have the default priority.

    Who walks or reads never looks here. What has ended is found when somebody asks for it, in the
    order of the deadlines. O(log nodes with a deadline) a change.
    """

    def __init__(self, clock: Callable[[], SupportsFloat]) -> None:
        self._clock = clock
        # Two dictionaries of plain numbers: the garbage collector has no objects in them to visit.
        self._priority: dict[int, int] = {}
        self._deadline: dict[int, float] = {}
        self._ends: SortedList[tuple[float, int]] = SortedList()

    def of(self, node: int) -> Retained:
        return Retained(self.priority(node), self._deadline.get(node, math.inf))

    def priority(self, node: int) -> int:
        return self._priority.get(node, DEFAULT_PRIORITY)

    def put(self, node: int, retained: Retained) -> None:
        self.forget(node)
        if retained.priority == DEFAULT_PRIORITY:
            return  # it would end where it begins
        self._priority[node] = retained.priority
        if retained.deadline < math.inf:
            self._deadline[node] = retained.deadline
            self._ends.add((retained.deadline, node))

    def inherit(self, node: int, other: int) -> None:
        """Gives a new node what another one has."""
        if other in self._priority:
            self.put(node, self.of(other))

    def forget(self, node: int) -> None:
        """The node is gone, or of the default priority again."""
        self._priority.pop(node, None)
        if (deadline := self._deadline.pop(node, None)) is not None:
            self._ends.remove((deadline, node))

    def ended(self) -> list[int]:
        """Gives the default priority back to the nodes whose time is over; returns them."""
        if not self._ends:
            return []
        over = self._ends.bisect_right((self.now(), math.inf))
        nodes = [node for _, node in self._ends[:over]]
        del self._ends[:over]
        for node in nodes:
            del self._priority[node], self._deadline[node]
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
        ends = sorted((end, node) for node, end in self._deadline.items())
        if ends != list(self._ends) or not self._deadline.keys() <= self._priority.keys():
            raise BrokenInvariant("the order of the deadlines is not that of the retained nodes")
        return set(self._priority)

    def now(self) -> float:
        """The time, in seconds.

        Raises `BrokenInvariant` when there is none: eviction asks for it in the middle of a call,
        when it is too late to refuse that.
        """
        try:
            time = self._clock()
            # Asked for several times in each call of the cache, so not checked in full.
            return time if type(time) is float and math.isfinite(time) else as_real("time", time)
        except Exception as error:
            raise BrokenInvariant(f"the clock failed: {type(error).__name__}: {error}") from error
