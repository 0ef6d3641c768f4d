"""Large trees and batches: the answers stay right. Nothing here looks at a clock."""

import numpy as np

import prefixtree as pt


def test_a_hundred_thousand_nodes() -> None:
    """A root of 100, below each 1,000 leaves of two tokens."""
    cache = pt.PrefixCache(100_000 + 1_000, 4)
    for root in range(100):
        for leaf in range(1_000):
            with cache.open([root, root, 1_000 + leaf, leaf]) as sequence:
                sequence.commit(4)
    stats = cache.stats()
    assert stats.nodes == 100 + 100_000
    assert stats.cached_tokens == 200 + 200_000
    assert stats.open_sequences == 0
    assert stats.pinned_tokens == 0
    assert cache.match([7, 7, 1_005, 5, 3]).cached == 4
    assert cache.match([7, 7, 1_005, 6]).cached == 3
    assert cache.match([7, 7, 2_005]).cached == 2
    cache.check()

    assert cache.evict(25_000).blocks == 25_000
    assert cache.match([99, 99, 1_999, 999]).cached == 4
    assert cache.match([0, 0, 1_000, 0]).cached == 0
    assert cache.clear().blocks + stats.free_blocks + 25_000 == 101_000
    assert cache.stats().free_blocks == 101_000


def test_a_thousand_sequences_for_two_hundred_steps() -> None:
    """Eight groups share prompts; a token is the sequence's own, so nothing merges later."""
    count, steps, block_size = 1_000, 200, 16
    cache = pt.PrefixCache(30_000, block_size)
    prompts = [[group] * 100 + [1_000 + index] for index, group in enumerate(range(8))]
    sequences = [cache.open(prompts[index % 8]) for index in range(8)]
    cache.commit(sequences)
    sequences += [cache.open(prompts[index % 8]) for index in range(8, count)]
    assert all(sequence.cached_len == 101 for sequence in sequences[8:])

    batch = cache.batch(sequences)
    kv = np.full(30_000 * block_size, -1)
    own = np.arange(count, dtype=np.int32)
    for step in range(steps):
        slots = cache.append(batch, own + 10_000 * (step + 1))
        assert len(np.unique(slots)) == count
        assert (kv[slots] == -1).all()
        kv[slots] = own + 10_000 * (step + 1)
        cache.commit(batch)
    stats = cache.stats()
    assert stats.cached_tokens == stats.pinned_tokens == 8 * 101 + count * steps
    assert stats.logical_tokens == count * (101 + steps)
    assert stats.nodes == 8 + count
    for index in (0, 1, 500, 999):
        slots = sequences[index].slots(101, 301)
        assert kv[slots].tolist() == [index + 10_000 * (step + 1) for step in range(steps)]
        assert cache.match(sequences[index].tokens()).cached == 301
    cache.check()
    for sequence in sequences:
        sequence.close()
    assert cache.clear().blocks == 30_000 - stats.free_blocks
    assert cache.stats().free_blocks == 30_000


def test_a_long_prompt_in_chunks() -> None:
    cache = pt.PrefixCache(40_000, 4)
    prompt = np.arange(131_072, dtype=np.int32)
    sequence = cache.open(prompt)
    for stop in range(2_048, len(prompt) + 1, 2_048):
        sequence.commit(stop)
        assert cache.match(prompt) == pt.Match(cached=stop, pending=len(prompt) - stop)
    assert cache.stats().cached_tokens == 131_072
    cache.check()


def test_a_deep_chain_of_splits() -> None:
    """A path of 2,000 nodes: every prefix was opened once."""
    cache = pt.PrefixCache(3_000, 1)
    prompt = list(range(2_000))
    with cache.open(prompt) as sequence:
        sequence.commit(2_000)
    for length in range(1, 2_000):
        cache.open(prompt[:length]).close()
    assert cache.match(prompt).cached == 2_000
    with cache.open([*prompt, 5]) as sequence:
        assert sequence.cached_len == 2_000
        sequence.commit(2_001)
        assert len(np.unique(sequence.slots(0, 2_001))) == 2_001
    cache.check()
    assert cache.clear().blocks == 2_001
