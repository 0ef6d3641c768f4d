"""Runs a plan with torch operations, on any device; the fast path on CPU."""

import math

import torch

from attention.algebra import Partial, merge, merge_
from attention.options import RunOptions
from attention.problem import Problem
from attention.torch_backend.batches import KV_TILE
from attention.torch_backend.groups import Group

# Logits that the path without a fused kernel holds at once.
MAX_LOGITS = 1 << 20


def execute(
    problem: Problem,
    groups: list[Group],
    query_index: torch.Tensor | None,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: RunOptions,
) -> Partial:
    """Attention of all queries, in the packed order; arguments as `attention.run` checks them.

    Args:
        query_index: int64 [R], packed place of each row; None where the rows are in that order.
    """
    if query_index is not None:
        q = q.index_select(0, query_index)
    # Query heads that share a KV head stand together: [num_queries, Hkv, group, head_dim].
    q = q.view(len(q), problem.num_kv_heads, -1, problem.head_dim)
    if problem.layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    total = Partial(
        q.new_zeros((*q.shape[:3], v_cache.shape[3]), dtype=problem.precision),
        q.new_full(q.shape[:3], -torch.inf, dtype=problem.precision),
    )
    for group in groups:
        part = _attend(group, q, k_cache, v_cache, options.scale, options.softcap)
        _add(total, group, part)
    o, lse = total.o.flatten(1, 2).to(q.dtype), total.lse.flatten(1, 2)
    if query_index is None:
        return Partial(o, lse)
    return Partial(
        torch.empty_like(o).index_copy_(0, query_index, o),
        torch.empty_like(lse).index_copy_(0, query_index, lse),
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


def _attend(
    group: Group,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Partials of a group's rows: o [size * queries, Hkv, group, d] and lse without d."""
    if group.query_index is not None:
        q = q.index_select(0, group.query_index)
    else:
        q = q[_query_range(group)]
    _, kv_heads, per_head, head_dim = q.shape
    # All query heads of a KV head are rows of one matrix: [size, Hkv, queries * group, d].
    q = (
        q.view(group.size, group.queries, kv_heads, per_head, head_dim)
        .transpose(1, 2)
        .flatten(2, 3)
    )
    mask = group.mask
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(per_head, dim=1)
        mask = mask.unsqueeze(1)

    if group.spans is None:
        assert group.slots is not None
        shape = (group.size, group.tokens)
        k, v = _gather(k_cache, group.slots, shape), _gather(v_cache, group.slots, shape)
        part = _softmax(q, k, v, mask, scale, softcap)
    else:
        parts = [
            _softmax(
                q[item : item + 1],
                _consecutive(k_cache, *span),
                _consecutive(v_cache, *span),
                None,
                scale,
                softcap,
            )
            for item, span in enumerate(group.spans)
        ]
        part = parts[0]
        if len(parts) > 1:
            part = Partial(torch.cat([p.o for p in parts]), torch.cat([p.lse for p in parts]))

    rows = (group.size, kv_heads, group.queries, per_head)
    o = part.o.view(*rows, -1).transpose(1, 2).flatten(0, 1)
    return Partial(o.to(part.lse.dtype), part.lse.reshape(rows).transpose(1, 2).flatten(0, 1))


def _consecutive(cache: torch.Tensor, first_slot: int, tokens: int) -> torch.Tensor:
    """KV of consecutive slots, [1, Hkv, tokens, d]: a view where slots lie at one stride."""
    _, block_size, heads, head_dim = cache.shape
    by_block, by_slot, by_head, _ = cache.stride()
    if by_block != block_size * by_slot:
        slots = torch.arange(first_slot, first_slot + tokens, device=cache.device)
        return _gather(cache, slots, (1, tokens))
    return cache.as_strided(
        (1, heads, tokens, head_dim),
        (0, by_head, by_slot, 1),
        cache.storage_offset() + first_slot * by_slot,
    )


def _gather(cache: torch.Tensor, slots: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """KV of slots, [size, Hkv, tokens, d], from a cache [num_blocks, block_size, Hkv, d].

    index_select copies whole rows, several times as fast as indexing in two dimensions. So the
    cache, whatever its strides, becomes rows at their greatest common stride: one per slot where
    the heads of a slot lie together, else one per slot and head.
    """
    num_blocks, block_size, heads, head_dim = cache.shape
    by_block, by_slot, by_head, _ = cache.stride()
    together = by_head == head_dim
    step = math.gcd(by_block, by_slot) if together else math.gcd(by_block, by_slot, by_head)
    last = (num_blocks - 1) * by_block + (block_size - 1) * by_slot
    if not together:
        last += (heads - 1) * by_head
    width = heads * head_dim if together else head_dim
    rows = cache.as_strided((last // step + 1, width), (step, 1))
    if by_block == block_size * by_slot and step == by_slot:
        index = slots
    else:
        index = slots // block_size * (by_block // step) + slots % block_size * (by_slot // step)
    size, tokens = shape
    if together:
        return rows.index_select(0, index).view(size, tokens, heads, head_dim).transpose(1, 2)
    head = torch.arange(heads, device=cache.device) * (by_head // step)
    index = index.view(size, 1, tokens) + head.view(1, heads, 1)
    return rows.index_select(0, index.flatten()).view(size, heads, tokens, head_dim)


def _softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of rows [size, Hkv, rows, d] over k and v [size, Hkv, tokens, d]."""
    if q.device.type == "cpu" and softcap is None and k.shape[3] == v.shape[3]:
        return Partial(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, attn_mask=mask, scale=scale
            )
        )
    tokens = k.shape[2]
    if tokens > KV_TILE:
        # Only items read in place are this long, and they have no mask.
        half = tokens // 2
        return merge(
            _softmax(q, k[:, :, :half], v[:, :, :half], None, scale, softcap),
            _softmax(q, k[:, :, half:], v[:, :, half:], None, scale, softcap),
        )
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(precision) * scale, k.to(precision), v.to(precision)
    step = max(1, MAX_LOGITS // (k.shape[0] * k.shape[1] * tokens))
    parts = []
    for begin in range(0, q.shape[2], step):
        logits = torch.matmul(q[:, :, begin : begin + step], k.transpose(2, 3))
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            logits += mask if mask.shape[2] == 1 else mask[:, :, begin : begin + step]
        lse = torch.logsumexp(logits, dim=3)
        weights = logits.sub_(lse.unsqueeze(3)).exp_()
        parts.append(Partial(torch.matmul(weights, v), lse))
    return Partial(torch.cat([p.o for p in parts], 2), torch.cat([p.lse for p in parts], 2))
