"""Where rows grow: the last entry of each row's own tail, and the free entries behind its list."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.segments import Segments
from attention.triton_backend.lists import Pieces, TileLists
from attention.triton_backend.tiling import Tiling


class Tails(NamedTuple):
    """Tails of R rows, as they are planned.

    Attributes:
        entry: int64 [R], entry of the tail's last token, -1 if it has none yet.
        length: int64 [R], tokens of that entry.
        next_slot: int64 [R], slot behind that token, -1 if there is none.
        width: int64 [R], most tokens of an entry.
        segment: int64 [R], the tail's segment.
        tile: int64 [R], tile of the row among the lean ones.
        free: int64 [T], first entry behind each tile's list.
        unit: int64 [T], the tile's last unit, which reads on into them.
    """

    entry: Int64Array
    length: Int64Array
    next_slot: Int64Array
    width: Int64Array
    segment: Int64Array
    tile: Int64Array
    free: Int64Array
    unit: Int64Array


def with_tails(segments: Segments) -> Segments:
    """The segments, and behind them an empty one for each row without a tail of its own.

    A row's own tail is the segment that it alone reads and that ends with its position.
    """
    owned = np.zeros(len(segments.position), np.bool_)
    owned[segments.row_begin[own_tails(segments)]] = True
    row = np.flatnonzero(~owned)
    count = len(row)
    if not count:
        return segments
    zeros = np.zeros(count, np.int64)

    def appended(column: Int64Array, values: Int64Array) -> Int64Array:
        return np.concatenate((column, values))

    ones = np.ones(count, np.float32)
    return segments._replace(
        node=appended(segments.node, zeros - 1),
        start=appended(segments.start, segments.position[row] + 1),
        length=appended(segments.length, zeros),
        offset=appended(segments.offset, zeros),
        first_block=appended(segments.first_block, zeros),
        row_begin=appended(segments.row_begin, row),
        row_end=appended(segments.row_end, row + 1),
        round=appended(segments.round, zeros + segments.round.max() + 1),
        temperature=None
        if segments.temperature is None
        else np.concatenate((segments.temperature, ones)),
        log_weight=None
        if segments.log_weight is None
        else np.concatenate((segments.log_weight, ones - 1)),
    )


def own_tails(segments: Segments) -> Int64Array:
    """Segments that only one row reads and that end with its position."""
    alone = segments.row_end - segments.row_begin == 1
    end = segments.start + segments.length
    return np.flatnonzero(alone & (end == segments.position[segments.row_begin] + 1))


def place_tails(
    segments: Segments, pieces: Pieces, rows: Tiling, lists: TileLists, last_unit: Int64Array
) -> Tails:
    """Find the tails of all rows in the lists of their tiles.

    Args:
        segments: from `with_tails`.
        last_unit: int64 [T], last unit of each tile.
    """
    own = own_tails(segments)
    num_rows = len(segments.position)
    segment = np.empty(num_rows, np.int64)
    segment[segments.row_begin[own]] = own
    piece_of = np.full(len(segments.length), -1)
    ends = pieces.begin + pieces.length == segments.length[pieces.segment]
    last = np.flatnonzero(ends & (pieces.length > 0))
    piece_of[pieces.segment[last]] = last

    tile = np.repeat(np.arange(len(rows.begin)), rows.end - rows.begin)
    width = 1 << lists.log2_width[tile]
    piece = piece_of[segment]
    empty = piece < 0
    length, entries = pieces.length[piece], pieces.entries[piece]
    place = segments.offset[segment] + segments.length[segment] - 1
    in_last = np.where(entries > 1, (place & width - 1) + 1, length)
    size = segments.block_size
    block = segments.blocks[segments.first_block[segment] + np.maximum(place, 0) // size]
    return Tails(
        entry=np.where(empty, -1, pieces.entry[piece] + entries - 1),
        length=in_last,
        next_slot=np.where(empty, -1, block.astype(np.int64) * size + place % size + 1),
        width=width,
        segment=segment,
        tile=tile,
        free=lists.end,
        unit=last_unit,
    )
