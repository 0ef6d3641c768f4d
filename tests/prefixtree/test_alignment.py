"""Whole blocks only: for engines whose kernels read plain block tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import prefixtree as pt
from allocator import InvalidArgument


def make(num_blocks: int = 16, **options: Any) -> pt.PrefixCache:
    return pt.PrefixCache(num_blocks, 4, align="block", **options)


def cached(cache: pt.PrefixCache, tokens: list[int]) -> None:
    with cache.open(tokens) as sequence:
        sequence.commit(len(tokens))


def test_matches_are_rounded_down_to_blocks() -> None:
    cache = make()
    cached(cache, list(range(10)))
    assert cache.stats().cached_tokens == 8
    for length, found in ((3, 0), (4, 4), (7, 4), (8, 8), (10, 8)):
        assert cache.match(list(range(length))).cached == found
    assert cache.match([0, 1, 2, 3, 4, 9, 9, 9]).cached == 4
    cache.check()


def test_blocks_that_begin_alike_are_told_apart() -> None:
    cache = make()
    cached(cache, [1, 2, 3, 4])
    cached(cache, [1, 2, 3, 5])
    assert cache.match([1, 2, 3, 4]).cached == cache.match([1, 2, 3, 5]).cached == 4
    assert cache.stats().nodes == 2
    cache.check()


def test_a_block_table_is_plain() -> None:
    cache = make()
    cached(cache, list(range(8)))
    with cache.open([*range(8), 20, 21, 22, 23, 24]) as sequence:
        table = sequence.block_table()
        assert table.dtype == np.int32
        assert len(table) == 4
        slots = sequence.slots(0, 13)
        assert (slots == table[np.arange(13) // 4] * 4 + np.arange(13) % 4).all()


def test_without_alignment_there_is_no_block_table() -> None:
    with pt.PrefixCache(4, 4).open([1]) as sequence, pytest.raises(pt.NotAligned, match="align"):
        sequence.block_table()


def test_forks_share_whole_blocks_and_compute_the_rest_again() -> None:
    cache = make()
    sequence = cache.open([1, 2, 3, 4, 5, 6])
    sequence.commit(6)
    fork = sequence.fork(1)[0]
    assert (fork.cached_len, fork.committed, len(fork)) == (4, 4, 6)
    assert fork.block_table()[0] == sequence.block_table()[0]
    assert fork.block_table()[1] != sequence.block_table()[1]
    fork.commit(6)
    cache.append([sequence, fork], [7, 8])
    cache.check()


def test_a_fork_without_a_block_for_the_rest_is_refused() -> None:
    cache = make(2)
    with cache.open([1, 2, 3, 4, 5]) as sequence:
        sequence.commit(5)
        before = cache.stats()
        with pytest.raises(pt.OutOfBlocks, match="1 blocks needed, 0 free"):
            sequence.fork(1)
        assert cache.stats() == before


def test_a_rollback_into_a_block_that_others_match() -> None:
    cache = make()
    sequence = cache.open(list(range(12)))
    sequence.commit(12)
    sequence.rollback(2)
    assert (len(sequence), sequence.committed) == (10, 8)
    assert cache.match(list(range(12))).cached == 12
    sequence.commit(10)
    cache.append([sequence], [99])
    cache.check()


def test_who_moved_is_told_and_its_old_blocks_wait() -> None:
    cache = make()
    first, second = cache.open([1] * 8), cache.open([1] * 8)
    old = second.block_table().tolist()
    assert not first.commit(8)
    assert second.commit(8)
    assert second.block_table().tolist() == first.block_table().tolist() != old
    assert cache.stats().retired_blocks == 2
    with cache.open([2] * 44) as other:
        assert not set(other.block_table().tolist()) & set(old)
    assert cache.append([second], [3]).tolist()
    assert cache.stats().retired_blocks == 0


def test_a_batch_says_which_moved() -> None:
    cache = make()
    batch = cache.batch([cache.open([token] * 4) for token in (1, 2, 1, 2)])
    assert cache.commit(batch).tolist() == [2, 3]


def test_block_0_is_never_handed_out() -> None:
    cache = make(3, reserve_block_0=True)
    with cache.open([1] * 8) as sequence:
        assert sequence.block_table().tolist() == [1, 2]
        assert not cache.can_open([2])
    cache.clear()
    assert cache.stats().free_blocks == 2
    cache.check()


def test_an_explanation_names_the_partial_block() -> None:
    cache = make()
    cached(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert cache.explain([1, 2, 3, 4, 5, 6]).why is pt.Why.PARTIAL_BLOCK
    assert cache.explain([1, 2, 3, 4, 5, 6, 9, 9]).why is pt.Why.PARTIAL_BLOCK
    assert cache.explain([1, 2, 9, 9]).why is pt.Why.PARTIAL_BLOCK
    assert cache.explain([1, 2, 3, 4, 9, 9, 9, 9]).why is pt.Why.NEVER_SEEN
    assert cache.explain([9, 9, 9, 9]).why is pt.Why.NEVER_SEEN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"align": "blocks"}, "align is 'blocks', expected 'token' or 'block'"),
        ({"align": None}, "align is None"),
        ({"num_blocks": 1, "reserve_block_0": True}, "num_blocks is 1, expected at least 2"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        pt.PrefixCache(**{"num_blocks": 4, "block_size": 4, **arguments})
