"""Which work items share one call: those of one round and of similar shape, within bounds."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import cut
from attention.segments import Segments
from attention.torch_backend.items import BoolArray, WorkItems
from attention.torch_backend.places import places_of

# Bounds of what one call holds: KV gathered (K and V together), KV read in place, tokens of an
# item, queries.
GATHER_BYTES = 4 << 20
IN_PLACE_BYTES = 64 << 20
KV_TILE = 2048
MAX_QUERIES = 1024
# From this size on, KV is read in place: a call costs less than the copy.
WORTH_A_CALL = 256 << 10
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
        begin, size: int64 [B], first item of each batch and how many there are.
        queries, tokens: int64 [B], what its items are padded to: at least the most that one has.
    """

    items: WorkItems
    begin: Int64Array
    size: Int64Array
    queries: Int64Array
    tokens: Int64Array


class Views(NamedTuple):
    """Batches to be read in place: items of equal shape, in consecutive blocks, equally spaced.

    Attributes:
        block, offset: int64 [B], where the first item begins.
        step: int64 [B], blocks from each item to the next.
    """

    batches: Batches
    block: Int64Array
    offset: Int64Array
    step: Int64Array


class Gathers(NamedTuple):
    """Batches to be gathered.

    Attributes:
        whole_blocks: bool [B], items begin on a block, and the tokens are those of whole blocks.
    """

    batches: Batches
    whole_blocks: BoolArray


def make_batches(
    problem: Problem, segments: Segments, items: WorkItems, kind: Int64Array
) -> tuple[Views, Gathers]:
    """Cut items to the bounds of a call and batch them.

    Args:
        kind: int64 [M], segments of another kind share no call.
    """
    items = _cut_queries(items)
    views, left = _views(problem, segments, items, kind)
    gathered = _cut_tokens(items.take(left), segments.block_size)
    return views, _gathers(problem, segments, gathered, kind)


def _cut_queries(items: WorkItems) -> WorkItems:
    if not (items.num_rows > MAX_QUERIES).any():
        return items
    pieces = cut(items.num_rows, MAX_QUERIES)
    items = items.take(pieces.source)
    row_begin = items.row_begin + pieces.begin
    return items._replace(row_begin=row_begin, row_end=row_begin + pieces.size)


def _cut_tokens(items: WorkItems, block_size: int) -> WorkItems:
    # A piece ends where a block does, if one holds a block.
    tile = KV_TILE // block_size * block_size or KV_TILE
    if not (items.kv_len > tile).any():
        return items
    pieces = cut(items.kv_len, tile)
    items = items.take(pieces.source)
    return items._replace(
        kv_begin=items.kv_begin + pieces.begin,
        kv_len=pieces.size,
        round=items.round * (pieces.ordinal.max() + 1) + pieces.ordinal,
    )


def _views(
    problem: Problem, segments: Segments, items: WorkItems, kind: Int64Array
) -> tuple[Views, Int64Array]:
    """What is read in place, and the indices of the other items."""
    places = places_of(segments, items)
    num_rows, tokens = items.num_rows, items.kv_len
    viewable = places.contiguous
    if problem.layout == "HND" and segments.block_size > 1:
        # The tokens of a head lie at one stride inside a block only.
        viewable &= places.offset + tokens <= segments.block_size
    viewable &= (tokens % KV_STEP == 0) | (tokens >= KV_BLOCK) | (num_rows <= FEW_QUERIES)
    chosen = np.flatnonzero(viewable)

    # Equal shapes side by side, in the order of their blocks.
    shape = np.stack(
        (
            items.round * 2 + items.masked,
            kind[items.segment],
            num_rows,
            tokens,
            places.offset,
        )
    )[:, chosen]
    block = places.block[chosen]
    order = np.argsort(_mixed(shape) + block, kind="stable")
    chosen, shape, block = chosen[order], shape[:, order], block[order]
    first = np.flatnonzero(_begins(shape, block))
    size = np.diff(first, append=len(chosen))
    bytes_ = size * tokens[chosen[first]] * problem.token_bytes
    calls = np.maximum(IN_PLACE_BYTES * size // np.maximum(bytes_, 1), 1)
    calls = np.minimum(calls, np.maximum(MAX_QUERIES // num_rows[chosen[first]], 1))
    worthwhile = bytes_ >= WORTH_A_CALL
    in_place = np.repeat(worthwhile, size)
    left = np.ones(len(tokens), np.bool_)
    left[chosen[in_place]] = False

    step = np.where(size > 1, np.append(block[1:] - block[:-1], 0)[first], 0)
    pieces = cut(size[worthwhile], calls[worthwhile])
    chosen, block = chosen[in_place], block[in_place]
    begin = np.cumsum(pieces.size) - pieces.size
    items = items.take(chosen)
    return Views(
        Batches(items, begin, pieces.size, items.num_rows[begin], items.kv_len[begin]),
        block=block[begin],
        offset=places.offset[chosen][begin],
        step=step[worthwhile][pieces.source],
    ), np.flatnonzero(left)


def _mixed(columns: Int64Array) -> Int64Array:
    """A number for each column of values, in the high bits; columns may collide."""
    mixed = np.zeros(columns.shape[1], np.int64)
    for row in columns:
        mixed = (mixed * 1_000_003 + row) & 0x3FFFFFFF
    return mixed << 32


def _begins(shape: Int64Array, block: Int64Array) -> BoolArray:
    """Where sorted items are of another shape, or of another step, than those before them."""
    other = np.ones(len(block), np.bool_)
    other[1:] = (shape[:, 1:] != shape[:, :-1]).any(axis=0)
    step = np.diff(block, prepend=0)
    bends = np.diff(step, prepend=0) != 0
    # A bend begins a run, unless it is the second item of one, which is free to set the step: of
    # bends side by side, every other one.
    steady = other | ~bends
    place = np.arange(len(block))
    last_steady = np.maximum.accumulate(np.where(steady, place, 0))
    begins: BoolArray = other | (~steady & ((place - last_steady) % 2 != other[last_steady]))
    return begins


def _gathers(problem: Problem, segments: Segments, items: WorkItems, kind: Int64Array) -> Gathers:
    whole_blocks = _in_whole_blocks(segments, items)
    key = _shape_key(items, kind, whole_blocks)
    by_key = np.argsort(key, kind="stable")
    key, items, whole_blocks = key[by_key], items.take(by_key), whole_blocks[by_key]
    num_rows, kv_len = items.num_rows, items.kv_len

    kind, shape = key >> _SHAPE_BITS, key >> _KV_BITS
    first = _firsts(kind)
    count = np.diff(first, append=len(kind))
    tokens, queries = _most(kv_len, first), _most(num_rows, first)
    padding = count * tokens - _total(kv_len, first)
    idle = count * tokens * queries - _total(kv_len * num_rows, first)
    cheap = padding * problem.token_bytes <= CALL_BYTES
    cheap &= idle * problem.pair_flops <= CALL_FLOPS
    shape = np.where(np.repeat(cheap, count), kind, shape)

    first = _firsts(shape)
    count = np.diff(first, append=len(shape))
    tokens, queries = _most(kv_len, first), _most(num_rows, first)
    limit = GATHER_BYTES // np.maximum(tokens * problem.token_bytes, 1)
    limit = np.minimum(limit, MAX_QUERIES // np.maximum(queries, 1))
    calls = cut(count, np.maximum(limit, 1))
    begin = first[calls.source] + calls.begin
    tokens = _most(kv_len, begin)
    rounded = _round_up(tokens, KV_STEP)
    tokens = np.where(rounded - tokens <= tokens >> 3, rounded, tokens)
    whole_blocks = whole_blocks[begin]
    blocks = _round_up(_most(kv_len, begin), segments.block_size)
    tokens = np.where(whole_blocks, blocks, tokens)
    return Gathers(Batches(items, begin, calls.size, _most(num_rows, begin), tokens), whole_blocks)


def _in_whole_blocks(segments: Segments, items: WorkItems) -> BoolArray:
    """Items that begin on a block and end on one, or waste little of the last one."""
    block_size = segments.block_size
    begin = segments.offset[items.segment] + items.kv_begin
    waste = -items.kv_len % block_size
    chosen: BoolArray = (begin % block_size == 0) & (waste <= items.kv_len >> 3)
    return chosen & (block_size > 1)


def _firsts(values: Int64Array) -> Int64Array:
    """Where runs of equal values begin."""
    firsts: Int64Array = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return firsts


def _most(values: Int64Array, first: Int64Array) -> Int64Array:
    """The maximum of each run of values; of none where there is no run."""
    most: Int64Array = np.maximum.reduceat(values, first) if len(first) else first
    return most


def _total(values: Int64Array, first: Int64Array) -> Int64Array:
    total: Int64Array = np.add.reduceat(values, first) if len(first) else first
    return total


# Fields of the shape key from the lowest: tokens; padded tokens and padded queries; the kind.
_KV_BITS = (KV_TILE + KV_TILE // 4).bit_length()
_QUERY_BITS = MAX_QUERIES.bit_length()
_SHAPE_BITS = 2 * _KV_BITS + _QUERY_BITS


def _shape_key(items: WorkItems, kind: Int64Array, whole_blocks: BoolArray) -> Int64Array:
    """Sorts items by what they may share a call with, those of one shape by their tokens."""
    num_rows = items.num_rows
    # Padding costs up to a quarter of the tokens; few queries cost little, so up to half of them.
    octave = _octave(num_rows)
    query_step = np.where(num_rows > 64, octave >> 2, octave)
    token_step = np.maximum(_octave(items.kv_len) >> 2, KV_STEP)
    key = items.round * (kind.max() + 1) + kind[items.segment]
    key = key * 4 + 2 * items.masked + whole_blocks
    key = (key << _QUERY_BITS) + _round_up(num_rows, query_step)
    key = (key << _KV_BITS) + _round_up(items.kv_len, token_step)
    shape_key: Int64Array = (key << _KV_BITS) + items.kv_len
    return shape_key


def _octave(size: Int64Array) -> Int64Array:
    """The largest power of two that is at most each size (1 for 0)."""
    exponent = np.frexp(size)[1].astype(np.int64)
    octave: Int64Array = 1 << np.maximum(exponent - 1, 0)
    return octave


def _round_up(size: Int64Array, step: int | Int64Array) -> Int64Array:
    rounded: Int64Array = -(-size // step) * step
    return rounded
