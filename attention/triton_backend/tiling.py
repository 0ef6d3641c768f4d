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


class Tilings(NamedTuple):
    """Fat tiles, of all rows or none, and behind them lean tiles, of all rows or none.

    Attributes:
        tiles: of both kinds.
        num_fat: how many of them are fat.
        segments: int64 [M], those that fat tiles read, and behind them the others, each ascending.
        num_fat_segments: how many fat tiles read.
    """

    tiles: Tiling
    num_fat: int
    segments: Int64Array
    num_fat_segments: int


class Apart(NamedTuple):
    """What fat tiles read.

    Attributes:
        large, small: int64, the segments that are, and those that are not, ascending.
        rows: bool [R], rows of trees in which there are such segments; None for all.
        tree_begin: int64, first row of each tree.
    """

    large: Int64Array
    small: Int64Array
    rows: BoolArray | None
    tree_begin: Int64Array


class Ranges(NamedTuple):
    """Ranges of rows, counted at the borders 0 to R.

    Attributes:
        begin, end: int64, the borders of each range.
        starts: int64 [R + 1], ranges that begin at each border.
        depth: int64 [R + 1], ranges that the row behind each border lies in.
    """

    begin: Int64Array
    end: Int64Array
    starts: Int64Array
    depth: Int64Array

    @property
    def inside(self) -> BoolArray:
        """Which borders lie inside some range."""
        inside: BoolArray = self.depth > self.starts
        return inside

    @property
    def covered(self) -> BoolArray:
        """Which rows lie in some range."""
        covered: BoolArray = self.depth[:-1] > 0
        return covered


def make_tilings(
    segments: Segments,
    lean_rows: int,
    fat_rows: int,
    programs: int,
    costs: Costs,
    *,
    all_lean: bool,
) -> Tilings:
    """The tiles that read segments.

    Args:
        lean_rows, fat_rows: most rows of the two kinds.
        programs: units that run at once.
        all_lean: every row has a lean tile in any case.
    """
    is_large = segments.row_end - segments.row_begin > lean_rows
    (large,) = is_large.nonzero()
    apart = None
    if fat_rows > lean_rows and len(large):
        (small,) = (~is_large).nonzero()
        lean = _ranges(segments, small)
        sizes = lean_rows, fat_rows
        apart = _read_apart(segments, large, small, lean, sizes, costs, all_lean=all_lean)
    if apart is None:
        return Tilings(
            lean_tiles(segments, lean_rows, programs), 0, np.arange(len(segments.length)), 0
        )
    if apart.rows is not None:
        lean = _ranges(segments, apart.small)
    fat = _fat_tiles(segments, apart, lean, fat_rows)
    num_fat, num_large, chosen = len(fat.begin), len(apart.large), apart.small
    if not len(chosen):
        return Tilings(fat, num_fat, apart.large, num_large)
    begin, end, length = lean.begin, lean.end, segments.length.take(chosen)
    # Fat tiles read what lies above these, where there is something to be read apart.
    above = None
    if apart.rows is not None:
        above = np.where(apart.rows.take(begin), 0, tokens_above(segments).take(chosen))
    tiled = lean.covered
    borders = _changes(tiled)
    borders[fat.begin] = True
    tiles = _lean_tiles(begin, end, length, above, lean, borders, tiled, lean_rows, programs)
    both = Tiling(np.concatenate((fat.begin, tiles.begin)), np.concatenate((fat.end, tiles.end)))
    return Tilings(both, num_fat, np.concatenate((apart.large, chosen)), num_large)


def lean_tiles(segments: Segments, rows_per_tile: int, programs: int) -> Tiling:
    """Lean tiles that read all segments."""
    return _lean_tiles(
        segments.row_begin,
        segments.row_end,
        segments.length,
        tokens_above(segments),
        None,
        _outermost(len(segments.position)),
        None,
        rows_per_tile,
        programs,
    )


def _read_apart(
    segments: Segments,
    large: Int64Array,
    small: Int64Array,
    lean: Ranges,
    sizes: tuple[int, int],
    costs: Costs,
    *,
    all_lean: bool,
) -> Apart | None:
    """Which segments are read by fat tiles, the others by lean ones; None: all by lean ones.

    It is those of more rows than a lean tile has, in the trees for which that pays: rows that read
    segments of both kinds have two partial results instead of one.

    Args:
        large, small: segments of more rows than a lean tile has, and the others.
        lean: rows of the small segments.
        sizes: most rows of the two kinds of tiles.
    """
    lean_rows, fat_rows = sizes
    begin, length = segments.row_begin.take(large), segments.length.take(large)
    size = segments.row_end.take(large) - begin
    lean_reads = (size + (lean_rows - 1)) // lean_rows
    fewer = length * (lean_reads - (size + (fat_rows - 1)) // fat_rows)
    if fewer.sum() * costs.reload < 2 * costs.launch:  # of fat tiles, and of the merge
        return None
    root = _roots(segments)
    trees = len(root)
    tree_begin = segments.row_begin.take(root)
    tree_size = segments.row_end.take(root) - tree_begin
    tree = tree_begin.searchsorted(begin, side="right") - 1
    # The first reading of a segment is from memory, the others are from a cache.
    alone = np.add.reduceat(segments.length, root) * costs.load
    alone += np.bincount(tree, length * (lean_reads - 1), trees) * costs.reload
    saved = np.bincount(tree, fewer, trees) * costs.reload
    both = tree_size
    if not all_lean:
        both = np.add.reduceat(lean.covered, tree_begin, dtype=np.int64)
    saved -= both * (2 * costs.partial)
    # A tree takes some time, so that one without large segments, which saves nothing, is out.
    pays = saved >= (1 - WORTHWHILE) * alone
    if saved.dot(pays) < 2 * costs.launch:
        return None
    if np.count_nonzero(pays) == trees:
        return Apart(large, small, None, tree_begin)
    chosen = pays.take(tree)
    small = np.concatenate((small, large[~chosen]))
    small.sort()
    return Apart(large[chosen], small, np.repeat(pays, tree_size), tree_begin)


def _fat_tiles(segments: Segments, apart: Apart, lean: Ranges, rows_per_tile: int) -> Tiling:
    """Tiles of the rows of segments that are read apart; what lies between them is one tile each.

    No tile reaches over two trees, nor ends inside a segment that is left to lean tiles.
    """
    if apart.rows is None:
        tiled, borders = None, _outermost(len(segments.position))
        borders[apart.tree_begin] = True
    else:
        tiled = apart.rows
        borders = _changes(tiled)
        borders[apart.tree_begin] |= tiled[apart.tree_begin]
    chosen = apart.large
    begin, end = segments.row_begin.take(chosen), segments.row_end.take(chosen)
    together = segments.length.take(chosen) > tokens_above(segments).take(chosen)
    small = end - begin <= rows_per_tile
    (big,) = (together & ~small).nonzero()
    borders[begin[big]] = borders[end[big]] = True
    # What the rows of trees without fat tiles keep together is no concern of these.
    blocked = lean.inside
    (kept,) = (together & small).nonzero()
    if len(kept):
        blocked |= _ranges(segments, chosen[kept]).inside
    return _cut(borders, tiled, rows_per_tile, blocked)


def _lean_tiles(
    begin: Int64Array,
    end: Int64Array,
    length: Int64Array,
    above: Int64Array | None,
    ranges: Ranges | None,
    borders: BoolArray,
    tiled: BoolArray | None,
    rows_per_tile: int,
    programs: int,
) -> Tiling:
    """Tiles that read segments, of their rows, tokens, and tokens above each.

    Rows with much KV of their own have tiles of their own, as there is nothing to share; the others
    fill tiles, so that the lists are not too short, as long as there are tiles for all `programs`.

    Args:
        above: None if nothing is above, and no segment has more rows than a tile.
        ranges: rows of all the segments, where they are known.
        borders: which borders are borders of tiles in any case.
        tiled: rows that need tiles; None for all.
    """
    num_rows = len(borders) - 1
    own = np.zeros(num_rows + 1, np.int64)
    np.add.at(own[1:], begin, length)
    own = own.cumsum()
    tokens = own.take(end) - own.take(begin)
    few = min(TILE_TOKENS, int(own[-1]) // (4 * programs)) // rows_per_tile
    is_alone = tokens > few
    if above is not None:
        together = length > above
        small = end - begin <= rows_per_tile
        (big,) = (together & ~small).nonzero()
        borders[begin[big]] = borders[end[big]] = True
        together &= small
        ranges = _ranges_of(begin[together], end[together], num_rows)
        is_alone &= small & (tokens > (LITTLE_SHARED + 1) * above)
    elif ranges is None:
        ranges = _ranges_of(begin, end, num_rows)
    blocked = ranges.inside
    (alone,) = is_alone.nonzero()
    if len(alone):
        possible = np.zeros(num_rows + 1, np.bool_)
        possible[begin.take(alone)] = possible[end.take(alone)] = True
        borders |= possible > blocked
    return _cut(borders, tiled, rows_per_tile, blocked)


def tokens_above(segments: Segments) -> Int64Array:
    """Tokens that the rows of a segment read before it: int64 [M]."""
    return segments.start if segments.on_paths else np.zeros_like(segments.start)


def _roots(segments: Segments) -> Int64Array:
    """The segments that no other lies above, by their rows; those below follow each of them."""
    if segments.on_paths:
        roots: Int64Array = (segments.start == 0).nonzero()[0]
        return roots
    # Empty are the tails of rows that grow, each below the segment that its row has.
    return (segments.length > 0).nonzero()[0]


def _cut(
    is_border: BoolArray, tiled: BoolArray | None, rows_per_tile: int, blocked: BoolArray
) -> Tiling:
    """Cut the rows between borders, where they are tiled, at places that are not blocked.

    Between two places that are not blocked lie at most rows_per_tile rows.
    """
    (borders,) = is_border.nonzero()
    begin = borders[:-1]
    size = borders[1:] - begin
    if size.max() > rows_per_tile:
        most = rows_per_tile if tiled is None else np.where(tiled.take(begin), rows_per_tile, size)
        pieces = cut(size, most)
        begin = begin.take(pieces.source) + pieces.begin
        if np.count_nonzero(blocked.take(begin)):
            begin = _fill(borders, np.minimum(size, most), blocked)
    end = np.empty_like(begin)
    end[:-1], end[-1] = begin[1:], borders[-1]
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


def _ranges(segments: Segments, chosen: Int64Array) -> Ranges:
    begin, end = segments.row_begin.take(chosen), segments.row_end.take(chosen)
    return _ranges_of(begin, end, len(segments.position))


def _ranges_of(begin: Int64Array, end: Int64Array, num_rows: int) -> Ranges:
    starts = np.bincount(begin, minlength=num_rows + 1)
    depth = starts - np.bincount(end, minlength=num_rows + 1)
    return Ranges(begin, end, starts, depth.cumsum())


def _outermost(num_rows: int) -> BoolArray:
    """The first border and the last."""
    borders = np.zeros(num_rows + 1, np.bool_)
    borders[0] = borders[-1] = True
    return borders


def _changes(rows: BoolArray) -> BoolArray:
    """Borders at which the rows' value changes, and the outermost two."""
    borders = _outermost(len(rows))
    np.not_equal(rows[1:], rows[:-1], out=borders[1:-1])
    return borders
