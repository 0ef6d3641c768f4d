"""The attention function that models call during continuous batching."""

from __future__ import annotations

from typing import Any

import torch

import attention
from prefixtree.engines.continuous_batching.allocator import LAYOUT, NAME, TreeAllocator
from prefixtree.engines.continuous_batching.step import Batch
from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.keywords import check_keywords

# Keywords of the library's continuous batching that are for other attentions, or for the model.
_OF_THE_BATCH = frozenset(
    {
        "block_table",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
    }
)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: Any = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    read_index: Any = None,
    write_index: Any = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Writes K and V [1, KV heads, T, head_dim] and attends with query [1, heads, T, head_dim].

    Returns [1, T, heads, head_dim] and None. The layers of one step share one plan for each window.
    """
    layer: Any = module.layer_idx
    allocator = None if cache is None else cache.layer_to_allocator.get(layer)
    if not isinstance(allocator, TreeAllocator):
        raise UnsupportedAttention(
            f"layer {layer} has the attention {NAME!r} without the cache that it reads: it is for "
            "continuous batching while prefixtree.engines.continuous_batching is installed"
        )
    check_keywords(layer, module, {"attention_mask": attention_mask, **others}, _OF_THE_BATCH)
    batch = allocator.batch
    if batch is None or batch.made_for is not write_index:
        batch = allocator.batch = Batch(
            write_index,
            write_index[allocator.index],
            read_index[allocator.index],
            cu_seq_lens_q,
            cu_seq_lens_k[allocator.layer_type],
            allocator.tokens_per_page,
            batch,
        )
    k_cache, v_cache = allocator.kv(layer)
    k, v = (states[0].transpose(0, 1) for states in (key, value))
    attention.write(k, v, k_cache, v_cache, batch.slots, layout=LAYOUT)
    q = query[0].transpose(0, 1)
    plan = batch.step.plan(
        allocator.window if sliding_window is None else sliding_window,
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_head_dim=v.shape[2],
        dtype=q.dtype,
        device=q.device,
        layout=LAYOUT,
    )
    out, lse = attention.run(plan, q, k_cache, v_cache, scale=scaling, softcap=softcap)
    if s_aux is not None:
        # A learned sink is a key whose value is 0.
        out, _ = attention.merge((out, lse), (attention.IDENTITY.o, s_aux.to(lse.dtype)))
    return out.to(query.dtype).unsqueeze(0), None
