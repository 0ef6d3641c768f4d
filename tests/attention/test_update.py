"""A plan that is updated is the plan of the other forest, whatever it was before."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
from attention import Forest, InvalidForest, Plan, PlanExhausted, PlanMismatch
from attention.errors import PlanFull
from tests.attention import checks
from tests.attention.checks import plan_of
from tests.attention.strategies import (
    Case,
    Node,
    Tensors,
    build_forest,
    cases,
    forests,
    tensors,
    with_sequences,
)

BACKENDS = ("torch", "reference", "triton")


@st.composite
def changes(draw: st.DrawFn) -> tuple[Case, Case]:
    """A batch, and another one of sequences on the same nodes, each with or without weights."""
    before = draw(cases(dtypes=(torch.float32,), kv_dtypes=(), source=forests()))
    forest = before.forest
    nodes = draw(st.lists(st.integers(0, len(forest.length) - 1), min_size=1, max_size=6))
    end = forest.start + forest.length
    sequences = [(node, draw(st.integers(1, min(5, int(end[node]))))) for node in nodes]
    after = replace(before, source=with_sequences(forest, sequences))
    if draw(st.booleans()):
        after = replace(after, temperature=None, log_weight=None)
    return before, after


def updated(before: Case, after: Case, backend: str) -> Plan:
    plan = plan_of(before, backend=backend)
    weights = (
        None if values is None else np.array(values)
        for values in (after.temperature, after.log_weight)
    )
    plan.update(after.source, *weights, num_blocks=after.num_blocks)
    return plan


def assert_same(plan: Plan, expected: Plan, case: Case, given_: Tensors) -> None:
    for name in ("num_queries", "min_num_blocks", "kv_tokens_read", "kv_tokens_per_path"):
        assert getattr(plan, name) == getattr(expected, name)
    options = checks.run_options(case)
    results = (attention.run(plan, *given_, **options) for plan in (plan, expected))
    for result, wanted in zip(*results, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@given(changes())
def test_updating_is_planning_anew(backend: str, cases_: tuple[Case, Case]) -> None:
    before, after = cases_
    plan = updated(before, after, backend)
    assert_same(plan, plan_of(after, backend=backend), after, tensors(after))
    explanation, anew = plan.explain(), plan_of(after, backend=backend).explain()
    assert explanation == anew


# The interpreter takes milliseconds a program.
@settings(max_examples=max(1, settings().max_examples // 8))
@given(changes())
def test_the_kernels_read_the_new_plan(cases_: tuple[Case, Case]) -> None:
    before, after = (
        replace(case, head_dim=32, value_head_dim=None, strides="plain") for case in cases_
    )
    try:
        plan = updated(before, after, "triton")
    except PlanFull:
        plan, after = plan_of(before, backend="triton"), before
    expected = checks.attend(after, tensors(after))
    options = checks.run_options(after)
    for result, wanted in zip(
        attention.run(plan, *tensors(after), **options), expected, strict=True
    ):
        torch.testing.assert_close(result, wanted.float(), rtol=1e-4, atol=1e-4)


def chats(lengths: list[int], block_size: int = 4) -> Forest:
    """Sequences of so many tokens of their own behind 9 shared ones."""
    nodes = [Node(-1, 9), *(Node(0, length) for length in lengths)]
    return build_forest(block_size, nodes, [(1 + i, 1) for i in range(len(lengths))])[0]


def plan_for(forest: Forest, **arguments: Any) -> Plan:
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "dtype": torch.float32}
    return attention.plan(forest, **heads, **arguments)


def columns(plan: Plan) -> list[int]:
    schedule = plan.work.schedule
    tensors = [*schedule.rows, *schedule.entries, *schedule.merges]
    for units in schedule.units:
        tensors += units[:-1]
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def test_the_tensors_and_the_handle_stay() -> None:
    plan = plan_for(chats([5, 6, 7]), backend="triton")
    before, handle = columns(plan), plan.handle
    plan.update(chats([3]))
    assert columns(plan) == before
    assert plan.handle is handle
    assert attention.ops.plan_of(handle) is plan
    assert (plan.num_queries, len(plan.segments.query)) == (1, 1)


def test_rows_behind_the_queries_are_neither_read_nor_written() -> None:
    """As in a captured graph: q and the results are as large as those of the first batch."""
    from attention.algebra import Partial
    from attention.options import RunOptions
    from attention.triton_backend.launch import launch_into

    large, small = chats([5, 6, 7, 8]), chats([9, 2])
    plan = plan_for(large, backend="triton")
    plan.update(small)
    given_ = tensors(Case(small, 10, num_q_heads=2, num_kv_heads=1, head_dim=16))
    expected = attention.run(plan, *given_)
    q = torch.full((4, 2, 16), torch.nan)
    q[:2] = given_.q
    result = Partial(torch.full_like(q, 7.0), torch.full((4, 2), 7.0))
    slots = plan.work.schedule.num_partials
    parts = Partial(torch.full((slots, 2, 16), torch.nan), torch.full((slots, 2), torch.nan))
    options = RunOptions(16**-0.5, None, None, None, None)
    launch_into(result, parts, plan.problem, plan.work.schedule, q, *given_[1:], options)
    for column, wanted in zip(result, expected, strict=True):
        assert torch.equal(column[:2], wanted)
        assert (column[2:] == 7.0).all()


def test_no_more_queries_than_a_captured_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = chats([5, 6, 7, 8]), chats([9, 2])
    given_ = tensors(Case(small, 10, num_q_heads=2, num_kv_heads=1, head_dim=16))
    plan = plan_for(large, backend="triton")
    plan.update(small)
    plan.update(large)
    plan.update(small)
    with monkeypatch.context() as capturing:
        capturing.setattr("attention.triton_backend.work._is_captured", lambda _: True)
        attention.run(plan, *given_)
    with pytest.raises(PlanFull, match="there are 4 queries, a captured run of the plan has 2"):
        plan.update(large)
    assert plan.num_queries == 2
    plan.update(chats([3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_planned_changes_nothing(backend: str) -> None:
    reserve = 0 if backend == "reference" else 2
    forest = chats([5, 1200])
    plan = plan_for(forest, backend=backend, reserve=reserve)
    given_ = tensors(Case(forest, 310, num_q_heads=2, num_kv_heads=1, head_dim=16))
    expected, segments = attention.run(plan, *given_), plan.segments
    failures: list[tuple[type[Exception], str, Forest, dict[str, Any]]] = [
        (PlanMismatch, "block_size is 8, expected that of the plan, 4", chats([5, 6], 8), {}),
        (InvalidForest, r"query_len\[0\] is 0", with_sequences(forest, [(1, 0)]), {}),
        (InvalidForest, "blocks has the id .*, expected ids from 0 to below 3", forest,
         {"num_blocks": 3}),
        (InvalidForest, r"temperature\[0\] is 0", forest, {"temperature": np.zeros(3)}),
    ]  # fmt: skip
    if reserve:
        of_two = with_sequences(forest, [(1, 2)])
        failures.append((PlanMismatch, "reserve is 2 for 2 queries of 1 sequences", of_two, {}))
    if backend == "triton":
        failures += [
            (PlanFull, "entries.slot needs room for", chats([5] * 500), {}),
            (PlanFull, "rows.query needs room for 70", chats([1] * 70), {}),
            (PlanFull, "scale needs room", forest, {"temperature": np.ones(3)}),
        ]
    for error, message, other, arguments in failures:
        with pytest.raises(error, match=message):
            plan.update(other, **arguments)
        assert plan.segments is segments
    for result, wanted in zip(attention.run(plan, *given_), expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_reserve_is_there_again(backend: str) -> None:
    plan = plan_for(chats([5, 6]), backend=backend, reserve=1)
    plan.advance(np.array([100, 101]))
    with pytest.raises(PlanExhausted):
        plan.advance(np.array([104, 105]))
    assert plan.min_num_blocks == 26
    plan.update(chats([3]))
    assert plan.min_num_blocks < 26
    plan.advance(np.array([100]))
    nodes = [Node(-1, 9), Node(0, 3), Node(1, 1)]
    longer, _ = build_forest(4, nodes, [(2, 1)])
    longer.blocks[-1] = 25
    given_ = tensors(Case(longer, 26, num_q_heads=2, num_kv_heads=1, head_dim=16))
    results = (attention.run(p, *given_) for p in (plan, plan_for(longer, backend=backend)))
    for result, wanted in zip(*results, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
