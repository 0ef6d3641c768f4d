"""Checks attention against float64, on tensors in which whatever must not be read is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from typing import Any, NamedTuple

import numpy as np
import torch

import attention
from attention import Forest
from prefixtree.bench.trees import node_slots
from prefixtree.bench.variants import Variant, forest_named

TOLERANCES = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1.5e-2}
"""Norm of the difference from float64 over the norm of the result, by the dtype of q."""
LSE_TOLERANCES = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 2e-3}
"""Largest difference of a log-sum-exp: it is computed in float32 from q, K and V as they are."""
ALONE = 3
"""Sequences of a batch-invariant plan that are run alone as well."""


class Outcome(NamedTuple):
    """What was found of one variant.

    Attributes:
        error, lse_error: as the tolerances measure them; NaN where nothing came back.
        wrong: what was not as it must be; empty if all is well.
    """

    variant: Variant
    error: float
    lse_error: float
    wrong: list[str]

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "name": self.variant.name,
            "error": None if isnan(self.error) else self.error,
            "lse_error": None if isnan(self.lse_error) else self.lse_error,
            "wrong": self.wrong,
        }


class Drawn(NamedTuple):
    """Random tensors of a variant, and the options with random values."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    run_options: dict[str, Any]


def check(variant: Variant, device: torch.device, backend: str | None, seed: int) -> Outcome:
    """Runs a variant on fresh random tensors, twice drawn, and says what is wrong.

    Each result must be near float64, without NaN although unwritten memory and unowned slots are
    NaN, and the same bits in a second run; under `batch_invariant` also when a sequence runs alone.
    An exception is one of the things that can be wrong.
    """
    wrong: list[str] = []
    errors, lse_errors = [np.nan], [np.nan]
    try:
        forest, num_blocks = forest_named(variant.tree)
        node_options = _node_options(variant, len(forest.parent), seed)
        plan = make_plan(forest, variant, node_options, device, backend)
        for draw in (seed, seed + 1):
            drawn = draw_tensors(forest, num_blocks, variant, device, draw)
            tensors = drawn[:3]
            with poisoned():
                out, lse = attention.run(plan, *tensors, **drawn.run_options)
            again, lse_again = attention.run(plan, *tensors, **drawn.run_options)
            if not (torch.equal(out, again) and torch.equal(lse, lse_again)):
                wrong.append("two runs differ in their bits, or hold NaN")
            expected, expected_lse = _reference(forest, variant, drawn, node_options)
            errors.append(_relative(out, expected))
            lse_errors.append(_largest(lse, expected_lse))
            if variant.batch_invariant:
                wrong += _alone(forest, variant, node_options, drawn, out, device, backend)
        errors, lse_errors = errors[1:], lse_errors[1:]
        # Written so that NaN does not pass.
        if not max(errors) <= TOLERANCES[variant.dtype]:
            wrong.append(f"error {max(errors):.1e}, at most {TOLERANCES[variant.dtype]:.1e}")
        if not max(lse_errors) <= LSE_TOLERANCES[variant.dtype]:
            wrong.append(f"lse error {max(lse_errors):.1e}")
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
    return Outcome(variant, max(errors), max(lse_errors), wrong)


def make_plan(
    forest: Forest,
    variant: Variant,
    node_options: dict[str, Any],
    device: torch.device,
    backend: str | None,
) -> attention.Plan:
    return attention.plan(
        forest,
        num_q_heads=variant.num_q_heads,
        num_kv_heads=variant.num_kv_heads,
        head_dim=variant.head_dim,
        value_head_dim=variant.value_head_dim,
        dtype=getattr(torch, variant.dtype),
        kv_dtype=None if variant.kv_dtype is None else getattr(torch, variant.kv_dtype),
        device=device,
        layout=variant.layout,
        window=variant.window,
        sink_tokens=variant.sink_tokens,
        batch_invariant=variant.batch_invariant,
        backend=backend,
        **node_options,
    )


def draw_tensors(
    forest: Forest, num_blocks: int, variant: Variant, device: torch.device, seed: int
) -> Drawn:
    """Normally distributed tensors; slots that no node owns hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, variant.dtype)
    kv_dtype = dtype if variant.kv_dtype is None else getattr(torch, variant.kv_dtype)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    owned = torch.from_numpy(np.concatenate(node_slots(forest)))
    caches = []
    for head_dim in (variant.head_dim, variant.value_head_dim or variant.head_dim):
        by_slot = torch.full(
            (num_blocks * forest.block_size, variant.num_kv_heads, head_dim), torch.nan
        )
        by_slot[owned] = normal(len(owned), variant.num_kv_heads, head_dim)
        cache = by_slot.to(kv_dtype).view(num_blocks, forest.block_size, *by_slot.shape[1:])
        if variant.layout == "HND":
            cache = cache.transpose(1, 2).contiguous()
        caches.append(cache.to(device))
    q = normal(forest.num_queries, variant.num_q_heads, variant.head_dim)
    options: dict[str, Any] = {"scale": variant.scale, "softcap": variant.softcap}
    if variant.alibi:
        options["alibi_slopes"] = torch.rand(variant.num_q_heads, generator=generator).to(device)
    if variant.kv_scales:
        for name in ("k_scale", "v_scale"):
            scales = 0.5 + torch.rand(variant.num_kv_heads, generator=generator)
            options[name] = scales.to(device)
    return Drawn(q.to(dtype).to(device), caches[0], caches[1], options)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is filled with NaN: what is not written cannot look right."""
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before)


def _reference(
    forest: Forest, variant: Variant, drawn: Drawn, node_options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """By `attention.attend`, on the CPU."""
    options: dict[str, Any] = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in drawn.run_options.items()
    }
    return attention.attend(
        forest,
        drawn.q.cpu(),
        drawn.k_cache.cpu(),
        drawn.v_cache.cpu(),
        layout=variant.layout,
        window=variant.window,
        sink_tokens=variant.sink_tokens,
        **node_options,
        **options,
    )


def _alone(
    forest: Forest,
    variant: Variant,
    node_options: dict[str, Any],
    drawn: Drawn,
    out: torch.Tensor,
    device: torch.device,
    backend: str | None,
) -> list[str]:
    """What is wrong with sequences run without the others: their bits must not change."""
    end = np.cumsum(forest.query_len)
    wrong = []
    for sequence in np.unique(np.linspace(0, len(end) - 1, ALONE).astype(np.int64)).tolist():
        one = slice(sequence, sequence + 1)
        alone = replace(forest, leaf=forest.leaf[one], query_len=forest.query_len[one])
        rows = slice(int(end[sequence] - forest.query_len[sequence]), int(end[sequence]))
        plan = make_plan(alone, variant, node_options, device, backend)
        got, _ = attention.run(plan, drawn.q[rows], *drawn[1:3], **drawn.run_options)
        if not torch.equal(got, out[rows]):
            wrong.append(f"sequence {sequence} has other bits when it runs alone")
    return wrong


def _node_options(variant: Variant, num_nodes: int, seed: int) -> dict[str, Any]:
    if not variant.node_weights:
        return {}
    rng = np.random.default_rng(seed)
    return {
        "temperature": rng.uniform(0.5, 2.0, num_nodes).astype(np.float32),
        "log_weight": rng.uniform(-1.0, 1.0, num_nodes).astype(np.float32),
    }


def _relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.cpu().double() - expected).norm() / expected.norm())


def _largest(lse: torch.Tensor, expected: torch.Tensor) -> float:
    return float((lse.cpu().double() - expected).abs().max())
