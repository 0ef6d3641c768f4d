"""Attention of rows over keys and values: as products or fused where that is faster."""

import torch

from attention.algebra import Partial, merge
from attention.torch_backend.batches import KV_TILE
from attention.torch_backend.bias import Bias
from attention.torch_backend.fused import chunked, fused, in_chunks
from attention.torch_backend.products import by_products, worthwhile

# Logits (and masks that differ from head to head) held at once.
MAX_LOGITS = 1 << 20


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
    gives anything. o is float32 (float64 if q is) or of the dtype of q.
    """
    if worthwhile(q, k.shape[2]):
        return by_products(q, k, v, width, bias, scale, softcap)
    compute = _compute_dtype(q)
    direct = softcap is None and bias.slope is None and k.dtype == compute
    if direct and q.device.type == "cpu":
        if bias.mask is None and in_chunks(q, k, v):
            return chunked(q, k, v, width, scale)
        return fused(q, k, v, width, bias.mask, scale)
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
                part = fused(queries, keys, values, width, added, scale)
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
