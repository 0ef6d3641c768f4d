"""Torch's fused kernel on CPUs, over keys and values that lie where they lie."""

import torch
import torch.nn.functional as F

from attention.algebra import Partial

# Heads that lie between each other share pages. Of items of so many bytes at least, so many tokens
# are then read for all heads before the next are, while their pages are in reach.
CHUNKED_BYTES = 4 << 20
CHUNK = 512
# There must be so many heads for each row: with more rows arithmetic takes the time, not memory. In
# bfloat16, which the kernel is slow to load, rows do not count.
CHUNKED_HEADS = 4


def in_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether to read items chunk by chunk; several only where they are one run of whole chunks."""
    heads, tokens, by_token = k.shape[1], k.shape[2], k.stride(2)
    if tokens < 2 * CHUNK or by_token == k.shape[3] or heads < CHUNKED_HEADS:
        return False
    if q.shape[2] * CHUNKED_HEADS > heads and k.dtype != torch.bfloat16:
        return False
    run = all(x.stride(0) == tokens * x.stride(2) for x in (k, v))
    side_by_side = run and tokens % CHUNK == 0
    large = 2 * tokens * by_token * k.itemsize >= CHUNKED_BYTES
    return large and (k.shape[0] == 1 or side_by_side)


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, width: int, scale: float) -> Partial:
    """As `softmax`; the chunks of all items are the items of one call."""
    size, chunks, rest = len(k), k.shape[2] // CHUNK, k.shape[2] % CHUNK

    def cut(x: torch.Tensor) -> torch.Tensor:
        by_item = x.stride(2) * CHUNK
        shape = (size * chunks, x.shape[1], CHUNK, x.shape[3])
        return x.as_strided(shape, (by_item, *x.stride()[1:]))

    keys = cut(k)
    queries = q.repeat_interleave(chunks, 0)
    o, lse = fused(queries, keys, keys if v is k else cut(v), width, None, scale)
    o, lse = o.unflatten(0, (size, chunks)), lse.unflatten(0, (size, chunks))
    if rest:
        keys = k[:, :, -rest:]
        last = fused(q, keys, keys if v is k else v[:, :, -rest:], width, None, scale)
        o, lse = torch.cat((o, last.o[None]), 1), torch.cat((lse, last.lse[None]), 1)
    total = torch.logsumexp(lse, 1)
    weight = torch.exp(lse - total.unsqueeze(1))
    return Partial((o * weight.unsqueeze(4)).sum(1), total)


def fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    width: int,
    mask: torch.Tensor | None,
    scale: float,
) -> Partial:
    rows = q.shape[2]
    # One row alone takes the fused kernel twice as long in bfloat16 as two.
    if rows == 1 and q.dtype == torch.bfloat16:
        q = q.repeat(1, 1, 2, 1)
    # It takes keys and values of one width only.
    widest = max(k.shape[3], v.shape[3])
    if k.shape[3] < widest or v.shape[3] < widest:
        q, k, v = (F.pad(x, (0, widest - x.shape[3])) for x in (q, k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=mask, scale=scale
    )
    if o.shape[3] > width:
        o = o[..., :width]
    if o.shape[2] > rows:
        o, lse = o[:, :, :rows], lse[:, :, :rows]
    return Partial(o, lse)
