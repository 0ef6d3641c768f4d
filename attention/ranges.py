"""Vectorised work on ranges of arrays."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array


def extremes(
    position: Int64Array, begin: Int64Array, end: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Lowest and highest position in each (non-empty) range of rows."""
    # reduceat also reduces from the end of each range to the begin of the next: in this order,
    # all those gaps together are no longer than the array. It takes no index at the array's end.
    by_begin = np.argsort(begin, kind="stable")
    bounds = np.column_stack((begin[by_begin], end[by_begin])).ravel()
    padded = np.append(position, position[-1])
    low, high = np.empty_like(begin), np.empty_like(begin)
    low[by_begin] = np.minimum.reduceat(padded, bounds)[::2]
    high[by_begin] = np.maximum.reduceat(padded, bounds)[::2]
    return low, high


def expand(counts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Index i, counts[i] times, for every i; and beside it 0, 1, ... counts[i] - 1."""
    index = np.arange(len(counts)).repeat(counts)
    ordinal = np.arange(len(index))
    ordinal -= (counts.cumsum() - counts).take(index)
    return index, ordinal


class Cut(NamedTuple):
    """Pieces of lengths: index of the length, ordinal among its pieces, begin within it, size."""

    source: Int64Array
    ordinal: Int64Array
    begin: Int64Array
    size: Int64Array


def cut(length: Int64Array, limit: int | Int64Array) -> Cut:
    """Cut each length into pieces of the size of its limit, the last one of what remains."""
    source, ordinal = expand(-(-length // limit))
    if isinstance(limit, np.ndarray):
        limit = limit.take(source)
    begin = ordinal * limit
    return Cut(source, ordinal, begin, np.minimum(limit, length.take(source) - begin))
