"""The attention that SGLang's layers call, against plain softmax, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.sglang import attention as ours
from prefixtree.engines.sglang.attention import PrefixTreeAttention

pytestmark = pytest.mark.engines

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 192


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with get_parallel().override(dcp_enabled=False):
        yield


class Case:
    """A pool full of random K and V, one layer, and requests whose pages are anywhere in it."""

    def __init__(self, page_size: int = 1, dtype: torch.dtype = torch.float32, **layer: Any):
        torch.manual_seed(0)
        self.page_size = page_size
        self.pool = MHATokenToKVPool(SLOTS, page_size, dtype, KV_HEADS, DIM, 1, "cpu", False)
        for buffer in (self.pool.k_buffer[0], self.pool.v_buffer[0]):
            buffer.copy_(torch.randn(buffer.shape))
        self.rows = torch.zeros(8, 64, dtype=torch.int32)
        self.runner = SimpleNamespace(
            device="cpu",
            page_size=page_size,
            req_to_token_pool=SimpleNamespace(req_to_token=self.rows),
            token_to_kv_pool=self.pool,
            use_mla_backend=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        self.backend = PrefixTreeAttention(self.runner)
        plain = {
            "layer_id": 0,
            "tp_q_head_num": HEADS,
            "tp_k_head_num": KV_HEADS,
            "qk_head_dim": DIM,
            "v_head_dim": DIM,
            "scaling": DIM**-0.5,
            "logit_cap": 0.0,
            "logit_capping_method": "tanh",
            "sliding_window_size": -1,
            "is_cross_attention": False,
            "attn_type": AttentionType.DECODER,
            "xai_temperature_len": -1,
            "k_scale": None,
            "v_scale": None,
        }
        self.layer = SimpleNamespace(**plain | layer)
        pages = torch.randperm(SLOTS // page_size - 1) + 1
        slots = (pages[:, None] * page_size + torch.arange(page_size)).reshape(-1)
        self.rows[1, :40], self.rows[2, :40] = slots[:40], slots[:40]
        self.rows[2, 16:64] = slots[64:112]  # leaves the other one after 16 tokens
        self.rows[3, :32] = slots[112:144]

    def forward(self, seq_lens: list[int], query_lens: list[int] | None, **others: Any) -> Any:
        """One step of the requests in rows 1, 2, ...; no query lengths: decode."""
        total = len(seq_lens) if query_lens is None else sum(query_lens)
        lens = query_lens or [1] * len(seq_lens)
        slots = [
            self.rows[row + 1, length - new : length]
            for row, (length, new) in enumerate(zip(seq_lens, lens, strict=True))
        ]
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if query_lens is None else ForwardMode.EXTEND,
            seq_lens=torch.tensor(seq_lens),
            seq_lens_cpu=torch.tensor(seq_lens),
            extend_seq_lens_cpu=query_lens,
            req_pool_indices=torch.arange(1, len(seq_lens) + 1),
            out_cache_loc=torch.cat(slots).long(),
            out_cache_loc_is_physical=False,
        )
        q = torch.randn(total, HEADS * DIM)
        k, v = torch.randn(2, total, KV_HEADS, DIM)
        self.backend.init_forward_metadata(batch)
        out = self.backend.forward(q, k, v, self.layer, batch, **others)
        return out.view(total, HEADS, DIM), self.expected(q, seq_lens, lens, **others)

    def expected(
        self, q: torch.Tensor, seq_lens: list[int], query_lens: list[int], sinks: Any = None
    ) -> torch.Tensor:
        """Softmax in float64 over what the rows of the requests say, after the step's write."""
        layer, outputs, at = self.layer, [], 0
        for row, (length, new) in enumerate(zip(seq_lens, query_lens, strict=True)):
            slots = self.rows[row + 1, :length].long()
            k, v = (
                buffer[0][slots].double().repeat_interleave(HEADS // KV_HEADS, 1)
                for buffer in (self.keys(), self.values())
            )
            queries = q[at : at + new].view(new, HEADS, DIM).double()
            at += new
            logits = torch.einsum("qhd,khd->hqk", queries, k) * layer.scaling
            if layer.logit_cap:
                logits = layer.logit_cap * torch.tanh(logits / layer.logit_cap)
            back = torch.arange(length - new, length)[:, None] - torch.arange(length)
            hidden = back < 0
            if layer.sliding_window_size >= 0:
                hidden |= back > layer.sliding_window_size
            logits = logits.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                column = sinks.double()[:, None, None].expand(HEADS, new, 1)
                logits = torch.cat([logits, column], 2)
            weights = torch.softmax(logits, 2)[:, :, :length]
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v).float())
        return torch.cat(outputs)

    def keys(self) -> list[torch.Tensor]:
        scale = 1 if self.layer.k_scale is None else self.layer.k_scale
        return [self.pool.get_key_buffer(0).float() * scale]

    def values(self) -> list[torch.Tensor]:
        scale = 1 if self.layer.v_scale is None else self.layer.v_scale
        return [self.pool.get_value_buffer(0).float() * scale]


def close(results: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(*results, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize(
    "layer", [{}, {"sliding_window_size": 9}, {"logit_cap": 2.0}, {"scaling": 0.9}]
)
def test_extend_and_decode(page_size: int, layer: dict[str, Any]) -> None:
    case = Case(page_size, **layer)
    close(case.forward([30, 37, 11], [4, 37, 1]))
    close(case.forward([30, 37, 11], [4, 0, 1]))
    for step in range(9):
        close(case.forward([31 + step, 38 + step, 12 + step], None))


def test_sinks() -> None:
    case, sinks = Case(), torch.randn(HEADS)
    close(case.forward([30, 20], [3, 20], sinks=sinks))
    close(case.forward([31, 21], None, sinks=sinks))


def test_float8_caches_with_scales() -> None:
    case = Case(8, torch.float8_e4m3fn, k_scale=torch.tensor([0.5]), v_scale=torch.tensor([2.0]))
    for buffer in (case.pool.k_buffer[0], case.pool.v_buffer[0]):
        buffer.copy_(torch.randn(buffer.shape).to(torch.float8_e4m3fn).view(torch.uint8))
    close(case.forward([30, 37], [4, 37]))
    close(case.forward([31, 38], None))


def test_plans_advance_while_the_pages_stay() -> None:
    """SGLang moves a request to the tree's pages, and gives away its own, while it decodes."""
    case = Case()
    close(case.forward([20, 20], None))
    plan = next(iter(case.backend._step.plans.values()))
    close(case.forward([21, 21], None))
    assert next(iter(case.backend._step.plans.values())) is plan
    given_away = case.rows[2, 18].clone()
    case.rows[2, 18] = case.rows[3, 0]
    case.pool.k_buffer[0][given_away], case.pool.v_buffer[0][given_away] = 9.0, 9.0
    close(case.forward([22, 22], None))
    assert next(iter(case.backend._step.plans.values())) is not plan


def test_other_requests_of_the_same_lengths_get_a_plan_of_their_own() -> None:
    case = Case()
    close(case.forward([20, 20], None))
    case.rows[1:3] = case.rows[1:3].flip(0)
    close(case.forward([21, 21], None))


@pytest.mark.parametrize(
    "layer",
    [
        {"is_cross_attention": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"logit_cap": 1.0, "logit_capping_method": "rtanh"},
        {"xai_temperature_len": 100},
    ],
)
def test_other_layers_are_refused(layer: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAttention, match="layer 0"):
        Case(**layer).forward([20], None)


def test_arguments_that_would_change_the_result_are_refused() -> None:
    with pytest.raises(UnsupportedAttention, match="q_rope"):
        Case().forward([20], None, q_rope=torch.zeros(1))


def test_latent_attention_and_speculation_are_refused() -> None:
    runner = Case().runner
    runner.use_mla_backend = True
    with pytest.raises(UnsupportedAttention, match="MLA"):
        PrefixTreeAttention(runner)
    runner.use_mla_backend = False
    runner.spec_algorithm = SpeculativeAlgorithm.EAGLE
    with pytest.raises(UnsupportedAttention, match="speculative"):
        PrefixTreeAttention(runner)


def test_cuda_graphs_are_refused_when_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Case().runner
    runner.device = "cuda"
    with pytest.raises(UnsupportedAttention, match="--disable-cuda-graph"):
        PrefixTreeAttention(runner)
    monkeypatch.setattr(ours, "cuda_graph_fully_disabled", lambda: True)
    PrefixTreeAttention(runner)


def test_cuda_graphs_that_are_switched_on_later_are_refused() -> None:
    with pytest.raises(UnsupportedAttention, match="--disable-cuda-graph"):
        Case().backend.init_cuda_graph_state(8, 8)
