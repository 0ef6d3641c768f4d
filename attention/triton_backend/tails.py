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


def with_tails(segments: Segments) -> tuple[Segments, Int64Array]:
    """The segments, behind them an empty one for each row without a tail of its own; and all tails.

    A row's own tail is the segment that it alone reads and that ends with its position. An empty
    one has the temperature and weight of what it is behind. The tails are segments: int64 [R].
    """
    (alone,) = (segments.row_end - segments.row_begin == 1).nonzero()
    end = segments.start.take(alone) + segments.length.take(alone)
    own = alone[end == segments.position.take(segments.row_begin.take(alone)) + 1]
    tail = np.full(len(segments.position), -1)
    tail[segments.row_begin.take(own)] = own
    (row,) = (tail < 0).nonzero()
    count = len(row)
    if not count:
        return segments, tail
    tail[row] = len(segments.length) + np.arange(count)
    zeros = np.zeros(count, np.int64)

    def appended(column: Int64Array, values: Int64Array) -> Int64Array:
        return np.concatenate((column, values))

    def weights(column: FloatArray | None) -> FloatArray | None:
        return None if column is None else np.append(column, column[grown_segments(segments)[row]])

    longer = segments._replace(
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
    return longer, tail


def place_tails(
    segments: Segments,
    tail: Int64Array,
    pieces: Pieces,
    rows: Tiling,
    lists: TileLists,
    last_unit: Int64Array,
) -> Tails:
    """Find the tails of all rows in the lists of their tiles.

    Args:
        segments, tail: from `with_tails`.
        last_unit: int64 [T], last unit of each tile.
    """
    num_rows, size = len(tail), segments.block_size
    ends = pieces.begin + pieces.length == segments.length.take(pieces.segment)
    (last,) = (ends & (pieces.length > 0)).nonzero()
    piece_of = np.full(len(segments.length), -1)
    piece_of[pieces.segment.take(last)] = last
    piece = piece_of.take(tail)

    tile = np.arange(len(rows.begin)).repeat(rows.end - rows.begin)
    width = 1 << lists.log2_width.take(tile)
    entry, length, next_slot = (np.full(num_rows, none) for none in (-1, 0, -1))
    (row,) = (piece >= 0).nonzero()
    of, piece = tail.take(row), piece.take(row)
    entries = pieces.entries.take(piece)
    # Where the last token is, from the begin of its segment's first block.
    place = segments.offset.take(of) + segments.length.take(of) - 1
    block = segments.first_block.take(of) + place // size
    slot = segments.blocks.take(block).astype(np.int64) * size + place % size
    entry[row] = pieces.entry.take(piece) + entries - 1
    in_entry = (place & width.take(row) - 1) + 1
    length[row] = np.where(entries > 1, in_entry, pieces.length.take(piece))
    next_slot[row] = slot + 1
    return Tails(
        entry=entry,
        length=length,
        next_slot=next_slot,
        width=width,
        segment=tail,
        tile=tile,
        free=lists.end,
        unit=last_unit,
    )
