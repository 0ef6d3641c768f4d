"""What the cache says of a miss."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import prefixtree as pt
from prefixtree import evictions

from .test_eviction import cached


def test_nothing_is_missing() -> None:
    cache = pt.PrefixCache(8, 2)
    cached(cache, [1, 2, 3])
    found = cache.explain([1, 2, 3])
    assert (found.cached, found.why) == (3, pt.Why.COMPLETE)
    assert str(found) == "3 of 3 tokens cached"


def test_never_seen() -> None:
    cache = pt.PrefixCache(8, 2)
    assert cache.explain([1]).why is pt.Why.NEVER_SEEN
    cached(cache, [1, 2, 3])
    found = cache.explain([1, 2, 4, 5])
    assert (found.cached, found.why, found.eviction) == (2, pt.Why.NEVER_SEEN, None)
    assert "2 of 4" in str(found)
    assert "never seen" in str(found)


def test_evicted_whole_or_in_part_when_and_by_whom() -> None:
    now = [10.0]
    cache = pt.PrefixCache(4, 2, eviction="fifo", clock=lambda: now[0])
    cached(cache, [1, 2, 3, 4])
    now[0] = 20.0
    assert cache.evict(1).blocks == 1
    now[0] = 30.0
    found = cache.explain([1, 2, 3, 4, 5])
    assert (found.cached, found.why) == (2, pt.Why.EVICTED)
    assert found.eviction == pt.Eviction(2, 2, False, "evict", "fifo", 20.0)
    assert "2 tokens were evicted by policy 'fifo', reason: evict" in str(found)
    assert cache.explain([1, 2, 9]).why is pt.Why.NEVER_SEEN
    with cache.open([7] * 8):
        found = cache.explain([1, 2, 3])
        assert found.eviction == pt.Eviction(0, 2, True, "open", "fifo", 30.0)


def test_an_eviction_is_known_again_after_its_parent_was_split() -> None:
    cache = pt.PrefixCache(8, 1)
    cached(cache, [1, 2, 3])
    with cache.open([1, 2, 3]):
        cached(cache, [1, 2, 3, 4])
        assert cache.clear().tokens == 1
        cached(cache, [1, 9])  # splits what the evicted token hung behind
        assert cache.explain([1, 2, 3, 4]).why is pt.Why.EVICTED


def test_what_is_back_is_not_missing() -> None:
    cache = pt.PrefixCache(8, 1)
    cached(cache, [1, 2, 3])
    cache.clear()
    cached(cache, [1, 2, 3])
    assert cache.explain([1, 2, 3, 4]).why is pt.Why.NEVER_SEEN


def test_a_number_that_went_to_another_node_says_nothing() -> None:
    cache = pt.PrefixCache(8, 1)
    cached(cache, [1, 2])
    with cache.open([1]):
        cache.clear()
    cache.clear()
    cached(cache, [5])
    assert cache.explain([5, 2]).why is pt.Why.NEVER_SEEN


def test_of_a_place_that_lost_its_tokens_twice_the_last_time_counts() -> None:
    now = [1.0]
    cache = pt.PrefixCache(8, 1, clock=lambda: now[0])
    cached(cache, [1, 2])
    cache.clear()
    now[0] = 2.0
    cached(cache, [1, 2])
    cache.forget([1])
    assert [gone.reason for gone in cache.evictions()] == ["forget", "clear"]
    assert cache.explain([1, 2]).eviction == pt.Eviction(1, 1, True, "forget", "", 2.0)


steps = st.tuples(st.integers(1, 9), st.sampled_from(["clear", "forget", "ask"]))


@given(st.lists(steps, max_size=60))
@example(  # so many forgotten ones in the index that it is made anew; 6 is the oldest that is not
    [(token, step) for token in range(1, 10) for step in ("clear", "ask")[: 1 + (token in (4, 6))]]
    + [(6, "ask"), (5, "ask")]
)
def test_the_latest_are_remembered(steps: list[tuple[int, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evictions, "REMEMBERED", 4)
        cache = pt.PrefixCache(8, 1)
        gone: list[tuple[int, str]] = []
        for token, step in steps:
            if step == "ask":
                latest = dict(gone[-4:]).get(token)
                found = cache.explain([token]).eviction
                assert (found.reason if found else None) == latest
            else:
                cached(cache, [token])
                cache.clear() if step == "clear" else cache.forget()
                gone.append((token, step))
            assert [past.reason for past in cache.evictions()] == [
                reason for _, reason in reversed(gone[-4:])
            ]


def test_forgotten() -> None:
    cache = pt.PrefixCache(8, 1)
    cached(cache, [1, 2])
    cache.forget([1])
    found = cache.explain([1, 2])
    assert found.eviction is not None
    assert (found.cached, found.eviction.reason, found.eviction.policy) == (1, "forget", "")


def test_other_namespaces_have_more() -> None:
    cache = pt.PrefixCache(16, 1)
    cached(cache, [1])
    for name, length in (("a", 2), ("b", 3), ("c", 1)):
        with cache.open([1, 2, 3][:length], namespace=name) as sequence:
            sequence.commit(length)
    found = cache.explain([1, 2, 3, 4])
    assert (found.cached, found.why) == (1, pt.Why.OTHER_NAMESPACE)
    assert found.elsewhere == (("b", 3), ("a", 2))
    assert "namespace 'b' has 3" in str(found)
    assert cache.explain([1, 2], namespace="nobody").elsewhere[0][1] == 2


def test_pending() -> None:
    cache = pt.PrefixCache(8, 1)
    with cache.open([1, 2, 3]):
        found = cache.explain([1, 2, 4])
        assert (found.cached, found.pending, found.why) == (0, 2, pt.Why.PENDING)
        assert "2 more pending" in str(found)


def test_asking_changes_nothing() -> None:
    cache = pt.PrefixCache(8, 1)
    cached(cache, [1])
    cached(cache, [2])
    before = cache.stats()
    cache.explain([1, 5])
    assert cache.stats() == before
    cache.evict(1)
    assert cache.match([2]).cached == 1
