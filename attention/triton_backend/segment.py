"""The segment kernel: one unit and one KV head a program.

Rows of the matrices are a unit's rows times query heads of the KV head, so that a KV tile is loaded
once for all of them. Softmax is online (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al.
2022, arXiv 2205.14135), in float32, in powers of two.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["window", "sink_tokens"])
def segment(
    q,
    k_cache,
    v_cache,  # None: values are the first columns of the keys
    out,
    lse,
    part_o,
    part_lse,
    row_query,
    row_position,
    row_partial,
    entry_slot,
    entry_length,
    entry_position,
    entry_row_begin,
    entry_row_end,
    entry_scale,
    entry_bias,
    unit_size,
    unit_row_begin,
    unit_row_end,
    unit_entry_begin,
    unit_entry_mid,
    unit_entry_end,
    unit_log2_width,
    unit_ordinal,
    scale,
    softcap,
    alibi_slopes,
    k_scale,
    v_scale,
    window,
    sink_tokens,
    q_stride_query,
    q_stride_head,
    k_stride_block,
    k_stride_slot,
    k_stride_head,
    v_stride_block,  # the three are None: those of the keys
    v_stride_slot,
    v_stride_head,
    k_scale_stride,
    v_scale_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of the group that a program takes
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,  # powers of two that hold HEAD_DIM; D2 may be 0
    D2: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is None is not there; grid: capacity * NUM_KV_HEADS * ceil(GROUP / HEADS)."""
    # Heads are the fastest: programs start in the order of the units, the longest first.
    SPLITS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    unit = tl.program_id(0) // (NUM_KV_HEADS * SPLITS)
    if unit >= tl.load(unit_size):
        return
    kv_head = tl.program_id(0) // SPLITS % NUM_KV_HEADS

    m = tl.arange(0, BLOCK_M)
    row = tl.load(unit_row_begin + unit) + m // HEADS
    member = tl.program_id(0) % SPLITS * HEADS + m % HEADS
    real = (row < tl.load(unit_row_end + unit)) & (member < GROUP)
    head = kv_head * GROUP + member
    query = tl.load(row_query + row, mask=real, other=0).to(tl.int64)
    own = tl.load(row_position + row, mask=real, other=0)
    q_row = q + query * q_stride_query + head.to(tl.int64) * q_stride_head
    q1 = _columns(q_row, real, 0, D1, HEAD_DIM)
    q2 = None
    if D2 > 0:
        q2 = _columns(q_row, real, D1, D2, HEAD_DIM)

    factor = scale
    if k_scale is not None:
        factor = factor * tl.load(k_scale + kv_head * k_scale_stride)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=real, other=0.0) * LOG2_E
    k_head = k_cache + kv_head.to(tl.int64) * k_stride_head
    v_head = None
    if v_cache is not None:
        v_head = v_cache + kv_head.to(tl.int64) * (
            k_stride_head if v_stride_head is None else v_stride_head
        )

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, V2 if V2 > 0 else 1], tl.float32)
    entry_begin = tl.load(unit_entry_begin + unit)
    entry_mid = tl.load(unit_entry_mid + unit)
    entry_end = tl.load(unit_entry_end + unit)
    log2_width = tl.load(unit_log2_width + unit)
    for masked in tl.static_range(2):
        largest, total, acc1, acc2 = _walk(
            largest,
            total,
            acc1,
            acc2,
            entry_mid if masked else entry_begin,
            entry_end if masked else entry_mid,
            log2_width,
            q1,
            q2,
            k_head,
            v_head,
            row,
            own,
            entry_slot,
            entry_length,
            entry_position,
            entry_row_begin,
            entry_row_end,
            entry_scale,
            entry_bias,
            factor,
            softcap,
            slope,
            window,
            sink_tokens,
            k_stride_block,
            k_stride_slot,
            v_stride_block,
            v_stride_slot,
            HEAD_DIM,
            D1,
            D2,
            VALUE_DIM,
            V1,
            V2,
            BLOCK_SIZE,
            BLOCK_N,
            masked,
        )

    empty = total == 0.0
    weight = 1.0 / tl.where(empty, 1.0, total)
    row_lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN_2)
    if v_scale is not None:
        weight = weight * tl.load(v_scale + kv_head * v_scale_stride)
    query = tl.load(row_query + row, mask=real, other=0, cache_modifier=".ca").to(tl.int64)
    partial = tl.load(row_partial + row, mask=real, other=0)
    direct = partial < 0
    ordinal = tl.load(unit_ordinal + unit)
    num_q_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    place = query * num_q_heads + head
    tl.store(lse + place, row_lse, mask=real & direct)
    part_place = (partial + ordinal).to(tl.int64) * num_q_heads + head
    tl.store(part_lse + part_place, row_lse, mask=real & ~direct)
    o1 = acc1 * weight[:, None]
    _store(out + place * VALUE_DIM, o1, real & direct, 0, V1, VALUE_DIM)
    _store(part_o + part_place * VALUE_DIM, o1, real & ~direct, 0, V1, VALUE_DIM)
    if V2 > 0:
        o2 = acc2 * weight[:, None]
        _store(out + place * VALUE_DIM, o2, real & direct, V1, V2, VALUE_DIM)
        _store(part_o + part_place * VALUE_DIM, o2, real & ~direct, V1, V2, VALUE_DIM)


@triton.jit
def _walk(
    largest,
    total,
    acc1,
    acc2,
    entry_begin,
    entry_end,
    log2_width,
    q1,
    q2,
    k_head,
    v_head,
    row,
    own,
    entry_slot,
    entry_length,
    entry_position,
    entry_row_begin,
    entry_row_end,
    entry_scale,
    entry_bias,
    factor,
    softcap,
    slope,
    window,
    sink_tokens,
    k_stride_block,
    k_stride_slot,
    v_stride_block,
    v_stride_slot,
    HEAD_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the lanes of the entries, with visibility only where it is MASKED."""
    dtype: tl.constexpr = q1.dtype
    count = (entry_end - entry_begin) << log2_width
    slot = slots(0, entry_begin, entry_end, log2_width, entry_slot, entry_length, BLOCK_N)
    # The number of stages is the launch's: given to the loop it would hold for loads of slots, too,
    # for which those of K and V would then wait, and nothing would be loaded ahead. What the loop
    # does not change stays in it: hoisted, descriptors of 576 columns of q fill 72 registers.
    for first in tl.range(0, count, BLOCK_N, disable_licm=True):
        stored = slot >= 0
        # Unsigned, a power of two is a shift.
        block = (slot.to(tl.uint32) // BLOCK_SIZE).to(tl.int32)
        k_offset = _offset(block, slot - block * BLOCK_SIZE, k_stride_block, k_stride_slot)
        k_row = k_head + k_offset
        k1 = widened(_columns(k_row, stored, 0, D1, HEAD_DIM), dtype)
        logits = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        k2 = None
        if D2 > 0:
            k2 = widened(_columns(k_row, stored, D1, D2, HEAD_DIM), dtype)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision="ieee")

        entry, token = lanes(first, entry_begin, log2_width, BLOCK_N)
        listed = entry < entry_end
        real = token < tl.load(entry_length + entry, mask=listed, other=0)
        # What is added to a lane's logits also takes care of lanes without a token, at no cost.
        bias = tl.where(real, 0.0, float("-inf"))
        if entry_bias is not None:
            weight = tl.load(entry_bias + entry, mask=listed, other=0.0) * LOG2_E
            bias = tl.where(real, weight, float("-inf"))
        lane_factor = factor
        if entry_scale is not None:
            lane_factor = factor * tl.load(entry_scale + entry, mask=listed, other=0.0)[None, :]
        if softcap is not None:
            grown = tl.exp2(logits * (lane_factor * (2.0 * LOG2_E / softcap)))
            capped = 1.0 - 2.0 / (grown + 1.0)  # tanh
            if dtype == tl.float32:
                # Near 0 that is off by as much as near 1, which float32 would show: a series.
                x = logits * (lane_factor / softcap)
                s = x * x
                series = -17.0 / 315.0 + s * (62.0 / 2835.0)
                series = x + x * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * series))
                capped = tl.where(s < 0.09, series, capped)
            logits = (softcap * LOG2_E) * capped + bias[None, :]
        else:
            logits = logits * (lane_factor * LOG2_E) + bias[None, :]
        if MASKED or slope is not None:
            position = tl.load(entry_position + entry, mask=listed, other=0) + token
            behind = own[:, None] - position[None, :]
            if slope is not None:
                logits -= slope[:, None] * behind
            if MASKED:
                row_begin = tl.load(entry_row_begin + entry, mask=listed, other=0)
                row_end = tl.load(entry_row_end + entry, mask=listed, other=0)
                logits = tl.where(row[:, None] >= row_begin[None, :], logits, float("-inf"))
                logits = tl.where(row[:, None] < row_end[None, :], logits, float("-inf"))
                seen = behind >= 0
                if window is not None:
                    seen &= (behind < window) | (position < sink_tokens)[None, :]
                logits = tl.where(seen, logits, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # Of a row that has seen nothing yet, -inf - -inf would be NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay = tl.exp2(largest - reference)
        weights = tl.exp2(logits - reference[:, None])
        total = total * decay + tl.sum(weights, 1)
        largest = new_largest
        acc1 = acc1 * decay[:, None]
        weights = weights.to(dtype)
        if v_head is None:
            acc1 = tl.dot(weights, k1, acc1, input_precision="ieee")
            if V2 > 0:
                acc2 = tl.dot(weights, k2, acc2 * decay[:, None], input_precision="ieee")
        else:
            v_row = v_head + k_offset
            if v_stride_block is not None:
                v_row = v_head + _offset(
                    block, slot - block * BLOCK_SIZE, v_stride_block, v_stride_slot
                )
            v1 = widened(_columns(v_row, stored, 0, V1, VALUE_DIM), dtype)
            acc1 = tl.dot(weights, v1, acc1, input_precision="ieee")
            if V2 > 0:
                v2 = widened(_columns(v_row, stored, V1, V2, VALUE_DIM), dtype)
                acc2 = tl.dot(weights, v2, acc2 * decay[:, None], input_precision="ieee")
        # One step ahead, so that loads of K and V wait for no other load and are pipelined.
        slot = slots(
            first + BLOCK_N, entry_begin, entry_end, log2_width, entry_slot, entry_length, BLOCK_N
        )
    return largest, total, acc1, acc2


@triton.jit
def lanes(first, entry_begin, log2_width, BLOCK_N: tl.constexpr):
    """Entry, and token in it, of BLOCK_N lanes of a unit, from a multiple of BLOCK_N on."""
    # Of two powers of two one divides the other, so the remainders add up. The sum of both would be
    # a term of entry and token alike, which the pipeline keeps in registers from stage to stage.
    lane = tl.arange(0, BLOCK_N)
    within = (1 << log2_width) - 1
    return entry_begin + ((first + lane) >> log2_width), (first & within) + (lane & within)


@triton.jit
def slots(
    first, entry_begin, entry_end, log2_width, entry_slot, entry_length, BLOCK_N: tl.constexpr
):
    """Slot of BLOCK_N lanes of a unit, -1 where there is no token."""
    entry, token = lanes(first, entry_begin, log2_width, BLOCK_N)
    listed = entry < entry_end
    length = tl.load(entry_length + entry, mask=listed, other=0)
    slot = tl.load(entry_slot + entry, mask=listed, other=0)
    return tl.where(token < length, slot + token, -1)


@triton.jit
def _offset(block, place, stride_block, stride_slot):
    return block.to(tl.int64) * stride_block + place.to(tl.int64) * stride_slot


@triton.jit
def _columns(rows, real, FIRST: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr):
    """Columns FIRST to FIRST + COUNT of rows of DIM, 0 where there are none."""
    column = FIRST + tl.arange(0, COUNT)
    mask = real[:, None]
    if FIRST + COUNT > DIM:
        mask = mask & (column < DIM)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(rows, values, real, FIRST: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr):
    column = FIRST + tl.arange(0, COUNT)
    mask = real[:, None]
    if FIRST + COUNT > DIM:
        mask = mask & (column < DIM)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def widened(x, dtype: tl.constexpr):
    """Values of a cache in the dtype of the queries; uint8 holds float8_e4m3fn.

    Its exponent and mantissa, moved to where float16 has them, are off by the bias alone: 2 ** 8.
    For architectures without the conversion.
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        half = half * 256.0
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    return x.to(dtype)
