"""Steps that take the plans of the step before, against steps planned anew."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

import attention
from prefixtree.engines.steps import Step
from prefixtree.engines.vllm.attention import TreeAttentionImpl, TreeAttentionMetadata

pytestmark = pytest.mark.engines

BLOCK, BLOCKS, HEADS, KV_HEADS, DIM = 4, 200, 4, 2, 8


def step(
    tables: np.ndarray, lengths: list[int], queries: list[int], before: Step | None
) -> TreeAttentionMetadata:
    starts = np.array([0, *queries]).cumsum()
    return TreeAttentionMetadata(Step(tables.copy(), np.array(lengths), starts, BLOCK, before))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", range(3))
def test_advanced_plans_give_what_new_ones_give(
    seed: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    calls: Counter[str] = Counter()
    for owner, name in ((attention, "plan"), (attention.Plan, "advance")):
        inner = getattr(owner, name)

        def counted(*args, inner=inner, name=name, **kwargs):
            calls[name] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    impl = TreeAttentionImpl(HEADS, DIM, 0.3, KV_HEADS, sliding_window=window)
    layer = torch.nn.Module()
    cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * DIM)
    free = rng.sample(range(1, BLOCKS), BLOCKS - 1)
    tables = np.zeros((3, 40), np.int32)
    shared = [free.pop() for _ in range(3)]
    for row in range(3):
        own = [free.pop() for _ in range(24)]
        tables[row, :27] = shared + own
    lengths, queries = [17, 13, 20], [5, 1, 2]
    before = None
    for at in range(80):
        now = step(tables, lengths, queries, before)
        query = torch.randn(sum(queries), HEADS, DIM)
        got, expected = torch.empty_like(query), torch.empty_like(query)
        impl.forward(layer, query, query, query, cache, now, got)
        made = calls.copy()
        alone = step(tables, lengths, queries, None)
        impl.forward(layer, query, query, query, cache, alone, expected)
        calls = made
        torch.testing.assert_close(got, expected)
        assert before is None or before._before is None  # no chain of steps is kept
        before, lengths, queries = now.step, [length + 1 for length in lengths], [1, 1, 1]
        if at == 30:  # the first request's own block was cached by another
            tables[0, 3] = free.pop()
        if at == 50:  # one goes on with two queries
            lengths[1], queries[1] = lengths[1] + 1, 2
    # The first, the first decode, the changed block, the two queries and the step after: anew.
    assert calls == {"plan": 5, "advance": 75}
