"""From segments to units: who reads what, in which order, and where partial results go."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand
from attention.segments import Segments
from attention.triton_backend.cost import Costs
from attention.triton_backend.lists import Pieces, TileLists, is_all_seen, tile_lists
from attention.triton_backend.tails import Tails, last_blocks, with_tails
from attention.triton_backend.tiling import Tiling, make_tilings

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

    def part(self, begin: int, end: int) -> "UnitColumns":
        """The units from `begin` to before `end`."""
        return UnitColumns(*(column[begin:end] for column in self))


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
    tail = None
    if reserve:
        segments, tail = with_tails(segments)
    tilings = make_tilings(
        segments,
        shape.lean_rows,
        shape.fat_rows,
        shape.programs,
        shape.costs,
        all_lean=reserve > 0,
    )
    pieces, lists = tile_lists(problem, segments, tilings, all_seen=all_seen, reserve=reserve)
    tiles, num_fat = tilings.tiles, tilings.num_fat
    kinds = {shape.fat_rows: slice(0, num_fat), shape.lean_rows: slice(num_fat, len(tiles.begin))}
    kinds = {rows: of for rows, of in kinds.items() if of.start < of.stop}
    parts, step = _cut_lists(lists, list(kinds.values()), shape.programs)
    if reserve:
        lean_parts = parts[num_fat:]  # they read what is to come
        np.maximum(lean_parts, 1, out=lean_parts)
    partials = parts.repeat(tiles.end - tiles.begin).reshape(len(kinds), -1)
    # What is higher on the path comes first: all rows of a tile have as many units above it.
    above = np.zeros(len(parts), np.int64)
    if len(kinds) > 1:
        above[num_fat:] = partials[0].take(tiles.begin[num_fat:])
    units, order = _units(tiles, lists, parts, step, above, num_fat)
    partial, merges, num_partials = _merges(segments, partials.sum(axis=0))
    num_fat_units, num_units = int(parts[:num_fat].sum()), len(order)
    bounds = {shape.fat_rows: (0, num_fat_units), shape.lean_rows: (num_fat_units, num_units)}
    units_of = {rows: units.part(*bounds[rows]) for rows in kinds}
    tails = None
    if tail is not None:
        tails = Tails(
            segment=tail,
            block=last_blocks(segments, tail),
            rows=Tiling(tiles.begin[num_fat:], tiles.end[num_fat:]),
            lists=lists.behind(num_fat),
            parts=parts[num_fat:],
            order=order[num_fat_units:] - num_fat_units,
        )
    return UnitPlan(
        segments=segments,
        partial=partial,
        pieces=pieces,
        num_entries=lists.num_entries,
        units=units_of,
        merges=merges,
        num_partials=num_partials,
        tails=tails,
    )


def _cut_lists(
    lists: TileLists, kinds: list[slice], programs: int
) -> tuple[Int64Array, Int64Array]:
    """Cut lists that are much longer than what a program has to do on average.

    Returns parts of each tile's list, and entries of all but the last of them.
    """
    entries = lists.end - lists.begin
    lanes = entries << lists.log2_width
    parts, step = np.minimum(entries, 1), np.maximum(entries, 1)
    for of in kinds:
        target = max(MIN_LANES, -(-int(lanes[of].sum()) // programs))
        if 2 * lanes[of].max() >= 3 * target:
            whole = np.maximum(LANE_STEP >> lists.log2_width[of], 1)
            wanted = np.maximum((lanes[of] + target // 2) // target, 1)
            step[of] = -(-step[of] // (wanted * whole)) * whole
            parts[of] = -(-entries[of] // step[of])
    return parts, step


def _units(
    tiles: Tiling,
    lists: TileLists,
    parts: Int64Array,
    step: Int64Array,
    above: Int64Array,
    num_fat: int,
) -> tuple[UnitColumns, Int64Array]:
    """The units of fat and behind them of lean tiles, and their order by tile before.

    Args:
        above: partials before theirs.
    """
    ordinal = None
    if parts.max() > 1:
        tile, ordinal = expand(parts)
    else:
        (tile,) = parts.nonzero()
    begin, mid, end, width, _ = lists.take(tile)
    ordinals = above.take(tile)
    if ordinal is not None:
        ordinals += ordinal
        begin += ordinal * step.take(tile)
        end = np.minimum(begin + step.take(tile), end)
        mid = np.minimum(np.maximum(mid, begin), end)
    shortness = begin - end << width
    if num_fat:
        shortness[parts[:num_fat].sum() :] += 1 - shortness.min(initial=0)
    order = shortness.argsort(kind="stable")
    tile = tile.take(order)
    units = UnitColumns(
        row_begin=tiles.begin.take(tile),
        row_end=tiles.end.take(tile),
        entry_begin=begin.take(order),
        entry_mid=mid.take(order),
        entry_end=end.take(order),
        log2_width=width.take(order),
        ordinal=ordinals.take(order),
    )
    return units, order


def _merges(segments: Segments, count: Int64Array) -> tuple[Int64Array, MergeColumns, int]:
    """Slots for `count` partials of each row, side by side those of a query; and what is merged."""
    query = segments.query
    if len(query) == segments.num_queries:
        several = count != 1  # a row that sees nothing merges nothing
        slots = count * several
        end = slots.cumsum()
        begin = end - slots
        num_partials = int(end[-1])
        if several.all():
            return begin, MergeColumns(query, begin, end), num_partials
        (merged,) = several.nonzero()
        merges = MergeColumns(query.take(merged), begin.take(merged), end.take(merged))
        return np.where(several, begin, -1), merges, num_partials
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
