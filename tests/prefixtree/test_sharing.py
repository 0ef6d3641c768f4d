"""Who shares which slots with whom, and from when on."""

import numpy as np
import pytest

import prefixtree as pt
from allocator import OutOfBlocks

from .observe import ancestry, check_forest


def cached(cache: pt.PrefixCache, tokens: list[int]) -> None:
    """Leaves these tokens in the cache, committed and held by nobody."""
    with cache.open(tokens) as sequence:
        sequence.commit(len(tokens))


def blocks_of(sequence: pt.Sequence, block_size: int) -> list[int]:
    return (sequence.slots(0, len(sequence)) // block_size).tolist()


def unheld(cache: pt.PrefixCache) -> int:
    """Blocks that no node holds."""
    stats = cache.stats()
    return stats.free_blocks + stats.retired_blocks


def test_a_prompt_is_matched_to_the_token_at_any_block_size() -> None:
    for block_size in (1, 2, 3, 16, 100):
        cache = pt.PrefixCache(64, block_size)
        cached(cache, list(range(50)))
        for length in range(1, 51):
            assert cache.match([*range(length), 99]).cached == length
            with cache.open(list(range(length))) as sequence:
                assert sequence.cached_len == length
        cache.check()


def test_a_split_inside_a_block_leaves_both_halves_on_that_block() -> None:
    cache = pt.PrefixCache(8, 4)
    first = cache.open([1, 2, 3, 4])
    first.commit(4)
    second = cache.open([1, 2, 9])
    assert second.cached_len == 2
    second.commit(3)

    forest = cache.forest([first, second])
    upper, lower = ancestry(forest, forest.leaf[0])
    assert ancestry(forest, forest.leaf[1])[0] == upper
    holders = [
        node
        for node in range(3)
        if forest.blocks[forest.block_ptr[node]] == first.slots(0, 1)[0] // 4
    ]
    assert sorted(holders) == sorted([upper, lower])
    assert (forest.offset[upper], forest.length[upper]) == (0, 2)
    assert (forest.offset[lower], forest.length[lower]) == (2, 2)
    cache.check()

    # The block is free only when neither half holds it.
    first.close()
    assert cache.clear().blocks == 0
    assert cache.match([1, 2, 3, 4]).cached == 2
    second.close()
    assert cache.clear().blocks == 2
    cache.check()


def test_a_split_moves_no_slot() -> None:
    cache = pt.PrefixCache(8, 4)
    first = cache.open([1, 2, 3, 4, 5, 6])
    first.commit(6)
    before = first.slots(0, 6).tolist()
    second = cache.open([1, 2, 3, 9])
    second.commit(4)
    assert first.slots(0, 6).tolist() == before
    assert second.slots(0, 3).tolist() == before[:3]


def test_a_new_branch_starts_on_a_fresh_block() -> None:
    cache = pt.PrefixCache(8, 4)
    first = cache.open([1, 2, 3, 4])
    first.commit(4)
    second = cache.open([1, 2, 9])
    slot = int(second.slots(2, 3)[0])
    assert slot % 4 == 0
    assert slot // 4 != blocks_of(first, 4)[0]


def test_two_branches_behind_a_half_filled_block_do_not_meet_in_it() -> None:
    cache = pt.PrefixCache(8, 4)
    cached(cache, [1, 2])
    first, second = cache.open([1, 2, 3]), cache.open([1, 2, 4])
    assert not set(first.slots(2, 3).tolist()) & set(second.slots(2, 3).tolist())
    cache.append([first, second], [5, 5])
    cache.append([second, first], [6, 6])
    cache.commit([first, second])
    slots = [*first.slots(2, 5).tolist(), *second.slots(2, 5).tolist()]
    assert len(set(slots)) == 6
    cache.check()


def test_two_requests_admitted_together_share_after_the_first_commit() -> None:
    cache = pt.PrefixCache(16, 4)
    prompt = list(range(10))
    first = cache.open(prompt)
    second = cache.open([*prompt[:7], 99])
    assert (first.cached_len, second.cached_len) == (0, 0)
    assert not set(first.slots(0, 10).tolist()) & set(second.slots(0, 8).tolist())
    assert cache.match(prompt) == pt.Match(cached=0, pending=10)
    assert cache.match([*prompt[:7], 98]) == pt.Match(cached=0, pending=7)

    first.commit(5)
    assert cache.match(prompt) == pt.Match(cached=5, pending=5)
    first.commit(10)
    assert cache.match(prompt) == pt.Match(cached=10, pending=0)
    assert cache.match([*prompt[:7], 99]) == pt.Match(cached=7, pending=1)

    third = cache.open([*prompt, 11])
    assert third.cached_len == 10
    assert third.slots(0, 10).tolist() == first.slots(0, 10).tolist()
    cache.check()


def test_pending_tokens_vanish_with_the_sequence_that_promised_them() -> None:
    cache = pt.PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3, 4, 5])
    sequence.rollback(2)
    assert cache.match([1, 2, 3, 4, 5]) == pt.Match(cached=0, pending=3)
    sequence.commit(1)
    assert cache.match([1, 2, 3, 4, 5]) == pt.Match(cached=1, pending=2)
    sequence.close()
    assert cache.match([1, 2, 3, 4, 5]) == pt.Match(cached=1, pending=0)


def test_pending_counts_a_prompt_whose_beginning_another_sequence_committed() -> None:
    cache = pt.PrefixCache(16, 4)
    slow = cache.open([1, 2, 3, 4, 5, 6])
    fast = cache.open([1, 2, 3])
    fast.commit(3)
    assert slow.committed == 0
    assert cache.match([1, 2, 3, 4, 5, 7]) == pt.Match(cached=3, pending=2)


def test_only_prompts_are_pending() -> None:
    cache = pt.PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3])
    cache.append([sequence], [4, 5], [2])
    assert cache.match([1, 2, 3, 4, 5]) == pt.Match(cached=0, pending=3)
    sequence.commit(3)
    assert cache.match([1, 2, 3, 4, 5]) == pt.Match(cached=3, pending=0)
    sequence.commit(4)
    assert cache.match([1, 2, 3, 4, 5]) == pt.Match(cached=4, pending=0)


def test_tokens_are_not_matched_before_their_commit() -> None:
    cache = pt.PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3, 4, 5])
    for length in range(6):
        sequence.commit(length)
        assert cache.match([1, 2, 3, 4, 5]).cached == length
        with cache.open([1, 2, 3, 4, 5]) as other:
            assert other.cached_len == length


def test_tokens_of_a_decode_in_flight_are_matched_by_a_third_request() -> None:
    cache = pt.PrefixCache(32, 4)
    batch = [cache.open([1, 2, 3]), cache.open([1, 2, 3, 4])]
    cache.commit(batch)
    for step in range(10):
        cache.append(batch, [10 + step, 50 + step])
        cache.commit(batch)
    third = cache.open([1, 2, 3, *range(10, 20), 7])
    assert third.cached_len == 13
    assert third.slots(0, 13).tolist() == batch[0].slots(0, 13).tolist()
    cache.check()


def test_a_decode_fills_its_blocks() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    for token in range(13):
        slots = cache.append([sequence], [token])
        assert slots.dtype == np.int64
        assert slots.tolist() == sequence.slots(len(sequence) - 1, len(sequence)).tolist()
        sequence.commit(len(sequence))
    assert len(set(blocks_of(sequence, 4))) == 4
    assert cache.stats().free_blocks == 4
    cache.check()


def test_a_decode_without_commits_fills_its_blocks() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    for token in range(13):
        cache.append([sequence], [token])
    assert len(set(blocks_of(sequence, 4))) == 4
    assert cache.stats().cached_tokens == 0


def test_forks_share_everything_and_their_samples_diverge() -> None:
    cache = pt.PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3, 4, 5, 6])
    sequence.commit(6)
    free = cache.stats().free_blocks
    forks = sequence.fork(3)
    assert cache.stats().free_blocks == free
    batch = [sequence, *forks]
    for fork in forks:
        assert fork.tokens().tolist() == [1, 2, 3, 4, 5, 6]
        assert fork.slots(0, 6).tolist() == sequence.slots(0, 6).tolist()

    cache.append(batch, [7, 8, 9, 10])
    cache.commit(batch)
    assert len({int(member.slots(6, 7)[0]) for member in batch}) == 4
    assert len({tuple(member.slots(0, 6).tolist()) for member in batch}) == 1
    for member, token in zip(batch, [7, 8, 9, 10], strict=True):
        assert cache.match([1, 2, 3, 4, 5, 6, token, 0]).cached == 7
        assert member.tokens().tolist()[-1] == token
    check_forest(cache.forest(batch), batch)
    cache.check()


def test_one_of_the_forks_goes_on_in_the_shared_block() -> None:
    cache = pt.PrefixCache(4, 4)
    sequence = cache.open([1, 2])
    sequence.commit(2)
    batch = [sequence, *sequence.fork(2)]
    cache.append(batch, [3, 4, 5])
    assert sorted(int(member.slots(2, 3)[0]) % 4 for member in batch) in ([0, 0, 2], [0, 0, 0])
    cache.commit(batch)
    cache.check()


def test_forks_outlive_the_sequence_they_came_from() -> None:
    cache = pt.PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    (fork,) = sequence.fork(1)
    sequence.close()
    assert cache.clear().blocks == 0
    assert cache.match([1, 2, 3]).cached == 3
    fork.close()
    assert cache.clear().blocks == 1


def test_concurrent_duplicates_merge_at_commit_and_memory_falls() -> None:
    cache = pt.PrefixCache(16, 4)
    prompt = list(range(8))
    first, second = cache.open(prompt), cache.open(prompt)
    assert unheld(cache) == 16 - 4
    first.commit(8)
    kept = first.slots(0, 8).tolist()
    second.commit(8)
    assert unheld(cache) == 16 - 2
    assert first.slots(0, 8).tolist() == second.slots(0, 8).tolist() == kept
    assert cache.stats().cached_tokens == 8
    cache.check()


def test_duplicates_in_one_batch_merge_at_its_commit() -> None:
    cache = pt.PrefixCache(16, 4)
    batch = [cache.open(list(range(6))) for _ in range(3)]
    cache.commit(batch)
    assert len({tuple(member.slots(0, 6).tolist()) for member in batch}) == 1
    assert unheld(cache) == 16 - 2
    cache.check()


def test_duplicates_in_part_keep_what_is_their_own() -> None:
    cache = pt.PrefixCache(16, 4)
    first, second = cache.open([1, 2, 3, 4, 5, 6, 7]), cache.open([1, 2, 3, 4, 5, 8, 9])
    own = second.slots(5, 7).tolist()
    first.commit(7)
    second.commit(7)
    assert second.slots(0, 5).tolist() == first.slots(0, 5).tolist()
    assert second.slots(5, 7).tolist() == own
    assert cache.stats().cached_tokens == 9
    assert unheld(cache) == 16 - 3
    cache.check()


def test_a_path_whose_parts_were_computed_by_different_sequences() -> None:
    """The second half lies at the offset where the first one ends, but on another block."""
    cache = pt.PrefixCache(16, 4)
    short, long, late = cache.open([1, 2]), cache.open([1, 2, 3, 4]), cache.open([1, 2, 3, 4])
    first, second = short.slots(0, 2).tolist(), long.slots(2, 4).tolist()
    short.commit(2)
    short.close()
    long.commit(4)
    late.commit(4)
    assert long.slots(0, 4).tolist() == late.slots(0, 4).tolist() == first + second
    assert unheld(cache) == 16 - 2
    check_forest(cache.forest([long, late]), [long, late])
    cache.check()


def test_samples_that_agree_merge_too() -> None:
    cache = pt.PrefixCache(16, 2)
    sequence = cache.open([1, 2])
    sequence.commit(2)
    batch = [sequence, *sequence.fork(1)]
    for token in (3, 4, 5, 6):
        cache.append(batch, [token, token])
        cache.commit(batch)
    assert batch[0].slots(0, 6).tolist() == batch[1].slots(0, 6).tolist()
    assert unheld(cache) == 16 - 3
    cache.check()


def test_a_duplicate_keeps_the_first_copy_when_that_one_is_closed() -> None:
    cache = pt.PrefixCache(16, 4)
    first, second = cache.open([1, 2, 3, 4]), cache.open([1, 2, 3, 4])
    first.commit(4)
    kept = first.slots(0, 4).tolist()
    first.close()
    second.commit(4)
    assert second.slots(0, 4).tolist() == kept
    assert cache.clear().blocks == 0
    cache.check()


def test_a_prompt_that_is_cached_whole_takes_no_block() -> None:
    cache = pt.PrefixCache(2, 4)
    cached(cache, [1, 2, 3, 4, 5])
    with cache.open([1, 2, 3, 4, 5]) as sequence:
        assert sequence.cached_len == sequence.committed == len(sequence) == 5
        assert sequence.slots(5, 5).tolist() == []
        assert cache.stats().free_blocks == 0


def test_match_changes_nothing() -> None:
    cache = pt.PrefixCache(8, 4)
    cached(cache, [1, 2, 3, 4, 5])
    cached(cache, [6, 7])
    before = cache.stats(), str(cache.tree())
    for prompt in ([1, 2], [1, 2, 3, 4, 5, 6], [6], [9, 9]):
        cache.match(prompt)
    assert (cache.stats(), str(cache.tree())) == before
    # A match is not a use: [1, 2, 3, 4, 5] is still the one to go first.
    cache.match([1, 2, 3, 4, 5])
    cache.evict(1)
    assert cache.match([6, 7]).cached == 2


def test_every_kind_of_token_sequence_is_the_same_prompt() -> None:
    import array

    import torch

    cache = pt.PrefixCache(8, 4)
    cached(cache, [1, 2, 3, 2**31 - 1])
    for prompt in (
        [1, 2, 3, 2**31 - 1],
        (1, 2, 3, 2**31 - 1),
        array.array("i", [1, 2, 3, 2**31 - 1]),
        array.array("q", [1, 2, 3, 2**31 - 1]),
        np.array([1, 2, 3, 2**31 - 1], dtype=np.int32),
        np.array([1, 2, 3, 2**31 - 1], dtype=np.int64),
        np.array([1, 2, 3, 2**31 - 1], dtype=np.uint32),
        np.array([1, 0, 2, 0, 3, 0, 2**31 - 1, 0])[::2],
        torch.tensor([1, 2, 3, 2**31 - 1]),
        torch.tensor([1, 2, 3, 2**31 - 1], dtype=torch.int32),
    ):
        assert cache.match(prompt).cached == 4
        with cache.open(prompt) as sequence:
            assert sequence.tokens().dtype == np.int32
            assert sequence.tokens().tolist() == [1, 2, 3, 2**31 - 1]


def test_a_prompt_may_change_after_it_was_opened() -> None:
    cache = pt.PrefixCache(8, 4)
    prompt = np.array([1, 2, 3, 4], dtype=np.int32)
    sequence = cache.open(prompt)
    prompt[:] = 9
    sequence.commit(4)
    assert sequence.tokens().tolist() == [1, 2, 3, 4]
    assert cache.match([1, 2, 3, 4]).cached == 4
    assert cache.match([9]).cached == 0


def test_what_a_caller_does_to_returned_arrays_changes_nothing() -> None:
    cache = pt.PrefixCache(8, 4)
    sequence = cache.open([1, 2, 3])
    sequence.commit(3)
    slots = sequence.slots(0, 3).tolist()
    added = cache.append([sequence], [4])
    expected = added.tolist()
    for array in (sequence.tokens(), sequence.slots(0, 4), added):
        if array.flags.writeable:
            array[:] = 77
    assert sequence.tokens().tolist() == [1, 2, 3, 4]
    assert sequence.slots(0, 4).tolist() == slots + expected
    cache.check()


def test_a_batch_handle_follows_its_sequences() -> None:
    cache = pt.PrefixCache(32, 4)
    members = [cache.open([1, 2, 3]), cache.open([1, 2, 3]), cache.open([4])]
    batch = cache.batch(members)
    cache.commit(batch)
    cache.append(batch, [5, 6, 7])
    members[0].rollback(1)
    members[1].commit(4)
    members[2].commit(2)
    members[2].fork(1)
    slots = cache.append(batch, [8, 9, 10])
    assert [member.tokens().tolist() for member in members] == [
        [1, 2, 3, 8],
        [1, 2, 3, 6, 9],
        [4, 7, 10],
    ]
    assert slots.tolist() == [int(member.slots(0, len(member))[-1]) for member in members]
    cache.commit(batch)
    check_forest(cache.forest(batch), members)
    cache.check()


def test_statistics_tell_hits_and_what_sharing_saves() -> None:
    cache = pt.PrefixCache(32, 4)
    first = cache.open(list(range(8)))
    first.commit(8)
    second = cache.open([*range(6), 90, 91])
    second.commit(8)
    second.fork(2)
    stats = cache.stats()
    assert (stats.num_blocks, stats.block_size) == (32, 4)
    assert (stats.query_tokens, stats.hit_tokens, stats.opens) == (16, 6, 2)
    assert stats.open_sequences == 4
    assert stats.logical_tokens == 32
    assert stats.cached_tokens == stats.pinned_tokens == 10
    assert stats.free_blocks == 32 - 3
    assert (stats.evictable_tokens, stats.evictable_blocks) == (0, 0)
    assert stats.nodes == 3
    with pytest.raises(AttributeError):
        stats.opens = 0  # type: ignore[misc]


def test_an_append_may_take_the_blocks_that_its_own_sequences_gave_up() -> None:
    cache = pt.PrefixCache(6, 1)
    first, second = cache.open([1, 2, 3]), cache.open([1, 2, 3])
    first.commit(3)
    assert second.commit(3)
    assert (cache.stats().free_blocks, cache.stats().retired_blocks) == (0, 3)
    # Others may not: a kernel that runs for the second one still reads there.
    with pytest.raises(OutOfBlocks) as refused:
        cache.append([first], [4])
    assert (refused.value.needed, refused.value.free, refused.value.evictable) == (1, 0, 0)
    assert cache.stats().retired_blocks == 3
    with pytest.raises(OutOfBlocks) as refused:
        cache.append([first, second], [4] * 4, [2, 2])
    assert (refused.value.needed, refused.value.free, refused.value.evictable) == (4, 3, 0)
    assert cache.stats().retired_blocks == 3
    assert len(cache.append([first, second], [4] * 3, [1, 2])) == 3
    assert (cache.stats().free_blocks, cache.stats().retired_blocks) == (0, 0)
    cache.check()
