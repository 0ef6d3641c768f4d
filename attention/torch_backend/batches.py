"""Which work items share one call: those of one round and of similar shape, within bounds."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.ranges import cut
from attention.segments import Segments
from attention.torch_backend.items import BoolArray, WorkItems

# Bounds of what one call holds: KV gathered (K and V together), tokens of an item, queries.
GATHER_BYTES = 8 << 20
KV_TILE = 2048
MAX_QUERIES = 1024
# From this size on, consecutive slots are read in place: a call costs less than the copy.
IN_PLACE_BYTES = 512 << 10
# The fused CPU kernel takes up to twice as long on a number of tokens not a multiple of this, if
# that is below its own block of KV, and that tells where there are many queries.
KV_STEP = 16
KV_BLOCK = 512
FEW_QUERIES = 16
# A call costs about as much as to gather and attend to this much padding.
CALL_BYTES = 512 << 10
CALL_FLOPS = 16 << 20


class Batches(NamedTuple):
    """B batches of work items; no two items of a batch have a query in common.

    Attributes:
        items: the items, those of a batch side by side.
        in_place: bool [I], the item's slots are consecutive and to be read where they lie.
        begin, size: int64 [B], first item of each batch and how many there are.
        queries, tokens: int64 [B], what its items are padded to: at least the most that one has.
    """

    items: WorkItems
    in_place: BoolArray
    begin: Int64Array
    size: Int64Array
    queries: Int64Array
    tokens: Int64Array


def make_batches(
    segments: Segments,
    items: WorkItems,
    *,
    token_bytes: int,
    pair_flops: int,
    viewable: bool,
) -> Batches:
    """Cut items to the bounds of a call and batch them, in the order of the rounds.

    Args:
        token_bytes: bytes of one token's K and V in one layer.
        pair_flops: floating-point operations of one query on one token, all heads together.
        viewable: consecutive slots can be read in place (tokens lie at one stride).
    """
    in_place = _in_place(segments, items, token_bytes) & viewable
    items, in_place = _bounded(items, in_place)
    key = _shape_key(items, in_place)
    by_key = np.argsort(key, kind="stable")
    key, items, in_place = key[by_key], items.take(by_key), in_place[by_key]
    num_rows = items.num_rows
    # What is read in place is not padded.
    padded_len = np.where(in_place, 0, items.kv_len)

    kind, shape = key >> _SHAPE_BITS, key >> _KV_BITS
    first = np.flatnonzero(np.append(True, kind[1:] != kind[:-1]))
    count = np.diff(first, append=len(kind))
    tokens = np.maximum.reduceat(padded_len, first)
    queries = np.maximum.reduceat(num_rows, first)
    padding = count * tokens - np.add.reduceat(padded_len, first)
    idle = count * tokens * queries - np.add.reduceat(padded_len * num_rows, first)
    cheap = (padding * token_bytes <= CALL_BYTES) & (idle * pair_flops <= CALL_FLOPS)
    shape = np.where(np.repeat(cheap, count), kind, shape)

    first = np.flatnonzero(np.append(True, shape[1:] != shape[:-1]))
    count = np.diff(first, append=len(shape))
    tokens = np.maximum.reduceat(padded_len, first)
    queries = np.maximum.reduceat(num_rows, first)
    limit = np.minimum(GATHER_BYTES // np.maximum(tokens * token_bytes, 1), MAX_QUERIES // queries)
    calls = cut(count, np.maximum(limit, 1))
    begin = first[calls.source] + calls.begin
    tokens = np.maximum.reduceat(items.kv_len, begin)
    rounded = _round_up(tokens, KV_STEP)
    worthwhile = ~in_place[begin] & (rounded - tokens <= tokens >> 3)
    return Batches(
        items=items,
        in_place=in_place,
        begin=begin,
        size=calls.size,
        queries=np.maximum.reduceat(num_rows, begin),
        tokens=np.where(worthwhile, rounded, tokens),
    )


def _in_place(segments: Segments, items: WorkItems, token_bytes: int) -> BoolArray:
    """Items worth reading in place: unmasked, large, and in consecutive blocks."""
    tokens = items.kv_len
    large = ~items.masked & (tokens * token_bytes >= IN_PLACE_BYTES)
    if not large.any():
        return large
    slow = (tokens % KV_STEP > 0) & (tokens < KV_BLOCK) & (items.num_rows > FEW_QUERIES)
    breaks = np.flatnonzero(segments.blocks[1:] != segments.blocks[:-1] + 1) + 1
    # A break at a segment's first block lies between another segment and it.
    first_block, last_token = segments.first_block, segments.offset + segments.length - 1
    first = np.searchsorted(breaks, first_block, side="right")
    last_block = first_block + last_token // segments.block_size
    contiguous: BoolArray = first == np.searchsorted(breaks, last_block, side="right")
    return large & ~slow & contiguous[items.segment]


def _bounded(items: WorkItems, in_place: BoolArray) -> tuple[WorkItems, BoolArray]:
    """Cut items with more tokens or queries than one call may hold."""
    longest = np.where(in_place, items.kv_len, KV_TILE)
    if (items.kv_len > longest).any():
        pieces = cut(items.kv_len, longest)
        items, in_place = items.take(pieces.source), in_place[pieces.source]
        items = items._replace(
            kv_begin=items.kv_begin + pieces.begin,
            kv_len=pieces.size,
            round=items.round * (pieces.ordinal.max() + 1) + pieces.ordinal,
        )
    if items.num_rows.max() > MAX_QUERIES:
        pieces = cut(items.num_rows, MAX_QUERIES)
        items, in_place = items.take(pieces.source), in_place[pieces.source]
        row_begin = items.row_begin + pieces.begin
        items = items._replace(row_begin=row_begin, row_end=row_begin + pieces.size)
    return items, in_place


# Fields of the shape key from the lowest: tokens; padded tokens and padded queries; the kind.
_KV_BITS = KV_TILE.bit_length()
_QUERY_BITS = MAX_QUERIES.bit_length()
_SHAPE_BITS = 2 * _KV_BITS + _QUERY_BITS


def _shape_key(items: WorkItems, in_place: BoolArray) -> Int64Array:
    """Sorts items by what they may share a call with, those of one shape by their tokens."""
    num_rows = items.num_rows
    # Padding costs up to a quarter of the tokens; few queries cost little, so up to half of them.
    octave = _octave(num_rows)
    query_step = np.where(num_rows > 64, octave >> 2, octave)
    tokens = np.where(in_place, 0, items.kv_len)
    token_step = np.maximum(_octave(tokens) >> 2, KV_STEP)
    key = items.round * 4 + 2 * items.masked + in_place
    key = (key << _QUERY_BITS) + _round_up(num_rows, query_step)
    key = (key << _KV_BITS) + _round_up(tokens, token_step)
    return (key << _KV_BITS) + tokens


def _octave(size: Int64Array) -> Int64Array:
    """The largest power of two that is at most each size (1 for 0)."""
    exponent = np.frexp(size)[1].astype(np.int64)
    octave: Int64Array = 1 << np.maximum(exponent - 1, 0)
    return octave


def _round_up(size: Int64Array, step: int | Int64Array) -> Int64Array:
    rounded: Int64Array = -(-size // step) * step
    return rounded
