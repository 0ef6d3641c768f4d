"""Where the tokens of work items lie: slots, blocks, or runs of blocks to be read in place."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int32Array, Int64Array
from attention.ranges import expand
from attention.segments import Segments
from attention.torch_backend.items import BoolArray, WorkItems


class Places(NamedTuple):
    """Where each item begins.

    Attributes:
        block: int64 [I], id of the block of the first token.
        offset: int64 [I], its offset in that block.
        contiguous: bool [I], the item's blocks have consecutive ids.
    """

    block: Int64Array
    offset: Int64Array
    contiguous: BoolArray


def places_of(segments: Segments, items: WorkItems) -> Places:
    """Places of items; O(items log blocks + blocks)."""
    blocks, block_size = segments.blocks, segments.block_size
    token = segments.offset.take(items.segment)
    token += items.kv_begin
    end = token + items.kv_len
    end -= 1
    first, last = token // block_size, end // block_size
    token -= first * block_size
    base = segments.first_block.take(items.segment)
    first += base
    last += base
    breaks = breaks_before(blocks[1:] - blocks[:-1] != 1)
    return Places(
        block=blocks.take(first).astype(np.int64),
        offset=token,
        contiguous=breaks.take(first) == breaks.take(last),
    )


def breaks_before(is_break: BoolArray) -> Int32Array:
    """How many there are up to each block: as many for two, and none lies between them.

    is_break: bool [B - 1], between each block and the next.
    """
    breaks = np.zeros(len(is_break) + 1, np.int32)
    if np.count_nonzero(is_break):
        np.add.accumulate(is_break, dtype=np.int32, out=breaks[1:])
    return breaks


def blocks_of(segments: Segments, items: WorkItems, padded: Int64Array) -> Int64Array:
    """Block ids of items that begin on a block, padded with their last block to `padded` blocks."""
    begin = segments.offset.take(items.segment) + items.kv_begin
    first = segments.first_block.take(items.segment)
    last = first + (begin + items.kv_len - 1) // segments.block_size
    item, place = expand(padded)
    place += (first + begin // segments.block_size).take(item)
    return segments.blocks.take(np.minimum(place, last.take(item))).astype(np.int64)


def slots_of(segments: Segments, items: WorkItems, padded: Int64Array) -> Int64Array:
    """Slots of the items' tokens, padded with their last token's slot to `padded` tokens."""
    block_size = segments.block_size
    padding = padded - items.kv_len
    begin = segments.offset.take(items.segment) + items.kv_begin
    end = begin + items.kv_len
    first_block, last_block = begin // block_size, (end - 1) // block_size

    # One run of slots per block of an item.
    blocks = last_block - first_block + 1
    item, block = expand(blocks)
    block += first_block.take(item)
    first = block * block_size
    run_begin = np.maximum(first, begin.take(item))
    run_len = np.minimum(first + block_size, end.take(item)) - run_begin
    base = segments.first_block.take(items.segment).take(item)
    slot = segments.blocks.take(base + block).astype(np.int64) * block_size + run_begin - first
    # An item's last run goes on into its padding, which then takes the last token's slot instead.
    run_len[blocks.cumsum() - 1] += padding
    run_end = run_len.cumsum()
    slots = np.arange(run_end[-1])
    slots += (slot - run_end + run_len).repeat(run_len)
    if np.count_nonzero(padding):
        last_token = padded.cumsum() - padding - 1
        of, ordinal = expand(padding)
        slots[last_token[of] + 1 + ordinal] = slots[last_token[of]]
    return slots
