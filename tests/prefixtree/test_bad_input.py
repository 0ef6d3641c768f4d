"""Calls that are refused: the error names the value, and the cache is as before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import prefixtree as pt
from allocator import AllocatorError
from prefixtree.errors import (
    InvalidBatch,
    InvalidLength,
    InvalidTokens,
    NotCommitted,
    PrefixTreeError,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
)

from .observe import ancestry

NAMED = (PrefixTreeError, AllocatorError)


@pytest.fixture
def cache() -> pt.PrefixCache:
    """A cache with one committed path that nobody holds."""
    cache = pt.PrefixCache(16, 4)
    with cache.open([1, 2, 3, 4, 5, 6]) as closed:
        closed.commit(6)
    return cache


def state(cache: pt.PrefixCache, sequences: list[pt.Sequence]) -> tuple[Any, ...]:
    return (
        cache.stats(),
        str(cache.tree()),
        [
            (len(each), each.committed, each.tokens().tolist(), each.slots(0, len(each)).tolist())
            for each in sequences
        ],
    )


@contextmanager
def nothing_changes(cache: pt.PrefixCache, *sequences: pt.Sequence) -> Iterator[None]:
    before = state(cache, list(sequences))
    yield
    assert state(cache, list(sequences)) == before
    cache.check()


BAD_TOKENS: list[tuple[Any, str]] = [
    ([1, -1], "-1"),
    ([2**31], "2147483648"),
    ([3, 2**70], str(2**70)),
    ([1, 2.5], "2.5|float"),
    ([float("nan")], "nan|float"),
    (np.array([1.0]), "float"),
    (np.array([True]), "bool"),
    (np.array([[1, 2]]), r"\(1, 2\)|2-d|2 dimensions"),
    ([[1, 2], [3, 4]], r"\(2, 2\)|2-d|\[1, 2\]"),
    ([[1], [2, 3]], "[1]"),
    (np.array([1, 2**31], dtype=np.uint32), "2147483648"),
    (np.array([1, 2**63], dtype=np.uint64), "9223372036854775808"),
    (np.array([5, -7]), "-7"),
    (np.array(["a"]), "a|U1|str"),
    (["a"], "a|U1|str"),
    (b"ab", "ab|bytes|S2"),
    ("12", "12|str|U2"),
    (7, "7|0-d|int"),
    (None, "None"),
    ([None], "None|object"),
    (torch.tensor([1.0]), "float"),
    (torch.tensor([1, -9]), "-9"),
    (torch.tensor([[1]]), r"\(1, 1\)|2-d|2 dimensions"),
]


@pytest.mark.parametrize(("bad", "named"), BAD_TOKENS, ids=[repr(bad) for bad, _ in BAD_TOKENS])
def test_bad_tokens_are_named_and_change_nothing(
    cache: pt.PrefixCache, bad: Any, named: str
) -> None:
    sequence = cache.open([1, 2])
    with nothing_changes(cache, sequence):
        with pytest.raises(InvalidTokens, match=named):
            cache.open(bad)
        with pytest.raises(InvalidTokens, match=named):
            cache.match(bad)
        count = len(bad) if hasattr(bad, "__len__") else 1
        with pytest.raises(InvalidTokens, match=named):
            cache.append([sequence], bad, [count])


def test_an_empty_prompt_is_refused(cache: pt.PrefixCache) -> None:
    for empty in ([], (), np.array([], dtype=np.int32), torch.tensor([], dtype=torch.int64)):
        with nothing_changes(cache), pytest.raises(InvalidTokens, match=r"empty|at least one"):
            cache.open(empty)


def test_the_smallest_and_the_largest_token_are_accepted() -> None:
    cache = pt.PrefixCache(4, 4)
    sequence = cache.open([0, 2**31 - 1])
    sequence.commit(2)
    assert cache.match([0, 2**31 - 1, 0]).cached == 2


def test_one_bad_sequence_in_a_batch_stops_the_whole_call(cache: pt.PrefixCache) -> None:
    good, gone = cache.open([1, 2, 3]), cache.open([1, 2, 4])
    gone.close()
    calls: list[Callable[[], Any]] = [
        lambda: cache.append([good, gone], [1, 2]),
        lambda: cache.commit([good, gone]),
        lambda: cache.forest([good, gone]),
        lambda: cache.batch([good, gone]),
    ]
    for call in calls:
        with nothing_changes(cache, good), pytest.raises(SequenceClosed):
            call()


def test_a_sequence_stands_in_a_batch_once(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 3])
    calls: list[Callable[[], Any]] = [
        lambda: cache.append([sequence, sequence], [1, 2]),
        lambda: cache.batch([sequence, sequence]),
    ]
    for call in calls:
        with nothing_changes(cache, sequence), pytest.raises(InvalidBatch):
            call()


def test_a_sequence_of_another_cache_is_refused(cache: pt.PrefixCache) -> None:
    other = pt.PrefixCache(4, 4)
    mine, foreign = cache.open([1, 2, 3]), other.open([1, 2, 3])
    calls: list[Callable[[], Any]] = [
        lambda: cache.append([mine, foreign], [1, 2]),
        lambda: cache.commit([mine, foreign]),
        lambda: cache.forest([mine, foreign]),
        lambda: cache.batch([mine, foreign]),
        lambda: cache.append(other.batch([foreign]), [1]),
        lambda: cache.commit(other.batch([foreign])),
    ]
    for call in calls:
        with (
            nothing_changes(cache, mine),
            nothing_changes(other, foreign),
            pytest.raises(InvalidBatch),
        ):
            call()


def test_counts_that_do_not_fit_the_tokens_are_refused(cache: pt.PrefixCache) -> None:
    batch = [cache.open([1, 2, 3]), cache.open([1, 2, 4])]
    for tokens, counts in (
        ([7], None),
        ([7, 8, 9], None),
        ([7, 8], [1, 2]),
        ([7, 8], [1, 0]),
        ([7, 8], [2]),
        ([7, 8], [1, 1, 0]),
        ([7, 8], [3, -1]),
    ):
        with nothing_changes(cache, *batch), pytest.raises(NAMED):
            cache.append(batch, tokens, counts)


@pytest.mark.parametrize("length", [-1, 1, 5, 2**40])
def test_a_commit_outside_of_the_sequence_is_named(cache: pt.PrefixCache, length: int) -> None:
    sequence = cache.open([1, 2, 9, 9])
    assert sequence.committed == 2
    with nothing_changes(cache, sequence), pytest.raises(InvalidLength, match=str(length)):
        sequence.commit(length)


def test_a_commit_of_what_is_committed_changes_nothing(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 9, 9])
    with nothing_changes(cache, sequence):
        sequence.commit(2)


def test_a_fork_with_uncommitted_tokens_is_refused(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 9, 9])
    with nothing_changes(cache, sequence), pytest.raises(NotCommitted, match="2"):
        sequence.fork(2)
    sequence.commit(4)
    sequence.fork(2)


def test_a_fork_into_a_negative_number_is_refused(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2])
    with nothing_changes(cache, sequence), pytest.raises(NAMED, match="-1"):
        sequence.fork(-1)


def test_a_rollback_of_a_negative_number_is_refused(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 3])
    with nothing_changes(cache, sequence), pytest.raises(InvalidLength, match="-1"):
        sequence.rollback(-1)


def test_a_rollback_past_the_fork_is_refused(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 3])
    (fork,) = sequence.fork(1)
    for side in (sequence, fork):
        with nothing_changes(cache, side), pytest.raises(RollbackPastFork, match="1"):
            side.rollback(1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1), (4, 4), (-2, -1)])
def test_slots_outside_of_the_sequence_are_refused(
    cache: pt.PrefixCache, start: int, stop: int
) -> None:
    sequence = cache.open([1, 2, 9])
    with nothing_changes(cache, sequence), pytest.raises(SlotRange) as caught:
        sequence.slots(start, stop)
    assert str(start) in str(caught.value)
    assert str(stop) in str(caught.value)
    assert isinstance(caught.value, IndexError)


def test_a_closed_sequence_answers_no_call(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 9])
    sequence.close()
    assert not sequence.is_open
    calls: list[Callable[[], Any]] = [
        sequence.close,
        lambda: sequence.commit(3),
        lambda: sequence.fork(1),
        lambda: sequence.rollback(1),
        lambda: sequence.slots(0, 1),
    ]
    for call in calls:
        with nothing_changes(cache), pytest.raises(SequenceClosed):
            call()


def test_a_handle_is_not_revived_by_a_later_sequence(cache: pt.PrefixCache) -> None:
    old = cache.open([1, 2, 9])
    batch = cache.batch([old])
    old.close()
    new = [cache.open([1, 2, 8, token]) for token in range(4)]
    with nothing_changes(cache, *new):
        for call in (old.close, lambda: old.commit(3), lambda: cache.append(batch, [1])):
            with pytest.raises(SequenceClosed):
                call()
    assert not old.is_open


def test_a_context_manager_closes_also_after_an_error(cache: pt.PrefixCache) -> None:
    with pytest.raises(ZeroDivisionError), cache.open([1, 2, 9]) as sequence:
        raise ZeroDivisionError
    assert not sequence.is_open
    assert cache.stats().open_sequences == 0
    cache.check()


def test_a_context_manager_accepts_a_sequence_that_was_closed_inside(
    cache: pt.PrefixCache,
) -> None:
    with cache.open([1, 2, 9]) as sequence:
        sequence.close()
    assert cache.stats().open_sequences == 0


def test_an_eviction_of_a_negative_number_is_refused(cache: pt.PrefixCache) -> None:
    with nothing_changes(cache), pytest.raises(NAMED, match="-1"):
        cache.evict(-1)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (-1, 4), (4, 0), (4, -2)])
def test_a_cache_needs_blocks_with_slots(num_blocks: int, block_size: int) -> None:
    with pytest.raises(NAMED, match=str(min(num_blocks, block_size))):
        pt.PrefixCache(num_blocks, block_size)


@pytest.mark.parametrize(
    ("kv_lens", "query_lens", "named"),
    [
        ([5, 3], [1, 1], "5"),  # beyond the end of the first
        ([2, 3], [1, 1], "2"),  # below what the first has committed
        ([4, 4], [1, 1], "4"),  # beyond the end of the second
        ([4, 0], [1, 1], "0"),  # nothing to attend to
        ([4, 3], [0, 1], "0"),  # no query
        ([4, 3], [1, -1], "-1"),
        ([4, 3], [5, 1], "5"),  # more queries than positions
        ([4, 3], [1, 1], None),  # the second's positions 0 and 1 are not computed
        ([4], [1, 1], None),
        ([4, 3], [1], None),
    ],
)
def test_a_forest_of_impossible_lengths_is_refused(
    kv_lens: list[int], query_lens: list[int], named: str | None
) -> None:
    cache = pt.PrefixCache(16, 4)
    first, second = cache.open([1, 2, 3]), cache.open([7, 8, 9])
    first.commit(3)
    cache.append([first], [4])
    with nothing_changes(cache, first, second), pytest.raises(NAMED, match=named):
        cache.forest([first, second], kv_lens, query_lens)


def test_a_refused_call_does_not_touch_the_order_of_eviction() -> None:
    cache = pt.PrefixCache(4, 2)
    for token in (1, 2, 3):
        with cache.open([token, token]) as sequence:
            sequence.commit(2)
    with pytest.raises(AllocatorError):
        cache.open([1, 1, *range(10, 30)])
    with pytest.raises(InvalidTokens):
        cache.open([1, 1, -1])
    cache.evict(1)
    assert [cache.match([token, token]).cached for token in (1, 2, 3)] == [0, 2, 2]


def test_a_refused_call_does_not_split_a_node() -> None:
    cache = pt.PrefixCache(4, 4)
    first = cache.open([1, 2, 3, 4])
    first.commit(4)
    with pytest.raises(AllocatorError):
        cache.open([1, 2, *range(10, 40)])
    forest = cache.forest([first])
    assert len(ancestry(forest, forest.leaf[0])) == 1
    assert cache.stats().nodes == 1


@pytest.mark.parametrize("wrong", [1.0, "1", None, [1]], ids=repr)
def test_numbers_that_are_no_integers_are_refused(cache: pt.PrefixCache, wrong: Any) -> None:
    sequence = cache.open([5, 6, 7])
    sequence.commit(2)
    calls = [
        lambda: sequence.commit(wrong),
        lambda: sequence.rollback(wrong),
        lambda: sequence.fork(wrong),
        lambda: sequence.slots(wrong, 2),
        lambda: sequence.slots(0, wrong),
        lambda: cache.evict(wrong),
        lambda: cache.can_open([1], watermark=wrong),
    ]
    for call in calls:
        with nothing_changes(cache, sequence), pytest.raises(ValueError, match="integer"):
            call()
    cache.check()


def test_a_batch_of_something_else_is_refused(cache: pt.PrefixCache) -> None:
    sequence = cache.open([1, 2, 3])
    with nothing_changes(cache, sequence), pytest.raises(pt.InvalidBatch, match="got 7"):
        cache.batch([sequence, 7])
