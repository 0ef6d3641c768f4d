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


class Apart(NamedTuple):
    """What fat tiles read.

    Attributes:
        segments: bool [M].
        rows: bool [R], rows of trees in which there are such segments.
        tree_begin: int64, first row of each tree.
    """

    segments: BoolArray
    rows: BoolArray
    tree_begin: Int64Array


def read_apart(
    segments: Segments, lean_rows: int, fat_rows: int, costs: Costs, *, all_lean: bool
) -> Apart | None:
    """Which segments are read by fat tiles, the others by lean ones; None: all by lean ones.

    It is those of more rows than a lean tile has, in the trees for which that pays: rows that read
    segments of both kinds have two partial results instead of one.

    Args:
        all_lean: every row has a lean tile in any case.
    """
    size = segments.row_end - segments.row_begin
    shared = size > lean_rows
    (large,) = shared.nonzero()
    if fat_rows <= lean_rows or not len(large):
        return None
    root = _roots(segments)
    tree_begin = segments.row_begin[root]
    tree_size = segments.row_end[root] - tree_begin
    tree = np.searchsorted(tree_begin, segments.row_begin[large], side="right") - 1
    length, size = segments.length[large], size[large]
    lean_reads, fat_reads = -(-size // lean_rows), -(-size // fat_rows)
    trees = len(root)
    # The first reading of a segment is from memory, the others are from a cache.
    alone = np.add.reduceat(segments.length, root) * costs.load
    alone += np.bincount(tree, length * (lean_reads - 1), trees) * costs.reload
    saved = np.bincount(tree, length * (lean_reads - fat_reads), trees) * costs.reload
    both = tree_size
    if not all_lean:
        lean = _covered(
            segments.row_begin[~shared], segments.row_end[~shared], int(tree_size.sum())
        )
        both = np.add.reduceat(lean, tree_begin, dtype=np.int64)
    # Without a shared segment, a tree saves nothing and has nothing of both kinds.
    saved -= both * 2 * costs.partial
    pays = (saved >= (1 - WORTHWHILE) * alone) & (np.bincount(tree, minlength=trees) > 0)
    if not pays.any() or saved[pays].sum() < 2 * costs.launch:  # of fat tiles, and of the merge
        return None
    if pays.all():
        return Apart(shared, np.ones(len(segments.position), np.bool_), tree_begin)
    shared[large[~pays[tree]]] = False
    return Apart(shared, np.repeat(pays, tree_size), tree_begin)


def fat_tiles(segments: Segments, apart: Apart, rows_per_tile: int) -> Tiling:
    """Tiles of the rows of segments that are read apart; what lies between them is one tile each.

    No tile reaches over two trees, nor ends inside a segment that is left to lean tiles.
    """
    borders = _changes(apart.rows)
    borders[apart.tree_begin] |= apart.rows[apart.tree_begin]
    (chosen,) = apart.segments.nonzero()
    begin, end = segments.row_begin[chosen], segments.row_end[chosen]
    together = segments.length[chosen] > tokens_above(segments)[chosen]
    small = end - begin <= rows_per_tile
    (big,) = (together & ~small).nonzero()
    borders[begin[big]] = borders[end[big]] = True
    kept = ~apart.segments
    kept[chosen[together & small]] = True
    # What the rows of trees without fat tiles keep together is no concern of these.
    blocked = _inside(segments.row_begin[kept], segments.row_end[kept], len(apart.rows))
    return _cut(borders, apart.rows, rows_per_tile, blocked)


def lean_tiles(
    segments: Segments,
    apart: Apart | None,
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
        borders = _changes(tiled)
    else:
        (lean,) = (~apart.segments).nonzero()
        begin, end, length, above = begin[lean], end[lean], length[lean], above[lean]
        above = np.where(apart.rows[begin], 0, above)
        tiled = _covered(begin, end, num_rows)
        borders = _changes(tiled)
        borders[within.begin] = True
    together = length > above
    small = end - begin <= rows_per_tile
    (big,) = (together & ~small).nonzero()
    borders[begin[big]] = borders[end[big]] = True
    together &= small
    blocked = _inside(begin[together], end[together], num_rows)

    own = np.zeros(num_rows + 1, np.int64)
    own[1:] = np.bincount(begin, length, num_rows).cumsum()
    tokens = own[end] - own[begin]
    few = min(TILE_TOKENS, int(own[-1]) // (4 * programs)) // rows_per_tile
    (alone,) = (small & (tokens > few) & (tokens > (LITTLE_SHARED + 1) * above)).nonzero()
    for border in (begin[alone], end[alone]):
        borders[border] |= ~blocked[border]
    return _cut(borders, tiled, rows_per_tile, blocked)


def is_nested(segments: Segments) -> bool:
    """Whether some segment lies above another one, as in trees and never in sets."""
    rows = int((segments.row_end - segments.row_begin).sum())
    return rows > len(segments.position)


def tokens_above(segments: Segments) -> Int64Array:
    """Tokens that the rows of a segment read before it: int64 [M]."""
    return segments.start if is_nested(segments) else np.zeros_like(segments.start)


def _roots(segments: Segments) -> Int64Array:
    """The segments that no other lies above, by their rows; those below follow each of them."""
    if is_nested(segments):
        return np.flatnonzero(segments.round == 0)
    return np.arange(len(segments.length))


def _cut(is_border: BoolArray, tiled: BoolArray, rows_per_tile: int, blocked: BoolArray) -> Tiling:
    """Cut the rows between borders, where they are tiled, at places that are not blocked.

    Between two places that are not blocked lie at most rows_per_tile rows.
    """
    (borders,) = is_border.nonzero()
    most = np.where(tiled[borders[:-1]], rows_per_tile, len(tiled))
    size = borders[1:] - borders[:-1]
    begin = borders[:-1]
    if (size > most).any():
        pieces = cut(size, most)
        begin = begin[pieces.source] + pieces.begin
        if blocked[begin].any():
            begin = _fill(borders, most, blocked)
    end = np.empty_like(begin)
    end[:-1], end[-1] = begin[1:], len(tiled)
    return Tiling(begin, end)


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


def _inside(begin: Int64Array, end: Int64Array, num_rows: int) -> BoolArray:
    """Which of the borders 0 to num_rows lie inside some range."""
    change = np.bincount(begin + 1, minlength=num_rows + 2)
    change -= np.bincount(end, minlength=num_rows + 2)
    inside: BoolArray = change[:-1].cumsum() > 0
    return inside


def _covered(begin: Int64Array, end: Int64Array, num_rows: int) -> BoolArray:
    """Which rows lie in some range."""
    change = np.bincount(begin, minlength=num_rows + 1)
    change -= np.bincount(end, minlength=num_rows + 1)
    covered: BoolArray = change[:-1].cumsum() > 0
    return covered


def _changes(rows: BoolArray) -> BoolArray:
    """Borders at which the rows' value changes, and the outermost two."""
    borders = np.ones(len(rows) + 1, np.bool_)
    np.not_equal(rows[1:], rows[:-1], out=borders[1:-1])
    return borders
