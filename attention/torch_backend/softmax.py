"""Attention of rows over keys and values that lie side by side: fused where torch has it so."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from attention.algebra import Partial

# Logits (and masks that differ from head to head) held at once.
MAX_LOGITS = 1 << 20


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

    def of(self, items: slice, tokens: slice) -> "Bias":
        """That of some of the items and tokens."""
        mask, distance = self.mask, self.distance
        return Bias(
            None if mask is None else mask[items, :, :, tokens],
            self.slope,
            None if distance is None else distance[tokens],
        )

    def added(self, rows: slice) -> torch.Tensor | None:
        """For some of the rows, [size or 1, Hkv or 1, rows or 1, tokens]."""
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None)]
        if self.slope is None or self.distance is None:
            return mask
        sloped = (self.slope[:, rows] * self.distance).unsqueeze(0)
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
    """Partials of rows [size, Hkv, rows, d] over k and v [size, Hkv, tokens, d] of one dtype.

    The values are the first `width` columns of v, which may be k itself. A row that sees no token
    gives anything. o is float32 (float64 for such rows) or the dtype of q.
    """
    rows = q.shape[2]
    fused = softcap is None and q.device.type == "cpu"
    step = rows
    if not fused or bias.slope is not None:
        step = max(1, MAX_LOGITS // k[..., 0].numel())
    parts = []
    for first in range(0, rows, step):
        some = slice(first, first + step)
        queries, added = q[:, :, some], bias.added(some)
        if fused:
            parts.append(_fused(queries, k, v, width, added, scale))
        else:
            parts.append(_unfused(queries, k, v[..., :width], added, scale, softcap))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.o for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def without_unseen(part: Partial, mask: torch.Tensor) -> Partial:
    """The partial with nothing in it for rows that this mask of `Bias` hides all tokens from."""
    unseen = (mask == -torch.inf).all(dim=3)
    return Partial(
        part.o.masked_fill(unseen.unsqueeze(3), 0.0), part.lse.masked_fill(unseen, -torch.inf)
    )


def combined(parts: list[Partial], size: int) -> Partial:
    """The merge of partials [n * size, Hkv, rows, d] over pieces of the same items: [size, ...]."""
    o, lse = parts[0]
    if len(parts) > 1:
        o, lse = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if len(lse) == size:
        return Partial(o, lse)
    o, lse = o.unflatten(0, (-1, size)), lse.unflatten(0, (-1, size))
    total = torch.logsumexp(lse, dim=0)
    weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    return Partial(torch.einsum("nshr,nshrd->shrd", weight, o.to(weight.dtype)), total)


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """Half-precision products are slow on CPUs that have no instructions for them."""
    if q.dtype == torch.float16 and q.device.type == "cpu" and not _HAS_FLOAT16:
        return torch.float32
    return q.dtype


_HAS_FLOAT16 = torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


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
