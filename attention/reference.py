"""Attention in float64, one query at a time: what all other paths are held to."""

from typing import NamedTuple

import numpy as np
import torch

from attention.forest import ForestArrays, Int64Array
from attention.node_sets import NodeSets
from attention.segments import FloatArray


def attend(
    source: ForestArrays | NodeSets,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    layout: str = "NHD",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    temperature: FloatArray | None = None,
    log_weight: FloatArray | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of every query over its own path, or its own set of nodes.

    Args:
        q: [num_queries, num_q_heads, head_dim], packed in the source's query order.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim] ("NHD") or
            [num_blocks, num_kv_heads, block_size, head_dim] ("HND"), of any floating-point dtype.
        v_cache: as k_cache; its head_dim may differ.
        layout, window, sink_tokens, temperature, log_weight: see `attention.plan`.
        scale, softcap, alibi_slopes, k_scale, v_scale: see `attention.run`.

    Returns:
        out [num_queries, num_q_heads, value_head_dim] and the natural log-sum-exp of the logits
        [num_queries, num_q_heads], both float64: 0 and -inf for a query that sees no token.
    """
    keys, values = _by_slot(k_cache, layout, k_scale), _by_slot(v_cache, layout, v_scale)
    heads = q.shape[1]
    group = heads // keys.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slopes = torch.zeros(heads) if alibi_slopes is None else alibi_slopes.cpu()
    per_node = _PerNode.of(source, temperature, log_weight)

    out = torch.zeros(len(q), heads, values.shape[2], dtype=torch.float64)
    lse = torch.full((len(q), heads), -torch.inf, dtype=torch.float64)
    query = 0
    for nodes, starts, positions in _sequences(source):
        tokens = _Tokens.of(source, nodes, starts, per_node)
        k = keys[tokens.slot].repeat_interleave(group, dim=1)
        v = values[tokens.slot].repeat_interleave(group, dim=1)
        for position in positions:
            behind = position - tokens.position
            seen = behind >= 0
            if window is not None:
                seen &= (behind < window) | (tokens.position < sink_tokens)
            if seen.any():
                logits = torch.einsum("hd,khd->hk", q[query].double().cpu(), k[seen])
                logits *= scale / tokens.temperature[seen]
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits = logits - slopes.double()[:, None] * behind[seen] + tokens.log_weight[seen]
                lse[query] = torch.logsumexp(logits, dim=1)
                out[query] = torch.einsum("hk,khd->hd", torch.softmax(logits, dim=1), v[seen])
            query += 1
    return out, lse


def _by_slot(cache: torch.Tensor, layout: str, scale: torch.Tensor | None) -> torch.Tensor:
    """A cache as float64 [slots, num_kv_heads, head_dim]."""
    cache = cache.cpu().double()
    cache = (cache.transpose(1, 2) if layout == "HND" else cache).flatten(0, 1)
    return cache if scale is None else cache * scale.cpu().double().reshape(-1, 1)


class _PerNode(NamedTuple):
    temperature: FloatArray
    log_weight: FloatArray

    @staticmethod
    def of(
        source: ForestArrays | NodeSets,
        temperature: FloatArray | None,
        log_weight: FloatArray | None,
    ) -> "_PerNode":
        num_nodes = len(source.length)
        # A plan holds both in float32.
        return _PerNode(
            np.ones(num_nodes) if temperature is None else np.asarray(temperature, np.float32),
            np.zeros(num_nodes) if log_weight is None else np.asarray(log_weight, np.float32),
        )


class _Tokens(NamedTuple):
    """All tokens of a sequence's nodes: slot, position, and what the node says of its logits."""

    slot: torch.Tensor
    position: torch.Tensor
    temperature: torch.Tensor
    log_weight: torch.Tensor

    @staticmethod
    def of(
        source: ForestArrays | NodeSets, nodes: list[int], starts: list[int], per_node: _PerNode
    ) -> "_Tokens":
        length = source.length[nodes]
        return _Tokens(
            torch.from_numpy(np.concatenate([_slots(source, node) for node in nodes])),
            torch.from_numpy(
                np.concatenate(
                    [start + np.arange(n) for start, n in zip(starts, length, strict=True)]
                )
            ),
            torch.from_numpy(np.repeat(per_node.temperature[nodes], length)).double(),
            torch.from_numpy(np.repeat(per_node.log_weight[nodes], length)).double(),
        )


def _slots(source: ForestArrays | NodeSets, node: int) -> Int64Array:
    blocks = source.blocks[source.block_ptr[node] : source.block_ptr[node + 1]].astype(np.int64)
    place = int(source.offset[node]) + np.arange(source.length[node])
    slots: Int64Array = blocks[place // source.block_size] * source.block_size
    slots += place % source.block_size
    return slots


def _sequences(source: ForestArrays | NodeSets) -> list[tuple[list[int], list[int], range]]:
    """Nodes of each sequence, the positions they start at, and the positions of its queries."""
    if isinstance(source, NodeSets):
        return [
            (
                source.member[begin:end].tolist(),
                source.member_start[begin:end].tolist(),
                range(int(first), int(first + query_len)),
            )
            for begin, end, first, query_len in zip(
                source.member_ptr[:-1],
                source.member_ptr[1:],
                source.query_start,
                source.query_len,
                strict=True,
            )
        ]
    sequences = []
    for leaf, query_len in zip(source.leaf.tolist(), source.query_len.tolist(), strict=True):
        path, node = [], leaf
        while node >= 0:
            path.append(node)
            node = int(source.parent[node])
        path.reverse()
        path_len = int(source.start[leaf] + source.length[leaf])
        sequences.append((path, source.start[path].tolist(), range(path_len - query_len, path_len)))
    return sequences
