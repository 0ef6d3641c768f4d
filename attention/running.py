"""Runs a plan on the tensors of one layer."""

import torch

from attention.errors import PlanMismatch
from attention.options import RunOptions
from attention.plan import Plan


@torch.no_grad()
def run(
    plan: Plan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query of the plan over its own path.

    The logit of a query at position p on a token at position t of a node is
    softcap(q . k * k_scale * scale / temperature) - slope * (p - t) + log_weight.

    Args:
        q: [num_queries, num_q_heads, head_dim], packed in the forest's query order.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim] ("NHD") or
            [num_blocks, num_kv_heads, block_size, head_dim] ("HND"), of any strides but a
            contiguous last dimension.
        v_cache: as k_cache, with value_head_dim; may be a view of k_cache (multi-head latent
            attention).
        scale: factor on the logits, head_dim ** -0.5 by default.
        softcap: logits become softcap * tanh(logits / softcap) after scaling.
        alibi_slopes: float32 [num_q_heads] (Press et al. 2021, arXiv 2108.12409).
        k_scale, v_scale: float32, of one element or [num_kv_heads]: what K and V of the caches are
            to be multiplied with; 1 by default.

    Returns:
        out [num_queries, num_q_heads, value_head_dim] in q's dtype, and the natural log-sum-exp of
        the logits [num_queries, num_q_heads] in float32 (float64 where q is).

    Raises:
        PlanMismatch: a tensor is not of the shape, dtype, device or layout of the plan.

    The same tensors give the same bits on every run. Not differentiable: the results carry no
    gradient.
    """
    _check(plan, q, k_cache, v_cache, softcap)
    scale = plan.problem.head_dim**-0.5 if scale is None else scale
    options = RunOptions(scale, softcap, alibi_slopes, k_scale, v_scale)
    return plan.work.run(q, k_cache, v_cache, options)


def _check(
    plan: Plan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    softcap: float | None,
) -> None:
    problem = plan.problem
    expected = (plan.num_queries, problem.num_q_heads, problem.head_dim)
    if q.shape != expected:
        raise PlanMismatch(f"q has shape {tuple(q.shape)}, expected {expected}")
    inner = (plan.block_size, problem.num_kv_heads)
    if problem.layout == "HND":
        inner = inner[::-1]
    for name, cache, head_dim in (
        ("k_cache", k_cache, problem.head_dim),
        ("v_cache", v_cache, problem.value_head_dim),
    ):
        block = (*inner, head_dim)
        if cache.shape[1:] != block or cache.shape[0] < plan.min_num_blocks:
            raise PlanMismatch(
                f"{name} has shape {tuple(cache.shape)}, expected at least {plan.min_num_blocks} "
                f"blocks of {block} in the layout {problem.layout}"
            )
    for name, tensor, dtype in (
        ("q", q, problem.dtype),
        ("k_cache", k_cache, problem.kv_dtype),
        ("v_cache", v_cache, problem.kv_dtype),
    ):
        if tensor.dtype != dtype:
            raise PlanMismatch(f"{name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != problem.device:
            raise PlanMismatch(f"{name} is on {tensor.device}, expected {problem.device}")
        if tensor.stride(-1) != 1:
            raise PlanMismatch(
                f"{name} has stride {tensor.stride(-1)} in its last dimension, expected 1"
            )
    if softcap is not None and not softcap > 0:
        raise PlanMismatch(f"softcap is {softcap}, expected a positive number or None")
