"""The plan of attention over a forest: made once a step, run once a layer."""

from dataclasses import dataclass, field

import numpy as np
import torch

from attention.batches import make_batches
from attention.errors import PlanMismatch
from attention.forest import ForestArrays, validate
from attention.groups import Group, make_groups
from attention.items import WorkItems, tokens_read, work_items
from attention.order import QueryOrder, depth_first

LAYOUTS = ("NHD", "HND")


@dataclass(frozen=True)
class Plan:
    """What `attention.run` executes. Made by `attention.plan`; holds no token and no KV.

    Attributes:
        num_queries: queries of all sequences together, the rows of q and of the result.
        num_q_heads, num_kv_heads, head_dim, dtype, device, layout, window: as given to `plan`.
        block_size: tokens a block of the caches must hold.
        min_num_blocks: blocks the caches must have: the highest block id + 1.
        order: the depth-first order of the queries.
        items: the work items, for any backend.
        kv_tokens_read: KV tokens from the first to the last that any query sees of a node, summed
            over the nodes: each once, however many sequences share it.
        kv_tokens_per_path: KV tokens that the queries of each sequence see, summed over the
            sequences: what is read where nothing is shared.
    """

    num_queries: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    layout: str
    window: int | None
    block_size: int
    min_num_blocks: int
    order: QueryOrder = field(repr=False)
    items: WorkItems = field(repr=False)
    groups: list[Group] = field(repr=False)
    query_index: torch.Tensor | None = field(repr=False)
    kv_tokens_read: int
    kv_tokens_per_path: int


def plan(
    forest: ForestArrays,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layout: str = "NHD",
    window: int | None = None,
) -> Plan:
    """Plan the attention of a forest's queries over their paths.

    Args:
        forest: the nodes and sequences; see `attention.Forest`.
        num_q_heads: a multiple of num_kv_heads; query head h reads KV head h // (their ratio).
        head_dim: of queries and keys; the values' may differ.
        dtype: of q and the caches: float64, float32, bfloat16 or float16.
        device: where q and the caches are.
        layout: of the caches, "NHD" or "HND"; see `attention.run`.
        window: a query at position p sees the positions > p - window only; None: no limit.

    Raises:
        InvalidForest: the forest's arrays contradict each other.
        PlanMismatch: an argument is outside what is said above.

    Host work in O(nodes log nodes + blocks + queries of all work items), vectorised: Python loops
    over levels and batched calls only.
    """
    validate(forest)
    _check_arguments(num_q_heads, num_kv_heads, head_dim, dtype, layout, window)
    # "cuda" is the current one of them, and so are tensors made there.
    device = torch.empty(0, device=device).device
    order = depth_first(forest)
    items = work_items(forest, order, window)
    identity = bool((order.packed[1:] > order.packed[:-1]).all())
    return Plan(
        num_queries=len(order.packed),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        layout=layout,
        window=window,
        block_size=forest.block_size,
        min_num_blocks=int(forest.blocks.max()) + 1,
        order=order,
        items=items,
        groups=make_groups(
            forest,
            order,
            make_batches(
                forest,
                items,
                token_bytes=2 * num_kv_heads * head_dim * dtype.itemsize,
                pair_flops=4 * num_q_heads * head_dim,
                viewable=layout == "NHD",
            ),
            window=window,
            mask_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            device=device,
        ),
        query_index=None if identity else torch.from_numpy(order.packed).to(device),
        kv_tokens_read=tokens_read(forest, order, window),
        kv_tokens_per_path=_tokens_per_path(forest, window),
    )


def _tokens_per_path(forest: ForestArrays, window: int | None) -> int:
    path_len = forest.start[forest.leaf] + forest.length[forest.leaf]
    if window is None:
        return int(path_len.sum())
    return int(np.minimum(path_len, forest.query_len + window - 1).sum())


def _check_arguments(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    layout: str,
    window: int | None,
) -> None:
    if num_kv_heads < 1:
        raise PlanMismatch(f"num_kv_heads is {num_kv_heads}, expected at least 1")
    if num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise PlanMismatch(
            f"num_q_heads is {num_q_heads}, expected a multiple of num_kv_heads, {num_kv_heads}"
        )
    if head_dim < 1:
        raise PlanMismatch(f"head_dim is {head_dim}, expected at least 1")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise PlanMismatch(
            f"dtype is {dtype}, expected torch.float64, float32, bfloat16 or float16"
        )
    if layout not in LAYOUTS:
        raise PlanMismatch(f"layout is {layout!r}, expected one of {LAYOUTS}")
    if window is not None and window < 1:
        raise PlanMismatch(f"window is {window}, expected at least 1 or None")
