"""EvictionOrder against sorted()."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator import (
    FIFO,
    LFU,
    LRU,
    MRU,
    SLRU,
    Cost,
    EvictionOrder,
    EvictionPolicy,
    InvalidArgument,
    PolicyFailed,
    Priority,
    Usage,
    make_policy,
)


class Density:
    """A policy of a caller's own, with keys that are fractions."""

    def __init__(self) -> None:
        self.name = "density"

    def key(self, usage: Usage) -> float:
        return usage.uses / usage.tokens


usages = st.builds(
    Usage,
    last_used=st.integers(0, 6),
    created=st.integers(0, 6),
    uses=st.integers(0, 3),
    tokens=st.integers(1, 4),
    start=st.integers(0, 100),
    clock=st.integers(0, 4).map(float),
    priority=st.sampled_from([0, 35, 100]),
)


def recompute(usage: Usage) -> float:
    """FLOPs, in those of a token without any before it: one token after the other."""
    places = range(usage.start, usage.start + usage.tokens)
    return sum(1 + 0.25 * (place + 0.5) for place in places)


def used_at(tick: int) -> Usage:
    return Usage(last_used=tick, created=0, uses=1, tokens=1, start=0)


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        (LRU(), lambda u: u.last_used),
        (MRU(), lambda u: -u.last_used),
        (FIFO(), lambda u: u.created),
        (LFU(), lambda u: (u.uses, u.last_used)),
        (SLRU(), lambda u: (u.uses != 0, u.last_used)),
        (Density(), lambda u: u.uses / u.tokens),
        (Cost(2.0, 0.5), lambda u: (u.clock + (1 + u.uses) * recompute(u) / u.tokens, u.last_used)),
        (Priority(), lambda u: (u.priority, u.last_used)),
        (Priority("slru"), lambda u: (u.priority, u.uses != 0, u.last_used)),
        (Priority(Density()), lambda u: (u.priority, u.uses / u.tokens)),
    ],
    ids=[
        *["lru", "mru", "fifo", "lfu", "slru", "density", "cost"],
        *["priority", "priority-slru", "priority-density"],
    ],
)
@given(data=st.data())
def test_any_sequence_of_changes(
    policy: EvictionPolicy, key: Callable[[Usage], float], data: st.DataObject
) -> None:
    order = EvictionOrder(policy)
    present: dict[int, Usage] = {}

    def expected() -> list[int]:
        return sorted(present, key=lambda item: (key(present[item]), item))

    for _ in range(data.draw(st.integers(0, 40), "operations")):
        action = data.draw(st.sampled_from(["add", "add", "discard", "pop"]), "action")
        item = data.draw(st.integers(0, 15), "item")
        if action == "pop" and present:
            first = expected()[0]
            assert order.pop() == first
            del present[first]
        elif action == "pop":
            with pytest.raises(KeyError, match="empty"):
                order.pop()
        elif action == "add" and item not in present:
            present[item] = data.draw(usages, "usage")
            order.add(item, present[item])
        elif action == "add":
            with pytest.raises(KeyError, match=f"item {item} is in the eviction order"):
                order.add(item, data.draw(usages, "usage"))
        elif item in present:
            order.discard(item)
            del present[item]
        else:
            with pytest.raises(KeyError, match=f"item {item} is not in the eviction order"):
                order.discard(item)
        assert list(order) == expected()
        assert len(order) == len(present)
        assert [item in order for item in range(16)] == [item in present for item in range(16)]


def test_lru_takes_the_least_recently_used_first_and_ties_by_item() -> None:
    order = EvictionOrder(LRU())
    for item, tick in [(5, 30), (9, 10), (7, 20), (2, 20)]:
        order.add(item, used_at(tick))
    assert [order.pop() for _ in range(4)] == [9, 2, 7, 5]


@given(st.dictionaries(st.integers(0, 15), usages), st.dictionaries(st.integers(16, 30), usages))
def test_many_at_once_are_as_many_one_by_one(
    first: dict[int, Usage], more: dict[int, Usage]
) -> None:
    order, other = EvictionOrder(LFU()), EvictionOrder(LFU())
    for item, usage in (*first.items(), *more.items()):
        other.add(item, usage)
    order.update(first.items())
    order.update(more.items())
    assert list(order) == list(other)
    for item in (*first, *more):
        order.discard(item)
    assert list(order) == []


def test_a_copy_and_its_original_change_apart() -> None:
    order = EvictionOrder(make_policy("cost"))
    for item in range(4):
        order.add(item, used_at(item)._replace(uses=item))
    order.pop()
    other = order.copy()
    assert list(other) == [1, 2, 3]
    assert other.clock == order.clock > 0
    order.pop()
    other.add(7, used_at(7)._replace(uses=9))
    assert list(order) == [2, 3]
    assert list(other) == [1, 2, 3, 7]
    assert other.clock < order.clock


def test_of_many_at_once_one_that_is_there_spoils_all() -> None:
    order = EvictionOrder(LRU())
    order.add(1, used_at(5))
    for items in ([2, 1], [3, 3]):
        with pytest.raises(KeyError, match=f"item {items[1]} is in the eviction order"):
            order.update((item, used_at(0)) for item in items)
        assert list(order) == [1]
        assert 2 not in order


def test_an_item_used_again_moves_back() -> None:
    order = EvictionOrder(LRU())
    order.add(1, used_at(1))
    order.add(2, used_at(2))
    order.discard(1)
    order.add(1, used_at(3))
    assert list(order) == [2, 1]


class Counted:
    """A key that counts how often keys are compared."""

    comparisons = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return isinstance(other, Counted) and self.value == other.value

    def __lt__(self, other: "Counted") -> bool:
        Counted.comparisons += 1
        return self.value < other.value


class CountedLRU:
    name = "counted"

    def key(self, usage: Usage) -> Counted:
        return Counted(usage.last_used)


def test_the_cost_of_a_change_grows_with_the_logarithm() -> None:
    order = EvictionOrder(CountedLRU())
    size = 1 << 13
    for item in range(size):
        order.add(item, used_at(item * 7919 % size))
    Counted.comparisons = 0
    for item in range(100):
        order.pop()
        order.add(size + item, used_at(item * 31))
        order.discard(size + item)
    # A pop, an add and a discard, which searches twice. A search compares log2(n) + 1 pairs and
    # each pair twice (equal? less?), and the searches in sublists and in their ends may round up.
    # A heap built anew, or a scan, would need thousands.
    assert Counted.comparisons / 100 <= 4 * 2 * (math.log2(size) + 3)


@pytest.mark.parametrize("key", [math.nan, "soon", (1, math.nan), (1, (2, math.nan))])
def test_a_key_without_an_order_is_refused_and_changes_nothing(key) -> None:
    class Moody:
        name = "moody"

        def key(self, usage: Usage):
            return key if usage.last_used > 1 else usage.last_used

    order = EvictionOrder(Moody())
    order.add(3, used_at(1))
    with pytest.raises(PolicyFailed):
        order.add(4, used_at(2))
    assert list(order) == [3]
    assert 4 not in order
    assert len(order) == 1


def test_the_error_for_nan_names_policy_and_usage() -> None:
    class Undecided:
        name = "undecided"

        def key(self, usage: Usage) -> float:
            return math.nan

    with pytest.raises(
        PolicyFailed, match=r"'undecided' failed for Usage\(last_used=8.*key nan has no place"
    ):
        EvictionOrder(Undecided()).add(1, used_at(8))


def test_a_policy_by_name() -> None:
    policy = make_policy("lru")
    assert isinstance(policy, LRU)
    assert policy.name == "lru"


def test_a_policy_of_the_callers_own_passes_through() -> None:
    policy = Density()
    assert make_policy(policy) is policy


class Nameless:
    def key(self, usage: Usage) -> int:
        return usage.uses


@pytest.mark.parametrize("wrong", ["lfru", "LRU", "", None, 3, LRU, Nameless()])
def test_anything_else_is_refused_with_the_known_names(wrong) -> None:
    with pytest.raises(
        ValueError,
        match="one of 'lru', 'mru', 'fifo', 'lfu', 'slru', 'cost', 'priority' or an object",
    ) as error:
        make_policy(wrong)
    assert repr(wrong) in str(error.value)


class Sour(LRU):
    """Fails for what was used at tick 2, and for the clock after an odd one."""

    def key(self, usage: Usage) -> int:
        if usage.last_used == 2:
            raise ZeroDivisionError("no such luck")
        return usage.last_used

    def clock_after(self, key) -> float:
        if key % 2:
            raise LookupError("what time is it?")
        return key


def test_a_policy_that_raises_is_named_with_its_error() -> None:
    order = EvictionOrder(Sour())
    order.add(1, used_at(3))
    with pytest.raises(
        PolicyFailed, match=r"'lru' failed for Usage\(last_used=2.*ZeroDivision"
    ) as e:
        order.add(2, used_at(2))
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert list(order) == [1]
    with pytest.raises(PolicyFailed, match="'lru' failed for 3: LookupError: what time is it"):
        order.pop()


def test_the_clock_is_that_of_the_largest_key_evicted() -> None:
    order = EvictionOrder(Sour())
    clocks = []
    for tick in (4, 8, 6):
        order.add(0, used_at(tick))
        order.discard(0)
        order.add(0, used_at(tick))
        assert order.pop() == 0
        clocks.append(order.clock)
    assert clocks == [4, 8, 8]


def test_the_clock_stands_still_under_a_policy_that_does_not_age() -> None:
    for policy in (LRU(), Density(), Priority()):
        order = EvictionOrder(policy)
        order.add(1, used_at(5))
        order.pop()
        assert order.clock == 0


def test_priority_ages_as_the_policy_among_equals_does() -> None:
    order = EvictionOrder(Priority("cost"))
    order.add(1, used_at(5)._replace(clock=7.0, priority=90))
    order.pop()
    assert 7 < order.clock < 10


def test_cost_lets_what_is_unused_age_and_weighs_uses_and_depth() -> None:
    base = Usage(last_used=1, created=0, uses=0, tokens=8, start=0, clock=10.0)
    key = Cost(16e9, 524288).key
    assert key(base) < key(base._replace(uses=1)) < key(base._replace(uses=1, clock=10.5))
    assert key(base) < key(base._replace(start=4096))
    assert key(base) < key(base._replace(last_used=2)), "the last word is recency's"
    assert Cost().key(base) == Cost().key(base._replace(start=4096)), "alike by default"


@pytest.mark.parametrize(
    "arguments",
    [
        {"flops_per_token": 0},
        {"flops_per_token": -1.0},
        {"flops_per_token": math.nan},
        {"flops_per_token": math.inf},
        {"flops_per_token": "many"},
        {"flops_per_token": 10**400},
        {"attention_flops_per_pair": -1},
        {"attention_flops_per_pair": math.nan},
        {"attention_flops_per_pair": None},
    ],
)
def test_costs_that_are_no_amount_are_refused_by_name(arguments) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(InvalidArgument, match=f"{name} is .*{str(value)[:8]}"):
        Cost(**arguments)


def test_priority_among_equals_by_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'random'"):
        Priority("random")
