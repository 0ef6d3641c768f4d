"""A plan of the torch backend that grows is the plan made anew."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention import PlanExhausted, PlanMismatch
from attention.options import RunOptions
from attention.plan import Plan
from attention.segments import segments_of
from attention.torch_backend import TorchWork, batches
from tests.attention.checks import plan_of, run_options
from tests.attention.strategies import (
    Case,
    Node,
    build_forest,
    cases,
    forests,
    level_forest,
    tensors,
    with_sequences,
)


def growing(case: Case, reserve: int) -> TorchWork:
    per_node = [
        None if values is None else np.array(values)
        for values in (case.temperature, case.log_weight)
    ]
    return TorchWork(plan_of(case).problem, segments_of(case.source, *per_node), reserve)


def options_of(case: Case, plan: Plan) -> RunOptions:
    options = run_options(case)
    scale = plan.problem.head_dim**-0.5 if case.scale is None else case.scale
    return RunOptions(**{**options, "scale": scale})


@settings(max_examples=settings().max_examples // 2)
@given(
    cases(dtypes=(torch.float64,), kv_dtypes=(), source=forests()),
    st.integers(1, 12),
    st.sampled_from((1, 2, 1024)),
)
@example(
    case=Case(*level_forest([[20], [3, 9]]), dtype=torch.float64, alibi_slopes=(0.5,) * 4),
    steps=2,
    most_queries=1,
)
def test_advancing_is_planning_anew(case: Case, steps: int, most_queries: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MAX_QUERIES", most_queries)
        assert_advancing_is_planning_anew(case, steps)


def assert_advancing_is_planning_anew(case: Case, steps: int) -> None:
    leaves = case.forest.leaf.tolist()
    now = replace(case, source=with_sequences(case.forest, [(leaf, 1) for leaf in leaves]))
    # The same sequences later: each with a node of its own for its new tokens.
    before = case.forest
    nodes = len(before.length)
    blocks = case.num_blocks + np.arange(len(leaves) * steps)
    first = before.start[leaves] + before.length[leaves]
    later_forest = type(before)(
        block_size=1,
        parent=np.append(before.parent, np.array(leaves, np.int32)),
        start=np.append(before.start, first),
        length=np.append(before.length, np.full(len(leaves), steps)),
        offset=np.zeros(nodes + len(leaves), np.int32),
        block_ptr=np.append(0, np.cumsum(np.append(before.length, np.full(len(leaves), steps)))),
        blocks=np.append(_slots(case), blocks * 1).astype(np.int32),
        leaf=np.arange(nodes, nodes + len(leaves), dtype=np.int32),
        query_len=np.ones(len(leaves), np.int64),
    )
    # Slots as blocks of one token, for both: what differs is only who planned the new tokens.
    now = replace(
        now,
        source=type(before)(
            **{
                **vars(later_forest),
                "parent": before.parent,
                "start": before.start,
                "length": before.length,
                "offset": np.zeros(nodes, np.int32),
                "block_ptr": later_forest.block_ptr[: nodes + 1],
                "blocks": later_forest.blocks[: len(_slots(case))],
                "leaf": before.leaf,
            }
        ),
    )
    num_blocks = max(int(later_forest.blocks.max()), case.num_blocks * before.block_size) + 1
    extended = {
        name: None if values is None else values + tuple(values[leaf] for leaf in leaves)
        for name, values in (("temperature", case.temperature), ("log_weight", case.log_weight))
    }
    later = replace(now, source=later_forest, num_blocks=num_blocks, **extended)
    given_ = tensors(later)
    work = growing(now, steps)
    for step in range(steps):
        work.advance(blocks.reshape(len(leaves), steps)[:, step])
    plan = plan_of(later)
    out, lse = work.run(*given_, options_of(now, plan))
    expected, expected_lse = plan.work.run(*given_, options_of(later, plan))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)


def _slots(case: Case) -> np.ndarray:
    """Slots of all tokens, renumbered so that they overlap no block id of new tokens."""
    from tests.attention.strategies import node_slots

    slots = np.concatenate([node_slots(case.source, n) for n in range(len(case.forest.length))])
    return np.where(slots < case.num_blocks, slots, slots + 12 * 7)


def test_a_plan_that_reserved_nothing_more() -> None:
    case = Case(*level_forest([[20], [3, 4]]))
    work = growing(case, 1)
    for slots in (np.zeros(3, np.int64), np.zeros(2), np.array([0, -1])):
        with pytest.raises(PlanMismatch, match="slots has"):
            work.advance(slots)
    work.advance(torch.tensor([60, 61]))
    with pytest.raises(PlanExhausted, match="advanced 1 times, expected at most its reserve, 1"):
        work.advance(np.array([62, 63]))


def test_only_sequences_of_one_query_grow() -> None:
    forest, num_blocks = build_forest(4, [Node(-1, 6)], [(0, 2)])
    with pytest.raises(PlanMismatch, match="reserve is 3 for 2 queries of 1 sequences"):
        growing(Case(forest, num_blocks), 3)
