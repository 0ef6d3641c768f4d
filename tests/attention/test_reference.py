"""The reference itself, against torch on plain tensors and against numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import attention
from tests.attention.checks import attend, flat
from tests.attention.strategies import (
    Case,
    Node,
    build_forest,
    cases,
    path_slots,
    sets_of,
    tensors,
)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("query_len", [1, 5, 23])
def test_one_path_is_plain_causal_attention(
    layout: str, window: int | None, query_len: int
) -> None:
    forest, num_blocks = build_forest(
        4, [Node(-1, 10, offset=3), Node(0, 13, shares_block=True)], [(1, query_len)], shuffle=5
    )
    case = Case(forest, num_blocks, layout=layout)
    q, k_cache, v_cache = tensors(case)
    out, lse = attention.attend(forest, q, k_cache, v_cache, layout=layout, window=window)

    slots = torch.from_numpy(path_slots(forest, 1))
    if layout == "HND":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    k, v = (
        cache.flatten(0, 1)[slots].double().transpose(0, 1).repeat_interleave(2, 0)
        for cache in (k_cache, v_cache)
    )
    behind = torch.arange(23 - query_len, 23)[:, None] - torch.arange(23)
    seen = (behind >= 0) & (behind < (window or 23))
    queries = q.double().transpose(0, 1)
    expected = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen)
    torch.testing.assert_close(out, expected.transpose(0, 1))
    logits = queries @ k.transpose(1, 2) / math.sqrt(case.head_dim)
    logits = logits.masked_fill(~seen, -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1).transpose(0, 1))


def test_scale_and_softcap_by_hand() -> None:
    forest, num_blocks = build_forest(2, [Node(-1, 2)], [(0, 1)])
    k = torch.tensor([[1.0], [3.0]]).view(1, 2, 1, 1).repeat(num_blocks, 1, 1, 1)
    v = torch.tensor([[10.0], [20.0]]).view(1, 2, 1, 1).repeat(num_blocks, 1, 1, 1)
    q = torch.tensor([[[2.0]]])
    out, lse = attention.attend(forest, q, k, v, scale=0.5, softcap=2.0)
    a, b = (math.exp(2 * math.tanh(logit / 2)) for logit in (1.0, 3.0))
    torch.testing.assert_close(out.item(), (10 * a + 20 * b) / (a + b))
    torch.testing.assert_close(lse.item(), math.log(a + b))


def test_queries_come_in_the_order_of_the_sequences() -> None:
    forest, num_blocks = build_forest(2, [Node(-1, 2), Node(0, 1)], [(1, 1), (0, 2), (1, 2)])
    case = Case(forest, num_blocks)
    q, k_cache, v_cache = tensors(case)
    q = q[:1].expand(forest.num_queries, -1, -1)
    out, _ = attention.attend(forest, q, k_cache, v_cache)
    # Positions 2; 0, 1; 1, 2 with one and the same query.
    assert torch.equal(out[0], out[4])
    assert torch.equal(out[2], out[3])
    torch.testing.assert_close(
        out[1],
        v_cache[forest.blocks[0], 0].double().repeat_interleave(2, 0),
    )


@pytest.fixture
def two_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, keys and values that make logits 2 and 6 with scale 1, in slots 0 and 1 of two nodes."""
    k = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    v = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)
    return torch.tensor([[[2.0]]]), k, v


def weighed(logits: list[float], values: list[float]) -> tuple[float, float]:
    total = sum(map(math.exp, logits))
    mean = sum(math.exp(x) * v for x, v in zip(logits, values, strict=True)) / total
    return mean, math.log(total)


@pytest.mark.parametrize(
    ("options", "logits", "values"),
    [
        ({"temperature": np.array([2.0, 4.0])}, [1.0, 1.5], [10, 20]),
        ({"log_weight": np.array([0.5, -1.0])}, [2.5, 5.0], [10, 20]),
        ({"alibi_slopes": torch.tensor([0.25])}, [1.75, 6.0], [10, 20]),
        ({"k_scale": torch.tensor(0.5)}, [1.0, 3.0], [10, 20]),
        ({"v_scale": torch.tensor([3.0])}, [2.0, 6.0], [30, 60]),
        ({"window": 1}, [6.0], [20]),
        ({"window": 1, "sink_tokens": 1}, [2.0, 6.0], [10, 20]),
        (
            {
                "softcap": 3.0,
                "temperature": np.array([1.0, 2.0]),
                "log_weight": np.array([1.0, 0.0]),
                "alibi_slopes": torch.tensor([0.25]),
            },
            [3 * math.tanh(2 / 3) - 0.25 + 1.0, 3 * math.tanh(1.0)],
            [10, 20],
        ),
    ],
)
def test_each_option_by_hand(
    two_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: dict[str, Any],
    logits: list[float],
    values: list[float],
) -> None:
    forest, _ = build_forest(1, [Node(-1, 1), Node(0, 1)], [(1, 1)])
    out, lse = attention.attend(forest, *two_tokens, scale=1.0, **options)
    torch.testing.assert_close((out.item(), lse.item()), weighed(logits, values))


def test_a_set_of_nodes_by_hand(
    two_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    forest, _ = build_forest(1, [Node(-1, 1), Node(-1, 1)], [(0, 1)])
    q, k, v = two_tokens
    # Side by side; the second one ahead of the query; both ahead of the first of two queries.
    sets = sets_of(
        forest, [[(0, 5), (1, 5)], [(0, 5), (1, 9)], [(0, 5), (1, 6)]], [5, 5, 4], [1, 1, 2]
    )
    out, lse = attention.attend(sets, q.expand(4, -1, -1), k, v, scale=1.0)
    expected = [weighed([2.0, 6.0], [10, 20]), (10.0, 2.0), (0.0, -math.inf), (10.0, 2.0)]
    assert out.flatten().tolist() == pytest.approx([mean for mean, _ in expected])
    assert lse.flatten().tolist() == pytest.approx([total for _, total in expected])


@settings(max_examples=settings().max_examples // 2)
@given(cases(dtypes=(torch.float64,)))
def test_flat_attention_in_float64_agrees(case: Case) -> None:
    given = tensors(case)
    torch.testing.assert_close(attend(case, given)[0], flat(case, given), rtol=1e-7, atol=1e-7)
