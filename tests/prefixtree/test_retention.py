"""Priorities of token ranges, and their durations on a clock that the tests turn."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import prefixtree as pt
from allocator import LRU, EvictionPolicy, InvalidArgument, Priority, Usage

from .observe import Clock

BY_DEFAULT = 35


def make(
    num_blocks: int = 64, block_size: int = 1, eviction: str | EvictionPolicy = "priority"
) -> tuple[pt.PrefixCache, Clock]:
    clock = Clock()
    return pt.PrefixCache(num_blocks, block_size, eviction=eviction, clock=clock), clock


def use(cache: pt.PrefixCache, *prompts: list[int]) -> None:
    for tokens in prompts:
        with cache.open(tokens) as sequence:
            sequence.commit(len(tokens))


def lengths(cache: pt.PrefixCache, *prompts: list[int]) -> list[int]:
    return [cache.match(tokens).cached for tokens in prompts]


def order_of(cache: pt.PrefixCache, *prompts: list[int]) -> list[int]:
    """Which of the prompts, of one token each, goes first, second, and so on."""
    gone: list[int] = []
    while len(gone) < len(prompts):
        assert cache.evict(1).blocks == 1
        gone += [i for i, n in enumerate(lengths(cache, *prompts)) if not n and i not in gone]
    return gone


def test_lowest_priority_first_and_least_recently_used_among_equals() -> None:
    cache, _ = make()
    prompts = [[1], [2], [3], [4], [5]]
    use(cache, *prompts)
    assert cache.retain([4], priority=10) == 1
    assert cache.retain([1], priority=80) == 1
    assert cache.retain([2], priority=80) == 1
    use(cache, [1], [4])
    assert order_of(cache, *prompts) == [3, 2, 4, 1, 0]


def test_the_last_call_counts() -> None:
    cache, clock = make()
    use(cache, [1], [2], [3])
    cache.retain([1], priority=80, duration=5)
    cache.retain([1], priority=1)
    cache.retain([2], priority=90, duration=1)
    cache.retain([2], priority=70, duration=9)
    cache.retain([3], priority=0)
    cache.retain([3], priority=35)
    clock.turn(6)
    cache.check()
    assert order_of(cache, [1], [2], [3]) == [0, 2, 1]


@pytest.mark.parametrize(("later", "expected"), [(4.0, [1, 0]), (5.0, [0, 1])])
def test_after_its_duration_a_range_is_as_any_other(later: float, expected: list[int]) -> None:
    cache, clock = make()
    use(cache, [1], [2])
    cache.retain([1], priority=80, duration=5)
    clock.turn(later)
    assert order_of(cache, [1], [2]) == expected


def test_a_low_priority_ends_too() -> None:
    cache, clock = make()
    use(cache, [1], [2])
    cache.retain([2], priority=0, duration=5)
    clock.turn(5)
    assert order_of(cache, [1], [2]) == [0, 1]


def test_a_range_in_the_middle_splits_at_its_borders_and_copies_nothing() -> None:
    cache, _ = make(block_size=4)
    tokens = list(range(10))
    use(cache, tokens, [50])
    free = cache.stats().free_blocks
    assert cache.retain(tokens, priority=90, start=3, stop=7) == 4
    assert (cache.stats().nodes, cache.stats().free_blocks) == (4, free)
    cache.check()
    cache.retain(tokens, priority=90, start=3, stop=7)
    cache.retain(tokens, priority=80, start=3, stop=7)
    assert cache.stats().nodes == 4
    assert cache.evict(1).blocks == 1
    # The token at 7 is in a block that its parent holds: to let it go would free nothing.
    assert lengths(cache, tokens, [50]) == [8, 1], "older than [50], and not retained"
    assert cache.evict(1).blocks == 1
    assert lengths(cache, tokens, [50]) == [7, 0]
    assert cache.evict(1).blocks == 1
    assert lengths(cache, tokens) == [4], "what lies above the range goes after it"


def test_only_what_is_cached_is_covered() -> None:
    cache, _ = make()
    use(cache, [1, 2, 3], [1, 2, 9])
    before = str(cache.tree())
    assert cache.retain([7, 7], priority=90) == 0
    assert cache.retain([1, 2, 3, 4, 5], priority=90, start=3) == 0
    assert cache.retain([1, 2, 3], priority=90, start=2, stop=2) == 0
    assert cache.retain([1, 2, 3], priority=90, namespace="other") == 0
    assert str(cache.tree()) == before
    assert cache.retain([1, 2, 3, 4, 5], priority=90, start=1) == 2
    cache.evict(1)
    assert lengths(cache, [1, 2, 3], [1, 2, 9]) == [3, 2]


def test_a_running_sequence_keeps_what_it_retained_after_its_end() -> None:
    cache, _ = make(block_size=2)
    sequence = cache.open([1, 2, 3, 4])
    assert cache.retain([1, 2, 3, 4], priority=90) == 0, "nothing is committed"
    sequence.commit(3)
    assert cache.retain([1, 2, 3, 4], priority=90) == 3
    sequence.commit(4)
    cache.append([sequence], [5])
    cache.commit([sequence])
    cache.check()
    assert sequence.tokens().tolist() == [1, 2, 3, 4, 5]
    sequence.close()
    use(cache, [8, 8], [9, 9])
    while cache.stats().cached_tokens > 3:
        cache.evict(1)
    assert lengths(cache, [1, 2, 3, 4, 5]) == [3]


def test_it_ends_while_it_is_pinned() -> None:
    cache, clock = make()
    use(cache, [1], [2])
    cache.retain([1], priority=80, duration=5)
    pin = cache.pin([1])
    clock.turn(5)
    cache.evict(0)
    cache.check()
    pin.unpin()
    use(cache, [2])
    assert order_of(cache, [1], [2]) == [0, 1]


def test_halves_of_a_split_are_retained_alike_and_end_together() -> None:
    cache, clock = make()
    use(cache, [1, 2, 3, 4], [9])
    cache.retain([1, 2, 3, 4], priority=80, duration=5)
    cache.open([1, 2]).close()
    cache.check()
    cache.evict(1)
    assert lengths(cache, [1, 2, 3, 4], [9]) == [4, 0]
    use(cache, [9])
    clock.turn(5)
    cache.evict(2)
    assert lengths(cache, [1, 2, 3, 4], [9]) == [2, 1]
    cache.evict(2)
    assert lengths(cache, [1, 2], [9]) == [0, 1]


def test_the_upper_half_of_a_split_outlives_the_lower_by_its_own_priority() -> None:
    cache, _ = make()
    use(cache, [1, 2, 3, 4], [9])
    cache.retain([1, 2, 3, 4], priority=80)
    cache.open([1, 2]).close()
    cache.forget([1, 2])
    use(cache, [9])
    cache.evict(1)
    assert lengths(cache, [1, 2], [9]) == [2, 0]


def test_what_is_evicted_and_computed_again_starts_anew() -> None:
    cache, _ = make()
    use(cache, [1])
    cache.retain([1], priority=90)
    cache.clear()
    use(cache, [1], [2])
    cache.check()
    assert order_of(cache, [1], [2]) == [0, 1]


@pytest.mark.parametrize("retained", [{}, {"priority": 90}, {"priority": 90, "duration": 9}])
def test_twins_that_agree_token_after_token_keep_what_one_of_them_retained(
    retained: dict[str, Any],
) -> None:
    """Their chain of nodes becomes one again, but not across a border of priorities."""
    cache, _ = make(block_size=4)
    twins = [cache.open([1, 2]), cache.open([1, 2])]
    cache.commit(twins)
    for token in (3, 4, 5):
        cache.append(twins, [token, token])
        twins[0].commit(len(twins[0]))
        if retained and token == 4:
            assert cache.retain([1, 2, 3, 4], start=2, **retained) == 2
        twins[1].commit(len(twins[1]))
        cache.check()
    for twin in twins:
        twin.close()
    use(cache, [7])
    cache.check()
    assert cache.stats().nodes == (4 if retained else 2)
    cache.evict(cache.num_blocks - cache.stats().free_blocks - 1)
    assert lengths(cache, [1, 2, 3, 4, 5], [7]) == ([4, 0] if retained else [0, 1])


@pytest.mark.parametrize("policy", ["lru", "mru", "fifo", "lfu", "slru", "cost"])
def test_a_policy_that_does_not_look_at_priorities_refuses_them(policy: str) -> None:
    cache, _ = make(eviction=policy)
    use(cache, [1, 2])
    with pytest.raises(pt.PriorityUnused, match=f"'{policy}' does not"):
        cache.retain([1], priority=90)
    assert cache.stats().nodes == 1


def test_a_policy_of_ones_own_may_look_at_priorities() -> None:
    class Reversed(LRU):
        uses_priority = True

        def key(self, usage: Usage) -> int:
            return -usage.priority

    cache, _ = make(eviction=Reversed())
    use(cache, [1], [2])
    cache.retain([2], priority=90)
    assert order_of(cache, [1], [2]) == [1, 0]


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (InvalidArgument, {"priority": -1}, "priority is -1, expected 0..100"),
        (InvalidArgument, {"priority": 101}, "priority is 101"),
        (InvalidArgument, {"priority": math.nan}, "priority is nan, expected an integer"),
        (InvalidArgument, {"priority": 1.5}, "priority is 1.5"),
        (InvalidArgument, {"priority": None}, "priority is None"),
        (InvalidArgument, {"duration": 0}, "duration is 0.0, expected more than 0 seconds"),
        (InvalidArgument, {"duration": -3}, "duration is -3.0"),
        (InvalidArgument, {"duration": math.nan}, "duration is nan"),
        (InvalidArgument, {"duration": math.inf}, "duration is inf"),
        (InvalidArgument, {"duration": "5"}, "duration is '5'"),
        (pt.InvalidLength, {"start": -1}, r"range -1\.\.3 of a prompt of 3 tokens"),
        (pt.InvalidLength, {"stop": 4}, r"range 0\.\.4 of"),
        (pt.InvalidLength, {"start": 3, "stop": 2}, r"range 3\.\.2 of"),
        (InvalidArgument, {"start": 0.5}, "start is 0.5"),
        (InvalidArgument, {"stop": "2"}, "stop is '2'"),
        (pt.InvalidNamespace, {"namespace": 3}, "got 3"),
        (pt.InvalidTokens, {"tokens": []}, "empty"),
        (pt.InvalidTokens, {"tokens": [1, -2]}, "-2"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    error: type[Exception], arguments: dict[str, Any], message: str
) -> None:
    cache, _ = make()
    use(cache, [1, 2, 3], [4])
    before = cache.stats(), str(cache.tree())
    with pytest.raises(error, match=message):
        cache.retain(**{"tokens": [1, 2, 3], "priority": 50, **arguments})
    assert (cache.stats(), str(cache.tree())) == before
    cache.evict(3)
    assert lengths(cache, [1], [4]) == [0, 1]


def test_numpy_numbers_will_do() -> None:
    cache, _ = make()
    use(cache, [1, 2, 3])
    assert (
        cache.retain(
            np.array([1, 2, 3], np.int32),
            priority=np.int64(50),
            duration=np.float32(2),
            start=np.int32(1),
            stop=np.uint8(3),
        )
        == 2
    )


@pytest.mark.parametrize("eviction", [Priority("slru"), Priority("cost")])
def test_among_equals_another_policy_may_decide(eviction: Priority) -> None:
    cache, _ = make(eviction=eviction)
    use(cache, [1], [1], [2], [3])
    cache.retain([2], priority=50)
    assert order_of(cache, [1], [2], [3]) == [2, 0, 1]


def test_a_policy_that_fails_breaks_the_cache_by_name() -> None:
    class Moody(LRU):
        name = "moody"

        def key(self, usage: Usage) -> int:
            if usage.last_used > 1:
                raise ZeroDivisionError("no such luck")
            return usage.last_used

    cache, _ = make(eviction=Moody())
    use(cache, [1])
    with pytest.raises(pt.PolicyFailed, match=r"'moody' failed for Usage.*no such luck") as caught:
        use(cache, [2])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(pt.CacheBroken, match=r"PolicyFailed.*moody"):
        cache.match([1])


@pytest.mark.parametrize("time", [math.nan, "noon"])
def test_a_clock_that_fails_breaks_the_cache_by_name(time: Any) -> None:
    cache, clock = make()
    use(cache, [1])
    cache.retain([1], priority=50, duration=1)
    clock.time = time
    cache.match([1])
    with pytest.raises(pt.BrokenInvariant, match="the clock failed: InvalidArgument: time is"):
        cache.evict(1)
    with pytest.raises(pt.CacheBroken, match="clock"):
        cache.match([1])


# Against a naive model: a dictionary of prefixes, each with its priority, deadline and last use.

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=5)
calls = st.one_of(
    st.tuples(st.just("use"), prompts),
    st.tuples(
        st.just("retain"),
        prompts,
        st.sampled_from([0, 20, 35, 60, 100]),
        st.sampled_from([None, None, 1, 2, 5]),
        st.integers(0, 6),
        st.integers(0, 6),
    ),
    st.tuples(st.just("wait"), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("evict"), st.just(1)),
)


class Naive:
    """Every cached prefix for itself, and every leaf looked at for each eviction."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, ...], tuple[int, float]] = {}
        self.used: dict[tuple[int, ...], int] = {}
        self.tick = 0

    def use(self, tokens: list[int]) -> None:
        self.tick += 1
        for stop in range(1, len(tokens) + 1):
            path = tuple(tokens[:stop])
            self.of.setdefault(path, (BY_DEFAULT, math.inf))
            self.used[path] = self.tick

    def retain(self, tokens: list[int], start: int, stop: int, value: tuple[int, float]) -> int:
        covered = [tuple(tokens[:n]) for n in range(start + 1, stop + 1)]
        covered = [path for path in covered if path in self.of]
        self.of.update(dict.fromkeys(covered, value))
        return len(covered)

    def rank(self, path: tuple[int, ...], now: float) -> tuple[int, int]:
        priority, deadline = self.of[path]
        return (priority if now < deadline else BY_DEFAULT), self.used[path]

    def leaves(self) -> list[tuple[int, ...]]:
        inner = {path[:-1] for path in self.of}
        return [path for path in self.of if path not in inner]


@settings(max_examples=200)
@given(st.lists(calls, min_size=6, max_size=30), st.integers(1, 3))
def test_as_a_naive_model(history: list[tuple[Any, ...]], block_size: int) -> None:
    cache, clock = make(256, block_size)
    naive = Naive()
    for what, *arguments in history:
        if what == "use":
            naive.use(*arguments)
            use(cache, *arguments)
        elif what == "wait":
            clock.turn(arguments[0])
        elif what == "retain":
            tokens, priority, duration, *ends = arguments
            start, stop = sorted(min(end, len(tokens)) for end in ends)
            deadline = math.inf if duration is None else clock.time + duration
            covered = naive.retain(tokens, start, stop, (priority, deadline))
            assert covered == cache.retain(
                tokens, priority=priority, duration=duration, start=start, stop=stop
            )
        else:
            before = naive.leaves()
            cache.evict(1)
            judge(cache, naive, before, clock.time)
        cache.check()
    while naive.of:
        before = naive.leaves()
        assert cache.evict(1).blocks
        judge(cache, naive, before, clock.time)


def judge(cache: pt.PrefixCache, naive: Naive, leaves: list[tuple[int, ...]], now: float) -> None:
    """What went had, one after the other, the lowest rank of the leaves of that moment."""
    left = {leaf: cache.match(leaf).cached for leaf in leaves}
    kept = {leaf[:stop] for leaf, n in left.items() for stop in range(1, n + 1)}
    gone = naive.of.keys() - kept
    while gone:
        path = min(naive.leaves(), key=lambda leaf: naive.rank(leaf, now))
        assert path in gone, f"{path} stayed, {gone} went"
        gone.remove(path)
        del naive.of[path]
        del naive.used[path]
