"""Draft trees against a dense mask over the tokens as the engine wrote them."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from attention import Forest, InvalidForest
from attention.drafts import draft_trees
from tests.attention.strategies import (
    Case,
    Node,
    Tensors,
    build_forest,
    forests,
    path_slots,
    tensors,
    with_sequences,
)


class Drafted(NamedTuple):
    forest: Forest
    num_blocks: int
    ptr: np.ndarray
    parent: np.ndarray


@st.composite
def drafted(draw: st.DrawFn) -> Drafted:
    """Forests whose unshared leaves may have drafts, in trees of every shape."""
    forest, num_blocks = draw(forests())
    uses = np.bincount(forest.leaf, minlength=len(forest.parent))
    uses += np.bincount(forest.parent[forest.parent >= 0], minlength=len(forest.parent))
    sequences, drafts, parent = [], [], []
    for leaf, query_len in zip(forest.leaf.tolist(), forest.query_len.tolist(), strict=True):
        count = 0
        if uses[leaf] == 1:
            length, path_len = int(forest.length[leaf]), int((forest.start + forest.length)[leaf])
            count = draw(st.integers(0, length) | st.just(length))
            query_len = min(path_len, max(query_len, count, 1))
            query_len = draw(st.sampled_from((query_len, max(count, 1))))
        straight = draw(st.booleans())
        for index in range(count):
            chain = straight and draw(st.integers(0, 3)) > 0
            parent.append(index - 1 if chain else draw(st.integers(-1, index - 1)))
        sequences.append((leaf, query_len))
        drafts.append(count)
    return Drafted(
        with_sequences(forest, sequences),
        num_blocks,
        np.cumsum([0, *drafts]),
        np.array(parent, np.int32),
    )


def dense(case: Drafted, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
    """Attention in float64 with a mask of what each query sees; also the positions of queries."""
    forest = case.forest
    outs, lses, positions = [], [], []
    query = 0
    for sequence, leaf in enumerate(forest.leaf.tolist()):
        slots = path_slots(forest, leaf)
        parents = case.parent[case.ptr[sequence] : case.ptr[sequence + 1]].tolist()
        committed = len(slots) - len(parents)
        seen = np.tril(np.ones((len(slots), len(slots)), bool))
        position = list(range(len(slots)))
        for draft, parent in enumerate(parents):
            row = seen[committed + draft]
            row[committed:] = seen[committed + parent, committed:] if parent >= 0 else False
            row[committed + draft] = True
            above = position[committed + parent] if parent >= 0 else committed - 1
            position[committed + draft] = above + 1
        query_len = int(forest.query_len[sequence])
        positions += position[len(slots) - query_len :]
        mask = torch.from_numpy(seen[len(slots) - query_len :])
        rows = q[query : query + query_len].double()
        logits = torch.einsum("qhd,khd->hqk", rows, keys[slots].double()) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~mask, -torch.inf)
        lses.append(torch.logsumexp(logits, 2).T)
        outs.append(torch.einsum("hqk,khd->qhd", torch.softmax(logits, 2), values[slots].double()))
        query += query_len
    return Tensors(torch.cat(outs), torch.cat(lses), torch.tensor(positions))


@given(drafted(), st.integers(0, 99))
def test_drafts_see_their_ancestors_only(case: Drafted, seed: int) -> None:
    forest = draft_trees(case.forest, case.ptr, case.parent)
    forest.validate(case.num_blocks)
    shape = Case(case.forest, case.num_blocks, num_q_heads=2, num_kv_heads=2, dtype=torch.float64)
    q, k_cache, v_cache = tensors(shape, seed)
    out, lse, position = dense(case, q, k_cache.flatten(0, 1), v_cache.flatten(0, 1))
    plan = attention.plan(forest, num_q_heads=2, num_kv_heads=2, head_dim=32, dtype=torch.float64)
    assert plan.num_queries == case.forest.num_queries
    by_query = torch.empty(plan.num_queries, dtype=torch.int64)
    by_query[torch.from_numpy(plan.segments.query)] = torch.from_numpy(plan.segments.position)
    assert by_query.tolist() == position.tolist()
    for found in (
        attention.run(plan, q, k_cache, v_cache),
        attention.attend(forest, q, k_cache, v_cache),
    ):
        torch.testing.assert_close(found[0], out, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], lse, rtol=1e-9, atol=1e-9)


@given(drafted())
def test_branches_without_forks_are_one_node(case: Drafted) -> None:
    forest = draft_trees(case.forest, case.ptr, case.parent)
    pieces = 0
    for sequence, leaf in enumerate(case.forest.leaf.tolist()):
        parents = case.parent[case.ptr[sequence] : case.ptr[sequence + 1]].tolist()
        for draft, parent in enumerate(parents):
            if draft:
                pieces += not (parent == draft - 1 and parents.count(parent) == 1)
            else:
                pieces += parents.count(-1) > 1 and case.forest.length[leaf] > len(parents)
    assert len(forest.parent) == len(case.forest.parent) + pieces


def test_a_tree_on_a_prompt() -> None:
    # Committed tokens 0..4; drafts 5..10: 0 forks into 1 and 3, 1 goes on with 2, 3 with 4; 5 is
    # another first token. The query of token 4 is there too.
    forest, _ = build_forest(4, [Node(-1, 3), Node(0, 8, shares_block=True)], [(1, 7), (0, 1)])
    tree = draft_trees(forest, np.array([0, 6, 6]), np.array([-1, 0, 1, 0, 3, -1], np.int32))
    assert tree.parent.tolist() == [-1, 0, 1, 2, 2, 1]
    assert tree.start.tolist() == [0, 3, 5, 6, 6, 5]
    assert tree.length.tolist() == [3, 2, 1, 2, 2, 1]
    assert tree.offset.tolist() == [0, 3, 1, 2, 0, 2]
    assert tree.leaf.tolist() == [1, 2, 3, 4, 5, 0]
    assert tree.query_len.tolist() == [1, 1, 2, 2, 1, 1]


def test_a_chain_of_drafts_changes_nothing() -> None:
    forest, _ = build_forest(4, [Node(-1, 9), Node(0, 7)], [(1, 5), (0, 1)])
    tree = draft_trees(forest, np.array([0, 5, 5]), np.arange(-1, 4, dtype=np.int32))
    for name, array in vars(forest).items():
        assert np.array_equal(getattr(tree, name), array), name


def test_no_drafts_at_all() -> None:
    forest, _ = build_forest(4, [Node(-1, 9), Node(0, 7)], [(1, 5), (0, 1)])
    tree = draft_trees(forest, np.zeros(3, np.int64), np.empty(0, np.int32))
    for name, array in vars(forest).items():
        assert np.array_equal(getattr(tree, name), array), name


BAD = {
    "too few ends": ([0, 2], [-1, 0], r"draft_ptr has shape \(2,\), expected \(4,\)"),
    "a first begin": ([1, 2, 2, 2], [-1, 0], r"draft_ptr\[0\] is 1, expected 0"),
    "ends that descend": ([0, 2, 1, 2], [-1, 0], r"draft_ptr\[1\] is 1, expected no less"),
    "parents missing": ([0, 2, 2, 2], [-1], r"draft_parent has shape \(1,\), expected \(2,\)"),
    "a parent below -1": ([0, 2, 2, 2], [-1, -2], r"draft_parent\[1\] is -2, expected -1 or an"),
    "its own parent": ([0, 2, 2, 2], [-1, 1], r"draft_parent\[1\] is 1, expected -1 or an earlier"),
    "a cycle": ([0, 3, 3, 3], [-1, 2, 1], r"draft_parent\[1\] is 2, expected -1 or an earlier"),
    "a parent of another sequence": ([0, 2, 3, 3], [-1, 0, 0], r"draft_parent\[2\] is 0"),
    "more drafts than queries": (
        [0, 4, 4, 4],
        [-1, 0, 0, 0],
        r"sequence 0 has 4 drafts, .* tokens, 5, and than it has queries, 3",
    ),
    "more drafts than tokens": (
        [0, 0, 3, 3],
        [-1, 0, 0],
        r"sequence 1 has 3 drafts, .* tokens, 2, and than it has queries, 4",
    ),
    "a leaf with children": ([0, 0, 0, 1], [-1], r"sequence 2 has drafts in node 0, which has"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_drafts(case: str) -> None:
    ptr, parent, said = BAD[case]
    nodes = [Node(-1, 6), Node(0, 5), Node(0, 2)]
    forest, _ = build_forest(4, nodes, [(1, 3), (2, 4), (0, 1)])
    with pytest.raises(InvalidForest, match=said):
        draft_trees(forest, np.array(ptr), np.array(parent, np.int32))


def test_bad_forests_and_dtypes() -> None:
    forest, _ = build_forest(4, [Node(-1, 6)], [(0, 3), (0, 4)])
    with pytest.raises(
        InvalidForest, match=r"sequence 1 has drafts in node 0, .* another sequence"
    ):
        draft_trees(forest, np.array([0, 0, 1]), np.array([-1], np.int32))
    with pytest.raises(InvalidForest, match="draft_parent has dtype float64"):
        draft_trees(forest, np.array([0, 0, 1]), np.array([-1.0]))
    with pytest.raises(InvalidForest, match=r"query_len\[1\] is 7"):
        draft_trees(
            replace(forest, query_len=np.array([3, 7])),
            np.zeros(3, np.int64),
            np.empty(0, np.int32),
        )
