"""Runs a plan on the tensors of one layer."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from attention.errors import PlanMismatch
from attention.ops import LIBRARY, plan_of
from attention.options import RunOptions, check_option, scale_shapes
from attention.plan import Plan
from attention.problem import Problem, lse_dtype


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
        scale: factor on the logits, positive, head_dim ** -0.5 by default.
        softcap: logits become softcap * tanh(logits / softcap) after scaling.
        alibi_slopes: float32 [num_q_heads] (Press et al. 2021, arXiv 2108.12409).
        k_scale, v_scale: float32, of one element or [num_kv_heads]: what K and V of the caches are
            to be multiplied with; 1 by default.

    Returns:
        out [num_queries, num_q_heads, value_head_dim] in q's dtype, and the natural log-sum-exp of
        the logits [num_queries, num_q_heads] in float32 (float64 where q is).

    Raises:
        PlanMismatch: a tensor is not of the shape, dtype, device or layout of the plan.

    K and V of all tokens that some query reads must be finite: 0 times NaN is NaN, so that one in a
    value may reach other queries of its tile. What no query reads may hold anything.

    The same tensors give the same bits on every run. Not differentiable: the results carry no
    gradient. `torch.compile` sees one node, the operator prefixtree::run, into which plans go as
    tensors: another plan runs through the same graph.
    """
    arguments = q, k_cache, v_cache, scale, softcap, alibi_slopes, k_scale, v_scale
    # To leave a mode that is off already takes a few microseconds.
    with torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS:
        if torch.compiler.is_compiling():
            return _operator(plan.handle, *arguments)
        return _execute(plan, *arguments)


_AS_IT_IS = nullcontext()


def _execute(
    plan: Plan,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    problem = plan.problem
    scale = problem.head_dim**-0.5 if scale is None else scale
    options = RunOptions(scale, softcap, alibi_slopes, k_scale, v_scale)
    _check_tensors(plan, q, k_cache, v_cache)
    _check_options(problem, options)
    return plan.work.run(q, k_cache, v_cache, options)


LIBRARY.define(
    "run(Tensor handle, Tensor q, Tensor k_cache, Tensor v_cache, float? scale, float? softcap, "
    "Tensor? alibi_slopes, Tensor? k_scale, Tensor? v_scale) -> (Tensor, Tensor)",
    # A plan expects strides. What Inductor would record and replay are the kernels of one plan.
    tags=(torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)


def _run(handle: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _execute(plan_of(handle), *arguments)


def _run_shapes(
    handle: torch.Tensor, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:2], v_cache.shape[-1]))
    return out, q.new_empty(q.shape[:2], dtype=lse_dtype(q.dtype))


LIBRARY.impl("run", _run, "CompositeExplicitAutograd")
torch.library.register_fake("prefixtree::run", _run_shapes, lib=LIBRARY)
_operator: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.ops.prefixtree.run.default


def _check_tensors(
    plan: Plan, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
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
        num_blocks, *block = cache.shape or (0,)
        if block != [*inner, head_dim] or num_blocks < plan.min_num_blocks:
            raise PlanMismatch(
                f"{name} has shape {tuple(cache.shape)}, expected at least {plan.min_num_blocks} "
                f"blocks of {(*inner, head_dim)} in the layout {problem.layout}"
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


def _check_options(problem: Problem, options: RunOptions) -> None:
    scale, softcap, alibi_slopes, k_scale, v_scale = options
    if not 0 < scale < math.inf:
        raise PlanMismatch(f"scale is {scale}, expected a positive number or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise PlanMismatch(f"softcap is {softcap}, expected a positive number or None")
    if alibi_slopes is not None:
        shape = (problem.num_q_heads,)
        check_option("alibi_slopes", alibi_slopes, (shape,), problem.device, PlanMismatch)
    for name, tensor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if tensor is not None:
            shapes = scale_shapes(problem.num_kv_heads)
            check_option(name, tensor, shapes, problem.device, PlanMismatch)
