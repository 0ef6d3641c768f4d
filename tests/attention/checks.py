"""What a case gives on the paths under test, in float64, and on flat attention beside them."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import attention
from attention import Forest, Plan
from tests.attention.strategies import Case, Tensors, node_slots, path_slots


def plan_of(case: Case, device: str = "cpu", **arguments: Any) -> Plan:
    return attention.plan(
        case.source,
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        device=device,
        layout=case.layout,
        value_head_dim=case.value_head_dim,
        window=case.window,
        batch_invariant=case.batch_invariant,
        **_node_arguments(case),
        **arguments,
    )


def run(
    case: Case, given: Tensors, device: str = "cpu", **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of a plan of the case; arguments: more of `attention.plan`."""
    return attention.run(
        plan_of(case, device, **arguments),
        given.q.to(device),
        given.k_cache.to(device),
        given.v_cache.to(device),
        **run_options(case, device),
    )


def attend(case: Case, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse in float64."""
    return attention.attend(
        case.source,
        *given,
        layout=case.layout,
        window=case.window,
        **_node_arguments(case),
        **run_options(case),
    )


def run_options(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Arguments of `attention.run` that are not the plan's."""
    return {
        "scale": case.scale,
        "softcap": case.softcap,
        **{
            name: None if values is None else torch.tensor(values, device=device)
            for name, values in (
                ("alibi_slopes", case.alibi_slopes),
                ("k_scale", case.k_scale),
                ("v_scale", case.v_scale),
            )
        },
    }


def _node_arguments(case: Case) -> dict[str, Any]:
    return {
        "sink_tokens": case.sink_tokens,
        "temperature": None if case.temperature is None else np.array(case.temperature),
        "log_weight": None if case.log_weight is None else np.array(case.log_weight),
    }


def flat(case: Case, given: Tensors) -> torch.Tensor:
    """The same attention sequence by sequence on gathered KV, as an engine without a tree does."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    group = case.num_q_heads // case.num_kv_heads
    keys = _by_slot(case, given.k_cache, case.k_scale)
    values = _by_slot(case, given.v_cache, case.v_scale)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    ones, zeros = (np.full(len(case.source.length), value) for value in (1.0, 0.0))
    temperature = ones if case.temperature is None else np.array(case.temperature)
    log_weight = zeros if case.log_weight is None else np.array(case.log_weight)
    slopes = torch.tensor(case.alibi_slopes or (0.0,) * case.num_q_heads, dtype=wide)

    outs = []
    first = 0
    for nodes, positions, own in _sequences(case):
        of = np.repeat(nodes, case.source.length[nodes])
        slots = torch.from_numpy(np.concatenate([node_slots(case.source, node) for node in nodes]))
        k, v = (
            cache[slots].transpose(0, 1).repeat_interleave(group, 0) for cache in (keys, values)
        )
        k = (k.to(wide) / torch.from_numpy(temperature[of]).to(wide)[:, None]).to(case.dtype)
        q = given.q[first : first + len(own)].transpose(0, 1)
        first += len(own)
        behind = torch.from_numpy(own[:, None] - positions)
        seen = behind >= 0
        if case.window is not None:
            seen &= (behind < case.window) | torch.from_numpy(positions < case.sink_tokens)
        bias = torch.from_numpy(log_weight[of]).to(wide) - slopes[:, None, None] * behind
        bias = bias.masked_fill(~seen, -torch.inf)
        if case.softcap is None:
            plain = case.log_weight is None and case.alibi_slopes is None
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen if plain else bias[None], scale=scale
            )[0]
        else:
            logits = case.softcap * torch.tanh(q @ k.transpose(1, 2) * scale / case.softcap)
            weights = torch.softmax(logits.to(wide) + bias, dim=-1)
            out = weights.to(case.dtype) @ v
        outs.append(out.masked_fill(~seen.any(1)[:, None], 0.0).transpose(0, 1))
    return torch.cat(outs)


def _by_slot(case: Case, cache: torch.Tensor, scale: tuple[float, ...] | None) -> torch.Tensor:
    cache = (cache if case.layout == "NHD" else cache.transpose(1, 2)).flatten(0, 1)
    if scale is None:
        return cache.to(case.dtype)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    return (cache.to(wide) * torch.tensor(scale, dtype=wide).view(-1, 1)).to(case.dtype)


def _sequences(case: Case) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Nodes of each sequence, the positions of their tokens, and those of its queries."""
    source = case.source
    sequences = []
    if isinstance(source, Forest):
        for leaf, query_len in zip(source.leaf, source.query_len, strict=True):
            nodes: list[int] = []
            node = int(leaf)
            while node >= 0:
                nodes.insert(0, node)
                node = int(source.parent[node])
            path_len = len(path_slots(source, int(leaf)))
            sequences.append(
                (nodes, np.arange(path_len), np.arange(path_len - query_len, path_len))
            )
        return sequences
    for sequence, (first, query_len) in enumerate(
        zip(source.query_start, source.query_len, strict=True)
    ):
        members = slice(source.member_ptr[sequence], source.member_ptr[sequence + 1])
        nodes = source.member[members].tolist()
        positions = [
            start + np.arange(source.length[node])
            for node, start in zip(nodes, source.member_start[members], strict=True)
        ]
        sequences.append((nodes, np.concatenate(positions), np.arange(first, first + query_len)))
    return sequences


def assert_as_good_as_flat(
    case: Case, given: Tensors, device: str = "cpu", **arguments: Any
) -> None:
    """Errors against float64 at most twice those of flat attention in the same dtype.

    On top of that comes what flat attention has no counterpart for: a partial is rounded to the
    dtype once before it is merged, by half a unit in the last place of at most the largest value.
    The weights of a merge sum to one, so the result is off by no more than that. A merge has five
    roundings of its own in the precision of the partials, each as small: four units cover them, of
    the size of the lse: with ALiBi, that of what has been added to the logits, padding included.

    arguments: more of `attention.plan`.
    """
    assert_right(case, given, *run(case, given, device, **arguments))


def assert_right(case: Case, given: Tensors, out: torch.Tensor, lse: torch.Tensor) -> None:
    """As above, of what somebody else ran."""
    expected, expected_lse = attend(case, given)
    assert out.dtype == case.dtype
    assert out.shape == expected.shape
    assert not out.isnan().any()
    largest = _by_slot(case, given.v_cache, case.v_scale).nan_to_num().abs().max().item()
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    size = 1 + expected_lse.nan_to_num(neginf=0.0).abs().max().item()
    if case.alibi_slopes is not None:
        farthest = max(int(own[-1]) for *_, own in _sequences(case))
        size += max(case.alibi_slopes) * (farthest + 256)
    rounding = torch.finfo(case.dtype).eps / 2 + 4 * torch.finfo(wide).eps * size
    error = (out.cpu().double() - expected).abs().max().item()
    flat_error = (flat(case, given).double() - expected).abs().max().item()
    assert error <= 2 * flat_error + rounding * largest
    assert lse.dtype == wide
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=0, atol=1e-4)
