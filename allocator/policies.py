"""Eviction policies: which of the items that may go goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from allocator.errors import InvalidArgument, as_real

Key: TypeAlias = "int | float | tuple[Key, ...]"

DEFAULT_PRIORITY = 35
MAX_PRIORITY = 100


class Usage(NamedTuple):
    """What a policy may look at of an item. Ticks only grow."""

    last_used: int  # the tick of its last use
    created: int  # a number that grows from item to item
    uses: int  # how often it was used again since it was made
    tokens: int  # how many it holds
    start: int  # position of its first token in its path
    clock: float = 0.0  # the order's clock at its last use, see `Ageing`
    priority: int = DEFAULT_PRIORITY  # what the user wants it to be, 0..100


@runtime_checkable
class EvictionPolicy(Protocol):
    """Says where an item stands in the eviction order."""

    @property
    def name(self) -> str: ...

    def key(self, usage: Usage) -> Key:
        """The smallest key is evicted first. It must not be NaN; keys must be comparable."""
        ...


@runtime_checkable
class Ageing(EvictionPolicy, Protocol):
    """A policy whose keys start from a clock that evictions drive.

    The clock is kept with the order, so that a policy has no state and serves any number of caches.
    """

    def clock_after(self, key: Key) -> float:
        """Where the clock stands once an item of this key was evicted; it never goes back."""
        ...


def uses_priority(policy: EvictionPolicy) -> bool:
    """Whether the policy looks at `Usage.priority`; one that does has a true `uses_priority`."""
    return bool(getattr(policy, "uses_priority", False))


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


class Cost:
    """What is cheap to compute again and seldom used first; what is left unused ages.

    The key is clock + (1 + uses) * FLOPs per token to compute the item again. It follows GDSF
    (Cherkasova: Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy,
    HP Labs 1998), with the cost and size that Marconi (Pan et al., MLSys 2025) gives to a prefix:
    FLOPs and bytes. Every token of an attention model takes the same bytes, so FLOPs per byte
    are in proportion to FLOPs per token. The clock is the largest key evicted so far, read when
    the item was last used: on a trace of conversations, a clock read when its last child went let
    old prefixes outlive newer ones and hit less than LRU.
    """

    name = "cost"

    def __init__(self, flops_per_token: float = 1.0, attention_flops_per_pair: float = 0.0) -> None:
        """The FLOPs to compute one token: `flops_per_token`, whatever its position (about twice
        the parameters of the model), and `attention_flops_per_pair` for each token before it (4
        * layers * query heads * head dim).

        Only their ratio matters. By default every token costs the same, which hits most tokens; a
        model's own figures trade some of these hits for deeper ones, which save more FLOPs. Raises
        `InvalidArgument` unless both are finite, the first > 0 and the second >= 0.
        """
        flops = as_real("flops_per_token", flops_per_token)
        per_pair = as_real("attention_flops_per_pair", attention_flops_per_pair)
        if flops <= 0:
            raise InvalidArgument(f"flops_per_token is {flops}, expected more than 0")
        if per_pair < 0:
            raise InvalidArgument(f"attention_flops_per_pair is {per_pair}, expected at least 0")
        self._per_token_before = per_pair / flops

    def key(self, usage: Usage) -> tuple[float, int]:
        before = usage.start + usage.tokens / 2  # tokens that one of it attends to, on average
        worth = (1 + usage.uses) * (1 + self._per_token_before * before)
        return usage.clock + worth, usage.last_used

    def clock_after(self, key: Key) -> float:
        assert isinstance(key, tuple)
        assert isinstance(key[0], float)
        return key[0]


class Priority:
    """Lowest priority first; among equals, the order of another policy."""

    name = "priority"
    uses_priority = True

    def __init__(self, among_equals: str | EvictionPolicy = "lru") -> None:
        """Raises `InvalidArgument` for an unknown policy."""
        self._among_equals = make_policy(among_equals)
        # Checked once: looking for a protocol's members takes longer than an eviction.
        self._ageing = self._among_equals if isinstance(self._among_equals, Ageing) else None

    def key(self, usage: Usage) -> tuple[int, Key]:
        return usage.priority, self._among_equals.key(usage)

    def clock_after(self, key: Key) -> float:
        if self._ageing is None:
            return 0.0
        assert isinstance(key, tuple)
        return self._ageing.clock_after(key[1])


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    policy.name: policy for policy in (LRU, MRU, FIFO, LFU, SLRU, Cost, Priority)
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
