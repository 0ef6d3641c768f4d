"""Schedules cut at random: whatever is valid must give the right result."""

from typing import NamedTuple

import numpy as np
import torch

from attention.problem import Problem
from attention.segments import Segments
from attention.triton_backend.units import Entries, Merges, Rows, Schedule, Units

POISON = 2**31 - 1  # behind the sizes, where nothing reads
SPARE = 3  # rows of capacity of that kind


class _Unit(NamedTuple):
    rows: range
    full: list[int]  # entries that all rows see whole
    masked: list[int]
    log2_width: int
    ordinal: int


class _Entry(NamedTuple):
    slot: int
    length: int
    position: int
    row_begin: int
    row_end: int
    scale: float
    bias: float


def random_schedule(
    problem: Problem, segments: Segments, rows_per_tile: tuple[int, ...], seed: int
) -> Schedule:
    """A valid schedule with one set of units for each of `rows_per_tile`, ascending.

    Rows are tiled twice, coarsely and finely, each segment is attended to in one of the tilings,
    and the entries of a tile are cut and shuffled into one unit or several.
    """
    rng = np.random.default_rng(seed)
    num_rows = len(segments.query)
    coarse = rng.random(len(segments.start)) < rng.choice((0.0, 0.5, 1.0))
    units: list[_Unit] = []
    entries: list[_Entry] = []
    parts = np.zeros(num_rows, np.int64)
    for tile in _tiles(rng, range(num_rows), rows_per_tile[-1]):
        chosen = np.flatnonzero(coarse)
        if any(_overlap(segments, segment, tile) for segment in chosen):
            _add_units(problem, segments, rng, tile, chosen, units, entries, parts)
        for part in _tiles(rng, tile, rows_per_tile[0]):
            _add_units(problem, segments, rng, part, np.flatnonzero(~coarse), units, entries, parts)

    rows, merges, num_partials = _places(segments, parts)
    by_size: list[list[_Unit]] = [[] for _ in rows_per_tile]
    for unit in units:
        fits = [size for size, most in enumerate(rows_per_tile) if len(unit.rows) <= most]
        by_size[int(rng.choice(fits))].append(unit)
    ints, floats = ("slot", "length", "position", "row_begin", "row_end"), ("scale", "bias")
    columns: list[_Entry] = []
    return Schedule(
        rows=rows,
        units=tuple(
            _units(of_size, most, columns, entries)
            for of_size, most in zip(by_size, rows_per_tile, strict=True)
        ),
        entries=Entries(
            *(_int32([getattr(entry, name) for entry in columns]) for name in ints),
            *(
                None
                if given is None
                else torch.tensor(
                    [*(getattr(entry, name) for entry in columns), *[torch.nan] * SPARE],
                    dtype=torch.float32,
                )
                for name, given in zip(
                    floats, (segments.temperature, segments.log_weight), strict=True
                )
            ),
        ),
        merges=merges,
        num_partials=num_partials + SPARE,
    )


def _tiles(rng: np.random.Generator, rows: range, most: int) -> list[range]:
    tiles = []
    begin = rows.start
    while begin < rows.stop:
        end = min(rows.stop, begin + int(rng.integers(max(1, most // 2), most + 1)))
        tiles.append(range(begin, end))
        begin = end
    return tiles


def _overlap(segments: Segments, segment: int, rows: range) -> bool:
    return bool(segments.row_begin[segment] < rows.stop and segments.row_end[segment] > rows.start)


def _add_units(
    problem: Problem,
    segments: Segments,
    rng: np.random.Generator,
    tile: range,
    chosen: np.ndarray,
    units: list[_Unit],
    entries: list[_Entry],
    parts: np.ndarray,
) -> None:
    # Not much wider than runs are: lanes without a token cost the interpreter time.
    log2_width = int(rng.integers(0, segments.block_size.bit_length() + 2))
    own = segments.position[tile.start : tile.stop]
    full, masked = [], []
    for segment in chosen:
        if not _overlap(segments, segment, tile):
            continue
        whole = segments.row_begin[segment] <= tile.start and segments.row_end[segment] >= tile.stop
        for entry in _runs(segments, rng, int(segment), 1 << log2_width):
            last = entry.position + entry.length - 1
            in_window = (
                problem.window is None
                or entry.position > own.max() - problem.window
                or last < problem.sink_tokens
            )
            seen = whole and last <= own.min() and in_window
            (full if seen and rng.random() < 0.8 else masked).append(len(entries))
            entries.append(entry)
    rng.shuffle(full)
    rng.shuffle(masked)
    number = int(rng.integers(1, 4))
    cut_full = [0, *np.sort(rng.integers(0, len(full) + 1, number - 1)), len(full)]
    cut_masked = [0, *np.sort(rng.integers(0, len(masked) + 1, number - 1)), len(masked)]
    for index in range(number):
        units.append(
            _Unit(
                tile,
                full[cut_full[index] : cut_full[index + 1]],
                masked[cut_masked[index] : cut_masked[index + 1]],
                log2_width,
                int(parts[tile.start]),
            )
        )
        parts[tile.start : tile.stop] += 1


def _runs(segments: Segments, rng: np.random.Generator, segment: int, width: int) -> list[_Entry]:
    """Entries of a segment: cut where its blocks do not follow each other, and at random."""
    place = segments.offset[segment] + np.arange(segments.length[segment])
    block = segments.blocks[segments.first_block[segment] + place // segments.block_size]
    slots = block.astype(np.int64) * segments.block_size + place % segments.block_size
    scale = 1.0 if segments.temperature is None else 1.0 / float(segments.temperature[segment])
    bias = 0.0 if segments.log_weight is None else float(segments.log_weight[segment])
    rows = int(segments.row_begin[segment]), int(segments.row_end[segment])
    runs = []
    begin = 0
    while begin < len(slots):
        end = begin + 1
        most = width if rng.random() < 0.7 else int(rng.integers(1, width + 1))
        while end < len(slots) and end - begin < most and slots[end] == slots[end - 1] + 1:
            end += 1
        position = int(segments.start[segment]) + begin
        runs.append(_Entry(int(slots[begin]), end - begin, position, *rows, scale, bias))
        begin = end
    if rng.random() < 0.2:
        runs.append(_Entry(POISON, 0, 0, *rows, scale, bias))
    return runs


def _places(segments: Segments, parts: np.ndarray) -> tuple[Rows, Merges, int]:
    """Partials of a query's rows stand side by side; a row with the only one needs none."""
    partial = np.full(len(parts), -1)
    queries: list[tuple[int, int, int]] = []
    used = 0
    for query in range(segments.num_queries):
        of = np.flatnonzero(segments.query == query)
        if parts[of].sum() == 1:
            continue
        begin = used
        for row in of:
            partial[row] = used
            used += int(parts[row])
        queries.append((query, begin, used))
    merges = Merges(
        torch.tensor([len(queries)], dtype=torch.int32),
        *(_int32([query[column] for query in queries]) for column in range(3)),
    )
    return Rows(_int32(segments.query), _int32(segments.position), _int32(partial)), merges, used


def _units(
    units: list[_Unit], rows_per_tile: int, columns: list[_Entry], entries: list[_Entry]
) -> Units:
    spans = []
    for unit in units:
        begin = len(columns)
        columns += [entries[entry] for entry in (*unit.full, *unit.masked)]
        spans.append((begin, begin + len(unit.full), len(columns)))
    return Units(
        torch.tensor([len(units)], dtype=torch.int32),
        _int32([unit.rows.start for unit in units]),
        _int32([unit.rows.stop for unit in units]),
        *(_int32([span[column] for span in spans]) for column in range(3)),
        _int32([unit.log2_width for unit in units]),
        _int32([unit.ordinal for unit in units]),
        rows_per_tile,
    )


def _int32(values: np.ndarray | list[int]) -> torch.Tensor:
    return torch.tensor([*map(int, values), *[POISON] * SPARE], dtype=torch.int32)
