"""Schedules under which a sequence's results have the same bits whatever else is planned.

All that decides a row's order of additions follows from its own path. Positions are cut into chunks
of CHUNK; a row has one partial result for each chunk of its path, and always merges them. In a
chunk, positions are cut into steps of the kernel, `block_n` of them: the token at position p is
lane p % block_n of a step. Where the paths of a tile's rows differ, there is a step for each
*version* of these positions, in which the rows of other versions see nothing, and which thus leaves
their results as they are: every row sees the steps of its own path, ascending.
"""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand, extremes
from attention.segments import Segments
from attention.triton_backend.lists import MAX_LOG2_WIDTH, Pieces
from attention.triton_backend.planner import MergeColumns, Shape, UnitColumns, UnitPlan
from attention.triton_backend.tiling import Tiling, lean_tiles

CHUNK = 512


def make_invariant_plan(problem: Problem, segments: Segments, shape: Shape) -> UnitPlan:
    """Cut the work on segments into units of `CHUNK` positions of a tile's rows.

    Args:
        shape: of which lean_rows, block_n and programs matter. The cut of rows into tiles decides
            no bit.

    O((R + chunks) log M), with a Python loop over the segments of a path within one step only.
    """
    block_n = shape.block_n
    rows = lean_tiles(segments, shape.lean_rows, shape.programs)
    nested, several = segments.on_paths, len(segments.query) > segments.num_queries
    if several:
        # The partials of a query's rows stand side by side, so all rows of a tile have as many.
        begin = np.union1d(rows.begin, segments.row_begin)
        rows = Tiling(begin, np.append(begin[1:], rows.end[-1]))
    first, last = _chunks_of_rows(problem, segments, nested)
    tile_first = np.minimum.reduceat(first, rows.begin)
    chunks = np.maximum(np.maximum.reduceat(last, rows.begin) - tile_first + 1, 0)
    tile, ordinal = expand(chunks)
    unit_of = np.cumsum(chunks) - chunks - tile_first  # of a tile's chunk 0, if it had one

    versions = _versions(problem, segments, rows, nested, block_n)
    versions = _by_unit(versions, unit_of, block_n)
    steps = versions.step_end - versions.step_begin
    before = np.cumsum(steps) - steps
    num_units = len(tile)
    steps_of_unit = np.bincount(versions.unit, steps, num_units).astype(np.int64)
    lane = before * block_n
    runs = _runs(segments, versions, lane, nested, block_n)

    # The lowest bit of all that must be a multiple of the width.
    aligned = np.full(num_units, segments.block_size | block_n | 1 << MAX_LOG2_WIDTH)
    np.bitwise_or.at(aligned, runs.unit, runs.lane | runs.place)
    log2_width = np.frexp(aligned & -aligned)[1].astype(np.int64) - 1
    lanes_before = (np.cumsum(steps_of_unit) - steps_of_unit) * block_n
    entries_of_unit = steps_of_unit * block_n >> log2_width
    entry_end = np.cumsum(entries_of_unit)
    entry_begin = entry_end - entries_of_unit
    shift = log2_width[runs.unit]
    pieces = Pieces(
        segment=runs.segment,
        begin=runs.place - segments.offset[runs.segment],
        length=runs.length,
        row_begin=runs.row_begin,
        row_end=runs.row_end,
        log2_width=shift,
        entry=entry_begin[runs.unit] + (runs.lane - lanes_before[runs.unit] >> shift),
        entries=-(-runs.length >> shift),
    )
    order = np.argsort(-steps_of_unit, kind="stable")
    units = UnitColumns(
        row_begin=rows.begin[tile[order]],
        row_end=rows.end[tile[order]],
        entry_begin=entry_begin[order],
        entry_mid=entry_begin[order],  # one way through the kernel for all
        entry_end=entry_end[order],
        log2_width=log2_width[order],
        ordinal=ordinal[order],
    )
    size = rows.end - rows.begin
    partial, merges, num_partials = _merges(
        segments, np.repeat(chunks, size), first - np.repeat(tile_first, size), last - first + 1
    )
    return UnitPlan(
        segments=segments,
        partial=partial,
        pieces=pieces,
        num_entries=int(entry_end[-1]) if num_units else 0,
        units={shape.lean_rows: units},
        merges=merges,
        num_partials=num_partials,
        tails=None,
    )


class _Versions(NamedTuple):
    """Steps of a unit with the tokens that one range of rows has there: those of the segment, and
    before its first token those of the segments above it."""

    tile: Int64Array
    segment: Int64Array
    step_begin: Int64Array
    step_end: Int64Array
    row_begin: Int64Array
    row_end: Int64Array
    unit: Int64Array

    def take(self, index: Int64Array) -> "_Versions":
        return _Versions(*(column[index] for column in self))


class _Runs(NamedTuple):
    """Tokens of a segment on consecutive lanes; `place` counts from its first block's begin."""

    unit: Int64Array
    lane: Int64Array
    segment: Int64Array
    place: Int64Array
    length: Int64Array
    row_begin: Int64Array
    row_end: Int64Array


def _chunks_of_rows(
    problem: Problem, segments: Segments, nested: bool
) -> tuple[Int64Array, Int64Array]:
    """First and last chunk of each row, by its own path alone; the last may be one before."""
    position = segments.position
    start = np.zeros_like(position)
    end = position + 1
    if not nested:
        segment = np.repeat(
            np.argsort(segments.row_begin), np.sort(segments.row_end) - np.sort(segments.row_begin)
        )
        start = segments.start[segment]
        end = np.minimum(end, start + segments.length[segment])
        whole = start // CHUNK, (start + segments.length[segment] - 1) // CHUNK
    first = start
    if problem.window is not None and not problem.sink_tokens:
        first = np.maximum(start, position + 1 - problem.window)
    first, last = first // CHUNK, (end - 1) // CHUNK
    if not nested:
        several = np.bincount(segments.query)[segments.query] > 1
        first, last = np.where(several, whole, (first, last))
    return first, np.maximum(last, first - 1)


def _versions(
    problem: Problem, segments: Segments, rows: Tiling, nested: bool, block_n: int
) -> _Versions:
    """The versions of all steps that some row of a tile sees; not yet cut into units."""
    begin, end = segments.row_begin, segments.row_end
    first_tile = np.searchsorted(rows.end, begin, side="right")
    tiles = np.searchsorted(rows.begin, end, side="left") - first_tile
    segment, ordinal = expand(tiles)
    tile = first_tile[segment] + ordinal
    stop = segments.start + segments.length
    # Rows below a segment go on into the step in which it ends; only its own rows end there.
    own_end = end.copy()
    if nested:
        parent = _parents(segments)
        below = np.flatnonzero(parent >= 0)
        np.minimum.at(own_end, parent[below], begin[below])

    first, through = segments.start // block_n, stop // block_n
    last = -(-stop // block_n)
    low, high = extremes(
        segments.position,
        np.maximum(begin[segment], rows.begin[tile]),
        np.minimum(end[segment], rows.end[tile]),
    )
    seen = high // block_n + 1
    ranges = [(first[segment], np.minimum(through[segment], seen), end),
              (through[segment], np.minimum(last[segment], seen), own_end)]  # fmt: skip
    parts = []
    for step_begin, step_end, row_end in ranges:
        whole = _Versions(
            tile, segment, step_begin, step_end, begin[segment], row_end[segment], tile
        )
        if problem.window is None:
            parts.append(whole)
            continue
        sinks = np.clip(-(-problem.sink_tokens // block_n), step_begin, step_end)
        inside = np.clip((low + 1 - problem.window) // block_n, sinks, step_end)
        parts += [whole._replace(step_end=sinks), whole._replace(step_begin=inside)]
    versions = _Versions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    there = np.maximum(versions.row_begin, rows.begin[versions.tile]) < np.minimum(
        versions.row_end, rows.end[versions.tile]
    )
    return versions.take(np.flatnonzero(there & (versions.step_begin < versions.step_end)))


def _by_unit(versions: _Versions, unit_of: Int64Array, block_n: int) -> _Versions:
    """Cut versions at the ends of chunks, and bring them in the order of units and paths."""
    steps = CHUNK // block_n
    first, last = versions.step_begin // steps, (versions.step_end - 1) // steps
    index, ordinal = expand(last - first + 1)
    cut = versions.take(index)
    chunk = first[index] + ordinal
    cut = cut._replace(
        step_begin=np.maximum(cut.step_begin, chunk * steps),
        step_end=np.minimum(cut.step_end, (chunk + 1) * steps),
        unit=unit_of[cut.tile] + chunk,
    )
    return cut.take(np.lexsort((cut.step_begin, cut.segment, cut.unit)))


def _runs(
    segments: Segments, versions: _Versions, lane: Int64Array, nested: bool, block_n: int
) -> _Runs:
    """The tokens of versions, lanes ascending: those above a segment stand in its first step."""
    parent = _parents(segments) if nested else np.full(len(segments.start), -1)
    stop = segments.start + segments.length
    of, segment = np.arange(len(lane)), versions.segment
    position = versions.step_begin * block_n
    until = versions.step_end * block_n
    parts: list[_Runs] = []
    while len(of) or not parts:
        begin = np.maximum(segments.start[segment], position[of])
        end = np.minimum(stop[segment], until[of])
        parts.append(
            _Runs(
                unit=versions.unit[of],
                lane=lane[of] + begin - position[of],
                segment=segment,
                place=segments.offset[segment] + begin - segments.start[segment],
                length=end - begin,
                row_begin=versions.row_begin[of],
                row_end=versions.row_end[of],
            )
        )
        above = np.flatnonzero((begin > position[of]) & (parent[segment] >= 0))
        of, segment = of[above], parent[segment[above]]
    runs = _Runs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.argsort(runs.lane)
    return _Runs(*(column[order] for column in runs))


def _parents(segments: Segments) -> Int64Array:
    """The segment above each one of a tree, -1 for roots: the one of the round before."""
    num_rows = len(segments.position)
    key = segments.round * num_rows + segments.row_begin
    order = np.argsort(key)
    above = np.searchsorted(key[order], key - num_rows, side="right") - 1
    parent: Int64Array = np.where(segments.round > 0, order[above], -1)
    return parent


def _merges(
    segments: Segments, slots: Int64Array, begin: Int64Array, count: Int64Array
) -> tuple[Int64Array, MergeColumns, int]:
    """First slot of each row, which has `slots` of them and merges `count` from `begin` on."""
    by_query = np.argsort(segments.query, kind="stable")
    ends = np.cumsum(slots[by_query])
    partial = np.empty_like(slots)
    partial[by_query] = ends - slots[by_query]
    # Rows of one query merge all their slots.
    rows = np.bincount(segments.query, minlength=segments.num_queries)
    last = by_query[np.cumsum(rows) - 1]
    first = by_query[np.cumsum(rows) - rows]
    merges = MergeColumns(
        query=segments.query[first],
        begin=(partial + begin)[first],
        end=(partial + begin + count)[last],
    )
    return partial, merges, int(ends[-1])
