"""What a notebook shows of a plan."""

from __future__ import annotations

from xml.etree import ElementTree

import torch

import attention
from prefixtree import PrefixCache


def test_a_plan_shows_its_explanation() -> None:
    cache = PrefixCache(16, 4)
    sequence = cache.open([1, 2, 3, 4, 5])
    plan = attention.plan(
        cache.forest([sequence], query_lens=[5]),
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=32,
        dtype=torch.float32,
        backend="torch",
    )
    shown = ElementTree.fromstring(plan._repr_html_())
    assert shown.tag == "pre"
    assert shown.text == str(plan.explain())
