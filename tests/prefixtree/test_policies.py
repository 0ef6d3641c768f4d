"""What each policy keeps of the same history, and what goes first."""

import pytest

from allocator import Cost
from prefixtree import PrefixCache

A, B, C, D = [1, 1], [2, 2], [3, 3], [4, 4]


def use(cache: PrefixCache, tokens: list[int]) -> None:
    with cache.open(tokens) as sequence:
        sequence.commit(len(tokens))


def order_of_eviction(cache: PrefixCache, paths: list[list[int]]) -> list[list[int]]:
    gone: list[list[int]] = []
    while len(gone) < len(paths):
        assert cache.evict(1).blocks == 1
        gone += [path for path in paths if path not in gone and not cache.match(path).cached]
    return gone


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("lru", [C, D, B, A]),
        ("mru", [A, B, D, C]),
        ("fifo", [A, B, C, D]),
        ("lfu", [C, D, A, B]),
        ("slru", [C, D, B, A]),
        ("priority", [C, D, B, A]),
        ("cost", [C, D, A, B]),
    ],
)
def test_the_order_of_each_policy(policy: str, expected: list[list[int]]) -> None:
    cache = PrefixCache(8, 2, eviction=policy)
    for path in (A, B, C, D, B, B, A):
        use(cache, path)
    assert order_of_eviction(cache, [A, B, C, D]) == expected
    cache.check()


def test_slru_keeps_what_is_hot_through_a_burst_that_lru_does_not_survive() -> None:
    kept = {}
    for policy in ("lru", "slru"):
        cache = PrefixCache(4, 2, eviction=policy)
        use(cache, A)
        use(cache, A)
        for token in range(10, 30):
            use(cache, [token, token])
        kept[policy] = cache.match(A).cached
    assert kept == {"lru": 0, "slru": 2}


def test_cost_keeps_what_is_dear_to_compute_again_and_lets_it_age() -> None:
    cache = PrefixCache(8, 2, eviction=Cost(1.0, 1.0))
    deep = [9, 1, 2, 3, 4, 5]
    use(cache, deep[:4])
    use(cache, deep)
    for token in range(10, 20):
        use(cache, [token, token])
    assert cache.match(deep).cached == 6
    for token in range(20, 60):
        use(cache, [token, token])
    assert cache.match(deep).cached == 0


def test_cost_reads_its_clock_at_the_last_use_and_not_when_a_node_becomes_a_leaf() -> None:
    cache = PrefixCache(8, 1, eviction=Cost(1.0, 0.0))
    use(cache, [1])
    use(cache, [1, 2])
    assert cache.evict(1).blocks == 1  # [1, 2]: the clock is 1, and [1] has the key 0 + 2 uses
    use(cache, [5])  # 1 + 1
    assert cache.evict(1).blocks == 1
    assert (cache.match([1]).cached, cache.match([5]).cached) == (0, 1)


def test_a_node_split_off_keeps_the_clock_of_its_last_use() -> None:
    cache = PrefixCache(8, 1, eviction=Cost(1.0, 0.0))
    for _ in range(3):
        use(cache, [5])  # 0 + 3
    for token in (6, 7):  # 0 + 1, then 1 + 1
        use(cache, [token])
        cache.evict(1)
        assert cache.match([token]).cached == 0
    use(cache, [1, 2, 3, 4])
    use(cache, [1, 2, 3, 4])  # 2 + 2
    cache.forget([1, 2])
    cache.evict(1)
    assert (cache.match([1, 2]).cached, cache.match([5]).cached) == (2, 0)


def test_a_node_split_off_keeps_its_age() -> None:
    cache = PrefixCache(8, 1, eviction="fifo")
    use(cache, [1, 2, 3])
    use(cache, [9])
    use(cache, [1, 2, 4])  # splits the first path behind its second token
    assert cache.evict(1).blocks == 1
    assert cache.match([1, 2, 3]).cached == 2
    assert cache.match([9]).cached == 1


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'lru', 'mru', 'fifo', 'lfu', 'slru', 'cost', 'priority'"):
        PrefixCache(4, 2, eviction="random")
