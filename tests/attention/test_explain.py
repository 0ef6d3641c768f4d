"""What `Plan.explain` counts, against loops over every query and token; and what it says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from attention import Forest
from attention.explain import Explanation, WorkSummary
from attention.problem import Problem
from tests.attention.strategies import Node, build_forest, forests, level_forest

windows = st.none() | st.sampled_from((1, 2, 9, 33, 100))


def explained(
    forest: Forest | attention.NodeSets, window: int | None = None, sinks: int = 0
) -> Explanation:
    return attention.plan(
        forest,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        value_head_dim=16,
        dtype=torch.bfloat16,
        window=window,
        sink_tokens=sinks,
    ).explain()


@given(forests(), windows, st.sampled_from((0, 1, 7, 40)))
def test_operations_are_counted_for_every_pair(
    built: tuple[Forest, int], window: int | None, sinks: int
) -> None:
    forest, _ = built
    pairs = 0
    for leaf, query_len in zip(forest.leaf, forest.query_len, strict=True):
        path_len = int(forest.start[leaf] + forest.length[leaf])
        for own in range(path_len - int(query_len), path_len):
            token = np.arange(own + 1)
            seen = token < sinks if window is not None else token >= 0
            if window is not None:
                seen = seen | (token > own - window)
            pairs += int(seen.sum())
    found = explained(forest, window, sinks)
    # Two products over head_dim 32 and 16, a multiplication and an addition each, 4 heads.
    assert found.flops == pairs * 2 * 4 * (32 + 16)
    assert found.queries == forest.query_len.sum()
    assert found.sequences == len(forest.leaf)


def test_bytes_are_those_of_keys_and_values() -> None:
    forest, _ = build_forest(4, [Node(-1, 10), Node(0, 3), Node(0, 5)], [(1, 1), (2, 1)])
    found = explained(forest)
    token = 2 * (32 + 16) * 2  # KV heads, dimensions of a key and a value, bytes of bfloat16
    assert (found.kv_tokens_unique, found.kv_bytes_unique) == (18, 18 * token)
    assert (found.kv_tokens_per_path, found.kv_bytes_per_path) == (28, 28 * token)
    assert (found.work.kv_tokens_loaded, found.kv_bytes_loaded) == (18, 18 * token)
    assert found.segments == 3
    assert found.sharing == pytest.approx(28 / 18)


def test_what_a_call_reads_twice_is_loaded_twice() -> None:
    # A node with more queries than one call takes is read by two calls.
    nodes = [Node(-1, 40)] + [Node(0, 1) for _ in range(1200)]
    forest, _ = build_forest(16, nodes, [(1 + i, 1) for i in range(1200)])
    found = explained(forest)
    assert found.kv_tokens_unique == 40 + 1200
    assert found.work.kv_tokens_loaded == 2 * 40 + 1200


def test_sequences_of_sets_are_counted_once() -> None:
    sets = attention.NodeSets(
        block_size=4,
        length=np.array([4, 3]),
        offset=np.zeros(2, np.int32),
        block_ptr=np.arange(3),
        blocks=np.arange(2, dtype=np.int32),
        member_ptr=np.array([0, 2, 3, 5]),
        member=np.array([0, 1, 1, 1, 0], np.int32),
        member_start=np.array([0, 4, 0, 0, 3]),
        query_start=np.array([6, 2, 6]),
        query_len=np.array([1, 3, 1]),
    )
    found = explained(sets)
    assert (found.sequences, found.queries) == (3, 5)
    assert found.flops == ((7) + (3 + 3 + 3) + 7) * 2 * 4 * (32 + 16)


PROBLEM = Problem(
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    value_head_dim=128,
    dtype=torch.bfloat16,
    kv_dtype=torch.bfloat16,
    device=torch.device("cpu"),
    layout="NHD",
    window=None,
    sink_tokens=0,
    batch_invariant=False,
)


def explanation(unique: int, per_path: int, work: WorkSummary) -> Explanation:
    return Explanation("some backend", PROBLEM, 8, 9, 5, unique, per_path, 123_456_789, work)


@pytest.mark.parametrize(
    ("unique", "per_path", "loaded", "shared", "alone", "said"),
    [
        (1000, 1000, 1000, None, None, "No two sequences see the same token"),
        (1000, 1500, 1500, 2e-5, 2e-5, "every path is read by itself"),
        (1000, 8000, 1000, None, None, "8.0 times fewer KV tokens than path by path"),
        (1000, 8000, 2000, 2e-5, 2.05e-5, "4.0 times fewer KV tokens than path by path, no gain"),
        (1000, 8000, 2000, 2e-5, 5e-5, "predicted to be 2.5 times as fast"),
    ],
)
def test_the_reason(
    unique: int, per_path: int, loaded: int, shared: float, alone: float, said: str
) -> None:
    work = WorkSummary((("tiles", 3),), loaded, 0, shared, alone)
    found = explanation(unique, per_path, work)
    assert said in found.reason
    assert str(found).endswith(found.reason)


def test_the_table() -> None:
    work = WorkSummary((("lean tiles", 1300), ("fat tiles", 12)), 2048, 777, 25e-6, 75.5e-6)
    lines = str(explanation(1024, 4096, work)).splitlines()
    rows = dict(line.split("  ", 1) for line in lines[:-1])
    values = {label.strip(): value.strip() for label, value in rows.items()}
    assert values == {
        "backend": "some backend",
        "problem": "32/8 heads, head_dim 128/128, bfloat16, KV bfloat16 NHD",
        "sequences": "8 with 9 queries",
        "segments": "5",
        "KV unique": "1,024 tokens, 4.0 MiB",
        "KV loaded": "2,048 tokens, 8.0 MiB",
        "KV per path": "4,096 tokens, 16.0 MiB",
        "sharing": "4.00 sequences see a token",
        "FLOPs": "123.5 MFLOP",
        "lean tiles": "1,300",
        "fat tiles": "12",
        "partials": "777",
        "predicted": "25.0 us a layer",
        "path by path": "75.5 us a layer",
    }
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines[:-1]}) == 1


def test_an_explanation_of_a_plan_prints() -> None:
    forest, _ = level_forest([[100], [20, 30], [1, 2, 3, 4, 5, 6, 7, 8]])
    text = str(explained(forest))
    assert text.startswith("backend")
    assert "torch" in text
