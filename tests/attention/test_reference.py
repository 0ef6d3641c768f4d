"""The reference itself, against torch on plain tensors and against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

import attention
from tests.attention.strategies import Case, Node, build_forest, path_slots, tensors


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
