"""The merge kernel: one result and a few query heads a program, partials in the order of slots."""

import triton
import triton.language as tl

from attention.triton_backend.segment import LN_2, LOG2_E


@triton.jit
def merge(
    out,
    lse,
    part_o,
    part_lse,
    merge_size,
    merge_query,
    merge_begin,
    merge_end,
    NUM_Q_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # VALUE_DIM, rounded up to a power of two
    HEADS: tl.constexpr,  # of a program
    PARTS: tl.constexpr,  # partials a step
):
    """Grid: capacity * ceil(NUM_Q_HEADS / HEADS)."""
    SPLITS: tl.constexpr = (NUM_Q_HEADS + HEADS - 1) // HEADS
    index = tl.program_id(0) // SPLITS
    if index >= tl.load(merge_size):
        return
    head = tl.program_id(0) % SPLITS * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    begin = tl.load(merge_begin + index)
    end = tl.load(merge_end + index)
    # Partials of no key have weight 0, so the largest log-sum-exp only needs to be finite.
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, COLUMNS], tl.float32)
    for first in range(begin, end, PARTS):
        part = first + tl.arange(0, PARTS)
        real = (part < end)[:, None] & (head < NUM_Q_HEADS)[None, :]
        place = part.to(tl.int64)[:, None] * NUM_Q_HEADS + head[None, :]
        part_lse_2 = tl.load(part_lse + place, mask=real, other=float("-inf")) * LOG2_E
        o = tl.load(
            part_o + place[:, :, None] * VALUE_DIM + column[None, None, :],
            mask=real[:, :, None] & (column < VALUE_DIM)[None, None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(part_lse_2, 0))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay = tl.exp2(largest - reference)
        weights = tl.exp2(part_lse_2 - reference[None, :])
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * o, 0)
        largest = new_largest

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    merged_lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN_2)
    place = tl.load(merge_query + index).to(tl.int64) * NUM_Q_HEADS + head
    real = head < NUM_Q_HEADS
    tl.store(lse + place, merged_lse, mask=real)
    tl.store(
        out + place[:, None] * VALUE_DIM + column[None, :],
        acc.to(out.dtype.element_ty),
        mask=real[:, None] & (column < VALUE_DIM)[None, :],
    )
