"""The order in which items are evicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sortedcontainers import SortedList

from allocator.errors import InvalidArgument
from allocator.policies import EvictionPolicy, Key, Usage


class EvictionOrder:
    """Items (integers) in the order in which a policy would evict them.

    Items with equal keys go in ascending order, so that every run evicts the same. Each change is
    O(log n). The policy is asked once, at `add`: when the usage of an item changes, discard it
    and add it again.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._key: dict[int, Key] = {}
        self._order: SortedList[tuple[Key, int]] = SortedList()

    def __len__(self) -> int:
        return len(self._key)

    def __contains__(self, item: int) -> bool:
        return item in self._key

    def __iter__(self) -> Iterator[int]:
        """The items in eviction order. Removes nothing; do not change the order meanwhile."""
        return (item for _, item in self._order)

    def add(self, item: int, usage: Usage) -> None:
        """Raises KeyError when `item` is present, InvalidArgument when the policy's key is NaN."""
        if item in self._key:
            raise KeyError(f"item {item} is in the eviction order already")
        key = self._key_of(usage)
        self._order.add((key, item))
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

    def pop(self) -> int:
        """Removes and returns the item that goes first. Raises KeyError when there is none."""
        if not self._key:
            raise KeyError("the eviction order is empty")
        item: int = self._order.pop(0)[1]
        del self._key[item]
        return item

    def _key_of(self, usage: Usage) -> Key:
        key = self._policy.key(usage)
        if key != key:
            raise InvalidArgument(f"policy {self._policy.name!r} gave the key {key} for {usage}")
        return key
