"""The order in which items are evicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sortedcontainers import SortedList

from allocator.errors import PolicyFailed
from allocator.policies import Ageing, EvictionPolicy, Key, Usage


class EvictionOrder:
    """Items (integers) in the order in which a policy would evict them.

    Items with equal keys go in ascending order, so that every run evicts the same. Each change is
    O(log n). The policy is asked once, at `add`: when the usage of an item changes, discard it
    and add it again.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._ageing = policy if isinstance(policy, Ageing) else None
        self.clock = 0.0
        """What `Usage.clock` is of an item used now; only an ageing policy moves it."""
        self._key: dict[int, Key] = {}
        self._order: SortedList[tuple[Key, int]] = SortedList()

    def __len__(self) -> int:
        return len(self._key)

    def __contains__(self, item: int) -> bool:
        return item in self._key

    def __iter__(self) -> Iterator[int]:
        """The items in eviction order. Removes nothing; do not change the order meanwhile."""
        return (item for _, item in self._order)

    def copy(self) -> EvictionOrder:
        """One that changes on its own, of the same items and clock. O(n)."""
        other = EvictionOrder(self._policy)
        other.clock = self.clock
        other._key = self._key.copy()
        other._order = self._order.copy()
        return other

    def add(self, item: int, usage: Usage) -> None:
        """Raises KeyError when `item` is present.

        Raises `PolicyFailed` when the policy raises or its key is NaN or not comparable; the item
        is not added then.
        """
        if item in self._key:
            raise KeyError(f"item {item} is in the eviction order already")
        key = self._key_of(usage)
        try:
            self._order.add((key, item))
        except Exception as error:  # keys that do not compare
            raise self._failure(usage, error) from error
        self._key[item] = key

    def update(self, items: Iterable[tuple[int, Usage]]) -> None:
        """As `add` for each, in about a third of the time. All or nothing."""
        keys = {}
        for item, usage in items:
            if item in self._key or item in keys:
                raise KeyError(f"item {item} is in the eviction order already")
            keys[item] = self._key_of(usage)
        self._order.update((key, item) for item, key in keys.items())
        self._key.update(keys)

    def discard(self, item: int) -> None:
        """Raises KeyError when `item` is absent."""
        if item not in self._key:
            raise KeyError(f"item {item} is not in the eviction order")
        self._order.remove((self._key.pop(item), item))

    def first(self) -> int:
        """The item that goes first; it stays. Raises KeyError when there is none."""
        if not self._key:
            raise KeyError("the eviction order is empty")
        item: int = self._order[0][1]
        return item

    def renew(self, item: int, usage: Usage) -> None:
        """Puts an item that is present where its usage now belongs; O(1) if that is the same place.

        Raises KeyError when it is absent, `PolicyFailed` as `add`.
        """
        key = self._key_of(usage)
        if key != self._key[item]:
            self.discard(item)
            self.add(item, usage)

    def pop(self) -> int:
        """Removes and returns the item that goes first.

        Raises KeyError when there is none, `PolicyFailed` when an ageing policy raises.
        """
        if not self._key:
            raise KeyError("the eviction order is empty")
        key, item = self._order.pop(0)
        del self._key[item]
        if self._ageing:
            try:
                self.clock = max(self.clock, self._ageing.clock_after(key))
            except Exception as error:
                raise self._failure(key, error) from error
        return int(item)

    def _key_of(self, usage: Usage) -> Key:
        try:
            key = self._policy.key(usage)
            if _is_nan(key):
                raise ValueError(f"the key {key} has no place in an order")
        except Exception as error:
            raise self._failure(usage, error) from error
        return key

    def _failure(self, given: Usage | Key, error: Exception) -> PolicyFailed:
        return PolicyFailed(
            f"policy {self._policy.name!r} failed for {given}: {type(error).__name__}: {error}"
        )


def _is_nan(key: Key) -> bool:
    return any(map(_is_nan, key)) if isinstance(key, tuple) else key != key
