"""Attention over a forest in float64, one query at a time: what all other paths are held to."""

import torch

from attention.forest import ForestArrays


def attend(
    forest: ForestArrays,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    layout: str = "NHD",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of every query over its own path.

    Args:
        q: [num_queries, num_q_heads, head_dim], packed in the forest's query order.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim] ("NHD") or
            [num_blocks, num_kv_heads, block_size, head_dim] ("HND").
        v_cache: as k_cache; its head_dim may differ.
        scale: factor on the logits, head_dim ** -0.5 by default.
        softcap: logits become softcap * tanh(logits / softcap) after scaling.
        window: a query at position p sees the positions > p - window only.

    Returns:
        out [num_queries, num_q_heads, value_head_dim] and the natural log-sum-exp of the logits
        [num_queries, num_q_heads], both float64.
    """
    keys, values = k_cache.double(), v_cache.double()
    if layout == "HND":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // keys.shape[2]

    outs, lses = [], []
    query = 0
    for sequence in range(len(forest.leaf)):
        blocks, offsets = _path_slots(forest, int(forest.leaf[sequence]))
        k = keys[blocks, offsets].repeat_interleave(group, dim=1)
        v = values[blocks, offsets].repeat_interleave(group, dim=1)
        path_len = len(blocks)
        for position in range(path_len - int(forest.query_len[sequence]), path_len):
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            logits = torch.einsum("hd,khd->hk", q[query].double(), k[seen]) * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            lses.append(torch.logsumexp(logits, dim=1))
            outs.append(torch.einsum("hk,khd->hd", torch.softmax(logits, dim=1), v[seen]))
            query += 1
    return torch.stack(outs), torch.stack(lses)


def _path_slots(forest: ForestArrays, leaf: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block ids and offsets in the block of all tokens from the root to the end of `leaf`."""
    blocks: list[int] = []
    offsets: list[int] = []
    path = []
    node = leaf
    while node >= 0:
        path.append(node)
        node = int(forest.parent[node])
    for node in reversed(path):
        node_blocks = forest.blocks[forest.block_ptr[node] : forest.block_ptr[node + 1]]
        first = int(forest.offset[node])
        for token in range(first, first + int(forest.length[node])):
            blocks.append(int(node_blocks[token // forest.block_size]))
            offsets.append(token % forest.block_size)
    return torch.tensor(blocks), torch.tensor(offsets)
