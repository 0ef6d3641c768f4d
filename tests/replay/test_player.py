"""What the player does to a cache."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator import BrokenInvariant, policy_names
from prefixtree.replay.meter import OPERATIONS, Meter, MeteredCache, gc_pauses
from prefixtree.replay.player import Player
from prefixtree.replay.request import Request
from tests.replay.strategies import traces


def request(session: int, prompt: list[int], output: list[int]) -> Request:
    tokens = np.array(prompt + output)
    return Request(0.0, session, len(prompt), len(output), tokens, np.ones(len(tokens), np.int64))


@given(
    traces(max_requests=15, max_blocks=5),
    st.integers(4, 20),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 4),
    st.integers(0, 100),
)
def test_a_disturbed_replay_ends_clean(
    requests: list[Request], num_blocks: int, block_size: int, running: int, seed: int
) -> None:
    for policy in policy_names():
        store = MeteredCache(num_blocks, block_size, policy, Meter())
        player = Player(store, running, disturb=0.4, seed=seed)
        player.play(requests)
        store.check()
        assert store.stats().open_sequences == 0
        player.end()
        assert store.stats().free_blocks == num_blocks


def test_every_disturbance_happens_and_the_same_seed_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resumed = []
    resume = MeteredCache._resume
    monkeypatch.setattr(
        MeteredCache, "_resume", lambda *args: (resumed.append(1), resume(*args))[1]
    )
    requests = [request(n, [n % 7, n % 3 + 10, n % 2 + 20], [100 + n]) for n in range(300)]

    def played(seed: int) -> tuple[dict[str, int], int]:
        store = MeteredCache(16, 2, "lru", Meter())
        player = Player(store, 4, 0.2, seed)
        player.play(requests)
        return dict(player.events), store.stats().hit_tokens

    events, hits = played(1)
    assert len(resumed) == events["preempted"]
    assert played(1) == (events, hits)
    assert played(2) != (events, hits)
    for name in ("aborted", "preempted", "forgotten"):
        assert 30 < events[name] < 90


def test_an_undisturbed_replay_computes_and_caches_everything() -> None:
    store = MeteredCache(100, 2, "lru", Meter())
    player = Player(store, 8, 0.0, 0)
    player.play([request(0, [1, 2, 3], [4, 5]), request(1, [1, 2, 9], [])])
    assert store.match([1, 2, 3, 4, 5]).cached == 5
    assert store.match([1, 2, 9]).cached == 3
    assert not player.events


def test_a_turn_waits_for_the_one_before() -> None:
    turns = [request(0, [1, 2], [3, 4]), request(0, [1, 2, 3, 4, 5], [])]
    store = MeteredCache(100, 2, "lru", Meter())
    Player(store, 8, 0.0, 0).play(turns)
    assert store.stats().hit_tokens == 4
    others = [turns[0], request(1, [1, 2, 3, 4, 5], [])]
    store = MeteredCache(100, 2, "lru", Meter())
    Player(store, 8, 0.0, 0).play(others)
    assert store.stats().hit_tokens == 2


@pytest.mark.parametrize(("running", "most"), [(1, 1), (3, 3), (50, 5)])
def test_as_many_run_as_may_and_as_fit(
    running: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MeteredCache(10, 2, "lru", Meter())
    open_at_once = []
    close = MeteredCache._close

    def counted(self: MeteredCache, *args: object) -> None:
        open_at_once.append(self.stats().open_sequences)
        close(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(MeteredCache, "_close", counted)
    Player(store, running, 0.0, 0).play([request(n, [10 * n], [10 * n + 1]) for n in range(20)])
    assert max(open_at_once) == most


def test_a_request_larger_than_the_cache_is_refused() -> None:
    store = MeteredCache(2, 2, "lru", Meter())
    player = Player(store, 2, 0.0, 0)
    player.play([request(0, [1, 2, 3], [4]), request(1, [1, 2], [4, 5])])
    assert player.events["refused"] == 1
    assert store.stats().opens == 1


def test_a_leaked_block_is_found_at_the_end() -> None:
    store = MeteredCache(4, 2, "lru", Meter())
    player = Player(store, 2, 0.0, 0)
    store.open([1]).commit(1)
    with pytest.raises(BrokenInvariant, match="3 of 4 blocks are free and 1 sequences open"):
        player.end()


def test_each_operation_is_timed_by_itself() -> None:
    meter = Meter()
    store = MeteredCache(4, 2, "lru", meter)
    Player(store, 2, 0.0, 0).play([request(n, [n, 50, 51], [n + 100]) for n in range(10)])
    timings = meter.timings()
    assert tuple(timings) == OPERATIONS
    assert [timings[name].calls for name in ("match", "open", "append", "close")] == [10] * 4
    assert timings["commit"].calls == 20
    assert 0 < timings["evict"].calls <= 20
    for timing in timings.values():
        assert 0 < timing.median_us <= timing.p99_us


def test_time_in_a_timed_call_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1_000, 6_000, 10_000, 10_000, 12_000])
    monkeypatch.setattr("prefixtree.replay.meter.perf_counter_ns", lambda: next(clock))
    meter = Meter()
    meter.call("open", lambda: meter.call("evict", lambda: None))
    with pytest.raises(ZeroDivisionError):
        meter.call("close", lambda: 1 / 0)
    means = {name: timing.mean_us for name, timing in meter.timings().items()}
    assert means == {"open": 5, "evict": 5, "close": 2}


def test_pauses_are_counted_while_the_context_is_open() -> None:
    with gc_pauses() as pauses:
        gc.collect()
        gc.collect()
    seen = pauses.count
    gc.collect()
    assert pauses.count == seen >= 2
    assert pauses.longest_ms > 0


def test_a_request_whose_own_cached_prefix_fills_the_cache_still_runs() -> None:
    store = MeteredCache(3, 2, "lru", Meter())
    player = Player(store, 2, 0.0, 0)
    # The first three leave a path of three half-filled blocks.
    player.play([request(n, list(range(n + 1)), []) for n in range(3)])
    assert store.stats().cached_tokens == 3
    assert store.stats().free_blocks == 0
    player.play([request(3, [0, 1, 2, 3], [4])])
    assert store.match([0, 1, 2, 3, 4]).cached == 5
    assert not player.events


def test_wrong_counts_of_an_empty_cache_are_found_at_the_end() -> None:
    store = MeteredCache(4, 2, "lru", Meter())
    store._pins.evictable_tokens += 1
    with pytest.raises(BrokenInvariant, match="1 evictable tokens, recount 0"):
        Player(store, 2, 0.0, 0).end()
