"""The trees that attention is measured on, and the forests made of them."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from prefixtree.bench.shapes import SUITES, UnknownSuite, shapes_of
from prefixtree.bench.trees import (
    Tree,
    forest_of,
    level_tree,
    node_slots,
    path_nodes,
    path_slots,
    tree,
    unshared,
)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any parents, lengths and sequences; of a node's children at most one continues its block."""
    size = draw(st.integers(1, 12))
    parent = np.array([draw(st.integers(-1, node - 1)) for node in range(size)])
    length = np.array(draw(st.lists(st.integers(1, 9), min_size=size, max_size=size)))
    leaf = np.array(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)))
    continues = np.zeros(size, np.bool_)
    for node in np.unique(parent[parent >= 0]):
        if draw(st.booleans()):
            continues[draw(st.sampled_from(np.flatnonzero(parent == node).tolist()))] = True
    return tree(parent, length, leaf, continues)


def path_of(shaped: Tree, leaf: int) -> list[int]:
    path: list[int] = []
    while leaf >= 0:
        path.insert(0, leaf)
        leaf = int(shaped.parent[leaf])
    return path


def test_each_suite_has_its_shapes() -> None:
    counts = Counter(shape.suite for shape in shapes_of(list(SUITES)))
    assert counts == {
        "small": 4,
        "fasttree": 13 * 3,
        "pat": 12 * 4,
        "deft": 3 * 7 + 2 * 7,
        "hydragen": 4 * 33 + 4,
        "ours": 5 + 7 + 3,
    }


def test_no_shape_is_named_twice() -> None:
    names = [(shape.suite, shape.name, shape.heads) for shape in shapes_of(list(SUITES))]
    assert len(set(names)) == len(names)


def test_some_shapes_are_as_their_papers_give_them() -> None:
    by_name = {f"{s.suite}: {s.name}": s for s in shapes_of(list(SUITES))}
    deep = by_name["fasttree: 1,2,4,8,16,32,64,128,1024 / 256,128,64,16 x6"]
    assert deep.path_tokens == 1024 * (256 + 128 + 64 + 6 * 16)
    assert deep.tree.length.sum() == 256 + 2 * 128 + 4 * 64 + 16 * (8 + 16 + 32 + 64 + 128 + 1024)
    assert by_name["pat: 1,10 / 4096,416"].block_size == 32
    none_shared = by_name["pat: 256 / 1024"]
    assert none_shared.tree.length.sum() == none_shared.path_tokens == 256 * 1024
    assert by_name["hydragen: 512 on 1024 + 0"].path_tokens == 512 * 1024
    assert by_name["hydragen: 512 on 1024 + 48"].path_tokens == 512 * 1072
    assert by_name["deft: 32 drafts on 1000"].tree.length.sum() == 1032
    assert by_name["ours: group of 7"].heads == "28/4"
    assert by_name["small: 1,32 / 2048,64"].path_bytes(2) == 2 * 8 * 128 * 2 * 32 * 2112
    assert by_name["small: 1,32 / 2048,64"].flops == 4 * 8 * 128 * 32 * 2112


def test_the_parent_of_a_child_is_in_proportion() -> None:
    shaped = level_tree((2, 3, 6), (5, [1, 2, 3], 7))
    assert shaped.parent.tolist() == [-1, -1, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert shaped.length.tolist() == [5, 5, 1, 2, 3, 7, 7, 7, 7, 7, 7]
    assert shaped.leaf.tolist() == [5, 6, 7, 8, 9, 10]
    assert shaped.path_lengths().tolist() == [13, 13, 14, 14, 15, 15]


def test_an_unknown_suite_is_named_with_those_that_are() -> None:
    with pytest.raises(UnknownSuite, match="no shapes 'fastree', expected small, fasttree, pat"):
        shapes_of(["pat", "fastree"])


@given(trees(), st.integers(1, 6), st.none() | st.integers(0, 9))
def test_a_tree_becomes_a_valid_forest(shaped: Tree, block_size: int, shuffle: int | None) -> None:
    forest, num_blocks = forest_of(shaped, block_size, shuffle)
    forest.validate(num_blocks)
    assert set(forest.blocks.tolist()) == set(range(num_blocks))
    slots = node_slots(forest)
    assert [len(of_node) for of_node in slots] == shaped.length.tolist()
    every = np.concatenate(slots)
    assert len(np.unique(every)) == len(every)
    for node in np.flatnonzero(shaped.continues):
        last = slots[shaped.parent[node]][-1]
        if (last + 1) % block_size:
            assert slots[node][0] == last + 1
    for node in np.flatnonzero(~shaped.continues):
        assert slots[node][0] % block_size == 0


@given(trees(), st.integers(1, 6))
def test_paths_go_from_the_root_to_the_leaf(shaped: Tree, block_size: int) -> None:
    forest, _ = forest_of(shaped, block_size)
    slots = node_slots(forest)
    paths = [path_of(shaped, leaf) for leaf in shaped.leaf.tolist()]
    for column, path in zip(path_nodes(forest).T.tolist(), paths, strict=True):
        assert column == path + [-1] * (len(column) - len(path))
    for found, path in zip(path_slots(forest), paths, strict=True):
        assert found.tolist() == np.concatenate([slots[node] for node in path]).tolist()
    assert shaped.path_lengths().tolist() == [len(found) for found in path_slots(forest)]


@given(trees(), st.integers(1, 6))
def test_without_sharing_the_same_slots_are_read(shaped: Tree, block_size: int) -> None:
    forest, num_blocks = forest_of(shaped, block_size, shuffle=1)
    alone = unshared(forest)
    alone.validate(num_blocks)
    assert len(set(alone.leaf.tolist())) == len(shaped.leaf)
    for mine, theirs in zip(path_slots(alone), path_slots(forest), strict=True):
        assert mine.tolist() == theirs.tolist()
    kinds = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    plan = attention.plan(alone, dtype=torch.float32, **kinds)
    assert plan.kv_tokens_read == plan.kv_tokens_per_path == shaped.path_lengths().sum()
