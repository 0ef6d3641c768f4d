"""The tensors of one run, as every group of a plan reads them."""

from typing import NamedTuple

import torch

from attention.options import RunOptions
from attention.problem import FLOAT8_DTYPES, Problem


class Layer(NamedTuple):
    """The tensors of one run as the groups read them.

    Attributes:
        q: [N, Hkv, group, d], query heads that share a KV head side by side.
        position: int64 [N].
        k_cache, v_cache: [num_blocks, block_size, Hkv, d], of any strides; float8 as bytes.
        kv_dtype: of the caches.
        scale, softcap: see `attention.run`; k_scale is in the scale or in q.
        slopes: [Hkv, group] in the precision of the logits, or None for 0.
    """

    q: torch.Tensor
    position: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv_dtype: torch.dtype
    scale: float
    softcap: float | None
    slopes: torch.Tensor | None

    @property
    def latent(self) -> bool:
        """Values are the first columns of the keys."""
        k, v = self.k_cache, self.v_cache
        same = k.data_ptr() == v.data_ptr() and k.stride() == v.stride()
        return same and v.shape[3] <= k.shape[3]


def layer_of(
    problem: Problem,
    q: torch.Tensor,
    position: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: RunOptions,
) -> Layer:
    """Arguments as `attention.run` checks them; q and position in the order of the groups."""
    q = q.reshape(len(q), problem.num_kv_heads, problem.group, problem.head_dim)
    scale = options.scale
    if options.k_scale is not None:
        if options.k_scale.numel() == 1 and options.k_scale.device.type == "cpu":
            scale *= float(options.k_scale)
        else:
            # Rounded to the dtype of q again, logits would be as far off as that is coarse.
            q = q.to(problem.precision) * options.k_scale.view(-1, 1, 1)
    if problem.layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if problem.kv_dtype in FLOAT8_DTYPES:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    slopes = options.alibi_slopes
    if slopes is not None:
        slopes = slopes.to(problem.precision).view(problem.num_kv_heads, problem.group)
    return Layer(q, position, k_cache, v_cache, problem.kv_dtype, scale, options.softcap, slopes)
