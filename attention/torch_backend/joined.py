"""Short nodes, read as the beginning of each node below them.

Every row that attends to a node makes a result for it, which is merged with those for the others.
Where a node is so short that this costs more than to read its tokens once for each of its children,
each child becomes one segment with it, if the blocks of the one go on where those of the other end.
"""

import numpy as np

from attention.forest import Int64Array
from attention.problem import Problem
from attention.ranges import expand
from attention.segments import Segments
from attention.torch_backend.batches import WORTH_A_CALL
from attention.torch_backend.items import BoolArray

# A number of a result costs about as much as so many bytes of KV that are read once more.
BYTES_A_NUMBER = 4


def join_short(problem: Problem, segments: Segments) -> Segments:
    """The segments of a forest, short ones joined to those below them.

    O(segments), and for those that are joined O(their blocks * their depth).
    """
    parent, length = segments.parent, segments.length
    # What is long enough to be read in place by itself is left alone.
    short = length < -(-WORTH_A_CALL // problem.token_bytes)
    (below,) = (short & short.take(parent) & (parent >= 0)).nonzero()
    if not len(below):
        return segments
    above = parent.take(below)
    follows = _follows(segments, below, above)
    below, above = below[follows], above[follows]
    rows = segments.row_end - segments.row_begin
    num_children = np.bincount(above, minlength=len(length))
    cost = (num_children - 1) * problem.token_bytes
    gain = rows * (problem.num_q_heads * problem.value_head_dim * BYTES_A_NUMBER)
    joins = cost * length <= gain
    # All children must take it on; and rows of its own would have to be left with it.
    joins &= np.bincount(above, rows.take(below), len(length)) == rows
    below = below[joins.take(above)]
    if not len(below):
        return segments

    # From the roots down, with what has been joined to a node already.
    length = length.copy()
    below = below[segments.round.take(below).argsort(kind="stable")]
    for level in np.split(below, np.flatnonzero(np.diff(segments.round.take(below))) + 1):
        above = parent.take(level)
        joins[above] &= cost.take(above) * length.take(above) <= gain.take(above)
        joined = joins.take(above)
        length[level[joined]] += length[above[joined]]
    return _without(segments, joins, length)


def _follows(segments: Segments, below: Int64Array, above: Int64Array) -> BoolArray:
    """Whether the tokens of each segment `below` lie behind those of the one above it."""
    block_size, blocks = segments.block_size, segments.blocks
    end = segments.offset.take(above) + segments.length.take(above)
    last = blocks.take(segments.first_block.take(above) + (end - 1) // block_size)
    first = blocks.take(segments.first_block.take(below))
    offset = segments.offset.take(below)
    follows: BoolArray = (offset == end % block_size) & ((offset == 0) | (first == last))
    for values in (segments.temperature, segments.log_weight):
        if values is not None:
            follows &= values.take(below) == values.take(above)
    return follows


def _without(segments: Segments, joins: BoolArray, length: Int64Array) -> Segments:
    """The segments without those that join the ones below them, which have `length` tokens then."""
    block_size, parent = segments.block_size, segments.parent
    (kept,) = (~joins).nonzero()
    # Each with what it begins with, from the segment itself upwards.
    item, member, top = np.arange(len(kept)), kept, kept.copy()
    items, members = [], []
    while len(item):
        items.append(item)
        members.append(member)
        top[item] = member
        above = parent.take(member)
        joined = (above >= 0) & joins.take(above)
        item, member = item[joined], above[joined]
    item, member = np.concatenate(items), np.concatenate(members)

    start, offset, length = segments.start.take(top), segments.offset.take(top), length.take(kept)
    num_blocks = (offset + length - 1) // block_size + 1
    first_block = num_blocks.cumsum() - num_blocks
    first = offset.take(item) + segments.start.take(member) - start.take(item)
    first //= block_size
    own = segments.offset.take(member) + segments.length.take(member) - 1
    piece, ordinal = expand(own // block_size + 1)
    blocks = np.empty(num_blocks.sum(), segments.blocks.dtype)
    # A block that the end of one shares with the begin of the next is the same in both.
    place = (first_block.take(item) + first).take(piece) + ordinal
    blocks[place] = segments.blocks.take(segments.first_block.take(member).take(piece) + ordinal)
    number = np.cumsum(~joins) - 1
    above = parent.take(top)
    return segments._replace(
        blocks=blocks,
        node=segments.node.take(kept),
        start=start,
        length=length,
        offset=offset,
        first_block=first_block,
        row_begin=segments.row_begin.take(kept),
        row_end=segments.row_end.take(kept),
        round=segments.round.take(kept),
        parent=np.where(above >= 0, number.take(above), -1),
        temperature=None if segments.temperature is None else segments.temperature.take(kept),
        log_weight=None if segments.log_weight is None else segments.log_weight.take(kept),
    )
