"""Which rows make a tile, and which of two tile shapes reads a segment.

Everything here works on the borders 0 to R between rows. A border inside a segment's range makes
two tiles read the segment, and a border more makes what lies above it be read once more. So a
segment is kept together if it is longer than what lies above it.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attention.forest import Int64Array
from attention.ranges import cut
from attention.segments import Segments
from attention.triton_backend.cost import Costs

BoolArray = npt.NDArray[np.bool_]

# Two kinds of tiles must be predicted to take at most this share of what one kind takes.
WORTHWHILE = 0.9
# Rows get a lean tile of their own for up to this many tokens ...
TILE_TOKENS = 512
# ... of which at most one in so many is then read again by another tile.
LITTLE_SHARED = 8


class Tiling(NamedTuple):
    """T tiles: consecutive ranges of rows that together are all rows.

    Attributes:
        begin, end: int64 [T].
    """

    begin: Int64Array
    end: Int64Array


def read_apart(
    segments: Segments, lean_rows: int, fat_rows: int, costs: Costs, *, all_lean: bool
) -> BoolArray | None:
    """Which segments are read by fat tiles, the others by lean ones; None: all by lean ones.

    It is those of more rows than a lean tile has, in the trees for which that pays: rows that read
    segments of both kinds have two partial results instead of one.

    Args:
        all_lean: every row has a lean tile in any case.
    """
    begin, end, length = segments.row_begin, segments.row_end, segments.length
    size = end - begin
    shared = size > lean_rows
    if fat_rows <= lean_rows or not shared.any():
        return None
    num_rows = len(segments.position)
    lean_reads, fat_reads = -(-size // lean_rows), -(-size // fat_rows)
    tree_begin = np.flatnonzero(_crossing(begin, end, num_rows)[:-1] == 0)
    tree = np.searchsorted(tree_begin, begin, side="right") - 1
    both = _covered(begin[shared], end[shared], num_rows)
    if not all_lean:
        both &= _covered(begin[~shared], end[~shared], num_rows)

    alone = np.bincount(tree, length * (costs.load + (lean_reads - 1) * costs.reload))
    saved = np.bincount(tree, shared * (lean_reads - fat_reads) * length) * costs.reload
    saved -= np.add.reduceat(both, tree_begin, dtype=np.int64) * 2 * costs.partial
    pays = saved >= (1 - WORTHWHILE) * alone
    if saved[pays].sum() < 2 * costs.launch:  # of the second kind of tiles, and of the merge
        return None
    apart: BoolArray = shared & pays[tree]
    return apart


def fat_tiles(segments: Segments, apart: BoolArray, rows_per_tile: int) -> Tiling:
    """Tiles of the rows of segments that are read apart; what lies between them is one tile each.

    No tile reaches over two trees, nor ends inside a segment that is left to lean tiles.
    """
    begin, end, length = segments.row_begin, segments.row_end, segments.length
    num_rows = len(segments.position)
    tiled = _covered(begin[apart], end[apart], num_rows)
    borders = _changes(tiled)
    borders[:-1] |= tiled & (_crossing(begin, end, num_rows)[:-1] == 0)
    together = length > tokens_above(segments)
    small = end - begin <= rows_per_tile
    big = np.flatnonzero(apart & together & ~small)
    borders[begin[big]] = borders[end[big]] = True
    kept = np.flatnonzero(~apart | (together & small))
    blocked = _crossing(begin[kept], end[kept], num_rows) > 0
    # What the rows of trees without fat tiles keep together is no concern of these.
    return _cut(np.flatnonzero(borders), tiled, rows_per_tile, blocked)


def lean_tiles(
    segments: Segments,
    apart: BoolArray | None,
    within: Tiling | None,
    rows_per_tile: int,
    programs: int,
) -> Tiling:
    """Tiles of the rows of all segments that are not read apart, each inside a tile of `within`.

    Rows with much KV of their own have tiles of their own, as there is nothing to share; the others
    fill tiles, so that the lists are not too short, as long as there are tiles for all `programs`.
    """
    begin, end, length = segments.row_begin, segments.row_end, segments.length
    num_rows = len(segments.position)
    above = tokens_above(segments)
    if apart is None or within is None:
        tiled = np.ones(num_rows, np.bool_)
        borders = np.zeros(num_rows + 1, np.bool_)
        borders[[0, -1]] = True
    else:
        below_fat = _covered(begin[apart], end[apart], num_rows)
        lean = np.flatnonzero(~apart)
        begin, end, length = begin[lean], end[lean], length[lean]
        above = np.where(below_fat[begin], 0, above[lean])
        tiled = _covered(begin, end, num_rows)
        borders = _changes(tiled)
        borders[within.begin] = True
    together = length > above
    small = end - begin <= rows_per_tile
    big = np.flatnonzero(together & ~small)
    borders[begin[big]] = borders[end[big]] = True
    blocked = _crossing(begin[together & small], end[together & small], num_rows) > 0

    own = np.zeros(num_rows + 1, np.int64)
    own[1:] = np.cumsum(np.bincount(begin, length, num_rows))
    tokens = own[end] - own[begin]
    few = min(TILE_TOKENS, int(own[-1]) // (4 * programs)) // rows_per_tile
    alone = np.flatnonzero(small & (tokens > few) & (tokens > (LITTLE_SHARED + 1) * above))
    for border in (begin[alone], end[alone]):
        borders[border] |= ~blocked[border]
    return _cut(np.flatnonzero(borders), tiled, rows_per_tile, blocked)


def is_nested(segments: Segments) -> bool:
    """Whether some segment lies above another one, as in trees and never in sets."""
    rows = int((segments.row_end - segments.row_begin).sum())
    return rows > len(segments.position)


def tokens_above(segments: Segments) -> Int64Array:
    """Tokens that the rows of a segment read before it: int64 [M]."""
    return segments.start if is_nested(segments) else np.zeros_like(segments.start)


def _cut(borders: Int64Array, tiled: BoolArray, rows_per_tile: int, blocked: BoolArray) -> Tiling:
    """Cut the rows between borders, where they are tiled, at borders that are not blocked.

    Between two borders that are not blocked lie at most rows_per_tile rows.
    """
    most = np.where(tiled[borders[:-1]], rows_per_tile, len(tiled))
    pieces = cut(np.diff(borders), most)
    begin = borders[pieces.source] + pieces.begin
    if blocked[begin].any():
        begin = _fill(borders, most, blocked)
    return Tiling(begin, np.append(begin[1:], len(tiled)))


def _fill(borders: Int64Array, most: Int64Array, blocked: BoolArray) -> Int64Array:
    """First rows of tiles that each reach to the last possible border; O(R log R)."""
    possible = np.flatnonzero(~blocked)
    between = np.searchsorted(borders, possible[:-1], side="right") - 1
    reach = np.minimum(possible[:-1] + most[between], borders[between + 1])
    following = np.searchsorted(possible, reach, side="right") - 1
    following = np.append(following, len(possible) - 1)
    reached = np.zeros(len(possible), np.bool_)
    reached[np.searchsorted(possible, borders)] = True
    # Each step doubles how many tiles behind each border are known.
    known, count = 0, len(borders)
    while known < count:
        reached[following[reached]] = True
        following = following[following]
        known, count = count, int(np.count_nonzero(reached))
    begins: Int64Array = possible[:-1][reached[:-1]]
    return begins


def _crossing(begin: Int64Array, end: Int64Array, num_rows: int) -> Int64Array:
    """For each border 0 to num_rows, how many ranges it lies inside of."""
    change = np.bincount(begin + 1, minlength=num_rows + 2)
    change -= np.bincount(end, minlength=num_rows + 2)
    return np.cumsum(change[:-1])


def _covered(begin: Int64Array, end: Int64Array, num_rows: int) -> BoolArray:
    """Which rows lie in some range."""
    change = np.bincount(begin, minlength=num_rows + 1)
    change -= np.bincount(end, minlength=num_rows + 1)
    covered: BoolArray = np.cumsum(change[:-1]) > 0
    return covered


def _changes(rows: BoolArray) -> BoolArray:
    """Borders at which the rows' value changes, and the outermost two."""
    borders = np.ones(len(rows) + 1, np.bool_)
    np.not_equal(rows[1:], rows[:-1], out=borders[1:-1])
    return borders
