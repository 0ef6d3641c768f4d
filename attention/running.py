"""Runs a plan on the tensors of one layer."""

import torch

from attention.errors import PlanMismatch
from attention.plan import Plan
from attention.torch_backend import execute


@torch.no_grad()
def run(
    plan: Plan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query of the plan over its own path.

    Args:
        q: [num_queries, num_q_heads, head_dim], packed in the forest's query order.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim] ("NHD") or
            [num_blocks, num_kv_heads, block_size, head_dim] ("HND"), of any strides but a
            contiguous last dimension.
        v_cache: as k_cache; its head_dim may differ.
        scale: factor on the logits, head_dim ** -0.5 by default.
        softcap: logits become softcap * tanh(logits / softcap) after scaling, before the mask.

    Returns:
        out [num_queries, num_q_heads, value_head_dim] in q's dtype, and the natural log-sum-exp of
        the logits [num_queries, num_q_heads] in float32 (float64 where q is).

    Raises:
        PlanMismatch: a tensor is not of the shape, dtype, device or layout of the plan.

    The same tensors give the same bits on every run. Not differentiable: the results carry no
    gradient.
    """
    _check(plan, q, k_cache, v_cache, softcap)
    scale = plan.head_dim**-0.5 if scale is None else scale
    return execute(plan, q, k_cache, v_cache, scale, softcap)


def _check(
    plan: Plan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    softcap: float | None,
) -> None:
    expected = (plan.num_queries, plan.num_q_heads, plan.head_dim)
    if q.shape != expected:
        raise PlanMismatch(f"q has shape {tuple(q.shape)}, expected {expected}")
    inner = (plan.block_size, plan.num_kv_heads)
    if plan.layout == "HND":
        inner = inner[::-1]
    for name, cache, head_dim in (
        ("k_cache", k_cache, plan.head_dim),
        ("v_cache", v_cache, v_cache.shape[-1] if v_cache.dim() else 0),
    ):
        block = (*inner, head_dim)
        if cache.shape[1:] != block or cache.shape[0] < plan.min_num_blocks:
            raise PlanMismatch(
                f"{name} has shape {tuple(cache.shape)}, expected at least {plan.min_num_blocks} "
                f"blocks of {block} in the layout {plan.layout}"
            )
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dtype != plan.dtype:
            raise PlanMismatch(f"{name} has dtype {tensor.dtype}, expected {plan.dtype}")
        if tensor.device != plan.device:
            raise PlanMismatch(f"{name} is on {tensor.device}, expected {plan.device}")
        if tensor.stride(-1) != 1:
            raise PlanMismatch(
                f"{name} has stride {tensor.stride(-1)} in its last dimension, expected 1"
            )
    if softcap is not None and not softcap > 0:
        raise PlanMismatch(f"softcap is {softcap}, expected a positive number or None")
