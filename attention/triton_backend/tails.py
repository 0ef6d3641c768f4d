"""Where rows grow: the last entry of each row's own tail, and the free entries behind its list."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.reserve import grown_segments
from attention.segments import FloatArray, Segments
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

    A row's own tail is the segment that it alone reads and that ends with its position. An empty
    one has the temperature and weight of what it is behind.
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

    def weights(column: FloatArray | None) -> FloatArray | None:
        return None if column is None else np.append(column, column[grown_segments(segments)[row]])

    return segments._replace(
        node=appended(segments.node, zeros - 1),
        start=appended(segments.start, segments.position[row] + 1),
        length=appended(segments.length, zeros),
        offset=appended(segments.offset, zeros),
        first_block=appended(segments.first_block, zeros),
        row_begin=appended(segments.row_begin, row),
        row_end=appended(segments.row_end, row + 1),
        round=appended(segments.round, zeros + segments.round.max() + 1),
        temperature=weights(segments.temperature),
        log_weight=weights(segments.log_weight),
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
    entry, length, next_slot = (np.full(num_rows, none) for none in (-1, 0, -1))
    row = np.flatnonzero(piece_of[segment] >= 0)
    of, piece = segment[row], piece_of[segment[row]]
    entries, size = pieces.entries[piece], segments.block_size
    # Where the last token is, from the begin of its segment's first block.
    place = segments.offset[of] + segments.length[of] - 1
    block = segments.blocks[segments.first_block[of] + place // size].astype(np.int64)
    entry[row] = pieces.entry[piece] + entries - 1
    length[row] = np.where(entries > 1, (place & width[row] - 1) + 1, pieces.length[piece])
    next_slot[row] = block * size + place % size + 1
    return Tails(
        entry=entry,
        length=length,
        next_slot=next_slot,
        width=width,
        segment=segment,
        tile=tile,
        free=lists.end,
        unit=last_unit,
    )
