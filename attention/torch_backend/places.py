"""Where the tokens of work items lie: slots, blocks, or runs of blocks to be read in place."""

from typing import NamedTuple

import numpy as np

from attention.forest import Int64Array
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
    token = segments.offset[items.segment] + items.kv_begin
    first = segments.first_block[items.segment]
    last = first + (token + items.kv_len - 1) // segments.block_size
    first = first + token // segments.block_size
    # Breaks up to each block: none between two blocks that have as many.
    breaks = np.zeros(len(segments.blocks), np.int64)
    np.cumsum(segments.blocks[1:] != segments.blocks[:-1] + 1, out=breaks[1:])
    return Places(
        block=segments.blocks[first].astype(np.int64),
        offset=token % segments.block_size,
        contiguous=breaks[first] == breaks[last],
    )


def blocks_of(segments: Segments, items: WorkItems, padded: Int64Array) -> Int64Array:
    """Block ids of items that begin on a block, padded with their last block to `padded` blocks."""
    begin = segments.offset[items.segment] + items.kv_begin
    first = segments.first_block[items.segment]
    last = first + (begin + items.kv_len - 1) // segments.block_size
    item, ordinal = expand(padded)
    first = first + begin // segments.block_size
    blocks: Int64Array = segments.blocks[np.minimum(first[item] + ordinal, last[item])].astype(
        np.int64
    )
    return blocks


def slots_of(segments: Segments, items: WorkItems, padded: Int64Array) -> Int64Array:
    """Slots of the items' tokens, padded with their last token's slot to `padded` tokens."""
    block_size = segments.block_size
    padding = padded - items.kv_len
    begin = segments.offset[items.segment] + items.kv_begin
    end = begin + items.kv_len
    first_block, last_block = begin // block_size, (end - 1) // block_size

    # One run of slots per block of an item.
    item, ordinal = expand(last_block - first_block + 1)
    block = first_block[item] + ordinal
    run_begin = np.maximum(block * block_size, begin[item])
    run_end = np.minimum((block + 1) * block_size, end[item])
    block_id = segments.blocks[segments.first_block[items.segment][item] + block].astype(np.int64)
    first_slot = block_id * block_size + run_begin % block_size
    run_len = run_end - run_begin
    # An item's last run goes on into its padding, which then takes the last token's slot instead.
    run_len[block == last_block[item]] += padding
    slots = np.arange(run_len.sum())
    slots += np.repeat(first_slot - (np.cumsum(run_len) - run_len), run_len)
    if padding.any():
        last_token = np.cumsum(padded) - padding - 1
        of, ordinal = expand(padding)
        slots[last_token[of] + 1 + ordinal] = slots[last_token[of]]
    return slots
