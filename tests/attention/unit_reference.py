"""Executes a schedule in float64 with plain loops: what kernels and schedules are held to."""

import numpy as np
import torch

from attention.options import RunOptions
from attention.problem import Problem
from attention.triton_backend.units import Schedule


def execute(
    problem: Problem,
    schedule: Schedule,
    num_queries: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: RunOptions,
    reads: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and lse in float64, NaN where nothing was written; arguments as `attention.run`.

    reads: int64 [num_blocks * block_size], counts how often units load each slot.
    """
    keys, values = k_cache.double(), v_cache.double()
    if problem.layout == "HND":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if options.k_scale is not None:
        keys = keys * options.k_scale.double().reshape(-1, 1)
    if options.v_scale is not None:
        values = values * options.v_scale.double().reshape(-1, 1)
    heads, group = problem.num_q_heads, problem.group
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    rows, entries, merges = schedule.rows, schedule.entries, schedule.merges
    out = torch.full((num_queries, heads, problem.value_head_dim), torch.nan, dtype=torch.float64)
    lse = torch.full((num_queries, heads), torch.nan, dtype=torch.float64)
    part_o = torch.full((schedule.num_partials, *out.shape[1:]), torch.nan, dtype=torch.float64)
    part_lse = torch.full((schedule.num_partials, heads), torch.nan, dtype=torch.float64)

    for units in schedule.units:
        for unit in range(int(units.size)):
            first, middle, last = (
                int(column[unit])
                for column in (units.entry_begin, units.entry_mid, units.entry_end)
            )
            unit_rows = range(int(units.row_begin[unit]), int(units.row_end[unit]))
            assert 0 < len(unit_rows) <= units.rows_per_tile
            width = 1 << int(units.log2_width[unit])
            seen: dict[int, list[tuple[int, int, float, float]]] = {row: [] for row in unit_rows}
            for entry in range(first, last):
                count = int(entries.length[entry])
                assert 0 <= count <= width
                scale = 1.0 if entries.scale is None else float(entries.scale[entry])
                bias = 0.0 if entries.bias is None else float(entries.bias[entry])
                for token in range(count):
                    slot = int(entries.slot[entry]) + token
                    position = int(entries.position[entry]) + token
                    if reads is not None:
                        reads[slot] += 1
                    for row in unit_rows:
                        if entry < middle or _visible(problem, schedule, entry, position, row):
                            seen[row].append((slot, position, scale, bias))
            for row in unit_rows:
                query = int(rows.query[row])
                part = _attend(
                    problem, options, q[query].double(), int(rows.position[row]), seen[row],
                    keys, values,
                )  # fmt: skip
                partial = int(rows.partial[row])
                if partial < 0:
                    assert int(units.ordinal[unit]) == 0
                    assert lse[query].isnan().all(), f"query {query} is written twice"
                    out[query], lse[query] = part
                else:
                    place = partial + int(units.ordinal[unit])
                    assert part_lse[place].isnan().all(), f"partial {place} is written twice"
                    part_o[place], part_lse[place] = part

    for index in range(int(merges.size)):
        query = int(merges.query[index])
        of = slice(int(merges.begin[index]), int(merges.end[index]))
        assert lse[query].isnan().all(), f"query {query} is written twice"
        lse[query] = torch.logsumexp(part_lse[of], 0)
        reference = torch.where(lse[query] == -torch.inf, 0.0, lse[query])
        out[query] = (torch.exp(part_lse[of] - reference)[..., None] * part_o[of]).sum(0)
    return out, lse


def _visible(problem: Problem, schedule: Schedule, entry: int, position: int, row: int) -> bool:
    entries = schedule.entries
    if not int(entries.row_begin[entry]) <= row < int(entries.row_end[entry]):
        return False
    own = int(schedule.rows.position[row])
    in_window = problem.window is None or position > own - problem.window
    return position <= own and (in_window or position < problem.sink_tokens)


def _attend(
    problem: Problem,
    options: RunOptions,
    q: torch.Tensor,
    own: int,
    seen: list[tuple[int, int, float, float]],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not seen:
        zeros = torch.zeros(problem.num_q_heads, problem.value_head_dim, dtype=torch.float64)
        return zeros, torch.full((problem.num_q_heads,), -torch.inf, dtype=torch.float64)
    slot, position, scale, bias = (torch.tensor(column) for column in zip(*seen, strict=True))
    logits = torch.einsum("hd,khd->hk", q, keys[slot]) * options.scale * scale.double()
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if options.alibi_slopes is not None:
        logits = logits - options.alibi_slopes.double()[:, None] * (own - position)
    logits = logits + bias.double()
    weights = torch.softmax(logits, dim=1)
    return torch.einsum("hk,khd->hd", weights, values[slot]), torch.logsumexp(logits, dim=1)
