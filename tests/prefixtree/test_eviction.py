"""What goes first when memory runs out, and what never goes."""

import pytest

import prefixtree as pt
from allocator import LRU, OutOfBlocks, Usage


def cached(cache: pt.PrefixCache, tokens: list[int]) -> None:
    """Leaves these tokens in the cache, committed and held by nobody."""
    with cache.open(tokens) as sequence:
        sequence.commit(len(tokens))


def whole(cache: pt.PrefixCache, *paths: list[int]) -> list[bool]:
    return [cache.match(path).cached == len(path) for path in paths]


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = pt.PrefixCache(8, 4)
    a, b, c = [1, 1, 1], [2, 2, 2], [3, 3, 3]
    for path in (a, b, c):
        cached(cache, path)
    cache.open(a).close()
    gone = []
    while cache.stats().cached_tokens:
        assert cache.evict(1).blocks == 1
        gone.append(whole(cache, a, b, c))
    assert gone == [[True, False, True], [True, False, False], [False, False, False]]


def test_a_parent_goes_after_its_children() -> None:
    cache = pt.PrefixCache(8, 2)
    cached(cache, [1, 2])
    cached(cache, [1, 2, 3, 4])
    cached(cache, [1, 2, 5, 6])
    cached(cache, [7, 7])
    order = []
    while cache.stats().cached_tokens:
        assert cache.evict(1).blocks == 1
        order.append(whole(cache, [1, 2], [1, 2, 3, 4], [1, 2, 5, 6], [7, 7]))
    # [1, 2] is as recent as its last child, so it goes right after that one.
    assert order == [
        [True, False, True, True],
        [True, False, False, True],
        [False, False, False, True],
        [False, False, False, False],
    ]


def test_the_half_of_a_split_that_was_not_matched_keeps_its_age() -> None:
    cache = pt.PrefixCache(8, 2)
    cached(cache, [1, 2, 3, 4])
    cached(cache, [5, 6])
    cache.open([1, 2]).close()
    cache.evict(1)
    assert whole(cache, [1, 2], [1, 2, 3], [5, 6]) == [True, False, True]


def test_evict_returns_what_came_free_and_stops_when_it_is_enough() -> None:
    cache = pt.PrefixCache(16, 2)
    for token in range(5):
        cached(cache, [token] * 4)
    assert cache.stats().free_blocks == 6
    assert cache.evict(0).blocks == 0
    assert cache.stats().cached_tokens == 20
    assert cache.evict(3) == pt.Evicted(blocks=3, tokens=6, nodes=1, trimmed=1)
    assert cache.stats().free_blocks == 9
    assert cache.stats().cached_tokens == 14
    assert cache.evict(100).blocks == 7
    assert cache.stats().free_blocks == 16
    assert cache.evict(1).blocks == 0


def test_only_the_tail_of_the_last_leaf_goes() -> None:
    cache = pt.PrefixCache(8, 2)
    cached(cache, [1, 2, 3, 4, 5])
    assert cache.evict(1) == pt.Evicted(blocks=1, tokens=1, nodes=0, trimmed=1)
    assert cache.match([1, 2, 3, 4, 5]).cached == 4
    assert cache.evict(1) == pt.Evicted(blocks=1, tokens=2, nodes=0, trimmed=1)
    assert cache.match([1, 2, 3, 4, 5]).cached == 2
    cached(cache, [1, 2, 3, 4, 6])  # goes on where the rest was cut off
    assert cache.match([1, 2, 3, 4, 5]).cached == 4
    assert cache.stats().trimmed_nodes == 2
    cache.check()


def test_the_part_in_a_block_that_stays_anyway_stays() -> None:
    """All blocks of its own are asked for, but the first tokens are on one of its parent's."""
    cache = pt.PrefixCache(8, 4)
    cached(cache, list(range(10)))
    cache.open([0, 1]).close()
    assert cache.evict(2) == pt.Evicted(blocks=2, tokens=6, nodes=0, trimmed=1)
    assert cache.match(list(range(10))).cached == 4
    cache.check()


def test_a_long_leaf_is_eaten_from_its_end() -> None:
    cache = pt.PrefixCache(1000, 4)
    tokens = list(range(4000))
    cached(cache, tokens)
    for round in range(1, 1000):
        assert cache.evict(1).blocks == 1
        if round % 100 == 0:
            assert cache.match(tokens).cached == 4000 - 4 * round
            cache.check()


def test_the_latest_evictions_say_why() -> None:
    cache = pt.PrefixCache(4, 2, clock=lambda: 7.0)
    cached(cache, [1, 2, 3, 4])
    cached(cache, [5, 6])
    cache.open([7] * 4).close()
    cached(cache, [8] * 2)
    cache.clear()
    cached(cache, [9, 9])
    cache.forget()
    assert cache.evictions() == [
        pt.Eviction(start=0, tokens=2, whole=True, reason="forget", policy="", at=7.0),
        pt.Eviction(start=0, tokens=2, whole=True, reason="clear", policy="lru", at=7.0),
        pt.Eviction(start=0, tokens=2, whole=True, reason="clear", policy="lru", at=7.0),
        pt.Eviction(start=0, tokens=2, whole=True, reason="clear", policy="lru", at=7.0),
        pt.Eviction(start=2, tokens=2, whole=False, reason="open", policy="lru", at=7.0),
    ]


def test_evict_goes_on_over_leaves_that_free_no_block() -> None:
    cache = pt.PrefixCache(4, 8)
    cached(cache, [1, 2, 3, 4, 5, 6])
    for length in (5, 4, 3, 2, 1):
        cache.open([1, 2, 3, 4, 5, 6][:length]).close()
    assert cache.stats().evictable_blocks == 1
    assert cache.evict(1).blocks == 1
    assert cache.stats().cached_tokens == 0
    cache.check()


def test_a_block_shared_with_a_pinned_half_stays() -> None:
    cache = pt.PrefixCache(4, 8)
    cached(cache, [1, 2, 3, 4, 5, 6])
    with cache.open([1, 2, 3]):
        stats = cache.stats()
        assert (stats.evictable_tokens, stats.evictable_blocks) == (3, 0)
        assert cache.evict(1).blocks == 0
        assert whole(cache, [1, 2, 3], [1, 2, 3, 4]) == [True, False]
    assert cache.stats().evictable_blocks == 1


def test_what_a_sequence_uses_stays() -> None:
    cache = pt.PrefixCache(8, 2)
    sequence = cache.open([1, 2, 3, 4])
    sequence.commit(4)
    cached(cache, [1, 2, 3, 4, 5, 6])
    cached(cache, [1, 2, 7, 8])
    assert cache.clear().blocks == 2
    assert whole(cache, [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 7]) == [True, False, False]
    sequence.close()
    assert cache.clear().blocks == 2
    assert cache.stats().free_blocks == 8


def test_clear_of_an_idle_cache_frees_every_block() -> None:
    cache = pt.PrefixCache(16, 3)
    for length in range(1, 11):
        cached(cache, [length % 3] * length)
    used = 16 - cache.stats().free_blocks
    assert cache.clear().blocks == used
    stats = cache.stats()
    assert (stats.free_blocks, stats.cached_tokens, stats.nodes) == (16, 0, 0)
    assert cache.clear().blocks == 0
    cache.check()


def test_opening_evicts_what_it_must_and_no_more() -> None:
    cache = pt.PrefixCache(4, 2)
    a, b, c, d = [1, 1], [2, 2], [3, 3], [4, 4]
    for path in (a, b, c, d):
        cached(cache, path)
    sequence = cache.open([5, 5, 5])
    assert whole(cache, a, b, c, d) == [False, False, True, True]
    sequence.close()
    assert cache.stats().free_blocks == 2
    cache.open([6, 6, 6]).close()
    assert whole(cache, c, d) == [True, True]


def test_opening_does_not_evict_what_it_matched() -> None:
    cache = pt.PrefixCache(4, 2)
    old, new = [1, 1, 1, 1], [2, 2, 2, 2]
    cached(cache, old)
    cached(cache, new)
    sequence = cache.open([1, 1, 1, 1, 9, 9])
    assert sequence.cached_len == 4
    assert whole(cache, old) == [True]
    sequence.commit(6)
    assert whole(cache, [1, 1, 1, 1, 9, 9]) == [True]


def test_appending_evicts_what_it_must() -> None:
    cache = pt.PrefixCache(4, 2)
    a, b = [1, 1], [2, 2]
    cached(cache, a)
    cached(cache, b)
    batch = [cache.open([3, 3]), cache.open([4, 4])]
    cache.commit(batch)
    cache.append(batch, [5, 5, 5], [3, 0])
    assert whole(cache, a, b) == [False, False]
    assert cache.stats().free_blocks == 0
    cache.check()


def test_a_prompt_that_does_not_fit_changes_nothing() -> None:
    cache = pt.PrefixCache(4, 2)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    cached(cache, [4, 4])
    before = cache.stats(), str(cache.tree())
    with pytest.raises(OutOfBlocks) as caught:
        cache.open([4, 4, *range(10, 16)])
    # [4, 4] is matched, so its block is no candidate.
    error = caught.value
    assert (error.needed, error.free, error.evictable) == (3, 1, 0)
    with pytest.raises(OutOfBlocks) as caught:
        cache.open(list(range(10, 16)))
    error = caught.value
    assert (error.needed, error.free, error.evictable) == (3, 1, 1)
    assert (cache.stats(), str(cache.tree())) == before
    assert whole(cache, [1, 2, 3], [4, 4]) == [True, True]
    cache.check()


def test_a_batch_that_does_not_fit_gets_nothing() -> None:
    cache = pt.PrefixCache(4, 2)
    batch = [cache.open([token, token]) for token in (1, 2, 3)]
    cache.commit(batch)
    before = cache.stats(), str(cache.tree())
    with pytest.raises(OutOfBlocks) as caught:
        cache.append(batch, [7, 8, 9])
    error = caught.value
    assert (error.needed, error.free, error.evictable) == (3, 1, 0)
    assert (cache.stats(), str(cache.tree())) == before
    assert [len(sequence) for sequence in batch] == [2, 2, 2]
    assert cache.append([batch[2]], [9]).shape == (1,)
    cache.check()


def test_a_cache_that_is_full_of_evictable_leaves_takes_anything() -> None:
    cache = pt.PrefixCache(16, 4)
    for start in range(0, 2000, 40):
        cached(cache, list(range(start, start + 40)))
    cache.check()
    assert cache.stats().open_sequences == 0
    with cache.open(list(range(5000, 5064))) as sequence:
        assert len(sequence) == 64
        assert cache.stats().free_blocks == 0


def test_evicted_tokens_are_counted() -> None:
    cache = pt.PrefixCache(8, 2)
    cached(cache, [1, 2, 3])
    cached(cache, [1, 2, 4])
    cache.clear()
    stats = cache.stats()
    assert (stats.evicted_tokens, stats.evicted_nodes) == (4, 3)


def test_a_policy_of_ones_own_decides() -> None:
    class Longest:
        name = "longest"

        def key(self, usage: Usage) -> int:
            return -usage.tokens

    cache = pt.PrefixCache(16, 1, eviction=Longest())
    for path in ([1], [2, 2, 2], [3, 3]):
        cached(cache, path)
    cache.evict(1)
    assert whole(cache, [1], [2, 2], [2, 2, 2], [3, 3]) == [True, True, False, True]
    cache.evict(2)  # [2, 2] and [3, 3] are as long now: the first made goes first
    assert whole(cache, [1], [2], [3, 3]) == [True, False, True]


def test_a_policy_sees_uses_lengths_and_positions() -> None:
    seen: list[Usage] = []

    class Watching(LRU):
        def key(self, usage: Usage) -> int | float:
            seen.append(usage)
            return super().key(usage)

    cache = pt.PrefixCache(16, 2, eviction=Watching())
    cached(cache, [1, 2, 3, 4, 5])
    assert (0, 5) in {(usage.start, usage.tokens) for usage in seen}
    seen.clear()
    cached(cache, [1, 2, 6])
    assert (2, 1) in {(usage.start, usage.tokens) for usage in seen}
    uses = max(usage.uses for usage in seen)
    for _ in range(3):
        cache.open([1, 2, 6]).close()
    assert max(usage.uses for usage in seen) > uses


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="lru"):
        pt.PrefixCache(4, 2, eviction="random")
