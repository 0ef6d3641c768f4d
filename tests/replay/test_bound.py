"""The clairvoyant bound against all that can be done, and against what is done."""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator import policy_names
from prefixtree.replay.bound import accesses, clairvoyant_hits
from prefixtree.replay.meter import Meter, MeteredCache
from prefixtree.replay.player import Player, fits
from prefixtree.replay.request import Request
from tests.replay.strategies import traces

Path = tuple[int, ...]


def paths(request: Request) -> tuple[list[Path], list[Path]]:
    """All prefixes of the prompt, and those of prompt and output: one for each token."""
    tokens = tuple(request.tokens().tolist())
    prefixes = [tokens[:length] for length in range(1, len(tokens) + 1)]
    return prefixes[: request.input_length], prefixes


def most_hits(requests: list[Request], capacity: int) -> int:
    """By trying every set of tokens that a tree cache could keep between two requests."""
    steps = [paths(request) for request in requests if request.input_length <= capacity]

    @cache
    def best(step: int, kept: frozenset[Path]) -> int:
        if step == len(steps):
            return 0
        prompt, whole = steps[step]
        hits = len(kept.intersection(prompt))
        useful = {path for later, _ in steps[step + 1 :] for path in later}
        return hits + max(
            best(step + 1, frozenset(subset))
            for subset in subsets((kept | set(whole)) & useful)
            if closed(subset) and len(subset) <= capacity and room(subset, kept, prompt, whole)
        )

    def room(
        subset: set[Path], kept: frozenset[Path], prompt: list[Path], whole: list[Path]
    ) -> bool:
        """Beside the prompt there is room for what is kept through the request."""
        return len((subset & kept).difference(whole).union(prompt)) <= capacity

    return best(0, frozenset())


def subsets(items: set[Path]) -> list[set[Path]]:
    ordered = sorted(items)
    sizes = range(len(ordered) + 1)
    return [set(c) for c in chain.from_iterable(combinations(ordered, n) for n in sizes)]


def closed(kept: set[Path]) -> bool:
    return all(len(path) == 1 or path[:-1] in kept for path in kept)


def request(prompt: list[int], output: list[int] | None = None) -> Request:
    tokens = prompt + (output or [])
    return Request(
        0.0, 0, len(prompt), len(output or []), np.array(tokens), np.ones(len(tokens), np.int64)
    )


@given(traces(max_requests=4, block=3, max_blocks=2), st.integers(1, 8))
def test_it_is_what_the_best_tree_cache_hits(requests: list[Request], capacity: int) -> None:
    assert clairvoyant_hits(accesses(requests), capacity) == most_hits(requests, capacity)


@settings(max_examples=300)
@given(
    traces(max_requests=12, max_blocks=5),
    st.integers(1, 20),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 4),
)
def test_no_policy_hits_more(
    requests: list[Request], num_blocks: int, block_size: int, running: int
) -> None:
    served = np.array([fits(request, num_blocks, block_size) for request in requests])
    bound = clairvoyant_hits(accesses(requests), num_blocks * block_size, served)
    for policy in policy_names():
        store = MeteredCache(num_blocks, block_size, policy, Meter())
        player = Player(store, running, disturb=0.0, seed=0)
        player.play(requests)
        assert store.stats().hit_tokens <= bound
        assert player.events["refused"] == (~served).sum()
        store.check()
        player.end()


@given(traces(max_requests=12))
def test_with_room_for_all_it_is_the_unlimited_cache(requests: list[Request]) -> None:
    access = accesses(requests)
    store = MeteredCache(1000, 1, "lru", Meter())
    # One at a time, so that an output is there before the next request.
    Player(store, running=1, disturb=0.0, seed=0).play(requests)
    assert store.stats().cached_tokens == access.footprint
    assert store.stats().hit_tokens == clairvoyant_hits(access, access.footprint)
    assert store.stats().hit_tokens == clairvoyant_hits(access, 10**9)
    assert store.stats().query_tokens == (access.tokens * access.in_prompt).sum()


def test_it_keeps_what_comes_first_and_part_of_what_comes_later() -> None:
    a, b, c = (Request(0.0, 0, 3, 0, np.array([first]), np.array([3])) for first in (1, 11, 21))
    access = accesses([a, b, c, b, a])
    assert len(access.piece) == 5
    # Beside c there is room for 2 tokens: b comes first.
    assert [clairvoyant_hits(access, capacity) for capacity in (3, 5, 6, 8, 9)] == [0, 2, 3, 5, 6]


def test_an_output_counts_only_where_a_prompt_has_it() -> None:
    again = [request([1], [2, 3]), request([1], [2, 3]), request([1, 2, 3, 4])]
    assert clairvoyant_hits(accesses(again), 100) == 1 + 3


def test_requests_that_are_not_served_do_not_count() -> None:
    access = accesses([request([1, 2]), request([1, 2]), request([1, 2])])
    assert clairvoyant_hits(access, 2) == 4
    assert clairvoyant_hits(access, 2, np.array([True, False, True])) == 2
    assert clairvoyant_hits(access, 1) == 0


@pytest.mark.parametrize("capacity", [1, 3, 7, 50])
def test_more_room_never_hits_less(capacity: int) -> None:
    requests = [request([n % 7, n % 5 + 10, n % 3 + 20]) for n in range(200)]
    access = accesses(requests)
    assert clairvoyant_hits(access, capacity) <= clairvoyant_hits(access, capacity + 3)
