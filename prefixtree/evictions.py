"""What was evicted lately, and why: the answer to a miss that was a hit before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from prefixtree.tree import RadixTree

REMEMBERED = 1 << 16
"""Evictions kept in mind, the latest; about 250 bytes each."""


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


class EvictionLog:
    """The latest evictions, found by the place in the tree where a walk now ends.

    A walk that misses an evicted node ends where that node hung, and its next token is the node's
    first. Nothing of a node's path needs to be hashed or kept for that.
    """

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        # Plain tuples: the garbage collector lets go of those, not of named ones, and would have
        # to walk through all of them again and again.
        self._at: OrderedDict[tuple[int, int, int, int], tuple[Any, ...]] = OrderedDict()

    def add(self, node: int, token: int, eviction: Eviction) -> None:
        """`node` is the one that stays, `token` the first one missing behind it. O(1)."""
        if len(self._at) == REMEMBERED:
            self._at.popitem(last=False)
        key = self._key(node, eviction.start, token)
        self._at[key] = tuple(eviction)
        self._at.move_to_end(key)

    def find(self, node: int, position: int, token: int) -> Eviction | None:
        """What was evicted behind `node`, where it went on with `token`. O(1)."""
        found = self._at.get(self._key(node, position, token))
        return None if found is None else Eviction._make(found)

    def __iter__(self) -> Iterator[Eviction]:
        """The latest first."""
        return map(Eviction._make, reversed(self._at.values()))

    def _key(self, node: int, position: int, token: int) -> tuple[int, int, int, int]:
        # A number may since have gone to another node, but not with the same birth and end.
        return node, self._tree.nodes.created[node], position, token
