"""Dropping the last tokens of a sequence: rejected drafts, and more."""

import pytest

import prefixtree as pt
from prefixtree.errors import InvalidLength, RollbackPastFork

from .observe import check_forest


def test_uncommitted_tokens_give_their_blocks_back() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    cache.append([sequence], list(range(10)), [10])
    assert cache.stats().free_blocks == 8 - 4
    sequence.rollback(9)
    assert cache.stats().free_blocks == 8 - 1
    assert sequence.tokens().tolist() == [1, 2, 3, 0]
    assert (len(sequence), sequence.committed) == (4, 3)
    cache.check()


def test_uncommitted_tokens_give_their_slots_back() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2])
    sequence.commit(2)
    draft = cache.append([sequence], [3, 4], [2]).tolist()
    sequence.rollback(2)
    assert cache.append([sequence], [5, 6], [2]).tolist() == draft
    sequence.commit(4)
    assert cache.match([1, 2, 3]).cached == 2
    assert cache.match([1, 2, 5, 6]).cached == 4


def test_committed_tokens_stay_in_the_tree_for_others() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3, 4, 5, 6])
    sequence.commit(6)
    slots = sequence.slots(0, 6).tolist()
    sequence.rollback(3)
    assert (len(sequence), sequence.committed) == (3, 3)
    assert cache.match([1, 2, 3, 4, 5, 6]).cached == 6
    stats = cache.stats()
    assert (stats.cached_tokens, stats.pinned_tokens, stats.evictable_tokens) == (6, 3, 3)
    with cache.open([1, 2, 3, 4, 5, 6, 7]) as other:
        assert other.cached_len == 6
        assert other.slots(0, 6).tolist() == slots
    cache.check()


def test_committed_tokens_behind_a_rollback_can_be_evicted() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3, 4, 5, 6])
    sequence.commit(6)
    sequence.rollback(4)
    assert cache.clear().blocks == 1
    assert cache.match([1, 2, 3, 4, 5, 6]).cached == 2
    assert sequence.slots(0, 2).shape == (2,)
    cache.check()


def test_a_rollback_takes_uncommitted_and_committed_tokens_together() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3, 4, 5])
    sequence.commit(5)
    cache.append([sequence], [6, 7, 8, 9, 10], [5])
    sequence.rollback(7)
    assert sequence.tokens().tolist() == [1, 2, 3]
    assert sequence.committed == 3
    assert cache.match([1, 2, 3, 4, 5, 6]).cached == 5
    assert cache.stats().free_blocks == 8 - 2
    cache.check()


def test_a_rollback_across_nodes() -> None:
    cache = pt.PrefixCache(16, 4)
    for prompt in ([1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 9]):
        with cache.open(prompt) as other:
            other.commit(len(prompt))
    sequence = cache.open([1, 2, 3, 4, 5, 6, 7, 8])
    sequence.commit(8)
    sequence.rollback(7)
    assert sequence.tokens().tolist() == [1]
    assert cache.stats().pinned_tokens == 1
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8]).cached == 8
    cache.append([sequence], [5])
    sequence.commit(2)
    assert cache.match([1, 5]).cached == 2
    check_forest(cache.forest([sequence]), [sequence])
    cache.check()


def test_going_on_after_a_rollback_leaves_the_cached_tokens_alone() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    left = sequence.slots(2, 3).tolist()
    sequence.rollback(1)
    assert cache.append([sequence], [9]).tolist() != left
    sequence.commit(3)
    assert cache.match([1, 2, 3]).cached == cache.match([1, 2, 9]).cached == 3
    cache.check()


def test_coming_back_to_rolled_back_tokens_finds_them() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3, 4])
    sequence.commit(4)
    slots = sequence.slots(0, 4).tolist()
    sequence.rollback(2)
    cache.append([sequence], [3, 4], [2])
    sequence.commit(4)
    assert sequence.slots(0, 4).tolist() == slots
    assert cache.stats().free_blocks + cache.stats().retired_blocks == 8 - 1
    cache.check()


def test_a_rollback_of_nothing_changes_nothing() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    sequence.rollback(0)
    assert len(sequence) == 3
    sequence.commit(3)
    sequence.fork(1)
    sequence.rollback(0)
    assert len(sequence) == 3


def test_a_rollback_stops_at_the_fork_on_both_sides() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    (fork,) = sequence.fork(1)
    cache.append([sequence, fork], [4, 5])
    for side in (sequence, fork):
        with pytest.raises(RollbackPastFork, match="2"):
            side.rollback(2)
        assert len(side) == 4
        side.rollback(1)
        assert side.tokens().tolist() == [1, 2, 3]
        with pytest.raises(RollbackPastFork):
            side.rollback(1)
    cache.check()


def test_the_last_fork_counts() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2])
    sequence.commit(2)
    sequence.fork(1)
    cache.append([sequence], [3, 4], [2])
    sequence.commit(4)
    (late,) = sequence.fork(1)
    for side in (sequence, late):
        with pytest.raises(RollbackPastFork):
            side.rollback(1)


def test_a_rollback_keeps_one_token() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    with pytest.raises((RollbackPastFork, InvalidLength), match="3"):
        sequence.rollback(3)
    sequence.rollback(2)
    assert sequence.tokens().tolist() == [1]


def test_drafts_of_a_batch_are_checked_and_dropped_step_by_step() -> None:
    cache = pt.PrefixCache(64, 4)
    batch = [cache.open([1, 2, 3, which]) for which in range(5)]
    cache.commit(batch)
    expected = [[1, 2, 3, which] for which in range(5)]
    for step in range(12):
        cache.append(batch, [100 + step, 200 + step, 300 + step] * 5, [3] * 5)
        forest = cache.forest(batch, query_lens=[3] * 5)
        check_forest(forest, batch, query_lens=[3] * 5)
        for index, sequence in enumerate(batch):
            accepted = (index + step) % 4
            sequence.rollback(3 - accepted)
            expected[index] += [100 + step, 200 + step, 300 + step][:accepted]
        cache.commit(batch)
    assert [sequence.tokens().tolist() for sequence in batch] == expected
    cache.check()
