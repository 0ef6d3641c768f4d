"""The forest of a batch, held against the slots and tokens of its sequences."""

import random

import numpy as np

import prefixtree as pt

from .observe import ancestry, check_forest, node_slots


def opened(cache: pt.PrefixCache, *prompts: list[int]) -> list[pt.Sequence]:
    batch = []
    for prompt in prompts:
        sequence = cache.open(prompt)
        sequence.commit(len(prompt))
        batch.append(sequence)
    return batch


def test_one_sequence_is_a_chain() -> None:
    cache = pt.PrefixCache(8, 4)
    (sequence,) = opened(cache, [1, 2, 3, 4, 5, 6])
    forest = cache.forest([sequence])
    assert forest.block_size == 4
    check_forest(forest, [sequence])


def test_shared_tokens_stand_in_shared_nodes() -> None:
    cache = pt.PrefixCache(16, 4)
    batch = opened(cache, [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [1, 2, 3, 9, 9, 8])
    forest = cache.forest(batch)
    check_forest(forest, batch)
    chains = [ancestry(forest, leaf) for leaf in forest.leaf]
    assert chains[0][0] == chains[1][0] == chains[2][0]
    assert chains[1] == chains[2][: len(chains[1])]
    assert sum(forest.length.tolist()) == 3 + 3 + 2 + 1


def test_two_sequences_on_one_node_have_the_same_leaf() -> None:
    cache = pt.PrefixCache(8, 4)
    (sequence,) = opened(cache, [1, 2, 3])
    batch = [sequence, *sequence.fork(3)]
    forest = cache.forest(batch)
    check_forest(forest, batch)
    assert len(set(forest.leaf.tolist())) == 1
    assert len(forest.parent) == 1


def test_a_batch_without_a_common_prefix_has_several_roots() -> None:
    cache = pt.PrefixCache(16, 2)
    batch = opened(cache, [1, 2, 3], [4], [5, 6], [5, 7])
    forest = cache.forest(batch)
    check_forest(forest, batch)
    assert (forest.parent == -1).sum() == 3


def test_only_the_nodes_of_the_batch_are_in_its_forest() -> None:
    cache = pt.PrefixCache(32, 2)
    batch = opened(cache, [1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 7], [8, 8])
    for chosen in ([0], [1, 0], [3], [2, 3], [3, 2, 1, 0]):
        some = [batch[index] for index in chosen]
        check_forest(cache.forest(some), some)


def test_uncommitted_tokens_are_a_part_of_the_forest() -> None:
    cache = pt.PrefixCache(32, 4)
    first, second = opened(cache, [1, 2, 3], [1, 2, 3])
    cache.append([first, second], [4, 5, 6, 7, 8], [2, 3])
    forest = cache.forest([first, second], query_lens=[2, 3])
    check_forest(forest, [first, second], query_lens=[2, 3])
    assert sum(forest.length.tolist()) == 3 + 2 + 3
    assert forest.leaf[0] != forest.leaf[1]


def test_a_prompt_in_chunks() -> None:
    cache = pt.PrefixCache(32, 4)
    prompt = list(range(23))
    (other,) = opened(cache, prompt[:6])
    sequence = cache.open(prompt)
    assert sequence.cached_len == 6
    for stop in (11, 12, 20, 23):
        queries = stop - sequence.committed
        forest = cache.forest([sequence, other], [stop, 6], [queries, 1])
        check_forest(forest, [sequence, other], [stop, 6], [queries, 1])
        sequence.commit(stop)


def test_an_empty_tail_adds_no_node() -> None:
    cache = pt.PrefixCache(16, 4)
    (sequence,) = opened(cache, [1, 2, 3, 4, 5])
    cache.append([sequence], [6])
    forest = cache.forest([sequence], [5], [1])
    check_forest(forest, [sequence], [5], [1])
    assert sum(forest.length.tolist()) == 5


def test_tails_of_a_ragged_batch() -> None:
    cache = pt.PrefixCache(64, 4)
    batch = opened(cache, [1, 2, 3], [1, 2, 3, 4, 5], [9], [1, 2, 3])
    counts = [0, 5, 1, 9]
    cache.append(batch, list(range(100, 115)), counts)
    query_lens = [max(1, count) for count in counts]
    check_forest(cache.forest(batch, query_lens=query_lens), batch, query_lens=query_lens)
    kv_lens = [3, 7, 1, 4]
    query_lens = [3, 2, 1, 1]
    check_forest(
        cache.forest(batch, kv_lens, query_lens), batch, kv_lens=kv_lens, query_lens=query_lens
    )


def test_queries_may_reach_back_over_several_nodes() -> None:
    cache = pt.PrefixCache(32, 2)
    batch = opened(cache, [1, 2], [1, 2, 3, 4], [1, 2, 3, 5])
    forest = cache.forest(batch, query_lens=[2, 4, 3])
    check_forest(forest, batch, query_lens=[2, 4, 3])


def test_a_forest_of_nothing() -> None:
    cache = pt.PrefixCache(4, 2)
    forest = cache.forest([])
    check_forest(forest, [])
    assert len(forest.parent) == 0


def test_a_forest_does_not_change_when_the_cache_goes_on() -> None:
    cache = pt.PrefixCache(32, 2)
    batch = opened(cache, [1, 2, 3], [1, 2, 4])
    forest = cache.forest(batch)
    before = [node_slots(forest, node) for node in range(len(forest.parent))]
    for _ in range(5):
        cache.append(batch, [5, 6])
        cache.commit(batch)
    opened(cache, [1])
    batch[0].close()
    cache.clear()
    assert [node_slots(forest, node) for node in range(len(forest.parent))] == before


def test_a_forest_carries_the_tokens_of_every_path() -> None:
    """Written by slot and read back through nodes, every sequence finds its own tokens."""
    rng = random.Random(5)
    for block_size in (1, 3, 4):
        cache = pt.PrefixCache(2000, block_size)
        kv = np.full(2000 * block_size, -1)
        batch: list[pt.Sequence] = []
        for _ in range(60):
            base = rng.choice(batch).tokens().tolist() if batch and rng.random() < 0.8 else []
            prompt = [*base[: rng.randint(0, len(base))]]
            prompt += [rng.randint(0, 2) for _ in range(rng.randint(1, 12))]
            sequence = cache.open(prompt)
            kv[sequence.slots(sequence.cached_len, len(prompt))] = prompt[sequence.cached_len :]
            sequence.commit(len(prompt))
            batch.append(sequence)
        for step in range(8):
            counts = [rng.randint(0, 3) for _ in batch]
            tokens = [rng.randint(0, 2) for _ in range(sum(counts))]
            kv[cache.append(batch, tokens, counts)] = tokens
            forest = cache.forest(batch, query_lens=[max(1, count) for count in counts])
            check_forest(forest, batch, query_lens=[max(1, count) for count in counts])
            for leaf, sequence in zip(forest.leaf, batch, strict=True):
                slots = [
                    slot for node in ancestry(forest, leaf) for slot in node_slots(forest, node)
                ]
                assert kv[slots].tolist() == sequence.tokens().tolist()
            if step % 3 != 2:
                cache.commit(batch)
            else:
                for sequence in batch:
                    sequence.commit(rng.randint(sequence.committed, len(sequence)))
                    sequence.rollback(len(sequence) - sequence.committed)
        cache.check()
