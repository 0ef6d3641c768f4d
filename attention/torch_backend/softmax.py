"""Attention of rows over keys and values that lie side by side: fused where torch has it so."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from attention.algebra import Partial, merge
from attention.torch_backend.batches import KV_TILE

# Logits (and masks that differ from head to head) held at once.
MAX_LOGITS = 1 << 20

# Where heads lie between each other they share pages. An item of so many bytes at least is read in
# chunks of so many tokens, all heads of one before the next, while they are in reach; but not for
# more rows than that, unless in bfloat16, where the chunks' results cost more than they save.
CHUNK = 512
CHUNKED_BYTES = 4 << 20
CHUNKED_ROWS = 64


class Bias(NamedTuple):
    """What is added to logits: mask + slope * distance.

    Attributes:
        mask: [size, 1, 1 or rows, tokens], or None for 0.
        slope: [Hkv, rows, 1], or None for 0.
        distance: [tokens].
    """

    mask: torch.Tensor | None
    slope: torch.Tensor | None
    distance: torch.Tensor | None

    def part(self, rows: slice, tokens: slice) -> torch.Tensor | None:
        """For some of the rows and tokens, [size or 1, Hkv or 1, rows or 1, tokens]."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None), tokens]
        if self.slope is None or self.distance is None:
            return mask
        sloped = (self.slope[:, rows] * self.distance[tokens]).unsqueeze(0)
        return sloped if mask is None else sloped + mask


def softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    width: int,
    bias: Bias,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Partials of rows [size, Hkv, rows, d] over k and v [size, Hkv, tokens, d].

    The values are the first `width` columns of v, which may be k itself. A row that sees no token
    gives anything. o is float32 (float64 for such rows) or the dtype
    of q.
    """
    compute = _compute_dtype(q)
    direct = softcap is None and bias.slope is None and k.dtype == compute
    if direct and q.device.type == "cpu":
        if bias.mask is None and _in_chunks(q, k):
            return _chunked(q, k, v, width, scale)
        return _fused(q, k, v, width, bias.mask, scale)
    rows, tokens = q.shape[2], k.shape[2]
    step = tokens if direct else KV_TILE
    total: Partial | None = None
    for begin in range(0, tokens, step):
        of = slice(begin, begin + step)
        keys = _converted(k[:, :, of], compute)
        values = keys if v is k else _converted(v[:, :, of], compute)
        row_step = rows if direct else max(1, MAX_LOGITS // (keys[..., 0].numel()))
        parts = []
        for first in range(0, rows, row_step):
            some = slice(first, first + row_step)
            added = bias.part(some, of)
            queries = q[:, :, some].to(compute)
            if softcap is None and q.device.type == "cpu":
                part = _fused(queries, keys, values, width, added, scale)
            else:
                part = _unfused(queries, keys, values[..., :width], added, scale, softcap)
            if tokens > step and added is not None:
                part = _where_seen(part, added)
            parts.append(part)
        part = parts[0]
        if len(parts) > 1:
            part = Partial(torch.cat([p.o for p in parts], 2), torch.cat([p.lse for p in parts], 2))
        total = part if total is None else merge(total, part)
    assert total is not None
    return total


def _where_seen(part: Partial, added: torch.Tensor) -> Partial:
    """The identity for rows that see none of the tokens that `added` was added to the logits of."""
    unseen = (added == -torch.inf).all(3)
    return Partial(
        part.o.masked_fill(unseen.unsqueeze(3), 0.0), part.lse.masked_fill(unseen, -torch.inf)
    )


def _in_chunks(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether to read items chunk by chunk; several only where they are one run of whole chunks."""
    tokens, by_token = k.shape[2], k.stride(2)
    if tokens < 2 * CHUNK or by_token == k.shape[3]:
        return False
    if q.shape[2] > CHUNKED_ROWS and k.dtype != torch.bfloat16:
        return False
    side_by_side = k.stride(0) == tokens * by_token and tokens % CHUNK == 0
    large = 2 * tokens * by_token * k.itemsize >= CHUNKED_BYTES
    return large and (len(k) == 1 or side_by_side)


def _chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, width: int, scale: float
) -> Partial:
    """As `softmax`; the chunks of all items are the items of one call."""
    size, chunks, rest = len(k), k.shape[2] // CHUNK, k.shape[2] % CHUNK

    def cut(x: torch.Tensor) -> torch.Tensor:
        by_item = x.stride(2) * CHUNK
        shape = (size * chunks, x.shape[1], CHUNK, x.shape[3])
        return x.as_strided(shape, (by_item, *x.stride()[1:]))

    keys = cut(k)
    queries = q.repeat_interleave(chunks, 0)
    o, lse = _fused(queries, keys, keys if v is k else cut(v), width, None, scale)
    o, lse = o.unflatten(0, (size, chunks)), lse.unflatten(0, (size, chunks))
    if rest:
        keys = k[:, :, -rest:]
        last = _fused(q, keys, keys if v is k else v[:, :, -rest:], width, None, scale)
        o, lse = torch.cat((o, last.o[None]), 1), torch.cat((lse, last.lse[None]), 1)
    total = torch.logsumexp(lse, 1)
    weight = torch.exp(lse - total.unsqueeze(1))
    return Partial((o * weight.unsqueeze(4)).sum(1), total)


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    """Half-precision products are slow on CPUs that have no instructions for them."""
    if q.dtype == torch.float16 and q.device.type == "cpu" and not _HAS_FLOAT16:
        return torch.float32
    return q.dtype


_HAS_FLOAT16 = torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype == dtype:
        return x
    return x.to(dtype, memory_format=torch.contiguous_format)


def _fused(
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


def _unfused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = k.to(precision), v.to(precision)
    logits = torch.matmul(q.to(precision) * scale, k.transpose(2, 3))
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        logits += mask
    lse = torch.logsumexp(logits, dim=3)
    # Rows that see no token have logits of -inf only, and -inf minus -inf is NaN.
    top = lse.masked_fill(lse == -torch.inf, 0.0) if mask is not None else lse
    return Partial(torch.matmul(logits.sub_(top.unsqueeze(3)).exp_(), v), lse)
