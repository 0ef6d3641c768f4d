"""The replay: every policy at every capacity, against what was possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
from tqdm import tqdm

from prefixtree.replay.bound import Accesses, accesses, clairvoyant_hits
from prefixtree.replay.meter import Meter, MeteredCache, gc_pauses
from prefixtree.replay.player import EVENTS, Player, fits
from prefixtree.replay.record import Recorder
from prefixtree.replay.report import Limit, Replay, Run, Settings
from prefixtree.replay.request import Request

DEFAULT_FRACTIONS = 0.02, 0.05, 0.1, 0.2, 0.4
"""Of what an unlimited cache would hold."""


class UnusableCapacity(ValueError):
    """A capacity that is less than a block."""


def replay(
    requests: list[Request],
    *,
    traces: list[Path],
    policies: Iterable[str],
    capacities: Iterable[int] | None,
    settings: Settings,
    recorder: Recorder | None = None,
) -> Replay:
    """Plays the requests under each policy at each capacity, in tokens, with a progress bar.

    `capacities` None stands for some fractions of what the requests need to evict nothing, made
    large enough for each request by itself. A `recorder` watches the first run. Raises
    `UnusableCapacity`, and what a broken cache raises: `BrokenInvariant`, `DoubleFree`,
    `ForeignBlock`, `CacheBroken`.
    """
    access = accesses(requests)
    total = sum(request.input_length for request in requests)
    if capacities is None:
        capacities = _default_capacities(access, requests, settings.block_size)
    limits = [
        _limit(requests, access, capacity, settings.block_size, total)
        for capacity in sorted(set(capacities))
    ]
    policies = list(policies)
    runs = []
    with tqdm(total=len(requests) * len(limits) * len(policies), unit=" requests") as bar:
        for limit in limits:
            for policy in policies:
                bar.set_description(f"{policy}, {limit.capacity:,} tokens")
                ticking = _ticking(requests, bar.update)
                runs.append(_run(ticking, policy, limit, settings, total, recorder))
                recorder = None
    return Replay(
        traces=[str(path) for path in traces],
        requests=len(requests),
        prompt_tokens=total,
        output_tokens=sum(request.output_length for request in requests),
        footprint_tokens=access.footprint,
        unlimited_hit_rate=clairvoyant_hits(access, access.footprint) / total,
        settings=settings,
        limits=limits,
        runs=runs,
    )


def _default_capacities(access: Accesses, requests: list[Request], block_size: int) -> list[int]:
    least = max(request.blocks(block_size) for request in requests)
    blocks = (int(access.footprint * fraction) // block_size for fraction in DEFAULT_FRACTIONS)
    return [max(least, count) * block_size for count in blocks]


def _limit(
    requests: list[Request], access: Accesses, capacity: int, block_size: int, total: int
) -> Limit:
    num_blocks = capacity // block_size
    if not num_blocks:
        raise UnusableCapacity(
            f"a capacity of {capacity} tokens, expected at least a block of {block_size}"
        )
    served = np.array([fits(request, num_blocks, block_size) for request in requests])
    hits = clairvoyant_hits(access, num_blocks * block_size, served)
    return Limit(capacity, num_blocks, hits / total, len(requests) - int(served.sum()))


def _run(
    requests: Iterable[Request],
    policy: str,
    limit: Limit,
    settings: Settings,
    total: int,
    recorder: Recorder | None,
) -> Run:
    meter = Meter()
    cache = MeteredCache(limit.num_blocks, settings.block_size, policy, meter)
    if recorder:
        requests = recorder.watching(requests, cache)
    player = Player(cache, settings.running, settings.disturb, settings.seed)
    start = perf_counter()
    with gc_pauses() as pauses:
        player.play(requests)
    seconds = perf_counter() - start
    stats = cache.stats()
    player.end()
    hit_rate = stats.hit_tokens / total
    return Run(
        policy=policy,
        capacity=limit.capacity,
        hit_rate=hit_rate,
        gap_points=100 * (limit.hit_rate - hit_rate),
        evicted_tokens=stats.evicted_tokens,
        seconds=seconds,
        gc_pauses=pauses.count,
        longest_gc_pause_ms=pauses.longest_ms,
        events={name: player.events[name] for name in EVENTS},
        operations=meter.timings(),
    )


def _ticking(requests: Iterable[Request], tick: Callable[[], object]) -> Iterator[Request]:
    for request in requests:
        yield request
        tick()
