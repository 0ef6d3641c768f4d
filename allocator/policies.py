"""Eviction policies: which of the items that may go goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from allocator.errors import InvalidArgument

Key: TypeAlias = int | float | tuple[int | float, ...]


class Usage(NamedTuple):
    """What a policy may look at of an item. Ticks only grow."""

    last_used: int  # the tick of its last use
    created: int  # a number that grows from item to item
    uses: int  # how often it was used again since it was made
    tokens: int  # how many it holds
    start: int  # position of its first token in its path


@runtime_checkable
class EvictionPolicy(Protocol):
    """Says where an item stands in the eviction order."""

    @property
    def name(self) -> str: ...

    def key(self, usage: Usage) -> Key:
        """The smallest key is evicted first. It must not be NaN; keys must be comparable."""
        ...


class LRU:
    """Least recently used first."""

    name = "lru"

    def key(self, usage: Usage) -> int:
        return usage.last_used


class MRU:
    """Most recently used first: for scans longer than the cache, of which LRU keeps nothing."""

    name = "mru"

    def key(self, usage: Usage) -> int:
        return -usage.last_used


class FIFO:
    """Oldest first, however often it was used."""

    name = "fifo"

    def key(self, usage: Usage) -> int:
        return usage.created


class LFU:
    """Least often used first, among equals the least recently used."""

    name = "lfu"

    def key(self, usage: Usage) -> tuple[int, int]:
        return usage.uses, usage.last_used


class SLRU:
    """What was used once before what was used again; the least recently used first within each.

    A burst of requests that never come back then cannot push out what is hot (Karedla, Love,
    Wherry: Caching strategies to improve disk system performance, IEEE Computer 1994; without its
    limit on the protected part, since everything here is evicted sooner or later).
    """

    name = "slru"

    def key(self, usage: Usage) -> tuple[int, int]:
        return int(usage.uses > 0), usage.last_used


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    policy.name: policy for policy in (LRU, MRU, FIFO, LFU, SLRU)
}


def policy_names() -> tuple[str, ...]:
    """The names that `make_policy` knows."""
    return tuple(_POLICIES)


def make_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """The policy of that name, or `policy` itself when it is one.

    Raises InvalidArgument, a ValueError, for anything else, listing the known names.
    """
    if isinstance(policy, str) and policy in _POLICIES:
        return _POLICIES[policy]()
    # A class has the attributes of its instances, but its `key` is not bound.
    if isinstance(policy, EvictionPolicy) and not isinstance(policy, type):
        return policy
    known = ", ".join(map(repr, _POLICIES))
    raise InvalidArgument(
        f"eviction policy is {policy!r}, expected one of {known} or an object with name and key"
    )
