"""What a replay found: as text, at most 100 columns wide, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from prefixtree.replay.meter import OPERATIONS, Timing


@dataclass(frozen=True)
class Settings:
    """How the requests are played."""

    block_size: int
    running: int
    """Most requests that run at a time."""
    disturb: float
    """Rate of aborts, of preemptions and of forgotten prefixes, each."""
    seed: int


@dataclass(frozen=True)
class Limit:
    """A capacity, and what was possible in it."""

    capacity: int
    """In tokens."""
    num_blocks: int
    hit_rate: float
    """Of the clairvoyant bound."""
    refused: int
    """Requests that are larger than the whole cache; their prompts count as missed."""


@dataclass(frozen=True)
class Run:
    """One policy at one capacity."""

    policy: str
    capacity: int
    hit_rate: float
    """Prompt tokens found in the cache, of those of the whole trace."""
    gap_points: float
    """What is missing to the bound, in percentage points."""
    evicted_tokens: int
    seconds: float
    gc_pauses: int
    longest_gc_pause_ms: float
    events: dict[str, int]
    operations: dict[str, Timing]


@dataclass(frozen=True)
class Replay:
    """All runs over the same requests, and what they were played with."""

    traces: list[str]
    requests: int
    prompt_tokens: int
    output_tokens: int
    footprint_tokens: int
    """Tokens that an unlimited cache holds in the end."""
    unlimited_hit_rate: float
    settings: Settings
    limits: list[Limit]
    runs: list[Run]


def as_json(replay: Replay) -> str:
    return json.dumps(asdict(replay), indent=1) + "\n"


def as_text(replay: Replay) -> str:
    return "\n".join(_lines(replay))


def _lines(replay: Replay) -> Iterator[str]:
    yield (
        f"{replay.requests:,} requests, {replay.prompt_tokens:,} prompt tokens,"
        f" {replay.output_tokens:,} of output"
    )
    settings = replay.settings
    yield (
        f"blocks of {settings.block_size}, at most {settings.running} running,"
        f" disturbed at {settings.disturb:g}, seed {settings.seed}"
    )
    yield (
        f"unlimited cache: {replay.unlimited_hit_rate:.2%} hit,"
        f" {replay.footprint_tokens:,} tokens kept"
    )
    for limit in replay.limits:
        runs = [run for run in replay.runs if run.capacity == limit.capacity]
        yield ""
        refused = f", {limit.refused:,} requests larger than that" if limit.refused else ""
        yield (
            f"{limit.capacity:,} tokens{refused}: no policy can hit more than {limit.hit_rate:.2%}"
        )
        yield f"{'policy':<10}{'hit':>8}{'gap, points':>13}" + "".join(
            f"{heading:>{width}}"
            for heading, width in (
                ("evicted tokens", 16),
                ("seconds", 10),
                ("gc pauses", 11),
                ("longest, ms", 13),
            )
        )
        for run in runs:
            yield (
                f"{run.policy:<10}{run.hit_rate:>8.2%}{run.gap_points:>13.2f}"
                f"{run.evicted_tokens:>16,}{run.seconds:>10.1f}"
                f"{run.gc_pauses:>11,}{run.longest_gc_pause_ms:>13.2f}"
            )
        yield "microseconds, mean/median/99%"
        yield f"{'':<10}" + "".join(f"{name:>15}" for name in OPERATIONS)
        for run in runs:
            yield f"{run.policy:<10}" + "".join(
                f"{_timing(run.operations.get(name)):>15}" for name in OPERATIONS
            )
        for run in runs:
            happened = [f"{count:,} {_SAID[name]}" for name, count in run.events.items() if count]
            if happened:
                yield f"{run.policy:<10}{', '.join(happened)}"


_SAID = {
    "refused": "refused",
    "aborted": "aborted",
    "preempted": "preempted",
    "forgotten": "prefixes forgotten",
    "cut_short": "outputs cut short",
}


def _timing(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return "/".join(_short(us) for us in (timing.mean_us, timing.median_us, timing.p99_us))


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 10 else f"{us:.0f}"
