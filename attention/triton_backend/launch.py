"""Runs a schedule on the tensors of one layer: the segment kernel once a tile, then the merge."""

from contextlib import nullcontext
from typing import Any

import torch

from attention.algebra import Partial
from attention.options import RunOptions
from attention.problem import Problem
from attention.triton_backend.merge import merge
from attention.triton_backend.segment import segment
from attention.triton_backend.tiles import (
    arch_of,
    converts_float8,
    power_of_two_from,
    split_dim,
    tiles_for,
)
from attention.triton_backend.units import Schedule, Units

_PARTS = 4  # partials that a step of a merge loads


def launch(
    problem: Problem,
    schedule: Schedule,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: RunOptions,
) -> Partial:
    """Arguments and result as `attention.run`; all checked.

    Nothing is copied to or waited for by the host, and grids depend on capacities alone: can be
    captured in a CUDA graph.
    """
    heads, value_dim = problem.num_q_heads, problem.value_head_dim
    result = Partial(q.new_empty(len(q), heads, value_dim), _empty(q, len(q), heads))
    parts = Partial(
        _empty(q, schedule.num_partials, heads, value_dim), _empty(q, schedule.num_partials, heads)
    )
    launch_into(result, parts, problem, schedule, q, k_cache, v_cache, options)
    return result


def launch_into(
    result: Partial,
    parts: Partial,
    problem: Problem,
    schedule: Schedule,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: RunOptions,
) -> None:
    """As `launch`, into contiguous tensors of the caller.

    Args:
        result: o [num_queries, num_q_heads, value_head_dim] in q's dtype, lse float32.
        parts: o [num_partials, num_q_heads, value_head_dim] and lse, both float32.
    """
    arch = arch_of(problem.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        for units in schedule.units:
            if programs := segment_programs(problem, units, arch):
                tensors = (q, k_cache, v_cache, result, parts)
                segment[programs,](
                    **segment_arguments(problem, schedule, units, *tensors, options, arch)
                )
        if programs := merge_programs(problem, schedule):
            merge[programs,](**merge_arguments(problem, schedule, result, parts))


def segment_programs(problem: Problem, units: Units, arch: str) -> int:
    """Programs of the segment kernel: of each unit, KV head, and part of its query heads."""
    splits = -(-problem.group // tiles_for(problem, arch).heads)
    return len(units.row_begin) * problem.num_kv_heads * splits


def segment_arguments(
    problem: Problem,
    schedule: Schedule,
    units: Units,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    result: Partial,
    parts: Partial,
    options: RunOptions,
    arch: str,
) -> dict[str, Any]:
    """What the segment kernel is called with."""
    tiles = tiles_for(problem, arch)
    tile = tiles.of(problem, units.rows_per_tile)
    d1, d2 = split_dim(problem.head_dim)
    v1, v2 = split_dim(problem.value_head_dim)
    k_strides = _strides(problem, k_cache)
    v_strides = _strides(problem, v_cache)
    alike = v_strides == k_strides
    rows, entries = schedule.rows, schedule.entries
    in_keys = (
        alike
        and v_cache.data_ptr() == k_cache.data_ptr()
        and problem.value_head_dim in (d1, problem.head_dim)
    )
    return {
        "q": q,
        "k_cache": _stored(k_cache, arch),
        "v_cache": None if in_keys else _stored(v_cache, arch),
        "out": result.o,
        "lse": result.lse,
        "part_o": parts.o,
        "part_lse": parts.lse,
        "row_query": rows.query,
        "row_position": rows.position,
        "row_partial": rows.partial,
        "entry_slot": entries.slot,
        "entry_length": entries.length,
        "entry_position": entries.position,
        "entry_row_begin": entries.row_begin,
        "entry_row_end": entries.row_end,
        "entry_scale": entries.scale,
        "entry_bias": entries.bias,
        "unit_size": units.size,
        "unit_row_begin": units.row_begin,
        "unit_row_end": units.row_end,
        "unit_entry_begin": units.entry_begin,
        "unit_entry_mid": units.entry_mid,
        "unit_entry_end": units.entry_end,
        "unit_log2_width": units.log2_width,
        "unit_ordinal": units.ordinal,
        "scale": float(options.scale),
        "softcap": None if options.softcap is None else float(options.softcap),
        "alibi_slopes": options.alibi_slopes,
        "k_scale": options.k_scale,
        "v_scale": options.v_scale,
        "window": problem.window,
        "sink_tokens": problem.sink_tokens,
        "q_stride_query": q.stride(0),
        "q_stride_head": q.stride(1),
        **{f"k_stride_{of}": stride for of, stride in k_strides.items()},
        **{f"v_stride_{of}": None if alike else stride for of, stride in v_strides.items()},
        "k_scale_stride": _stride(options.k_scale),
        "v_scale_stride": _stride(options.v_scale),
        "NUM_KV_HEADS": problem.num_kv_heads,
        "GROUP": problem.group,
        "HEADS": tiles.heads,
        "HEAD_DIM": problem.head_dim,
        "D1": d1,
        "D2": d2,
        "VALUE_DIM": problem.value_head_dim,
        "V1": v1,
        "V2": v2,
        "BLOCK_SIZE": k_cache.shape[1 if problem.layout == "NHD" else 2],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def merge_programs(problem: Problem, schedule: Schedule) -> int:
    """Programs of the merge kernel: of each result and a few heads."""
    heads, _ = _merge_shape(problem)
    return len(schedule.merges.query) * -(-problem.num_q_heads // heads)


def merge_arguments(
    problem: Problem, schedule: Schedule, result: Partial, parts: Partial
) -> dict[str, Any]:
    """What the merge kernel is called with."""
    merges = schedule.merges
    heads, columns = _merge_shape(problem)
    return {
        "out": result.o,
        "lse": result.lse,
        "part_o": parts.o,
        "part_lse": parts.lse,
        "merge_size": merges.size,
        "merge_query": merges.query,
        "merge_begin": merges.begin,
        "merge_end": merges.end,
        "NUM_Q_HEADS": problem.num_q_heads,
        "VALUE_DIM": problem.value_head_dim,
        "COLUMNS": columns,
        "HEADS": heads,
        "PARTS": _PARTS,
        "num_warps": 4,
    }


def _merge_shape(problem: Problem) -> tuple[int, int]:
    """Query heads and columns of a program: 512 numbers of a partial, 16 bytes a thread."""
    columns = power_of_two_from(problem.value_head_dim)
    return max(1, min(power_of_two_from(problem.num_q_heads), 512 // columns)), columns


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _strides(problem: Problem, cache: torch.Tensor) -> dict[str, int]:
    of = ("block", "slot", "head") if problem.layout == "NHD" else ("block", "head", "slot")
    return dict(zip(of, cache.stride()[:3], strict=True))


def _stride(per_head: torch.Tensor | None) -> int:
    return 0 if per_head is None or per_head.numel() == 1 else per_head.stride(0)


def _stored(cache: torch.Tensor, arch: str) -> torch.Tensor:
    """The cache as the kernel takes it: float8_e4m3fn as bytes where it cannot be converted."""
    if cache.dtype == torch.float8_e4m3fn and not converts_float8(arch):
        return cache.view(torch.uint8)
    return cache
