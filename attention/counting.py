"""What a plan reads, counted: each token once, and what reading every path alone would take."""

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand, extremes
from attention.segments import Segments


def tokens_read(problem: Problem, segments: Segments) -> int:
    """KV tokens that some query sees or that lie between two such, each segment's once."""
    low, high = extremes(segments.position, segments.row_begin, segments.row_end)
    return int(_seen(problem, segments.start, segments.length, low, high).sum())


def tokens_per_path(problem: Problem, segments: Segments) -> int:
    """The same, but each token once for every sequence (run of rows) that sees it."""
    start, length, low, high = _by_run(segments)
    return int(_seen(problem, start, length, low, high).sum())


def pairs_seen(problem: Problem, segments: Segments) -> int:
    """Pairs of a query and a KV token that it sees."""
    start, length, low, high = _by_run(segments)
    pairs = _sum_of_clipped(low + 1 - start, high + 1 - start, length)
    if problem.window is not None:
        behind = start + problem.window
        hidden = length - np.clip(problem.sink_tokens - start, 0, length)
        # Sinks are the first tokens of a segment: what leaves the window hides those behind them.
        low, high = low + 1 - behind, high + 1 - behind
        sinks = length - hidden
        pairs = pairs - _sum_of_clipped(low - sinks, high - sinks, hidden)
    return int(pairs.sum())


def num_sequences(segments: Segments) -> int:
    """Sequences that have queries."""
    run_begin = np.append(0, segments.run_end[:-1])
    return len(np.unique(segments.query[run_begin]))


def _by_run(segments: Segments) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Start, length, first and last position of queries, of each segment for each run of rows."""
    run_begin = np.append(0, segments.run_end[:-1])
    first = np.searchsorted(run_begin, segments.row_begin)
    last = np.searchsorted(run_begin, segments.row_end)
    segment, ordinal = expand(last - first)
    run = first[segment] + ordinal
    low = segments.position[run_begin[run]]
    high = segments.position[segments.run_end[run] - 1]
    return segments.start[segment], segments.length[segment], low, high


def _sum_of_clipped(first: Int64Array, last: Int64Array, most: Int64Array) -> Int64Array:
    """The sum of x from `first` to `last`, each x clipped to 0 .. `most`."""

    def up_to(x: Int64Array) -> Int64Array:
        inside = np.clip(x, 0, most)
        total: Int64Array = inside * (inside + 1) // 2 + most * np.maximum(x - most, 0)
        return total

    total: Int64Array = up_to(last) - up_to(first - 1)
    return total


def _seen(
    problem: Problem, start: Int64Array, length: Int64Array, low: Int64Array, high: Int64Array
) -> Int64Array:
    """Tokens of segments from the first to the last that queries at low to high see; sinks too."""
    last = np.minimum(start + length, high + 1)
    sinks, first = np.zeros_like(start), start
    if problem.window is not None:
        sinks = np.clip(problem.sink_tokens - start, 0, np.maximum(last - start, 0))
        first = np.maximum(start + sinks, low + 1 - problem.window)
    seen: Int64Array = sinks + np.maximum(last - first, 0)
    return seen
