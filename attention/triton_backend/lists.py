"""Lists of pieces: what the rows of a tile read, in the order in which they read it.

A piece is a run of tokens of one segment. Tiles that read the same segments share one list: those
of a chunk of queries behind a long path walk it as far as each of them sees. Nothing here is done
for each token or block: the entries of a piece follow from it (see `entries`).
"""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand, extremes
from attention.segments import Segments
from attention.triton_backend.tiling import BoolArray, Tiling, is_nested

MAX_LOG2_WIDTH = 6
# Entries are narrow enough that a piece has about as many, so that few lanes are empty.
ENTRIES_PER_PIECE = 4


class Pieces(NamedTuple):
    """P pieces, those of a list side by side.

    Attributes:
        segment: int64 [P].
        begin: int64 [P], the first token, counted from the segment's first.
        length: int64 [P], tokens; 0 in tails that nothing was written to yet.
        row_begin, row_end: int64 [P], rows that attend to it.
        log2_width: int64 [P], of the piece's entries.
        entry, entries: int64 [P], its first entry and how many it has.
    """

    segment: Int64Array
    begin: Int64Array
    length: Int64Array
    row_begin: Int64Array
    row_end: Int64Array
    log2_width: Int64Array
    entry: Int64Array
    entries: Int64Array


class TileLists(NamedTuple):
    """What T tiles read; columns as in `units.Units`, int64 [T].

    Attributes:
        num_entries: entries of all lists, those kept free behind lists included.
    """

    begin: Int64Array
    mid: Int64Array
    end: Int64Array
    log2_width: Int64Array
    num_entries: int


def is_all_seen(problem: Problem, segments: Segments) -> bool:
    """Whether every row sees all tokens of its segments."""
    if problem.window is not None or len(segments.position) != len(segments.run_end):
        return False
    if is_nested(segments):
        return True  # a tree, in which a sequence's only query is on the last token of its path
    low, _ = extremes(segments.position, segments.row_begin, segments.row_end)
    return bool((segments.start + segments.length <= low + 1).all())


def tile_lists(
    problem: Problem,
    segments: Segments,
    chosen: Int64Array,
    tiling: Tiling,
    *,
    all_seen: bool,
    reserve: int,
    growing: bool,
) -> tuple[Pieces, TileLists]:
    """The lists in which tiles read the chosen segments, ascending.

    Args:
        all_seen: see `is_all_seen`.
        reserve: how far the rows may advance.
        growing: the tiles read the tokens to come; as many entries are kept free for each row.

    O(M + overlaps of tiles and segments).
    """
    row_begin, row_end = segments.row_begin[chosen], segments.row_end[chosen]
    tile_of_row = np.repeat(np.arange(len(tiling.begin)), tiling.end - tiling.begin)
    first, last = tile_of_row[row_begin], tile_of_row[row_end - 1]
    list_of_tile = _shared_lists(first, last, len(tiling.begin), problem)
    new = np.append(True, list_of_tile[1:] != list_of_tile[:-1])
    begin = tiling.begin[new]
    rows = Tiling(begin, np.append(begin[1:], tiling.end[-1]))
    num_lists = len(begin)

    of, segment = list_of_tile[first], chosen
    count = list_of_tile[last] - of + 1
    if (count > 1).any():
        index, ordinal = expand(count)
        of, segment = of[index] + ordinal, chosen[index]
        row_begin, row_end = row_begin[index], row_end[index]
    whole = _Parts(
        of,
        segment,
        np.zeros_like(of),
        segments.length[segment],
        (row_begin <= rows.begin[of]) & (row_end >= rows.end[of]),
    )
    parts = whole if all_seen else _visible(problem, segments, whole, rows, reserve)
    parts = parts.take(np.argsort(parts.list * 2 + ~parts.full, kind="stable"))

    count = np.bincount(parts.list, minlength=num_lists)
    log2_width = _log2_width(parts, count, segments.block_size)
    shift = log2_width[parts.list]
    entries = _entries(_inside(segments, parts, shift), parts.length, shift)
    spare = np.cumsum((rows.end - rows.begin) * (reserve if growing else 0))
    before_list = np.append(0, spare[:-1])
    entry = np.cumsum(entries) - entries + before_list[parts.list]
    pieces = Pieces(
        segment=parts.segment,
        begin=parts.begin,
        length=parts.length,
        row_begin=segments.row_begin[parts.segment],
        row_end=segments.row_end[parts.segment],
        log2_width=shift,
        entry=entry,
        entries=entries,
    )

    of_list = _sums(parts.list, entries, num_lists)
    list_begin = np.cumsum(of_list) - of_list + before_list
    if all_seen or problem.window is not None:
        by_all, by_any = _sums(parts.list, entries * parts.full, num_lists), of_list
        by_all, by_any = by_all[list_of_tile], by_any[list_of_tile]
    else:
        by_all, by_any = _seen_entries(segments, tiling, list_of_tile, parts, pieces, count)
    begin = list_begin[list_of_tile]
    num_entries = int(of_list.sum() + spare[-1])
    width = log2_width[list_of_tile]
    return pieces, TileLists(begin, begin + by_all, begin + by_any, width, num_entries)


class _Parts(NamedTuple):
    """Tokens of segments in lists; `full`: all rows of the list's tiles read the segment."""

    list: Int64Array
    segment: Int64Array
    begin: Int64Array
    length: Int64Array
    full: BoolArray

    def take(self, index: Int64Array) -> "_Parts":
        return _Parts(
            self.list[index],
            self.segment[index],
            self.begin[index],
            self.length[index],
            self.full[index],
        )


def _shared_lists(
    first: Int64Array, last: Int64Array, num_tiles: int, problem: Problem
) -> Int64Array:
    """List of each tile: its predecessor's if no segment begins or ends between them.

    Tiles do not share lists under a window, as each of them would skip another part.
    """
    if problem.window is not None:
        return np.arange(num_tiles)
    new = np.zeros(num_tiles + 1, np.int64)
    new[first] = new[last + 1] = 1
    new[0] = 0
    return np.cumsum(new[:-1])


def _visible(
    problem: Problem, segments: Segments, whole: _Parts, rows: Tiling, reserve: int
) -> _Parts:
    """What some row of the lists' tiles sees of whole segments."""
    of, segment = whole.list, whole.segment
    begin = np.maximum(segments.row_begin[segment], rows.begin[of])
    end = np.minimum(segments.row_end[segment], rows.end[of])
    low, high = extremes(segments.position, begin, end)
    # Counted from the segment's first token on.
    low, high = low - segments.start[segment], high - segments.start[segment]
    last = np.clip(high + 1, 0, whole.length)
    if problem.window is None:
        seen = whole._replace(length=last)
        return seen.take(np.flatnonzero(last > 0))
    window = problem.window
    sinks = np.clip(problem.sink_tokens - segments.start[segment], 0, last)
    first = np.clip(low + 1 - window, sinks, last)
    # All rows see [inner, outer), also once they have advanced.
    inner = np.clip(high + reserve + 1 - window, first, last)
    outer = np.clip(low + 1, inner, last)
    inner[~whole.full] = outer[~whole.full] = last[~whole.full]
    bounds = np.stack((np.zeros_like(last), sinks, first, inner, outer, last))
    begin, end = bounds[[0, 2, 3, 4]], bounds[[1, 3, 4, 5]]
    full = np.stack((sinks <= low + 1, *(np.full(len(of), part == 1) for part in range(3))))
    part, index = np.nonzero(begin < end)
    return _Parts(
        of[index],
        segment[index],
        begin[part, index],
        (end - begin)[part, index],
        full[part, index] & whole.full[index],
    )


def _log2_width(parts: _Parts, count: Int64Array, block_size: int) -> Int64Array:
    """Width of the entries of each list: a power of two that divides the block size."""
    most = min((block_size & -block_size).bit_length() - 1, MAX_LOG2_WIDTH)
    tokens = _sums(parts.list, parts.length, len(count))
    # frexp gives the exponent of the next higher power of two.
    exponent = np.frexp(tokens // np.maximum(count * ENTRIES_PER_PIECE, 1))[1] - 1
    width: Int64Array = np.minimum(np.maximum(exponent, 0), most).astype(np.int64)
    return width


def _inside(segments: Segments, parts: _Parts | Pieces, shift: Int64Array) -> Int64Array:
    """How far behind a multiple of the width each part begins."""
    inside: Int64Array = (segments.offset[parts.segment] + parts.begin) & ((1 << shift) - 1)
    return inside


def _entries(inside: Int64Array, length: Int64Array, shift: Int64Array) -> Int64Array:
    """Entries of so many tokens that begin so far inside one; each ends at its width."""
    entries: Int64Array = np.where(length > 0, (inside + length - 1 >> shift) + 1, 0)
    return entries


def _seen_entries(
    segments: Segments,
    tiling: Tiling,
    list_of_tile: Int64Array,
    parts: _Parts,
    pieces: Pieces,
    count: Int64Array,
) -> tuple[Int64Array, Int64Array]:
    """How many of its list's first entries all rows of a tile see whole, and how many any of them.

    The pieces that all rows of the list read come first, positions ascending.
    """
    low = np.minimum.reduceat(segments.position, tiling.begin)
    high = np.maximum.reduceat(segments.position, tiling.begin)
    tile, ordinal = expand(count[list_of_tile])
    piece = (np.cumsum(count) - count)[list_of_tile][tile] + ordinal
    length, entries, shift = (c[piece] for c in (pieces.length, pieces.entries, pieces.log2_width))
    full = parts.full[piece]
    start = (segments.start[pieces.segment] + pieces.begin)[piece]
    inside = _inside(segments, pieces, pieces.log2_width)[piece]
    by_all = np.clip(low[tile] + 1 - start, 0, length)
    whole = np.where(by_all == length, entries, inside + by_all >> shift)
    some = _entries(inside, np.clip(high[tile] + 1 - start, 0, length), shift)
    num_tiles = len(tiling.begin)
    return (
        _sums(tile, whole * full, num_tiles),
        _sums(tile, np.where(full, some, entries), num_tiles),
    )


def _sums(index: Int64Array, values: Int64Array, size: int) -> Int64Array:
    return np.bincount(index, values, size).astype(np.int64)
