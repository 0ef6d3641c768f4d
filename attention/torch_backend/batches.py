"""Which work items share one call: those of one round and of similar shape, within bounds."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import cut
from attention.segments import Segments
from attention.torch_backend.items import BoolArray, WorkItems
from attention.torch_backend.places import places_of

# Bounds of what one call holds: KV gathered (K and V together), tokens of a gathered item, queries,
# their results. Larger results leave the cache before they are merged, and the memory for them goes
# back to the system between calls.
GATHER_BYTES = 4 << 20
KV_TILE = 2048
MAX_QUERIES = 1024
RESULT_BYTES = 4 << 20
# From this size on, KV is read in place: a call costs less than the copy.
WORTH_A_CALL = 256 << 10
# The fused CPU kernel takes up to twice as long for many queries on few tokens where more than half
# a step of them is left over, than on the tokens gathered and padded to whole steps.
KV_STEP = 16
FEW_TOKENS = 48
FEW_QUERIES = 16
# A call costs about as much as to gather and attend to this much padding.
CALL_BYTES = 512 << 10
CALL_FLOPS = 16 << 20


def most_queries(problem: Problem) -> int:
    """Queries of a call."""
    query_bytes = problem.num_q_heads * problem.value_head_dim * problem.precision.itemsize
    return min(max(RESULT_BYTES // query_bytes, 1), MAX_QUERIES)


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
    problem: Problem, segments: Segments, items: WorkItems, kind: Int64Array | None
) -> tuple[Views | None, Gathers | None]:
    """Cut items to the bounds of a call and batch them: what is read in place, what is gathered.

    Args:
        kind: int64 [M], segments of another kind share no call; None: all are of one.
    """
    if not len(items.segment):
        return None, None
    items = _cut_queries(items, most_queries(problem))
    views, left = _views(problem, segments, items, kind)
    if left is None:
        return views, None
    if views is not None:
        items = items.take(left)
    gathered = _cut_tokens(items, segments.block_size)
    return views, _gathers(problem, segments, gathered, kind)


def _cut_queries(items: WorkItems, most: int) -> WorkItems:
    num_rows = items.num_rows
    (long,) = (num_rows > most).nonzero()
    if not len(long):
        return items
    pieces = cut(num_rows.take(long), most)
    (short,) = (num_rows <= most).nonzero()
    items = items.take(np.concatenate((short, long.take(pieces.source))))
    row_begin = items.row_begin[len(short) :]
    row_begin += pieces.begin
    np.add(row_begin, pieces.size, out=items.row_end[len(short) :])
    return items


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
    problem: Problem, segments: Segments, items: WorkItems, kind: Int64Array | None
) -> tuple[Views | None, Int64Array | None]:
    """What is read in place, and the indices of the other items; None where there is nothing."""
    places = places_of(segments, items)
    num_rows, tokens = items.num_rows, items.kv_len
    viewable = places.contiguous
    if problem.layout == "HND" and segments.block_size > 1:
        # The tokens of a head lie at one stride inside a block only.
        viewable &= places.offset + tokens <= segments.block_size
    ragged = tokens & (KV_STEP - 1) > KV_STEP // 2
    if np.count_nonzero(ragged):
        viewable &= ~ragged | (tokens >= FEW_TOKENS) | (num_rows <= FEW_QUERIES)
    (chosen,) = viewable.nonzero()
    if not len(chosen):
        return None, np.arange(len(viewable))

    # Equal shapes side by side, in the order of their blocks.
    rounds = items.round * 2
    rounds += items.masked
    shape = [rounds * (MAX_QUERIES + 1) + num_rows, tokens * segments.block_size + places.offset]
    if kind is not None:
        shape.append(kind.take(items.segment))
    key = _mixed(shape) + places.block
    if len(chosen) < len(viewable):
        key = key.take(chosen)
    chosen = chosen.take(key.argsort(kind="stable"))
    shape, block = [column.take(chosen) for column in shape], places.block.take(chosen)
    (first,) = _begins(shape, block).nonzero()
    size = _sizes(first, len(chosen))
    lead = chosen.take(first)
    bytes_ = size * tokens.take(lead) * problem.token_bytes
    calls = np.maximum(most_queries(problem) // num_rows.take(lead), 1)
    second = np.minimum(first + 1, len(block) - 1)
    step = (block.take(second) - block.take(first)) * (size > 1)

    left = None
    # An item that fills a call has one of its own in any case.
    worthwhile = (bytes_ >= WORTH_A_CALL) | (calls == 1)
    if np.count_nonzero(worthwhile) < len(worthwhile) or len(chosen) < len(viewable):
        in_place = worthwhile.repeat(size)
        chosen, block = chosen[in_place], block[in_place]
        size, calls, step = size[worthwhile], calls[worthwhile], step[worthwhile]
        viewed = np.zeros(len(viewable), np.bool_)
        viewed[chosen] = True
        (left,) = (~viewed).nonzero()
        if not len(chosen):
            return None, left
    pieces = cut(size, calls)
    begin = pieces.size.cumsum()
    begin -= pieces.size
    items = items.take(chosen)
    lead = chosen.take(begin)
    return Views(
        Batches(items, begin, pieces.size, num_rows.take(lead), tokens.take(lead)),
        block=block.take(begin),
        offset=places.offset.take(lead),
        step=step.take(pieces.source),
    ), left


def _mixed(columns: list[Int64Array]) -> Int64Array:
    """A number for each row of the columns, in the high bits; rows may collide."""
    mixed = columns[0].copy()
    for column in columns[1:]:
        mixed *= 1_000_003
        mixed += column
    mixed &= 0x3FFFFFFF
    mixed <<= 32
    return mixed


def _begins(shape: list[Int64Array], block: Int64Array) -> BoolArray:
    """Where sorted items are of another shape, or of another step, than those before them."""
    other, bends = np.ones(len(block), np.bool_), np.ones(len(block), np.bool_)
    others = other[1:]
    np.not_equal(shape[0][1:], shape[0][:-1], out=others)
    for column in shape[1:]:
        others |= column[1:] != column[:-1]
    step = block[1:] - block[:-1]
    np.not_equal(step[1:], step[:-1], out=bends[2:])
    # A bend begins a run, unless it is the second item of one, which is free to set the step: of
    # bends side by side, every other one.
    unsteady = bends > other
    if not np.count_nonzero(unsteady[1:] > other[:-1]):
        return other
    place = np.arange(len(block))
    last_steady = np.maximum.accumulate(np.where(unsteady, 0, place))
    behind = place - last_steady
    behind &= 1
    begins: BoolArray = other | (unsteady & (behind != other.take(last_steady)))
    return begins


def _gathers(
    problem: Problem, segments: Segments, items: WorkItems, kind: Int64Array | None
) -> Gathers:
    whole_blocks = _in_whole_blocks(segments, items)
    key = _shape_key(items, kind, whole_blocks)
    by_key = key.argsort(kind="stable")
    key, items, whole_blocks = key.take(by_key), items.take(by_key), whole_blocks.take(by_key)
    num_rows, kv_len = items.num_rows, items.kv_len

    of_one, shape = key >> _SHAPE_BITS, key >> _KV_BITS
    first = _firsts(of_one)
    count = _sizes(first, len(key))
    tokens, queries = _most(kv_len, first), _most(num_rows, first)
    padding = count * tokens - np.add.reduceat(kv_len, first)
    idle = count * tokens * queries - np.add.reduceat(kv_len * num_rows, first)
    cheap = padding * problem.token_bytes <= CALL_BYTES
    cheap &= idle * problem.pair_flops <= CALL_FLOPS
    if np.count_nonzero(cheap) < len(cheap):
        first = _firsts(np.where(cheap.repeat(count), of_one, shape))
        count = _sizes(first, len(key))
        tokens, queries = _most(kv_len, first), _most(num_rows, first)
    by_bytes = GATHER_BYTES // (tokens * problem.token_bytes)
    limit = np.minimum(by_bytes, most_queries(problem) // queries)
    calls = cut(count, np.maximum(limit, 1))
    begin = first.take(calls.source) + calls.begin
    most, whole_blocks = _most(kv_len, begin), whole_blocks.take(begin)
    rounded = _round_up(most, KV_STEP)
    tokens = np.where(rounded - most <= most >> 3, rounded, most)
    tokens = np.where(whole_blocks, _round_up(most, segments.block_size), tokens)
    return Gathers(Batches(items, begin, calls.size, _most(num_rows, begin), tokens), whole_blocks)


def _in_whole_blocks(segments: Segments, items: WorkItems) -> BoolArray:
    """Items that begin on a block and end on one, or waste little of the last one."""
    block_size = segments.block_size
    begin = segments.offset.take(items.segment) + items.kv_begin
    waste = -items.kv_len % block_size
    chosen: BoolArray = (begin % block_size == 0) & (waste <= items.kv_len >> 3)
    return chosen & (block_size > 1)


def _firsts(values: Int64Array) -> Int64Array:
    """Where runs of equal values begin."""
    begins = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    firsts: Int64Array = begins.nonzero()[0]
    return firsts


def _sizes(first: Int64Array, end: int) -> Int64Array:
    """Sizes of the runs that begin at `first`, the last one of which ends at `end`."""
    sizes = np.empty_like(first)
    np.subtract(first[1:], first[:-1], out=sizes[:-1])
    sizes[-1] = end - first[-1]
    return sizes


def _most(values: Int64Array, first: Int64Array) -> Int64Array:
    """The maximum of each run of values."""
    most: Int64Array = np.maximum.reduceat(values, first)
    return most


# Fields of the shape key from the lowest: tokens; padded tokens and padded queries; the kind.
_KV_BITS = (KV_TILE + KV_TILE // 4).bit_length()
_QUERY_BITS = MAX_QUERIES.bit_length()
_SHAPE_BITS = 2 * _KV_BITS + _QUERY_BITS


def _shape_key(items: WorkItems, kind: Int64Array | None, whole_blocks: BoolArray) -> Int64Array:
    """Sorts items by what they may share a call with, those of one shape by their tokens."""
    num_rows = items.num_rows
    # Padding costs up to a quarter of the tokens; few queries cost little, so up to half of them.
    octave = _octave(num_rows)
    query_step = np.where(num_rows > 64, octave >> 2, octave)
    token_step = np.maximum(_octave(items.kv_len) >> 2, KV_STEP)
    key = items.round
    if kind is not None:
        key = key * (kind.max() + 1) + kind.take(items.segment)
    key = key * 4 + 2 * items.masked + whole_blocks
    key <<= _QUERY_BITS
    key += _round_up(num_rows, query_step)
    key <<= _KV_BITS
    key += _round_up(items.kv_len, token_step)
    key <<= _KV_BITS
    key += items.kv_len
    return key


def _octave(size: Int64Array) -> Int64Array:
    """The largest power of two that is at most each size (1 for 0)."""
    exponent = np.frexp(size)[1].astype(np.int64)
    octave: Int64Array = 1 << np.maximum(exponent - 1, 0)
    return octave


def _round_up(size: Int64Array, step: int | Int64Array) -> Int64Array:
    rounded: Int64Array = -(-size // step) * step
    return rounded
