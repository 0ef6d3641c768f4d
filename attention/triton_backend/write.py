"""The kernel that writes K and V of new tokens to their slots: one launch for both."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

# Elements of a token that a program takes: 16 bytes a thread and load, in float16.
_BLOCK = 1024
# Exponent bias, bits of the mantissa, code of the largest finite number.
_FLOAT8 = {torch.float8_e4m3fn: (7, 3, 0x7E), torch.float8_e5m2: (15, 2, 0x7B)}


def write_slots(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """As `attention.write`, of checked tensors, the caches in the layout "NHD"."""
    if len(slots):
        with torch.cuda.device(k_cache.device) if k_cache.is_cuda else nullcontext():
            write_kernel[grid_of(k, v)](
                **arguments_of(k, v, k_cache, v_cache, slots, k_scale, v_scale)
            )


def grid_of(k: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """Programs: tokens x blocks of their K and V."""
    block = _block_of(k, v)
    return len(k), sum(-(-x.shape[1] * x.shape[2] // block) for x in (k, v))


def arguments_of(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> dict[str, Any]:
    """What the kernel is called with."""
    block = _block_of(k, v)
    float8 = _FLOAT8.get(k_cache.dtype)
    if float8 is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    arguments: dict[str, Any] = {
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": slots,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "num_slots": k_cache.shape[0] * k_cache.shape[1],
        "slots_stride": slots.stride(0),
        "k_scale_stride": 0 if k_scale is None or k_scale.numel() == 1 else 1,
        "v_scale_stride": 0 if v_scale is None or v_scale.numel() == 1 else 1,
        "BLOCK_SIZE": k_cache.shape[1],
        "HEADS": k.shape[1],
        "K_DIM": k.shape[2],
        "V_DIM": v.shape[2],
        "FLOAT8": float8,
        "BLOCK": block,
        "num_warps": max(1, min(4, block // 256)),
    }
    for name, tensor in (("k", k), ("v", v)):
        for axis, stride in zip(("token", "head", "dim"), tensor.stride(), strict=True):
            arguments[f"{name}_{axis}"] = stride
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        for axis, stride in zip(("block", "slot", "head", "dim"), tensor.stride(), strict=True):
            arguments[f"{name}_{axis}"] = stride
    return arguments


def _block_of(k: torch.Tensor, v: torch.Tensor) -> int:
    longest = k.shape[1] * max(k.shape[2], v.shape[2])
    return min(_BLOCK, 1 << (longest - 1).bit_length())


@triton.jit
def write_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    num_slots,
    slots_stride,
    k_scale_stride,
    v_scale_stride,
    k_token,
    k_head,
    k_dim,
    v_token,
    v_head,
    v_dim,
    k_cache_block,
    k_cache_slot,
    k_cache_head,
    k_cache_dim,
    v_cache_block,
    v_cache_slot,
    v_cache_head,
    v_cache_dim,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: tokens, blocks of K and then of V; what is None is not there."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride).to(tl.int64)
    if slot < 0 or slot >= num_slots:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    part = tl.program_id(1)
    K_PARTS: tl.constexpr = (HEADS * K_DIM + BLOCK - 1) // BLOCK
    if part < K_PARTS:
        _copy(
            k + token * k_token,
            k_head,
            k_dim,
            k_cache + block * k_cache_block + offset * k_cache_slot,
            k_cache_head,
            k_cache_dim,
            k_scale,
            k_scale_stride,
            part,
            HEADS,
            K_DIM,
            FLOAT8,
            BLOCK,
        )
    else:
        _copy(
            v + token * v_token,
            v_head,
            v_dim,
            v_cache + block * v_cache_block + offset * v_cache_slot,
            v_cache_head,
            v_cache_dim,
            v_scale,
            v_scale_stride,
            part - K_PARTS,
            HEADS,
            V_DIM,
            FLOAT8,
            BLOCK,
        )


@triton.jit
def _copy(
    source,
    source_head,
    source_dim,
    target,
    target_head,
    target_dim,
    scale,
    scale_stride,
    part,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block `part` of one token: its heads and dimensions in a row."""
    element = part * BLOCK + tl.arange(0, BLOCK)
    inside = element < HEADS * DIM
    head = (element // DIM).to(tl.int64)
    dim = element % DIM
    x = tl.load(source + head * source_head + dim * source_dim, mask=inside, other=0.0)
    if scale is not None:
        divisor = tl.load(scale + head * scale_stride, mask=inside, other=1.0)
        x = x / divisor if x.dtype == tl.float64 else tl.div_rn(x.to(tl.float32), divisor)
    if FLOAT8 is not None:
        x = _float8(x.to(tl.float32), FLOAT8[0], FLOAT8[1], FLOAT8[2])
    place = target + head * target_head + dim * target_dim
    tl.store(place, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _float8(x, BIAS: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr):
    """Codes of float32 numbers in 8 bits, to nearest even, saturated; NaN stays NaN.

    In integers, as not every architecture converts to every one of these formats.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    DROPPED: tl.constexpr = 23 - MANTISSA
    odd = (magnitude >> DROPPED) & 1
    rounded = (magnitude + ((1 << (DROPPED - 1)) - 1) + odd) >> DROPPED
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Added to a power of two whose last bit is worth the smallest subnormal, the sum is rounded
    # as the code is to be, and its last bits are the code.
    ANCHOR: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    anchor = tl.full(x.shape, ANCHOR, tl.int32).to(tl.float32, bitcast=True)
    sum_bits = (magnitude.to(tl.float32, bitcast=True) + anchor).to(tl.int32, bitcast=True)
    subnormal = sum_bits - ANCHOR
    code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    code = tl.where(code > LARGEST, LARGEST, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
