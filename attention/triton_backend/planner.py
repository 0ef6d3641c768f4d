"""From segments to units: who reads what, in which order, and where partial results go."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand
from attention.segments import Segments
from attention.triton_backend.cost import Costs
from attention.triton_backend.lists import Pieces, TileLists, is_all_seen, tile_lists
from attention.triton_backend.tails import Tails, place_tails, with_tails
from attention.triton_backend.tiling import Tiling, fat_tiles, lean_tiles, read_apart

# Lists are cut for balance into parts of no fewer lanes; all but the last are whole steps long.
MIN_LANES = 256
LANE_STEP = 128


class Shape(NamedTuple):
    """What a schedule is made for.

    Attributes:
        lean_rows, fat_rows: rows of the two kinds of tiles; equal: there is only one.
        block_n: lanes that a lean tile's kernel takes in a step, a power of two.
        programs: units that run at once, of one KV head.
        costs: of the problem on the device.
    """

    lean_rows: int
    fat_rows: int
    block_n: int
    programs: int
    costs: Costs


class UnitColumns(NamedTuple):
    """Units of one kind of tile, longest first; columns as in `units.Units`, int64 [U]."""

    row_begin: Int64Array
    row_end: Int64Array
    entry_begin: Int64Array
    entry_mid: Int64Array
    entry_end: Int64Array
    log2_width: Int64Array
    ordinal: Int64Array


class MergeColumns(NamedTuple):
    """Columns as in `units.Merges`, int64 [Q]."""

    query: Int64Array
    begin: Int64Array
    end: Int64Array


class UnitPlan(NamedTuple):
    """A schedule before its entries are written out.

    Attributes:
        segments: those planned for; behind them the empty tails of rows that may advance.
        partial: int64 [R], as in `units.Rows`.
        pieces: of all lists; their entries are those of the schedule, but for the ones kept free.
        num_entries: entries, those kept free included.
        units: by the rows that their tiles have at most.
        merges: what is merged.
        num_partials: slots of the partial buffer.
        tails: where rows grow; None where they may not.
    """

    segments: Segments
    partial: Int64Array
    pieces: Pieces
    num_entries: int
    units: dict[int, UnitColumns]
    merges: MergeColumns
    num_partials: int
    tails: Tails | None


def make_plan(problem: Problem, segments: Segments, shape: Shape, reserve: int = 0) -> UnitPlan:
    """Cut the work on segments into units.

    Args:
        reserve: how often each row, then a query of its own, may advance by a token.

    O(M log M + R + overlaps of tiles and segments), with no Python loop over any of them.
    """
    all_seen = is_all_seen(problem, segments)
    if reserve:
        segments = with_tails(segments)
    kinds: dict[int, _Tiled] = {}
    apart = read_apart(segments, shape.lean_rows, shape.fat_rows, shape.costs, all_lean=reserve > 0)
    fat, chosen = None, np.arange(len(segments.length))
    if apart is not None:
        fat, chosen = fat_tiles(segments, apart, shape.fat_rows), (~apart.segments).nonzero()[0]
        lists = tile_lists(
            problem,
            segments,
            apart.segments.nonzero()[0],
            fat,
            all_seen=all_seen,
            reserve=reserve,
            growing=False,
        )
        kinds[shape.fat_rows] = _tiled(fat, *lists, shape.programs, fewest=0)
    if len(chosen):
        lean = lean_tiles(segments, apart, fat, shape.lean_rows, shape.programs)
        lists = tile_lists(
            problem, segments, chosen, lean, all_seen=all_seen, reserve=reserve, growing=True
        )
        kinds[shape.lean_rows] = _tiled(lean, *lists, shape.programs, fewest=min(reserve, 1))

    partials = np.zeros(len(segments.position), np.int64)
    units, pieces, num_entries, tails = {}, [], 0, None
    for rows_per_tile, kind in kinds.items():
        # What is higher on the path comes first: all rows of a tile have as many units above it.
        kind = kind.behind(num_entries)
        units[rows_per_tile], order = _units(kind, partials[kind.rows.begin])
        partials += np.repeat(kind.parts, kind.rows.end - kind.rows.begin)
        num_entries = kind.lists.num_entries
        pieces.append(kind.pieces)
        if reserve and rows_per_tile == shape.lean_rows:
            last_unit = np.argsort(order)[np.cumsum(kind.parts) - 1]
            tails = place_tails(segments, kind.pieces, kind.rows, kind.lists, last_unit)
    partial, merges, num_partials = _merges(segments, partials)
    return UnitPlan(
        segments=segments,
        partial=partial,
        pieces=Pieces(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))
        if len(pieces) > 1
        else pieces[0],
        num_entries=num_entries,
        units=units,
        merges=merges,
        num_partials=num_partials,
        tails=tails,
    )


class _Tiled(NamedTuple):
    """Tiles of one kind; `parts`: units of each, `step`: entries of all but the last of them."""

    rows: Tiling
    pieces: Pieces
    lists: TileLists
    parts: Int64Array
    step: Int64Array

    def behind(self, num_entries: int) -> "_Tiled":
        """The same with entries that begin at `num_entries`."""
        if not num_entries:
            return self
        lists = self.lists
        return self._replace(
            pieces=self.pieces._replace(entry=self.pieces.entry + num_entries),
            lists=TileLists(
                lists.begin + num_entries,
                lists.mid + num_entries,
                lists.end + num_entries,
                lists.log2_width,
                lists.num_entries + num_entries,
            ),
        )


def _tiled(rows: Tiling, pieces: Pieces, lists: TileLists, programs: int, fewest: int) -> _Tiled:
    """Cut lists that are much longer than what a program has to do on average."""
    entries = lists.end - lists.begin
    lanes = entries << lists.log2_width
    target = max(MIN_LANES, -(-int(lanes.sum()) // programs))
    step = np.maximum(entries, 1)
    if 2 * lanes.max() >= 3 * target:
        whole = np.maximum(LANE_STEP >> lists.log2_width, 1)
        parts = np.maximum((lanes + target // 2) // target, 1)
        step = -(-step // (parts * whole)) * whole
    return _Tiled(rows, pieces, lists, np.maximum(-(-entries // step), fewest), step)


def _units(kind: _Tiled, above: Int64Array) -> tuple[UnitColumns, Int64Array]:
    """The units of tiles with `above` partials before theirs; and their order, by tile before."""
    lists = kind.lists
    tile, ordinal = expand(kind.parts)
    begin = lists.begin[tile] + ordinal * kind.step[tile]
    end = np.minimum(begin + kind.step[tile], lists.end[tile])
    mid = np.clip(lists.mid[tile], begin, end)
    width = lists.log2_width[tile]
    order = np.argsort(begin - end << width, kind="stable")
    tile = tile[order]
    units = UnitColumns(
        row_begin=kind.rows.begin[tile],
        row_end=kind.rows.end[tile],
        entry_begin=begin[order],
        entry_mid=mid[order],
        entry_end=end[order],
        log2_width=width[order],
        ordinal=above[tile] + ordinal[order],
    )
    return units, order


def _merges(segments: Segments, count: Int64Array) -> tuple[Int64Array, MergeColumns, int]:
    """Slots for `count` partials of each row, side by side those of a query; and what is merged."""
    query = segments.query
    if len(query) == segments.num_queries:
        several = count != 1  # a row that sees nothing merges nothing
        slots = np.where(several, count, 0)
        end = np.cumsum(slots)
        merged = np.flatnonzero(several)
        begin = end - slots
        merges = MergeColumns(query[merged], begin[merged], end[merged])
        return np.where(several, begin, -1), merges, int(end[-1])
    rows = np.bincount(query, minlength=segments.num_queries)
    total = np.bincount(query, count, segments.num_queries).astype(np.int64)
    several = (rows > 1) | (total != 1)
    slots = np.where(several, total, 0)
    end = np.cumsum(slots)
    merged = np.flatnonzero(several)
    merges = MergeColumns(merged, (end - slots)[merged], end[merged])
    by_query = np.argsort(query, kind="stable")
    kept = np.where(several[query], count, 0)[by_query]
    partial = np.empty_like(query)
    partial[by_query] = np.cumsum(kept) - kept
    partial[~several[query]] = -1
    return partial, merges, int(end[-1])
