"""Runs of blocks that fall, turned round.

A pool that takes back the end of a sequence before its beginning hands out blocks whose ids fall.
What all rows see whole may be read in any order of its tokens, so such a run is read from its other
end: in place, like one that rises.
"""

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand
from attention.segments import Segments
from attention.torch_backend.batches import WORTH_A_CALL
from attention.torch_backend.items import BEHIND, WorkItems
from attention.torch_backend.places import breaks_before


def turned(problem: Problem, segments: Segments, items: WorkItems) -> tuple[Segments, WorkItems]:
    """The same work, with falling runs of blocks the other way round where that is worth a call.

    Their tokens are in another order then. Those behind the last whole block are an item of their
    own. O(blocks).
    """
    chosen = _falling(problem, segments, items)
    if not len(chosen):
        return segments, items
    whole, ends = np.divmod(segments.length[chosen], segments.block_size)
    of, ordinal = expand(whole)
    first = segments.first_block[chosen].take(of)
    blocks = segments.blocks.copy()
    blocks[first + ordinal] = segments.blocks.take(first + whole.take(of) - 1 - ordinal)
    behind = np.zeros(len(segments.length), np.int64)
    behind[chosen] = ends
    behind = behind.take(items.segment)
    rest = items.take(behind.nonzero()[0])
    kv_len = behind[behind > 0]
    rest = rest._replace(kv_begin=rest.kv_len - kv_len, kv_len=kv_len, round=rest.round + BEHIND)
    items = items._replace(kv_len=items.kv_len - behind)
    items = WorkItems(*(np.concatenate(columns) for columns in zip(items, rest, strict=True)))
    return segments._replace(blocks=blocks), items


def _falling(problem: Problem, segments: Segments, items: WorkItems) -> Int64Array:
    """The segments to be turned: all rows see them whole, and their whole blocks are one run."""
    blocks, size = segments.blocks, segments.block_size
    # In sets, segments have blocks in common. With heads first in a block, a run of blocks need not
    # be one of tokens.
    possible = segments.on_paths and (problem.layout == "NHD" or size == 1)
    if not possible or not np.count_nonzero(blocks[1:] < blocks[:-1]):
        return np.empty(0, np.int64)
    whole = segments.length // size
    worthwhile = (whole > 1) & (segments.offset == 0)
    worthwhile &= whole * size * problem.token_bytes >= WORTH_A_CALL
    in_part = items.masked | (items.kv_len < segments.length.take(items.segment))
    worthwhile[items.segment[in_part]] = False
    (chosen,) = worthwhile.nonzero()
    breaks = breaks_before(blocks[1:] - blocks[:-1] != -1)
    first = segments.first_block[chosen]
    falling: Int64Array = chosen[breaks[first] == breaks[first + whole[chosen] - 1]]
    return falling
