"""What is read where it lies: runs that are worth a call, and what has a call of its own anyway."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.torch_backend import batches
from attention.torch_backend.groups import InPlace
from tests.attention.checks import assert_as_good_as_flat, plan_of
from tests.attention.strategies import Case, Node, build_forest, cases, forests, tensors


@given(cases(source=forests()), st.sampled_from((1, 2, 3, 1024)), st.sampled_from((0, 1024)))
def test_as_good_as_flat_attention_in_calls_of_any_size(
    case: Case, most_queries: int, worthwhile: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "WORTH_A_CALL", worthwhile)
        patch.setattr(batches, "MAX_QUERIES", most_queries)
        assert_as_good_as_flat(case, tensors(case))


def shared(length: int, num_sequences: int) -> Case:
    """Sequences of a token each behind some shared tokens."""
    nodes = [Node(-1, length), *(Node(0, 1) for _ in range(num_sequences))]
    leaves = [(1 + sequence, 1) for sequence in range(num_sequences)]
    forest, num_blocks = build_forest(16, nodes, leaves)
    return Case(forest, num_blocks, num_q_heads=4, num_kv_heads=2, head_dim=64)


@pytest.mark.parametrize(
    ("length", "num_sequences", "in_place"),
    [
        (40, 500, False),  # other nodes could share the call
        (40, 600, True),
        (40, 2000, True),  # in two calls
        (24, 600, True),
        (25, 600, False),  # faster padded to 32, which are gathered
        (25, 10, False),
        (57, 600, True),
    ],
)
def test_what_fills_a_call_is_read_in_place(
    length: int, num_sequences: int, in_place: bool
) -> None:
    case = shared(length, num_sequences)
    plan = plan_of(case)
    found = [group for group in plan.work.groups if group.tokens >= length]
    assert all(isinstance(group.kv, InPlace) == in_place for group in found)
    assert sum(group.size * group.queries for group in found) == num_sequences
    assert_as_good_as_flat(case, tensors(case))


def test_items_with_a_mask_share_no_call_with_those_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Four queries each on two nodes of 8 tokens: those below the one see all of it.
    monkeypatch.setattr(batches, "WORTH_A_CALL", 0)
    nodes = [Node(-1, 8), Node(-1, 8), *(Node(0, 1) for _ in range(4))]
    for first, second in ((0, 1), (1, 0)):
        nodes[2:] = [Node(first, 1)] * 4
        leaves = [(second, 4), *((leaf, 1) for leaf in range(2, 6))]
        case = Case(*build_forest(8, nodes, leaves))
        assert_as_good_as_flat(case, tensors(case))
