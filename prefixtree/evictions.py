"""What was evicted lately, and why: the answer to a miss that was a hit before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from prefixtree.columns import Int32s
from prefixtree.tree import RadixTree

REMEMBERED = 1 << 16
"""Evictions kept in mind, the latest; about 250 bytes each, twice that once somebody asks."""


class Eviction(NamedTuple):
    """One node, or the end of one, that was evicted."""

    start: int
    """Position of the first token that went."""
    tokens: int
    """How many went."""
    whole: bool
    """The whole node, or only its tail: no more than what was asked for."""
    reason: str
    """The call that needed room or dropped it: "open", "resume", "append", "fork", "evict",
    "clear" or "forget"."""
    policy: str
    """Name of the policy that chose it, "" where the call named it."""
    at: float
    """When, by the cache's clock, in seconds."""


class EvictionCount(NamedTuple):
    """All evictions of one policy for one reason, see `Eviction`."""

    policy: str
    reason: str
    nodes: int = 0
    """Evicted whole."""
    trimmed: int = 0
    """Nodes that lost only their tail."""
    tokens: int = 0
    blocks: int = 0
    """That came free."""


class Evicted(NamedTuple):
    """What a call of `evict` or `clear` did."""

    blocks: int
    """Blocks that came free."""
    tokens: int
    """Cached tokens that are gone."""
    nodes: int
    """Nodes that went whole."""
    trimmed: int
    """Nodes that lost only their tail: 0 or 1, the last one chosen."""


class Removed(NamedTuple):
    """What left the tree at once."""

    held: list[Int32s]
    """The blocks to let go of, those of each node in their order: views as of `RaggedInts.get`.
    What removed nodes shared appears more than once."""
    nodes: int
    trimmed: int
    tokens: int


class EvictionCounts:
    """How much has been removed, by policy and reason."""

    def __init__(self) -> None:
        self._each: dict[tuple[str, str], list[int]] = {}  # as `EvictionCount` has them

    def add(self, policy: str, reason: str, removed: Removed, blocks: int) -> None:
        if removed.held:
            counts = self._each.get((policy, reason))
            if counts is None:
                counts = self._each[policy, reason] = [0, 0, 0, 0]
            counts[0] += removed.nodes
            counts[1] += removed.trimmed
            counts[2] += removed.tokens
            counts[3] += blocks

    def total(self) -> EvictionCount:
        """All of them, of no policy and reason."""
        return EvictionCount("", "", *map(sum, zip(*self._each.values(), strict=True)))

    def each(self) -> tuple[EvictionCount, ...]:
        return tuple([EvictionCount(*which, *counts) for which, counts in self._each.items()])


class EvictionLog:
    """The latest evictions, found by the place in the tree where a walk now ends.

    A walk that misses an evicted node ends where that node hung, and its next token is the node's
    first. Nothing of a node's path needs to be hashed or kept for that. To find one takes an index,
    which is brought up to date only then: there are many evictions to a question.
    """

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        # Plain tuples, a place and an `Eviction` each: the garbage collector lets go of those, not
        # of named ones, and would have to walk through all of them again and again.
        self._latest: deque[tuple[Any, ...]] = deque(maxlen=REMEMBERED)
        self._added = 0  # ever, which is the number of the next one
        self._number: dict[tuple[int, int, int, int], int] = {}  # place to its last one
        self._indexed = 0  # those before this number have been put there

    def add(self, node: int, token: int, eviction: tuple[Any, ...]) -> None:
        """`node` is the one that stays, `token` the first one missing behind it. O(1).

        `eviction`: the fields of an `Eviction`.
        """
        # A number may later go to another node, but not with the same birth and end.
        self._latest.append((node, self._tree.nodes.created[node], token, *eviction))
        self._added += 1

    def find(self, node: int, position: int, token: int) -> Eviction | None:
        """What was evicted behind `node`, where it went on with `token`.

        O(evictions since the last call), at most `REMEMBERED`.
        """
        self._index()
        number = self._number.get((node, self._tree.nodes.created[node], token, position), -1)
        first = self._added - len(self._latest)
        return Eviction._make(self._latest[number - first][3:]) if number >= first else None

    def __iter__(self) -> Iterator[Eviction]:
        """The latest first."""
        return (Eviction._make(entry[3:]) for entry in reversed(self._latest))

    def _index(self) -> None:
        """Notes those that have been added since this was done last."""
        count = min(self._added - self._indexed, len(self._latest))
        if len(self._number) + count > 2 * REMEMBERED:  # too many of them are forgotten
            self._number.clear()
            count = len(self._latest)
        latest_first = [*islice(reversed(self._latest), count)]
        numbers = enumerate(reversed(latest_first), self._added - count)
        self._number.update((entry[:4], number) for number, entry in numbers)
        self._indexed = self._added
