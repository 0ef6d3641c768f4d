"""Work items: pieces of segments with the range of rows that attend to them.

A segment that all its rows see whole is one item without a mask. Where causality or a window hides
a part of it from some of them, its queries are cut into tiles, and for each tile the node falls
into up to three pieces: one that every query of the tile sees whole, and one before and one behind
it of which each query sees a part. Only those two need a mask.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attention.forest import Int64Array
from attention.ranges import cut, expand, extremes
from attention.segments import Segments

BoolArray = npt.NDArray[np.bool_]

# Half of a tile's square on the causal diagonal is wasted, and each tile is an item of its own.
QUERY_TILE = 256
# Sequences with no more queries than this share tiles with their neighbours.
SHORT_QUERY_LEN = 16
# Up to this many (query, token) pairs, one masked item is cheaper than up to three pieces.
SMALL_MASK = QUERY_TILE * QUERY_TILE


class WorkItems(NamedTuple):
    """I work items as arrays: in each, a range of queries attends to a run of tokens of one node.

    Attributes:
        segment: int64 [I].
        kv_begin: int64 [I], the first token, counted from the first token of the node.
        kv_len: int64 [I], number of tokens, >= 1.
        row_begin, row_end: int64 [I], range of queries in depth-first order.
        masked: bool [I], some query of the range does not see all of these tokens.
        round: int64 [I], the items of one round have no query in common.
    """

    segment: Int64Array
    kv_begin: Int64Array
    kv_len: Int64Array
    row_begin: Int64Array
    row_end: Int64Array
    masked: BoolArray
    round: Int64Array

    @property
    def num_rows(self) -> Int64Array:
        """int64 [I], queries of each item."""
        return self.row_end - self.row_begin

    def take(self, index: Int64Array) -> "WorkItems":
        """The items at `index`, in its order."""
        return WorkItems(
            segment=self.segment.take(index),
            kv_begin=self.kv_begin.take(index),
            kv_len=self.kv_len.take(index),
            row_begin=self.row_begin.take(index),
            row_end=self.row_end.take(index),
            masked=self.masked.take(index),
            round=self.round.take(index),
        )


def work_items(segments: Segments, window: int | None, sink_tokens: int) -> WorkItems:
    """The work items that cover, once each, all that every query sees.

    A piece that no query sees (outside every window, or ahead of all queries) makes no item.
    O(items + their queries).
    """
    begin, end = segments.row_begin, segments.row_end
    whole = WorkItems(
        segment=np.arange(len(begin)),
        kv_begin=np.zeros_like(begin),
        kv_len=segments.length,
        row_begin=begin,
        row_end=end,
        masked=np.zeros(len(begin), np.bool_),
        round=segments.round * _PARTS,
    )
    # On a path, a sequence's only query is on the last token. In sets it may stand anywhere.
    single = len(segments.position) == len(segments.run_end)
    if window is None and segments.on_paths and single:
        return whole
    low, high = extremes(segments.position, begin, end)
    stop = segments.start + segments.length
    seen_whole = stop <= low + 1
    if window is not None:
        seen_whole &= (high - window < segments.start) | (stop <= sink_tokens)
    if seen_whole.all():
        return whole
    pieces = _pieces(segments, np.flatnonzero(~seen_whole), window, sink_tokens)
    whole = whole.take(np.flatnonzero(seen_whole))
    return WorkItems(*(np.concatenate(columns) for columns in zip(whole, pieces, strict=True)))


# The parts of a node for one tile: all in one item, or the sinks that no window reaches; before, in
# and behind what all queries see.
_PARTS = 5
_SINKS = 1
_SEEN_BY_ALL = 3
BEHIND = 4


def _pieces(segments: Segments, of: Int64Array, window: int | None, sink_tokens: int) -> WorkItems:
    """Work items of the segments `of`, that some of their rows do not see whole."""
    segment, row_begin, row_end = _tiles(segments, of)
    low, high = extremes(segments.position, row_begin, row_end)
    start = segments.start[segment]
    stop = start + segments.length[segment]
    # Some query of the tile sees [first, last), all of them see [inner, outer) and the sinks.
    first = inner = sinks = start
    outer, last = np.minimum(low + 1, stop), np.minimum(high + 1, stop)
    if window is not None:
        first, inner = np.maximum(low + 1 - window, start), np.maximum(high + 1 - window, start)
        sinks = np.minimum(np.minimum(first, stop), sink_tokens)
    seen_whole = (first == inner) & (outer == last)
    small = (row_end - row_begin) * (last - first) <= SMALL_MASK
    in_one = seen_whole | small | (inner >= outer)
    split = ~in_one
    # The first query's own token is left to the masked piece: pieces then end where tiles do.
    outer = np.minimum(low, stop)
    begin, end = (
        np.stack((first, start, first, inner, outer)),
        np.stack((last, sinks, inner, outer, last)),
    )
    chosen = np.stack((in_one, np.ones_like(split), split, split, split))
    part, tile = np.nonzero(chosen & (begin < end))
    kv_begin, kv_end = begin[part, tile], end[part, tile]
    segment = segment[tile]
    return WorkItems(
        segment=segment,
        kv_begin=kv_begin - start[tile],
        kv_len=kv_end - kv_begin,
        row_begin=row_begin[tile],
        row_end=row_end[tile],
        masked=~seen_whole[tile] & (part != _SINKS) & (part != _SEEN_BY_ALL),
        round=segments.round[segment] * _PARTS + part,
    )


def _tiles(segments: Segments, of: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut the rows of the segments `of` into tiles; segment, first row and end of each tile."""
    begin, end = segments.row_begin[of], segments.row_end[of]
    cuts = _tile_ends(segments)
    first_cut = np.searchsorted(cuts, begin, side="right")
    tiles = np.searchsorted(cuts, end, side="left") - first_cut + 1
    index, ordinal = expand(tiles)
    tile_begin, tile_end = begin[index], end[index]
    inner = np.flatnonzero(ordinal > 0)
    # Between two tiles of one node lies a cut: the end of the one, the begin of the other.
    tile_begin[inner] = tile_end[inner - 1] = cuts[first_cut[index[inner]] + ordinal[inner] - 1]
    return of[index], tile_begin, tile_end


def _tile_ends(segments: Segments) -> Int64Array:
    """Where tiles end: around long sequences and, in and between them, every QUERY_TILE queries."""
    is_long = np.diff(segments.run_end, prepend=0) > SHORT_QUERY_LEN
    run_end = segments.run_end[np.append(is_long[1:] | is_long[:-1], True)]
    run_begin = np.append(0, run_end[:-1])
    tiles = cut(run_end - run_begin, QUERY_TILE)
    return run_begin[tiles.source] + tiles.begin + tiles.size
