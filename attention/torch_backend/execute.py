"""Runs a plan with torch operations, on any device; the fast path on CPU."""

from typing import NamedTuple

import torch

from attention.algebra import Partial, merge_
from attention.options import RunOptions
from attention.problem import FLOAT8_DTYPES, Problem
from attention.torch_backend.bias import Bias
from attention.torch_backend.groups import Group
from attention.torch_backend.kv import Caches, caches_of, tokens_of
from attention.torch_backend.softmax import softmax


class Layer(NamedTuple):
    """The tensors of one run as the groups read them.

    Attributes:
        q: [N, Hkv, group, d], query heads that share a KV head side by side.
        position: int64 [N].
        caches: K and V; float8 as bytes.
        kv_dtype: of the caches.
        scale, softcap: see `attention.run`; k_scale is in the scale or in q.
        slopes: [Hkv, group] in the precision of the logits, or None for 0.
    """

    q: torch.Tensor
    position: torch.Tensor
    caches: Caches
    kv_dtype: torch.dtype
    scale: float
    softcap: float | None
    slopes: torch.Tensor | None


def layer_of(
    problem: Problem,
    q: torch.Tensor,
    position: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: RunOptions,
) -> Layer:
    """Arguments as `attention.run` checks them; q and position in the order of the groups."""
    q = q.reshape(q.shape[0], problem.num_kv_heads, problem.group, problem.head_dim)
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
    caches = caches_of(k_cache, v_cache)
    return Layer(q, position, caches, problem.kv_dtype, scale, options.softcap, slopes)


def execute(problem: Problem, groups: list[Group], layer: Layer) -> Partial:
    """Partials of all queries over all groups, [N, Hkv, group, d] in the problem's precision."""
    total: Partial | None = None
    for group in groups:
        part = attend(group, layer)
        if total is None:
            # `len` of a tensor takes as long as a small operation.
            whole = group.first_query == 0 and part.o.shape[0] == layer.q.shape[0]
            if whole and group.rows is None:
                total = Partial(part.o.contiguous(), part.lse.contiguous())
                continue
            total = _nothing(problem, layer)
        _add(total, group, part)
    return _nothing(problem, layer) if total is None else total


def _nothing(problem: Problem, layer: Layer) -> Partial:
    shape = layer.q.shape[:3]
    return Partial(
        layer.q.new_zeros((*shape, problem.value_head_dim), dtype=problem.precision),
        layer.q.new_full(shape, -torch.inf, dtype=problem.precision),
    )


def _add(total: Partial, group: Group, part: Partial) -> None:
    """Merge the kept rows of a group into those of their queries, none of which occurs twice."""
    if group.rows is not None and group.targets is not None:
        part = Partial(part.o.index_select(0, group.rows), part.lse.index_select(0, group.rows))
        index = group.targets
    elif group.query_index is not None:
        index = group.query_index
    else:
        of = _query_range(group)
        merge_(Partial(total.o[of], total.lse[of]), part)
        return
    merged = Partial(total.o.index_select(0, index), total.lse.index_select(0, index))
    merge_(merged, part)
    total.o.index_copy_(0, index, merged.o)
    total.lse.index_copy_(0, index, merged.lse)


def _query_range(group: Group) -> slice:
    assert group.first_query is not None
    return slice(group.first_query, group.first_query + group.size * group.queries)


def attend(group: Group, layer: Layer) -> Partial:
    """Partials of a group's rows: o [size * queries, Hkv, group, d] and lse without d."""
    size, queries, q = group.size, group.queries, layer.q
    if group.query_index is not None:
        q = q.index_select(0, group.query_index)
    elif size * queries < q.shape[0]:
        q = q[_query_range(group)]
    _, kv_heads, per_head, head_dim = q.shape
    if queries > 1:
        # All query heads of a KV head are rows of one matrix: [size, Hkv, queries * group, d].
        q = q.reshape(size, queries, kv_heads, per_head, head_dim).transpose(1, 2).flatten(2, 3)
    k, v = tokens_of(layer.caches, group)
    if k.dtype != layer.kv_dtype:
        latent, k = v is k, k.view(layer.kv_dtype)
        v = k if latent else v.view(layer.kv_dtype)
    width, scale = layer.caches.v.shape[3], layer.scale / group.temperature
    o, lse = softmax(q, k, v, width, _bias(group, layer), scale, layer.softcap)
    if queries > 1:
        rows = (size, kv_heads, queries, per_head)
        o = o.reshape(*rows, width).transpose(1, 2).flatten(0, 1)
        lse = lse.reshape(rows).transpose(1, 2).flatten(0, 1)
    return Partial(o if o.dtype == lse.dtype else o.to(lse.dtype), _shifted(group, layer, lse))


def _bias(group: Group, layer: Layer) -> Bias:
    mask = group.mask
    per_head = layer.q.shape[2]
    if mask is not None:
        if mask.shape[1] > 1 and per_head > 1:
            mask = mask.repeat_interleave(per_head, dim=1)
        mask = mask.unsqueeze(1)
    if layer.slopes is None:
        return Bias(mask, None, None)
    # As seen from behind the item, for any query: what is left of the distance shifts the lse.
    distance = torch.arange(-group.tokens, 0, device=layer.q.device, dtype=layer.slopes.dtype)
    slope = layer.slopes.repeat(1, group.queries).unsqueeze(2)
    return Bias(mask, slope, distance)


def _shifted(group: Group, layer: Layer, lse: torch.Tensor) -> torch.Tensor:
    """lse [size * queries, Hkv, group] with what has been left out of all logits of an item."""
    if group.log_weight is not None:
        lse = lse + group.log_weight.repeat_interleave(group.queries)[:, None, None]
    if layer.slopes is not None:
        index = group.query_index
        position = layer.position[_query_range(group) if index is None else index]
        first = group.positions[group.item : group.item + group.size]
        end = (first + group.tokens).repeat_interleave(group.queries)
        lse = lse - layer.slopes * (position - end)[:, None, None]
    return lse
