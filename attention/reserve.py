"""Plans that may advance: which ones, and which segments their rows grow at the end of."""

from numbers import Integral

import numpy as np

from attention.errors import PlanMismatch
from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand, extremes
from attention.segments import Segments


def check_reserve(problem: Problem, segments: Segments, reserve: int) -> None:
    """Raise PlanMismatch where segments cannot be advanced so often.

    What a query sees of its segments must not change by its moving on, so none may stand before
    the last token of one. O(M log M + R).
    """
    if not isinstance(reserve, Integral) or reserve < 0:
        raise PlanMismatch(f"reserve is {reserve!r}, expected an integer, at least 0")
    if not reserve:
        return
    if problem.batch_invariant:
        raise PlanMismatch(f"reserve is {reserve}, expected 0 in a batch-invariant plan")
    queries, rows = segments.num_queries, len(segments.query)
    if not queries == rows == len(segments.run_end):
        raise PlanMismatch(
            f"reserve is {reserve} for {queries} queries of {len(segments.run_end)} sequences in "
            f"{rows} places, expected 0: only sequences with one query in one place advance"
        )
    if segments.on_paths:
        return  # where a sequence's only query is on the last token of its path
    low, _ = extremes(segments.position, segments.row_begin, segments.row_end)
    end = segments.start + segments.length
    hidden = end > low + 1
    if hidden.any():
        first = int(np.argmax(hidden))
        raise PlanMismatch(
            f"reserve is {reserve} and a query at position {low[first]} is before the end of its "
            f"node, {end[first]}, expected 0: only sequences that see all their tokens advance"
        )


def grown_segments(segments: Segments) -> Int64Array:
    """int64 [R], the deepest segment of each row: it gives new tokens their weights.

    O(M log M + rows of all segments together).
    """
    by_round = np.argsort(segments.round, kind="stable")
    index, ordinal = expand((segments.row_end - segments.row_begin)[by_round])
    grown = np.empty(len(segments.query), np.int64)
    grown[segments.row_begin[by_round][index] + ordinal] = by_round[index]
    return grown
