"""Orders of waiting requests, and who waits for whom."""

import math
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import prefixtree as pt
from allocator import InvalidArgument
from prefixtree.errors import InvalidNamespace, InvalidTokens
from prefixtree.scheduling import (
    SharedPrefix,
    Waiting,
    heaviest_subtree_first,
    highest_response_ratio_first,
    longest_match_first,
    shared_prefixes,
)

Prompt = tuple[int, ...]


def cached(*prompts: list[int], block_size: int = 2, **options: Any) -> pt.PrefixCache:
    cache = pt.PrefixCache(4_000, block_size, **options)
    for prompt in prompts:
        with cache.open(prompt) as sequence:
            sequence.commit(len(prompt))
    return cache


def test_longest_match_goes_first_and_arrival_decides_ties() -> None:
    cache = cached([1, 2, 3, 4], [7, 8])
    queue = [[9], [7, 8, 1], [1, 2, 9, 9], [1, 2, 3, 4, 5], [7, 9], [7, 8]]
    assert longest_match_first(cache, map(Waiting, queue)) == [3, 1, 2, 5, 4, 0]


def test_the_heaviest_subtree_goes_first_even_with_a_shorter_match() -> None:
    cache = cached([1, 1, 1, 1, 1, 1], [2, 2, 3], [2, 2, 4])
    light, heavy = [1, 1, 1, 1, 1, 1, 9], [2, 2, 4, 9]
    queue = [light, [5], [2, 2, 9], [2, 2, 3], heavy, [2, 2, 4, 8]]
    # Below 2, 2: first the child 4 with two requests, then 3, then what ends there.
    assert heaviest_subtree_first(cache, map(Waiting, queue)) == [4, 5, 3, 2, 0, 1]


def test_namespaces_share_no_subtree_and_no_pending_prefix() -> None:
    cache = cached([1, 2, 3])
    for tenant in ("a", "b"):
        with cache.open([1, 2, 3], namespace=tenant) as sequence:
            sequence.commit(3)
    queue = [
        Waiting([1, 2, 3, 4], "a"),
        Waiting([1, 2, 3, 4], "b"),
        Waiting([1, 2, 3, 5], "b"),
        Waiting([1, 2, 3, 4]),
    ]
    assert heaviest_subtree_first(cache, queue) == [1, 2, 0, 3]
    assert shared_prefixes(cache, queue) == []


def test_a_better_ratio_is_shorter_work_or_a_longer_wait() -> None:
    cache = cached(list(range(90)))
    hit, miss = Waiting([*range(90), 7], waited=1.0), Waiting([7] * 91, waited=1.0)
    assert highest_response_ratio_first(cache, [miss, hit], tokens_per_second=10) == [1, 0]
    # The hit has 1 + 1 / 0.1; so has the miss when it has waited for 10 * 9.1 seconds.
    late, later = miss._replace(waited=90.9), miss._replace(waited=91.1)
    assert highest_response_ratio_first(cache, [late, hit], tokens_per_second=10) == [1, 0]
    assert highest_response_ratio_first(cache, [hit, later], tokens_per_second=10) == [1, 0]


def test_a_prompt_cached_whole_still_takes_a_token_of_service() -> None:
    cache = cached([1, 2, 3])
    queue = [Waiting([1, 2, 3, 9], waited=2.0), Waiting([1, 2, 3], waited=2.0)]
    assert highest_response_ratio_first(cache, queue, tokens_per_second=1.0) == [0, 1]


def serve(order: Any, services: int) -> int | None:
    """When a cold request is served while for each service, 0.1 s long, a hit arrives.

    The cold one takes 4 s, and two hits are always there with it.
    """
    cache = cached(list(range(50)))
    cold = (0.0, [999] * 40)
    queue = [(-0.1, [*range(50), 98]), (-0.1, [*range(50), 99]), cold]
    for served in range(services):
        now = 0.1 * served
        waiting = [Waiting(tokens, waited=now - arrived) for arrived, tokens in queue]
        if queue.pop(order(cache, waiting)[0]) is cold:
            return served
        queue.append((now, [*range(50), 100 + served]))
    return None


def test_the_response_ratio_starves_nobody() -> None:
    def by_ratio(cache: pt.PrefixCache, waiting: list[Waiting]) -> list[int]:
        return highest_response_ratio_first(cache, waiting, tokens_per_second=10)

    assert serve(longest_match_first, 300) is None
    assert serve(heaviest_subtree_first, 300) is None
    # A hit has waited for 0.2 s when it is next: the cold one goes before it after 8 s.
    assert serve(by_ratio, 300) in range(79, 84)


def test_one_computes_what_several_share() -> None:
    cache = cached([1, 2, 3, 4])
    queue = [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [9, 9, 9],
        [1, 2, 3, 4, 5, 6, 0],
        [1, 2, 3, 4, 8, 8],
        [9, 9],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
        [1, 2, 3, 4],
    ]
    assert shared_prefixes(cache, map(Waiting, queue)) == [
        SharedPrefix(0, (2, 5), (2, 4)),
        SharedPrefix(1, (4,), (2,)),
    ]
    assert shared_prefixes(cache, map(Waiting, queue), min_saved=3) == [
        SharedPrefix(0, (5,), (4,)),
    ]


def test_nobody_waits_for_one_that_shares_little_when_another_shares_much() -> None:
    cache = cached()
    queue = [Waiting(prompt) for prompt in ([1, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6])]
    assert shared_prefixes(cache, queue, min_saved=3) == [SharedPrefix(1, (2,), (4,))]


def test_under_block_alignment_only_whole_blocks_are_shared() -> None:
    cache = cached([1, 2, 3, 4], block_size=4, align="block")
    head = [1, 2, 3, 4]
    queue = [[*head, 5, 6, 7], [*head, 5, 6, 7, 8, 9], [*head, 5, 6, 7, 8, 1], [*head, 5, 6, 7, 9]]
    assert shared_prefixes(cache, map(Waiting, queue)) == [SharedPrefix(1, (2,), (4,))]
    assert shared_prefixes(cache, map(Waiting, queue), min_saved=5) == []


def test_the_next_one_takes_over_when_the_first_is_aborted() -> None:
    cache = cached([1, 2])
    first = cache.open([1, 2, 3, 4, 5])
    queue = [Waiting([1, 2, 3, 4, 6]), Waiting([1, 2, 3, 4, 7]), Waiting([8])]
    assert cache.match(queue[0].tokens) == pt.Match(cached=2, pending=2)
    assert shared_prefixes(cache, queue) == [SharedPrefix(None, (0, 1), (2, 2))]
    first.commit(3)
    assert shared_prefixes(cache, queue) == [SharedPrefix(None, (0, 1), (1, 1))]
    assert shared_prefixes(cache, queue, min_saved=2) == []

    first.close()  # aborted: what it had not committed will not come
    assert cache.match(queue[0].tokens) == pt.Match(cached=3, pending=0)
    assert shared_prefixes(cache, queue) == [SharedPrefix(0, (1,), (1,))]
    second = cache.open(queue[0].tokens)
    assert second.cached_len == 3
    assert shared_prefixes(cache, queue[1:]) == [SharedPrefix(None, (0,), (1,))]
    second.commit(5)
    assert cache.match(queue[1].tokens) == pt.Match(cached=4, pending=0)
    assert shared_prefixes(cache, queue[1:]) == []
    second.close()
    cache.check()


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=7)
spaces = st.sampled_from(["", "a"])
paths = st.lists(st.tuples(spaces, tokens), max_size=6)


@st.composite
def situations(draw: st.DrawFn) -> tuple[pt.PrefixCache, list[Waiting]]:
    align: Any = draw(st.sampled_from(["token", "block"]))
    cache = pt.PrefixCache(200, 2, align=align)
    for namespace, prompt in draw(paths):
        sequence = cache.open(prompt, namespace=namespace)
        if draw(st.booleans()):
            sequence.commit(len(prompt))
            sequence.close()
        else:
            sequence.commit(draw(st.integers(sequence.cached_len, len(prompt))))
    waited = st.integers(0, 20)
    return cache, [
        Waiting(prompt, namespace, draw(waited))
        for namespace, prompt in draw(st.lists(st.tuples(spaces, tokens), max_size=9))
    ]


def common(left: Waiting, right: Waiting) -> int:
    if left.namespace != right.namespace:
        return 0
    count = 0
    for one, other in zip(left.tokens, right.tokens, strict=False):
        if one != other:
            break
        count += 1
    return count


def naive_depth_first(matches: list[tuple[str, Prompt]], depth: int = 0) -> list[int]:
    """One level of the trie a call, one token a level."""

    def below(members: list[int], depth: int) -> list[int]:
        ending = [i for i in members if len(matches[i][1]) == depth]
        branches: dict[Any, list[int]] = {}
        for index in members:
            namespace, match = matches[index]
            if len(match) > depth:
                branches.setdefault((namespace, match[depth]), []).append(index)
        heaviest = sorted(branches.values(), key=lambda branch: (-len(branch), branch[0]))
        return [index for branch in heaviest for index in below(branch, depth + 1)] + ending

    return below(list(range(len(matches))), 0)


@settings(max_examples=100, deadline=None)
@given(situations())
def test_orders_are_as_defined(situation: tuple[pt.PrefixCache, list[Waiting]]) -> None:
    cache, queue = situation
    match = [cache.match(one.tokens, namespace=one.namespace).cached for one in queue]
    everybody = range(len(queue))
    assert longest_match_first(cache, queue) == sorted(everybody, key=lambda i: (-match[i], i))
    clipped = [
        (str(one.namespace), (*one.tokens[:n],)) for one, n in zip(queue, match, strict=True)
    ]
    assert heaviest_subtree_first(cache, queue) == naive_depth_first(clipped)

    def ratio(index: int) -> Fraction:
        service = Fraction(max(1, len(queue[index].tokens) - match[index]), 4)
        return (int(queue[index].waited) + service) / service

    by_ratio = highest_response_ratio_first(cache, queue, tokens_per_second=4.0)
    assert by_ratio == sorted(everybody, key=lambda i: (-ratio(i), i))


@settings(max_examples=200, deadline=None)
@given(situations(), st.integers(1, 4))
def test_groups_are_as_defined(
    situation: tuple[pt.PrefixCache, list[Waiting]], min_saved: int
) -> None:
    """One after the other: who saves enough from an open sequence, or from one who computes."""
    cache, queue = situation
    matches = [cache.match(one.tokens, namespace=one.namespace) for one in queue]
    computing: list[int] = []
    waits_for: dict[int, tuple[int | None, int]] = {}
    for index, match in enumerate(matches):
        sources: dict[int | None, int] = {None: match.pending}
        for other in computing:
            agreed = common(queue[index], queue[other])
            sources[other] = agreed - agreed % cache.align - match.cached
        source = max(sources, key=lambda one: sources[one])
        if sources[source] >= min_saved:
            assert sum(saved >= min_saved for saved in sources.values()) == 1
            waits_for[index] = (source, sources[source])
        else:
            computing.append(index)

    groups = shared_prefixes(cache, queue, min_saved=min_saved)
    found = {
        index: (group.computes, saved)
        for group in groups
        for index, saved in zip(group.waits, group.saved, strict=True)
    }
    assert found == waits_for
    assert sum(len(group.waits) for group in groups) == len(waits_for)
    firsts = [g.waits[0] if g.computes is None else g.computes for g in groups]
    assert firsts == sorted(firsts)
    for group in groups:
        assert list(group.waits) == sorted(group.waits)
        if group.computes is None:  # all of them wait for the same tokens
            first = group.waits[0]
            for index in group.waits:
                agreed = common(queue[first], queue[index])
                assert agreed > matches[first].cached


def test_numpy_prompts_and_an_empty_queue() -> None:
    cache = cached([1, 2, 3])
    queue = [Waiting(np.array(prompt, np.int64)) for prompt in ([4], [1, 2])]
    assert longest_match_first(cache, queue) == [1, 0]
    assert longest_match_first(cache, []) == heaviest_subtree_first(cache, []) == []
    assert highest_response_ratio_first(cache, [], tokens_per_second=1) == []
    assert shared_prefixes(cache, []) == []


def test_a_thousand_prompts_each_the_beginning_of_the_next() -> None:
    """As deep as it gets: nothing here recurses."""
    prompt = list(range(1_500))
    cache = cached(prompt)
    queue = [Waiting(prompt[:length]) for length in range(1, 1_501)]
    assert heaviest_subtree_first(cache, queue) == list(range(1_499, -1, -1))
    assert shared_prefixes(pt.PrefixCache(1, 1), queue) == [
        SharedPrefix(0, tuple(range(1, 1_500)), (1,) * 1_499)
    ]


BAD_TIMES = [math.nan, math.inf, -0.5, "1", None, 10**400]


@pytest.mark.parametrize("bad", BAD_TIMES)
def test_times_and_rates_without_meaning_are_refused(bad: Any) -> None:
    cache = cached([1])
    queue = [Waiting([1]), Waiting([2], waited=bad)]
    with pytest.raises(InvalidArgument) as caught:
        highest_response_ratio_first(cache, queue, tokens_per_second=1.0)
    assert f"waited of request 1 is {bad!r}, expected" in str(caught.value)
    with pytest.raises(InvalidArgument) as caught:
        highest_response_ratio_first(cache, queue[:1], tokens_per_second=bad)
    assert f"tokens_per_second is {bad!r}, expected" in str(caught.value)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="tokens_per_second is 0, expected more than 0"):
        highest_response_ratio_first(cached(), [], tokens_per_second=0)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", None])
def test_a_least_saving_without_meaning_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"min_saved is {bad!r}"):
        shared_prefixes(cached(), [], min_saved=bad)


@pytest.mark.parametrize(
    "call",
    [
        longest_match_first,
        heaviest_subtree_first,
        shared_prefixes,
        lambda cache, queue: highest_response_ratio_first(cache, queue, tokens_per_second=1),
    ],
)
def test_bad_prompts_are_refused_and_nothing_changes(call: Any) -> None:
    cache = cached([1, 2, 3])
    before = cache.stats()
    with pytest.raises(InvalidTokens, match="empty prompt"):
        call(cache, [Waiting([1]), Waiting([])])
    with pytest.raises(InvalidNamespace, match=r"1\.5"):
        call(cache, [Waiting([1], namespace=1.5)])  # type: ignore[arg-type]
    call(cache, [Waiting([1, 2, 3, 4]), Waiting([1, 2])])
    assert cache.stats() == before
