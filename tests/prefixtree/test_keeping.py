"""Pins for good, forgetting, admission, preemption."""

import pytest

from prefixtree import (
    InvalidLength,
    NotPinned,
    NotPreempted,
    OutOfBlocks,
    PrefixCache,
    SequenceClosed,
)


def committed(cache: PrefixCache, tokens: list[int]) -> None:
    with cache.open(tokens) as sequence:
        sequence.commit(len(tokens))


def test_a_pinned_prefix_outlives_eviction_until_it_is_unpinned() -> None:
    cache = PrefixCache(8, 2)
    committed(cache, [1, 2, 3, 4])
    committed(cache, [1, 2, 5, 6])
    pin = cache.pin([1, 2, 3])
    assert pin.tokens == 3
    cache.clear()
    assert cache.match([1, 2, 3, 4]).cached == 3
    assert cache.match([1, 2, 5]).cached == 2
    cache.check()
    pin.unpin()
    cache.clear()
    assert cache.stats().free_blocks == 8
    cache.check()


def test_two_pins_on_one_prefix_are_taken_off_one_by_one() -> None:
    cache = PrefixCache(8, 2)
    committed(cache, [1, 2])
    pins = [cache.pin([1, 2]), cache.pin([1, 2, 9])]
    pins[0].unpin()
    cache.clear()
    assert cache.match([1, 2]).cached == 2
    with pytest.raises(NotPinned):
        pins[0].unpin()
    pins[1].unpin()
    assert cache.clear().blocks == 1
    cache.check()


def test_what_sequences_add_below_a_pin_can_go() -> None:
    cache = PrefixCache(8, 2)
    committed(cache, [1, 2])
    cache.pin([1, 2])
    committed(cache, [1, 2, 3, 4])
    cache.clear()
    assert cache.match([1, 2, 3, 4]).cached == 2


def test_a_pin_on_nothing_keeps_nothing() -> None:
    cache = PrefixCache(8, 2)
    pin = cache.pin([1, 2])
    assert pin.tokens == 0
    committed(cache, [1, 2])
    cache.clear()
    assert cache.stats().free_blocks == 8
    pin.unpin()
    cache.check()


def test_forget_drops_what_is_behind_a_prefix_and_says_what_stays() -> None:
    cache = PrefixCache(16, 2)
    committed(cache, [1, 2, 3, 4])
    committed(cache, [1, 2, 5, 6])
    running = cache.open([1, 2, 5, 6, 7])
    running.commit(5)
    forgotten = cache.forget([1, 2])
    assert (forgotten.tokens, forgotten.kept_tokens, forgotten.blocks) == (2, 3, 1)
    assert cache.match([1, 2, 3, 4]).cached == 2
    assert cache.match([1, 2, 5, 6, 7]).cached == 5
    cache.check()
    running.close()
    assert cache.forget([1, 2]).kept_tokens == 0
    assert cache.stats().cached_tokens == 2


def test_forget_cuts_a_node_where_the_prefix_ends() -> None:
    cache = PrefixCache(16, 4)
    committed(cache, [1, 2, 3, 4, 5, 6])
    assert cache.forget([1, 2, 3, 4, 5]).tokens == 1
    assert cache.match([1, 2, 3, 4, 5, 6]).cached == 5
    cache.check()


def test_forget_of_a_namespace_leaves_the_others() -> None:
    cache = PrefixCache(16, 4)
    committed(cache, [1, 2, 3])
    with cache.open([1, 2, 3], namespace="a") as sequence:
        sequence.commit(3)
    assert cache.forget(namespace="a").tokens == 3
    assert cache.match([1, 2, 3], namespace="a").cached == 0
    assert cache.match([1, 2, 3]).cached == 3
    assert cache.forget().tokens == 3
    assert cache.stats().free_blocks == 16
    cache.check()


def test_forget_of_what_is_not_there_changes_nothing() -> None:
    cache = PrefixCache(16, 4)
    committed(cache, [1, 2, 3])
    assert cache.forget([1, 9]) == (0, 0, 0)
    assert cache.forget(namespace="nobody") == (0, 0, 0)
    assert cache.match([1, 2, 3]).cached == 3


def test_can_open_foretells_open_and_keeps_a_watermark() -> None:
    cache = PrefixCache(4, 2)
    committed(cache, [1, 2, 3, 4])
    assert cache.can_open([1, 2, 3, 4, 5, 6, 7, 8])
    assert not cache.can_open([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert not cache.can_open([9] * 9)
    assert cache.can_open([9] * 4, watermark=2)
    assert not cache.can_open([9] * 4, watermark=3)
    with pytest.raises(InvalidLength, match="-1"):
        cache.can_open([1], watermark=-1)
    assert cache.match([1, 2, 3, 4]).cached == 4


def test_a_preempted_sequence_gives_way_and_goes_on_with_what_is_left() -> None:
    cache = PrefixCache(3, 2)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    cache.append([sequence], [4])
    sequence.preempt()
    assert sequence.is_preempted
    assert not sequence.is_open
    assert cache.stats().open_sequences == 0
    with pytest.raises(SequenceClosed, match="preempted"):
        sequence.fork(1)
    with pytest.raises(SequenceClosed, match="preempted"):
        cache.append([sequence], [5])
    with cache.open([8, 9, 8, 9]):
        with pytest.raises(OutOfBlocks):
            sequence.resume()
        assert sequence.is_preempted
    sequence.resume()
    assert sequence.tokens().tolist() == [1, 2, 3, 4]
    assert sequence.cached_len == sequence.committed
    cache.check()
    with pytest.raises(NotPreempted):
        sequence.resume()
    sequence.close()
    with pytest.raises(NotPreempted):
        sequence.resume()


def test_a_preempted_sequence_can_be_closed_once() -> None:
    cache = PrefixCache(3, 2)
    with cache.open([1, 2, 3]) as sequence:
        sequence.preempt()
    with pytest.raises(SequenceClosed, match="closed"):
        sequence.close()
    cache.clear()
    assert cache.stats().free_blocks == 3
