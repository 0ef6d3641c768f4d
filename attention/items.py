"""Work items: pieces of nodes with the range of queries that attend to them.

A node that all its queries see whole is one item without a mask. Where causality or a window hides
a part of it from some of them, its queries are cut into tiles, and for each tile the node falls
into up to three pieces: one that every query of the tile sees whole, and one before and one behind
it of which each query sees a part. Only those two need a mask.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attention.forest import ForestArrays, Int64Array
from attention.order import QueryOrder

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
        node: int64 [I].
        kv_begin: int64 [I], the first token, counted from the first token of the node.
        kv_len: int64 [I], number of tokens, >= 1.
        query_begin, query_end: int64 [I], range of queries in depth-first order.
        masked: bool [I], some query of the range does not see all of these tokens.
        round: int64 [I], the items of one round have no query in common.
    """

    node: Int64Array
    kv_begin: Int64Array
    kv_len: Int64Array
    query_begin: Int64Array
    query_end: Int64Array
    masked: BoolArray
    round: Int64Array

    @property
    def num_queries(self) -> Int64Array:
        """int64 [I], queries of each item."""
        return self.query_end - self.query_begin

    def take(self, index: Int64Array | slice) -> "WorkItems":
        """The items at `index`, in its order."""
        return WorkItems(
            node=self.node[index],
            kv_begin=self.kv_begin[index],
            kv_len=self.kv_len[index],
            query_begin=self.query_begin[index],
            query_end=self.query_end[index],
            masked=self.masked[index],
            round=self.round[index],
        )


def work_items(forest: ForestArrays, order: QueryOrder, window: int | None) -> WorkItems:
    """The work items that cover, once each, all that every query sees.

    A piece that no query sees (outside every window) makes no item. O(items + their queries).
    """
    node = np.flatnonzero(order.end > order.begin)
    begin, end = order.begin[node], order.end[node]
    whole = WorkItems(
        node=node,
        kv_begin=np.zeros_like(node),
        kv_len=forest.length[node],
        query_begin=begin,
        query_end=end,
        masked=np.zeros(len(node), np.bool_),
        round=order.depth[node] * _PARTS,
    )
    # A query on its sequence's last token sees all before it.
    if window is None and len(order.position) == len(order.sequence_end):
        return whole
    low, high = _extremes(order.position, begin, end)
    seen_whole = forest.start[node] + forest.length[node] <= low + 1
    if window is not None:
        seen_whole &= high - window < forest.start[node]
    if seen_whole.all():
        return whole
    pieces = _pieces(forest, order, node[~seen_whole], window)
    whole = whole.take(np.flatnonzero(seen_whole))
    return WorkItems(*(np.concatenate(columns) for columns in zip(whole, pieces, strict=True)))


def tokens_read(forest: ForestArrays, order: QueryOrder, window: int | None) -> int:
    """KV tokens from the first to the last that any query sees, summed over the nodes."""
    node = np.flatnonzero(order.end > order.begin)
    if window is None:
        return int(forest.length[node].sum())
    low, _ = _extremes(order.position, order.begin[node], order.end[node])
    hidden = np.clip(low + 1 - window - forest.start[node], 0, forest.length[node])
    return int((forest.length[node] - hidden).sum())


# The parts of a node for one tile: all in one item, or before, in and behind what all queries see.
_PARTS = 4
_SEEN_BY_ALL = 2


def _pieces(
    forest: ForestArrays, order: QueryOrder, nodes: Int64Array, window: int | None
) -> WorkItems:
    """Work items of nodes that some of their queries do not see whole."""
    node, query_begin, query_end = _tiles(order, nodes)
    low, high = _extremes(order.position, query_begin, query_end)
    start = forest.start[node]
    stop = start + forest.length[node]
    # Some query of the tile sees [first, last), all of them see [inner, outer).
    first = inner = start
    outer, last = np.minimum(low + 1, stop), np.minimum(high + 1, stop)
    if window is not None:
        first, inner = np.maximum(low + 1 - window, start), np.maximum(high + 1 - window, start)
    seen_whole = (first == inner) & (outer == last)
    small = (query_end - query_begin) * (last - first) <= SMALL_MASK
    in_one = seen_whole | small | (inner >= outer)
    split = ~in_one
    # The first query's own token is left to the masked piece: pieces then end where tiles do.
    outer = np.minimum(low, stop)
    begin, end = np.stack((first, first, inner, outer)), np.stack((last, inner, outer, last))
    part, tile = np.nonzero(np.stack((in_one, split, split, split)) & (begin < end))
    kv_begin, kv_end = begin[part, tile], end[part, tile]
    node = node[tile]
    return WorkItems(
        node=node,
        kv_begin=kv_begin - start[tile],
        kv_len=kv_end - kv_begin,
        query_begin=query_begin[tile],
        query_end=query_end[tile],
        masked=~seen_whole[tile] & (part != _SEEN_BY_ALL),
        round=order.depth[node] * _PARTS + part,
    )


def _tiles(order: QueryOrder, nodes: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut the queries of nodes into tiles; node, first query and end of each tile."""
    begin, end = order.begin[nodes], order.end[nodes]
    cuts = _tile_ends(order)
    first_cut = np.searchsorted(cuts, begin, side="right")
    tiles = np.searchsorted(cuts, end, side="left") - first_cut + 1
    index, ordinal = expand(tiles)
    tile_begin, tile_end = begin[index], end[index]
    inner = np.flatnonzero(ordinal > 0)
    # Between two tiles of one node lies a cut: the end of the one, the begin of the other.
    tile_begin[inner] = tile_end[inner - 1] = cuts[first_cut[index[inner]] + ordinal[inner] - 1]
    return nodes[index], tile_begin, tile_end


def _tile_ends(order: QueryOrder) -> Int64Array:
    """Where tiles end: around long sequences and, in and between them, every QUERY_TILE queries."""
    is_long = np.diff(order.sequence_end, prepend=0) > SHORT_QUERY_LEN
    run_end = order.sequence_end[np.append(is_long[1:] | is_long[:-1], True)]
    run_begin = np.append(0, run_end[:-1])
    tiles = cut(run_end - run_begin, QUERY_TILE)
    return run_begin[tiles.source] + tiles.begin + tiles.size


def _extremes(
    position: Int64Array, begin: Int64Array, end: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Lowest and highest position in each (non-empty) range of queries."""
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
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


class Cut(NamedTuple):
    """Pieces of lengths: index of the length, ordinal among its pieces, begin within it, size."""

    source: Int64Array
    ordinal: Int64Array
    begin: Int64Array
    size: Int64Array


def cut(length: Int64Array, limit: int | Int64Array) -> Cut:
    """Cut each length into pieces of the size of its limit, the last one of what remains."""
    source, ordinal = expand(-(-length // limit))
    limit = np.broadcast_to(limit, length.shape)[source]
    begin = ordinal * limit
    return Cut(source, ordinal, begin, np.minimum(limit, length[source] - begin))
