"""Entries from pieces, on the host; `expand` does it on a GPU.

Entry j of a piece holds its tokens from the j-th multiple of the width on, counted from the begin
of the segment's first block. As widths divide the block size, no entry crosses a block.
"""

from typing import NamedTuple

import numpy as np

from attention.forest import Int32Array, Int64Array
from attention.segments import FloatArray, Segments
from attention.triton_backend.lists import Pieces


class PieceColumns(NamedTuple):
    """What entries are made from; int64 and float32 [P], entries of pieces ascending.

    Attributes:
        entry, entries: first entry and how many.
        log2_width: of the entries.
        place: where the piece begins, in tokens from the begin of its segment's first block.
        length: tokens.
        first_block: where the segment's blocks begin in the array of blocks.
        position, row_begin, row_end, scale, bias: as in `units.Entries`, of the first token.
    """

    entry: Int64Array
    entries: Int64Array
    log2_width: Int64Array
    place: Int64Array
    length: Int64Array
    first_block: Int64Array
    position: Int64Array
    row_begin: Int64Array
    row_end: Int64Array
    scale: FloatArray | None
    bias: FloatArray | None


class EntryColumns(NamedTuple):
    """Columns as in `units.Entries`, float32 or integers as wide as the block ids, [E].

    Attributes:
        place: int64 [E], their places in these.
    """

    place: Int64Array
    slot: Int32Array
    length: Int32Array
    position: Int32Array
    row_begin: Int32Array
    row_end: Int32Array
    scale: FloatArray | None
    bias: FloatArray | None


def piece_columns(segments: Segments, pieces: Pieces) -> PieceColumns:
    """All that the entries of pieces follow from; O(pieces)."""
    of = pieces.segment
    temperature, log_weight = segments.temperature, segments.log_weight
    return PieceColumns(
        entry=pieces.entry,
        entries=pieces.entries,
        log2_width=pieces.log2_width,
        place=segments.offset.take(of) + pieces.begin,
        length=pieces.length,
        first_block=segments.first_block.take(of),
        position=segments.start.take(of) + pieces.begin,
        row_begin=pieces.row_begin,
        row_end=pieces.row_end,
        scale=None if temperature is None else 1 / temperature.take(of),
        bias=None if log_weight is None else log_weight.take(of),
    )


def expand_pieces(pieces: PieceColumns, blocks: Int32Array, block_size: int) -> EntryColumns:
    """The entries of pieces, on the host; O(entries)."""
    counts = pieces.entries

    def each(values: Int64Array) -> Int32Array:
        return values.astype(np.int32).repeat(counts)

    entry = np.arange(counts.sum(), dtype=np.int32)
    before = counts.cumsum() - counts
    place, shift = each(pieces.place), each(pieces.log2_width)
    multiple = entry + each((pieces.place >> pieces.log2_width) - before)
    begin = np.maximum(place, multiple << shift)
    multiple += 1
    end = np.minimum(each(pieces.place + pieces.length), multiple << shift)
    block = begin // block_size
    inside = begin - block * block_size
    block += each(pieces.first_block)
    return EntryColumns(
        place=(pieces.entry - before).repeat(counts) + entry,
        slot=blocks.take(block) * np.int32(block_size) + inside,
        length=end - begin,
        position=each(pieces.position - pieces.place) + begin,
        row_begin=each(pieces.row_begin),
        row_end=each(pieces.row_end),
        scale=None if pieces.scale is None else pieces.scale.repeat(counts),
        bias=None if pieces.bias is None else pieces.bias.repeat(counts),
    )
