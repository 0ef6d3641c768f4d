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
    run_begin = np.append(0, segments.run_end[:-1])
    first = np.searchsorted(run_begin, segments.row_begin)
    last = np.searchsorted(run_begin, segments.row_end)
    segment, ordinal = expand(last - first)
    run = first[segment] + ordinal
    low = segments.position[run_begin[run]]
    high = segments.position[segments.run_end[run] - 1]
    start, length = segments.start[segment], segments.length[segment]
    return int(_seen(problem, start, length, low, high).sum())


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
