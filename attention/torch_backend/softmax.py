"""Attention of rows over keys and values that lie side by side: fused where torch has it so."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from attention.algebra import Partial, merge
from attention.torch_backend.batches import KV_TILE

# Logits (and masks that differ from head to head) held at once.
MAX_LOGITS = 1 << 20

# Tokens of one item that are read at once where its heads lie between each other, in bfloat16.
INTERLEAVED_TILE = 512


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
    rows, tokens = q.shape[2], k.shape[2]
    step = tokens if direct else KV_TILE
    if direct and len(q) == 1 and k.dtype == torch.bfloat16 and k.stride(2) > k.shape[3]:
        # Heads that lie between each other share pages: all of them while those are in reach.
        step = INTERLEAVED_TILE
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
                parts.append(_fused(queries, keys, values, width, added, scale))
            else:
                parts.append(_unfused(queries, keys, values[..., :width], added, scale, softcap))
        part = parts[0]
        if len(parts) > 1:
            part = Partial(torch.cat([p.o for p in parts], 2), torch.cat([p.lse for p in parts], 2))
        total = part if total is None else merge(total, part)
    assert total is not None
    return total


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
    q, k, v = (F.pad(x, (0, widest - x.shape[3])) if x.shape[3] < widest else x for x in (q, k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=mask, scale=scale
    )
    return Partial(o[:, :, :rows, :width], lse[:, :, :rows])


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
    return Partial(torch.matmul(logits.sub_(lse.unsqueeze(3)).exp_(), v), lse)
