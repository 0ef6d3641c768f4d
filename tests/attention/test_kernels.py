"""The kernels on schedules cut at random: right against float64, whatever is poisoned."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attention import Forest, NodeSets
from attention.algebra import Partial
from attention.options import RunOptions
from attention.problem import Problem
from attention.segments import segments_of
from attention.triton_backend.launch import launch_into
from attention.triton_backend.tiles import tiles_for
from attention.triton_backend.units import Entries, Schedule
from tests.attention import checks, unit_reference
from tests.attention.random_schedules import SPARE, random_schedule
from tests.attention.strategies import (
    Case,
    Node,
    Tensors,
    build_forest,
    cases,
    forests,
    node_sets,
    tensors,
    with_sequences,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter takes milliseconds a program: forests are small here.
FEWER = settings(max_examples=max(1, settings().max_examples // 10))
FEWEST = settings(max_examples=max(1, settings().max_examples // 25))
seeds = st.integers(0, 2**32 - 1)


def problem_of(case: Case) -> Problem:
    return Problem(
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        value_head_dim=case.value_head_dim or case.head_dim,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype or case.dtype,
        device=DEVICE,
        layout=case.layout,
        window=case.window,
        sink_tokens=case.sink_tokens,
        batch_invariant=case.batch_invariant,
    )


def schedule_of(case: Case, seed: int) -> Schedule:
    temperature, log_weight = (
        None if values is None else np.array(values, np.float32)
        for values in (case.temperature, case.log_weight)
    )
    problem = problem_of(case)
    tiles = tiles_for(problem)
    most = (tiles.lean.rows_per_tile, tiles.fat.rows_per_tile)
    segments = segments_of(case.source, temperature, log_weight)
    return random_schedule(problem, segments, most, seed)


def options_of(case: Case) -> RunOptions:
    given = checks.run_options(case, str(DEVICE))
    if given["scale"] is None:
        given["scale"] = case.head_dim**-0.5
    return RunOptions(**given)


def run(case: Case, schedule: Schedule, given: Tensors) -> Partial:
    """What the kernels make of the schedule, on the CPU, in tensors full of NaN before."""
    problem = problem_of(case)
    heads, value_dim = problem.num_q_heads, problem.value_head_dim

    def nan(rows: int, dtype: torch.dtype) -> Partial:
        lse = torch.full((rows, heads), torch.nan, device=DEVICE)
        return Partial(
            torch.full((rows, heads, value_dim), torch.nan, device=DEVICE).to(dtype), lse
        )

    result = nan(len(given.q), problem.dtype)
    parts = nan(schedule.num_partials, torch.float32)
    q, k_cache = given.q.to(DEVICE), given.k_cache.to(DEVICE)
    v_cache = given.v_cache.to(DEVICE)
    if case.strides == "latent":
        v_cache = k_cache[..., :value_dim]
    launch_into(result, parts, problem, on_device(schedule), q, k_cache, v_cache, options_of(case))
    return Partial(result.o.cpu(), result.lse.cpu())


def on_device(schedule: Schedule) -> Schedule:
    def moved(columns: Any) -> Any:
        return type(columns)(*(c.to(DEVICE) if isinstance(c, torch.Tensor) else c for c in columns))

    return schedule._replace(
        rows=moved(schedule.rows),
        entries=moved(schedule.entries),
        units=tuple(moved(units) for units in schedule.units),
        merges=moved(schedule.merges),
    )


@st.composite
def few_queries(draw: st.DrawFn) -> tuple[Forest | NodeSets, int]:
    """Forests and node sets with at most six queries."""
    source, num_blocks = draw(forests() | node_sets())
    if isinstance(source, NodeSets):
        return replace(source, query_len=np.minimum(source.query_len, 2)), num_blocks
    sequences = zip(source.leaf.tolist(), source.query_len.tolist(), strict=True)
    few = [(leaf, min(query_len, 3)) for leaf, query_len in sequences][:2]
    return with_sequences(source, few), num_blocks


kernel_cases = cases(dtypes=KERNEL_DTYPES, source=few_queries()).filter(
    lambda case: case.num_q_heads * case.source.num_queries <= 64
)


@FEWER
@given(kernel_cases, seeds)
def test_as_good_as_flat_attention_on_any_schedule(case: Case, seed: int) -> None:
    inputs = tensors(case)
    checks.assert_right(case, inputs, *run(case, schedule_of(case, seed), inputs))


@FEWER
@given(kernel_cases, seeds)
def test_reads_a_schedule_as_the_reference_does(case: Case, seed: int) -> None:
    """What is executed is the schedule's to say: here even one that leaves entries out."""
    inputs, schedule = tensors(case), schedule_of(case, seed)
    units = tuple(
        of._replace(entry_end=torch.maximum(of.entry_mid, of.entry_end - 1))
        for of in schedule.units
    )
    schedule = schedule._replace(units=units)
    options = options_of(case)
    on_cpu = RunOptions(*(o.cpu() if isinstance(o, torch.Tensor) else o for o in options))
    expected_o, expected_lse = unit_reference.execute(
        problem_of(case), schedule, len(inputs.q), *inputs, on_cpu
    )
    o, lse = run(case, schedule, inputs)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-4)
    eps = torch.finfo(case.dtype).eps
    largest = expected_o.abs().max().item()
    torch.testing.assert_close(o.double(), expected_o, rtol=eps, atol=4 * eps * largest + 1e-5)


@FEWEST
@given(kernel_cases, seeds)
def test_the_same_bits_on_every_run(case: Case, seed: int) -> None:
    inputs, schedule = tensors(case), schedule_of(case, seed)
    first, second = run(case, schedule, inputs), run(case, schedule, inputs)
    assert torch.equal(first.o, second.o)
    assert torch.equal(first.lse, second.lse)


@FEWEST
@given(kernel_cases, seeds)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(case: Case, seed: int) -> None:
    """Other queries in its tile, and entries that it does not see behind its own."""
    inputs, schedule = tensors(case), schedule_of(case, seed)
    o, lse = run(case, schedule, inputs)
    others = inputs.q.flip(1) * 2
    others[0] = inputs.q[0]
    beside_o, beside_lse = run(case, schedule, inputs._replace(q=others))
    assert torch.equal(beside_o[0], o[0])
    assert torch.equal(beside_lse[0], lse[0])
    more_o, more_lse = run(case, with_unseen_entries(schedule), inputs)
    assert torch.equal(more_o, o)
    assert torch.equal(more_lse, lse)


def with_unseen_entries(schedule: Schedule) -> Schedule:
    """Every unit of the schedule with two more entries that have tokens, but no row."""
    taken: list[int] = []
    unseen: list[bool] = []
    changed = []
    for units in schedule.units:
        columns = {"entry_begin": [0] * SPARE, "entry_mid": [0] * SPARE, "entry_end": [0] * SPARE}
        for unit in range(int(units.size)):
            begin, middle, end = (int(units[column][unit]) for column in (3, 4, 5))
            real = [e for e in range(begin, end) if schedule.entries.length[e] > 0][:1] * 2
            first = len(taken)
            taken += [*range(begin, end), *real]
            unseen += [False] * (end - begin) + [True] * len(real)
            spans = (first, first + middle - begin, len(taken))
            for column, value in zip(columns.values(), spans, strict=True):
                column.insert(unit, value)
        tensors = {name: torch.tensor(of, dtype=torch.int32) for name, of in columns.items()}
        changed.append(units._replace(**tensors))
    entries = Entries(*(None if of is None else of[taken] for of in schedule.entries))
    hidden = torch.tensor(unseen, dtype=torch.bool)
    return schedule._replace(
        units=tuple(changed),
        entries=entries._replace(
            row_begin=entries.row_begin.masked_fill(hidden, 0),
            row_end=entries.row_end.masked_fill(hidden, 0),
        ),
    )


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what the interpreter loads")
@FEWER
@given(kernel_cases, seeds)
def test_each_slot_is_loaded_as_often_as_the_schedule_says(case: Case, seed: int) -> None:
    """Values that are the first columns of the keys are not loaded again."""
    from triton.runtime.interpreter import InterpreterBuilder

    # Values of other widths are loaded on their own, from the addresses of the keys.
    assume(case.strides != "latent" or case.head_dim == 576)
    inputs, schedule, problem = tensors(case), schedule_of(case, seed), problem_of(case)
    loaded: list[np.ndarray] = []
    load = InterpreterBuilder.create_masked_load

    def counting(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        loaded.append(pointers.data[mask.data].astype(np.int64))
        return load(builder, pointers, mask, *rest)

    with patch.object(InterpreterBuilder, "create_masked_load", counting):
        run(case, schedule, inputs)
    k_cache = inputs.k_cache
    block, *inner = k_cache.stride()[:3]
    slot_stride, head_stride = inner if case.layout == "NHD" else inner[::-1]
    block_size = case.source.block_size
    slots = np.arange(case.num_blocks * block_size)
    first = slots // block_size * block + slots % block_size * slot_stride
    first = first[:, None] + np.arange(problem.num_kv_heads) * head_stride
    places = k_cache.data_ptr() + first * k_cache.element_size()
    addresses, counts = np.unique(np.concatenate(loaded), return_counts=True)
    at = np.searchsorted(addresses, places).clip(max=len(addresses) - 1)
    found = np.where(addresses[at] == places, counts[at], 0)

    expected = np.zeros(len(slots), np.int64)
    unit_reference.execute(
        problem, schedule, len(inputs.q), *inputs, options_of(case), reads=expected
    )
    assert expected.any()
    assert (found == expected[:, None]).all()


def test_a_soft_cap_keeps_the_digits_of_small_logits() -> None:
    forest, num_blocks = build_forest(4, [Node(-1, 9), Node(0, 3)], [(1, 2)])
    case = Case(forest, num_blocks, head_dim=16, softcap=30.0, scale=0.01)
    given_ = tensors(case, 1)
    _, lse = checks.run(case, given_, DEVICE.type, backend="triton")
    _, expected = checks.attend(case, given_)
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=0, atol=5e-7)
