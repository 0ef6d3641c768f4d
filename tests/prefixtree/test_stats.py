"""Statistics: each sum is the recount, counters differ, and the shape of the tree is that of it."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import prefixtree as pt
from allocator import BrokenInvariant, InvalidArgument
from prefixtree.histogram import POWERS, Histogram, Observations
from prefixtree.stats import COUNTERS, DERIVED, HISTOGRAMS
from tests.inspector.caches import Grown, small

from .observe import Clock

grown = st.builds(Grown, st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 5))


@given(grown, st.integers(0, 3))
def test_the_sums_are_the_recount(run: Grown, evicted: int) -> None:
    cache, running = run.cache, run.running
    cache.evict(evicted)
    with suppress(pt.OutOfBlocks):
        cache.append(running, [1] * len(running))
    cache.commit(running[::2])
    if running:
        running[0].rollback(min(1, len(running[0]) - 1, len(running[0]) - running[0].fork_len))
        running.pop().preempt()
    stats = cache.stats()
    cache.check()
    assert stats.logical_tokens == sum(map(len, running))
    assert stats.open_sequences == len(running)
    assert stats.pending_tokens == sum(len(one) - one.committed for one in running)
    assert stats.kept_prefixes == len(run.pins)
    assert stats.kept_tokens == sum(pin.tokens for pin in run.pins)

    view = cache.tree()
    used = view.pins.astype(int)
    several = (view.length * np.maximum(used - 1, 0)).sum()
    assert stats.shared_tokens == several
    held = stats.pinned_tokens + stats.pending_tokens
    assert stats.sharing_factor == pytest.approx((held + several) / held if held else 1)

    on_nodes = set(view.blocks.tolist())
    assert stats.pinned_blocks + stats.evictable_blocks == len(on_nodes)
    in_use = {
        block
        for at in np.flatnonzero(used)
        for block in view.blocks[view.block_ends[at] : view.block_ends[at + 1]].tolist()
    }
    assert stats.pinned_blocks == len(in_use)
    taken = len(on_nodes) * stats.block_size - len(view.tokens)
    assert stats.unused_slots == taken
    assert 0 <= stats.fragmentation < 1
    free = np.diff(np.concatenate([[0], cache._pool.refs == 0, [0]]).astype(int))
    assert stats.free_extents == np.count_nonzero(free == 1)

    for name in ("nodes", "trimmed", "tokens"):
        total = {"nodes": "evicted_nodes", "trimmed": "trimmed_nodes", "tokens": "evicted_tokens"}
        counted = sum(getattr(count, name) for count in stats.evictions)
        assert counted == getattr(stats, total[name])
    lengths = stats.match_lengths
    assert (lengths.observed, lengths.total) == (stats.opens, stats.hit_tokens)
    assert stats.idle_times.observed == sum(
        count.nodes + count.trimmed for count in stats.evictions if count.policy
    )
    assert stats.block_lifetimes.observed == sum(
        count.blocks for count in stats.evictions if count.policy
    )


@pytest.mark.parametrize("name", ["logical_tokens", "pending_tokens", "_kept_tokens"])
def test_check_finds_a_sum_that_is_wrong(name: str) -> None:
    cache, _ = small()
    cache.check()
    owner = cache if name == "_kept_tokens" else cache._tails
    setattr(owner, name, getattr(owner, name) + 1)
    with pytest.raises(BrokenInvariant, match="tokens, recount"):
        cache.check()


def test_evictions_are_counted_by_policy_and_reason() -> None:
    cache = pt.PrefixCache(4, 2, eviction="fifo")

    def use(*prompt: int) -> None:
        with cache.open(prompt) as sequence:
            sequence.commit(len(prompt))

    assert cache.evict(1).blocks == 0
    use(1, 2, 3, 4, 5)
    use(6, 7, 8, 9)
    cache.forget([6])  # the block of 6 and 7 stays for 6
    cache.evict(1)
    cache.clear()
    assert cache.stats().evictions == (
        pt.EvictionCount("fifo", "open", nodes=0, trimmed=1, tokens=1, blocks=1),
        pt.EvictionCount("", "forget", nodes=1, trimmed=0, tokens=3, blocks=1),
        pt.EvictionCount("fifo", "evict", nodes=0, trimmed=1, tokens=2, blocks=1),
        pt.EvictionCount("fifo", "clear", nodes=2, trimmed=0, tokens=3, blocks=2),
    )


def test_how_deep_and_how_wide_the_tree_is() -> None:
    cache = pt.PrefixCache(40, 2)
    assert (cache.stats().branches, cache.stats().fan_out) == (0, 0.0)
    for last in range(3):  # three leaves behind one node
        with cache.open([1, 2, 3, last]) as sequence:
            sequence.commit(4)
    with cache.open([9, 9], namespace="other") as sequence:
        sequence.commit(2)
    stats = cache.stats()
    assert stats.nodes == 5
    assert stats.branches == 3  # that node and two roots
    assert stats.fan_out == 5 / 3
    # Opened behind nothing, twice behind the head, and behind nothing of the other namespace.
    assert (stats.path_nodes.observed, stats.path_nodes.total) == (4, 2)
    cache.pin([1, 2, 3, 0])
    with cache.open([1, 2, 3, 1, 5]) as sequence:
        sequence.commit(5)
        forks = sequence.fork(2)
    gone = cache.stats().delta(stats).path_nodes
    assert (gone.observed, gone.total) == (4, 2 + 2 + 2 * 3)
    for fork in forks:
        fork.close()
    cache.clear()
    assert cache.stats().branches == 2  # what the pin keeps: a root, the head and its leaf
    cache.check()


def test_the_times_are_those_of_the_clock() -> None:
    clock = Clock()
    cache = pt.PrefixCache(8, 2, clock=clock)
    first = cache.open([1, 2, 3, 4])
    first.commit(4)
    clock.turn(20)
    first.close()
    clock.turn(3)
    cache.open([1, 2]).close()  # a part of it is used again after 3 seconds
    clock.turn(50)
    cache.evict(1)  # the rest, 53 seconds after its last use
    clock.turn(700)
    cache.clear()
    stats = cache.stats()
    assert (stats.reuse_gaps.observed, stats.reuse_gaps.total) == (1, 3)
    assert (stats.idle_times.observed, stats.idle_times.total) == (2, 53 + 750)
    assert (stats.block_lifetimes.observed, stats.block_lifetimes.total) == (2, 73 + 773)


def test_a_clock_that_goes_backwards_gives_no_negative_time() -> None:
    clock = Clock()
    cache = pt.PrefixCache(8, 2, clock=clock)
    with cache.open([1, 2]) as first:
        first.commit(2)
    clock.turn(-5)
    cache.open([1, 2]).close()
    clock.turn(-5)
    cache.clear()
    stats = cache.stats()
    for name in ("reuse_gaps", "idle_times", "block_lifetimes"):
        assert getattr(stats, name).observed == 1
        assert getattr(stats, name).total == 0


def test_joins_are_counted() -> None:
    cache = pt.PrefixCache(16, 2)
    one, two = cache.open([1, 2, 3]), cache.open([1, 2, 3, 4])
    assert cache.stats().prefilling_sequences == 2
    cache.commit([one])
    assert (cache.stats().joins, cache.stats().prefilling_sequences) == (0, 1)
    cache.commit([two])
    stats = cache.stats()
    assert (stats.joins, stats.joined_tokens, stats.prefilling_sequences) == (1, 3, 0)
    two.preempt()
    two.resume()
    assert cache.stats().resumes == 1


@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40))
def test_a_delta_is_what_happened_between(seed: int, before: int, between: int) -> None:
    run = Grown(seed, before, 2)
    earlier = run.cache.stats()
    run.chance = Random(seed + 1)
    for _ in range(between):
        try:
            run.step()
        except pt.OutOfBlocks:
            run.cache.clear()
    later = run.cache.stats()
    delta = later.delta(earlier)
    for name in later._fields:
        value = getattr(delta, name)
        if name in COUNTERS:
            assert value == getattr(later, name) - getattr(earlier, name) >= 0
        elif name in HISTOGRAMS:
            past, now = getattr(earlier, name), getattr(later, name)
            assert [a + b for a, b in zip(past.counts, value.counts, strict=True)] == [*now.counts]
            assert past.total + value.total == pytest.approx(now.total)
        elif name == "evictions":
            sums: Counter[tuple[str, str, str]] = Counter()
            for some in (*value, *earlier.evictions):
                for part in ("nodes", "trimmed", "tokens", "blocks"):
                    sums[some.policy, some.reason, part] += getattr(some, part)
            assert +sums == +Counter(
                {
                    (some.policy, some.reason, part): getattr(some, part)
                    for some in later.evictions
                    for part in ("nodes", "trimmed", "tokens", "blocks")
                }
            )
            assert all(any(some[2:]) for some in value)
        else:
            assert value == getattr(later, name)
    if later != earlier and any(getattr(delta, name) for name in COUNTERS):
        with pytest.raises(InvalidArgument, match=r"expected at most|same cache"):
            earlier.delta(later)


def test_statistics_are_plain_values_on_request_and_immutable() -> None:
    cache = Grown(7, 60, 4).cache
    cache.evict(2)
    stats = cache.stats()
    values = stats.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values.keys() == {*stats._fields, *DERIVED}
    assert values["hit_rate"] == stats.hit_rate
    assert values["evictions"][0]["reason"] == stats.evictions[0].reason
    assert values["match_lengths"]["total"] == stats.hit_tokens
    with pytest.raises(AttributeError):
        stats.opens = 0  # type: ignore[misc]
    assert stats.saved_bytes(8) == 8 * stats.shared_tokens
    with pytest.raises(InvalidArgument, match="bytes_per_token"):
        stats.saved_bytes(0)


def test_what_attention_reads_is_that_of_the_last_forest() -> None:
    cache = pt.PrefixCache(20, 4)
    first = cache.open([1, 2, 3, 4, 5])
    first.commit(5)
    second = cache.open([1, 2, 3, 9])
    second.commit(4)
    assert cache.stats().saved_attention_bytes(8) == 0
    cache.forest([first, second])
    stats = cache.stats()
    assert (stats.attended_tokens, stats.attended_logical_tokens) == (3 + 2 + 1, 5 + 4)
    assert stats.saved_attention_bytes(8) == 8 * 3
    with pytest.raises(InvalidArgument, match="bytes_per_token"):
        stats.saved_attention_bytes(0)
    with pytest.raises(pt.InvalidLength):
        cache.forest([first], [6])
    assert cache.stats() == stats
    cache.append([first], [6])
    cache.forest([first], [6])
    again = cache.stats().delta(stats)  # a state, no count
    assert (again.attended_tokens, again.attended_logical_tokens) == (6, 6)


@given(st.lists(st.integers(0, 2**22)))
def test_histograms_count_between_bounds(values: list[int]) -> None:
    one_by_one = Observations(POWERS)
    for value in values:
        one_by_one.histogram()
        one_by_one.add(value)
    found = one_by_one.histogram()
    assert found == Histogram.of(np.array(values, int), POWERS)
    expected = [sum(value <= bound for value in values) for bound in POWERS]
    assert found.cumulative() == [*expected, len(values)]
    assert found.observed == len(values)
    assert found.mean == (np.mean(values) if values else 0)


@given(grown)
def test_a_summary_is_of_each_node(run: Grown) -> None:
    view = run.cache.tree()
    summary = view.summary()
    nodes = list(view)
    for name, values in {
        "depth": [node.depth for node in nodes],
        "fan_out": [len(node.children) for node in nodes],
        "length": [len(node.tokens) for node in nodes],
        "age": view.age.tolist(),
        "idle": view.idle[view.pins == 0].tolist(),
    }.items():
        found = getattr(summary, name)
        assert (found.observed, found.total) == (len(values), sum(values)), name
        assert found == Histogram.of(np.array(values, int), POWERS)
