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
from attention.triton_backend.tiling import BoolArray, Tiling, Tilings

MAX_LOG2_WIDTH = 6
# Entries are narrow enough that a piece has about as many, so that few lanes are empty.
ENTRIES_PER_PIECE = 4
_POWERS = 2.0 ** np.arange(1, MAX_LOG2_WIDTH + 1)
_LAST_LANES = (1 << np.arange(MAX_LOG2_WIDTH + 1)) - 1


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

    def take(self, tiles: Int64Array) -> "TileLists":
        """What these tiles read."""
        begin, mid, end, width, num_entries = self
        return TileLists(
            begin.take(tiles), mid.take(tiles), end.take(tiles), width.take(tiles), num_entries
        )

    def behind(self, tiles: int) -> "TileLists":
        """What the tiles behind the first ones read."""
        begin, mid, end, width, num_entries = self
        return TileLists(begin[tiles:], mid[tiles:], end[tiles:], width[tiles:], num_entries)


def is_all_seen(problem: Problem, segments: Segments) -> bool:
    """Whether every row sees all tokens of its segments."""
    if problem.window is not None or len(segments.position) != len(segments.run_end):
        return False
    if segments.on_paths:
        return True  # a sequence's only query is on the last token of its path
    low, _ = extremes(segments.position, segments.row_begin, segments.row_end)
    return bool((segments.start + segments.length <= low + 1).all())


def tile_lists(
    problem: Problem,
    segments: Segments,
    tilings: Tilings,
    *,
    all_seen: bool,
    reserve: int,
) -> tuple[Pieces, TileLists]:
    """The lists in which tiles read segments, pieces by list.

    Args:
        all_seen: see `is_all_seen`.
        reserve: how far the rows may advance; behind the lists of lean tiles, as many entries are
            kept free for each row.

    O(M + overlaps of tiles and segments).
    """
    tiling, num_fat, segment, num_fat_segments = tilings
    row_begin, row_end = segments.row_begin.take(segment), segments.row_end.take(segment)
    tile_of_row = np.arange(len(tiling.begin)).repeat(tiling.end - tiling.begin)
    first_row, last_row = row_begin, row_end - 1
    if num_fat:
        # Fat tiles have all rows, lean tiles have them once more behind those.
        first_row = first_row.copy()
        first_row[num_fat_segments:] += len(segments.position)
        last_row[num_fat_segments:] += len(segments.position)
    first, last = tile_of_row.take(first_row), tile_of_row.take(last_row)
    list_of_tile, rows = _shared_lists(first, last, tilings, problem)
    num_lists = len(rows.begin)

    of, last_of = list_of_tile.take(first), list_of_tile.take(last)
    if np.count_nonzero(of != last_of):
        count = last_of - of + 1
        index, ordinal = expand(count)
        of, segment = of.take(index) + ordinal, segment.take(index)
        row_begin, row_end = row_begin.take(index), row_end.take(index)
    full = row_begin <= rows.begin.take(of)
    full &= row_end >= rows.end.take(of)
    # The pieces that all rows of a list read come first, positions ascending.
    if all_seen:
        # Who reads whole what others read in part stands before it, as its ancestor.
        if np.count_nonzero(of[1:] < of[:-1]):
            order = of.argsort(kind="stable")
            of, segment, full = of.take(order), segment.take(order), full.take(order)
        begin = np.zeros(len(of), np.int64)
        parts = _Parts(of, segment, begin, segments.length.take(segment), full)
    else:
        whole = np.zeros(len(of), np.int64), segments.length.take(segment)
        parts = _visible(problem, segments, _Parts(of, segment, *whole, full), rows, reserve)
        parts = parts.take((parts.list * 2 - parts.full).argsort(kind="stable"))

    count = np.bincount(parts.list, minlength=num_lists)
    log2_width = _log2_width(parts, count, segments.block_size)
    shift = log2_width.take(parts.list)
    entries = _entries(_inside(segments, parts, shift), parts.length, shift)
    entries_before = np.zeros(len(entries) + 1, np.int64)
    entries.cumsum(out=entries_before[1:])
    entry = entries_before[:-1]
    behind = count.cumsum()
    list_end = entries_before.take(behind)
    list_begin = entries_before.take(behind - count)
    num_partly = np.bincount(parts.list.take((~parts.full).nonzero()[0]), minlength=num_lists)
    list_mid = entries_before.take(behind - num_partly)
    num_entries = int(entries_before[-1])
    if reserve:
        spare = (rows.end - rows.begin) * reserve
        spare[: list_of_tile[num_fat - 1] + 1 if num_fat else 0] = 0
        before = spare.cumsum() - spare
        entry = entry + before.take(parts.list)
        list_begin, list_mid, list_end = (x + before for x in (list_begin, list_mid, list_end))
        num_entries += int(spare.sum())
    pieces = Pieces(
        segment=parts.segment,
        begin=parts.begin,
        length=parts.length,
        row_begin=segments.row_begin.take(parts.segment),
        row_end=segments.row_end.take(parts.segment),
        log2_width=shift,
        entry=entry,
        entries=entries,
    )

    begin, width = list_begin.take(list_of_tile), log2_width.take(list_of_tile)
    if all_seen or problem.window is not None:
        mid, end = list_mid.take(list_of_tile), list_end.take(list_of_tile)
    else:
        by_all, by_any = _seen_entries(segments, tilings, list_of_tile, parts, pieces, count)
        mid, end = begin + by_all, begin + by_any
    return pieces, TileLists(begin, mid, end, width, num_entries)


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
    first: Int64Array, last: Int64Array, tilings: Tilings, problem: Problem
) -> tuple[Int64Array, Tiling]:
    """List of each tile, its predecessor's if no segment begins or ends between them; their rows.

    Tiles do not share lists under a window, as each of them would skip another part.
    """
    tiling, num_tiles = tilings.tiles, len(tilings.tiles.begin)
    if problem.window is not None:
        return np.arange(num_tiles), tiling
    new = np.zeros(num_tiles + 1, np.bool_)
    new[first] = new[last + 1] = True
    new[0] = new[tilings.num_fat] = new[num_tiles] = True
    (borders,) = new.nonzero()
    if len(borders) > num_tiles:
        return np.arange(num_tiles), tiling
    rows = Tiling(tiling.begin.take(borders[:-1]), tiling.end.take(borders[1:] - 1))
    return new[:-1].cumsum() - 1, rows


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
    tokens = np.zeros(len(count), np.int64)
    np.add.at(tokens, parts.list, parts.length)
    lanes = tokens / np.maximum(count * ENTRIES_PER_PIECE, 1)
    width: Int64Array = _POWERS[:most].searchsorted(lanes, side="right")
    return width


def _inside(segments: Segments, parts: _Parts | Pieces, shift: Int64Array) -> Int64Array:
    """How far behind a multiple of the width each part begins."""
    inside: Int64Array = segments.offset.take(parts.segment)
    inside += parts.begin
    inside &= _LAST_LANES.take(shift)
    return inside


def _entries(inside: Int64Array, length: Int64Array, shift: Int64Array) -> Int64Array:
    """Entries of so many tokens that begin so far inside one; each ends at its width.

    Without tokens, one if it begins inside.
    """
    entries = inside + length
    entries += _LAST_LANES.take(shift)
    entries >>= shift
    return entries


def _seen_entries(
    segments: Segments,
    tilings: Tilings,
    list_of_tile: Int64Array,
    parts: _Parts,
    pieces: Pieces,
    count: Int64Array,
) -> tuple[Int64Array, Int64Array]:
    """How many of its list's first entries all rows of a tile see whole, and how many any of them.

    The pieces that all rows of the list read come first, positions ascending.
    """
    begin, num_fat = tilings.tiles.begin, tilings.num_fat
    low, high = (
        np.concatenate([of.reduceat(segments.position, b) for b in _kinds(begin, num_fat)])
        for of in (np.minimum, np.maximum)
    )
    tile, ordinal = expand(count[list_of_tile])
    piece = (np.cumsum(count) - count)[list_of_tile][tile] + ordinal
    length, entries, shift = (c[piece] for c in (pieces.length, pieces.entries, pieces.log2_width))
    full = parts.full[piece]
    start = (segments.start[pieces.segment] + pieces.begin)[piece]
    inside = _inside(segments, pieces, pieces.log2_width)[piece]
    by_all = np.clip(low[tile] + 1 - start, 0, length)
    whole = np.where(by_all == length, entries, inside + by_all >> shift)
    by_any = np.clip(high[tile] + 1 - start, 0, length)
    some = np.where(by_any > 0, _entries(inside, by_any, shift), 0)
    num_tiles = len(begin)
    return (
        _sums(tile, whole * full, num_tiles),
        _sums(tile, np.where(full, some, entries), num_tiles),
    )


def _kinds(begin: Int64Array, num_fat: int) -> list[Int64Array]:
    return [kind for kind in (begin[:num_fat], begin[num_fat:]) if len(kind)]


def _sums(index: Int64Array, values: Int64Array, size: int) -> Int64Array:
    return np.bincount(index, values, size).astype(np.int64)
