"""A trace of real requests, played through several caches in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter_ns
from typing import NamedTuple

from prefixtree.bench.measure import Clock, Timings, in_turn
from prefixtree.bench.operations import timed
from prefixtree.bench.peers import Peer
from prefixtree.columns import Int32s


class Played(NamedTuple):
    """What a trace took at one block size."""

    block_size: int
    requests: int
    tokens: int
    """Of all prompts."""
    steps: dict[str, dict[str, dict[str, float]]]
    """Step, cache, and then what `Timings.summary` says. `evict` counts only requests that had to;
    `request` is all steps of a request but `match`, for `open` looks again."""
    hit_tokens: dict[str, int]


def play(
    prompts: Iterable[Int32s],
    makers: Sequence[type[Peer]],
    pool_tokens: int,
    block_size: int,
    clock: Clock = perf_counter_ns,
) -> Played:
    """Each prompt through each cache: match, evict what is lacking, open, commit, close.

    `peers` says what these comprise. One request runs at a time, and its answer is not cached.
    """
    peers = [make(pool_tokens, block_size) for make in makers]
    timings = Timings(clock)
    hits = dict.fromkeys((peer.name for peer in peers), 0)
    requests = tokens = 0
    for prompt in prompts:
        for peer in in_turn(peers, requests):
            own = peer.prepare(prompt)
            matched = timings.time("match", peer.name, peer.match, own)
            hits[peer.name] += matched
            spent = 0.0
            lacking = peer.lacking(own, matched)
            if lacking:
                timings.time("evict", peer.name, peer.evict, lacking)
                spent += timings.last("evict", peer.name)
            request = timed(timings, peer, "open", peer.open, own)
            timed(timings, peer, "commit", peer.commit, request)
            timed(timings, peer, "close", peer.close, request)
            apart = [s for s in ("open", "commit", "close") if s in peer.steps]
            inserted = sum(timings.last(step, peer.name) for step in apart if step != "close")
            timings.note("open + commit", peer.name, inserted)
            spent += sum(timings.last(step, peer.name) for step in apart)
            timings.note("request", peer.name, spent)
        requests += 1
        tokens += len(prompt)
    steps = ("match", "open", "commit", "open + commit", "close", "evict", "request")
    return Played(
        block_size, requests, tokens, {step: timings.summary(step) for step in steps}, hits
    )
