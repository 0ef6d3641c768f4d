"""Where rows grow: the last entry of each row's own tail, and the free entries behind its list."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int32Array, Int64Array
from attention.reserve import grown_segments
from attention.segments import FloatArray, Segments
from attention.triton_backend.lists import Pieces, TileLists
from attention.triton_backend.tiling import Tiling


class Tails(NamedTuple):
    """Tails of R rows in T lean tiles, from which `place_tails` finds what grows, once it does.

    Attributes:
        segment: int64 [R], the tail's segment.
        block: int [R], id of the block of its last token; anything where it has no token yet.
        rows, lists: of the tiles.
        parts: int64 [T], units of each tile.
        order: int64 [U], for each unit in the order of running, its number in that of the tiles.
    """

    segment: Int64Array
    block: Int32Array
    rows: Tiling
    lists: TileLists
    parts: Int64Array
    order: Int64Array


class TailPlaces(NamedTuple):
    """Where R tails end, and where they go on.

    Attributes:
        next_slot: int32 [R], slot behind the tail's last token, -1 if it has none yet.
        entry: int64 [R], entry of that token.
        length: int32 [R], tokens of that entry.
        room: int32 [R], tokens that it still takes, in its block.
        width: int64 [R], most tokens of an entry.
        tile: int64 [R], tile of the row.
        free: int64 [T], first entry behind each tile's list.
        unit: int64 [T], the tile's last unit, which reads on into them.

    Entry, length and room mean nothing where there is no token yet.
    """

    next_slot: Int32Array
    entry: Int64Array
    length: Int32Array
    room: Int32Array
    width: Int64Array
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


def last_blocks(segments: Segments, tail: Int64Array) -> Int32Array:
    """The block of each tail's last token. Block ids are the caller's, who may reuse the array."""
    last = segments.offset.take(tail) + segments.length.take(tail)
    last -= 1
    last //= segments.block_size
    last += segments.first_block.take(tail)
    return segments.blocks.take(last)


def place_tails(segments: Segments, pieces: Pieces, tails: Tails) -> TailPlaces:
    """Find the tails of all rows in the lists of their tiles; segments as from `with_tails`."""
    size, of, lists = segments.block_size, tails.segment, tails.lists
    ends = pieces.begin + pieces.length == segments.length.take(pieces.segment)
    (last,) = (ends & (pieces.length > 0)).nonzero()
    piece_of = np.full(len(segments.length), -1)
    piece_of[pieces.segment.take(last)] = last
    piece = piece_of.take(of)

    tile = np.arange(len(tails.parts)).repeat(tails.rows.end - tails.rows.begin)
    width = 1 << lists.log2_width.take(tile)
    # Tails without a piece find what stands behind the last one.
    entry = np.append(pieces.entry + pieces.entries, 0).take(piece)
    entry -= 1
    # Where the last token is, from the begin of its segment's first block.
    place = segments.offset.take(of) + segments.length.take(of)
    place -= 1
    inside = place % size
    next_slot = tails.block.astype(np.int64) * size + inside
    next_slot += 1
    length = np.minimum((place & width - 1) + 1, np.append(pieces.length, 0).take(piece))
    room = np.minimum(width - length, size - 1 - inside)
    next_slot[piece < 0] = -1  # without an entry, they begin one

    unit = np.empty_like(tails.order)
    unit[tails.order] = np.arange(len(unit))
    return TailPlaces(
        next_slot=next_slot.astype(np.int32),
        entry=entry,
        length=length.astype(np.int32),
        room=room.astype(np.int32),
        width=width,
        tile=tile,
        free=lists.end.copy(),
        unit=unit.take(tails.parts.cumsum() - 1),
    )
