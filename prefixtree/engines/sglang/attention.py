"""SGLang's attention backend: its batch becomes a forest, planned once a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.model_executor.forward_batch_info import ForwardMode

import attention
from attention.problem import FLOAT8_DTYPES
from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.steps import RESERVE, reaching

# Plans are made on the host, between launches.
_EAGER = (
    "--attention-backend prefixtree runs without CUDA graphs: start the server with "
    "--disable-cuda-graph"
)

_MODES = (ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.MIXED)


class _Shape(NamedTuple):
    """What layers that share a plan have in common."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    window: int | None
    in_window_pool: bool


@dataclass
class _Step:
    """One forward pass: who takes part, and the forests and plans made for it so far.

    Attributes:
        seq_lens: int64 [S], tokens of each, its queries among them.
        query_lens, num_pages: int64 [S].
        pages: int32 tensor [S, pages] on the device, the first slot of each page of a sequence in
            order; anything behind its length.
        forests: by whether they are of the slots of the sliding-window pool.
        plans: what its layers attend with.
    """

    seq_lens: NDArray[np.int64]
    query_lens: NDArray[np.int64]
    num_pages: NDArray[np.int64]
    pages: torch.Tensor
    is_decode: bool
    forests: dict[bool, attention.Forest] = field(default_factory=dict)
    plans: dict[_Shape, attention.Plan] = field(default_factory=dict)

    def follows(self, before: _Step | None) -> bool:
        """Whether this is the decode step after `before`, of sequences on the same pages.

        Pages change when SGLang finds, a decode step late, that a prompt was in its tree.
        """
        if (
            before is None
            or not (before.is_decode and self.is_decode)
            or not np.array_equal(self.seq_lens, before.seq_lens + 1)
        ):
            return False
        columns = before.pages.shape[1]
        # What is behind a row changes with each of its tokens, at most one entry a row.
        changed = (self.pages[:, :columns] != before.pages).nonzero().cpu().numpy()
        return bool((changed[:, 1] >= before.num_pages[changed[:, 0]]).all())


class PrefixTreeAttention(AttentionBackend):  # type: ignore[misc]
    """Attention of one ModelRunner, for decode, extend and mixed batches, eager.

    The KV stays in SGLang's pools and is written by them. Sequences share a page when SGLang's
    `req_to_token` gives them the same one at the same place, whichever radix cache put it there,
    so each shared page is read once a step for all of them. While the same requests decode, the
    plan is advanced; else it is made anew. Sliding windows (with SGLang's separate pool for them
    too), logit soft-capping, attention sinks, float8 KV and head sizes that differ between layers
    are taken.
    """

    # Plans read the lengths on the host.
    needs_cpu_seq_lens = True

    def __init__(self, runner: Any) -> None:
        """Raises `UnsupportedAttention` for what would be wrong or crash later.

        That is: latent attention (MLA), pools in another layout than [slots, heads, head_dim] or
        4-bit, speculative decoding, decode context parallelism, and CUDA graphs on a GPU.
        """
        super().__init__()
        self.device = torch.device(runner.device)
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = pool = runner.token_to_kv_pool
        self.page_size: int = runner.page_size
        self._has_window_pool = isinstance(pool, SWAKVPool)
        _refuse_runner(runner)
        self._step: _Step | None = None
        # Slots of the step's new tokens in the pool of the sliding-window layers.
        self._window_slots: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Begin a step. Raises `UnsupportedAttention` for batches of speculative decoding and such.

        O(pages of all sequences); forests and plans are made when a layer asks for one.
        """
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self._step = None
            return
        if mode not in _MODES:
            raise UnsupportedAttention(
                f"the batch's forward mode is {mode.name}, expected one of "
                f"{', '.join(known.name for known in _MODES)}"
            )
        step, before = self._step_of(forward_batch), self._step
        slots = forward_batch.out_cache_loc
        self._window_slots = self._in_window_pool(slots) if self._has_window_pool else None
        if before is not None and step.follows(before):
            step.plans = self._advanced(before.plans, slots)
        self._step = step

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Raises `UnsupportedAttention`: the graphs were switched on after the start."""
        raise UnsupportedAttention(_EAGER)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> torch.Tensor:
        """As `forward_extend`, for one query a request."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **others)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Write the new tokens' K and V, then attend.

        Args:
            q: [num_tokens, num_q_heads * head_dim] or with heads apart; k, v: [num_tokens,
                num_kv_heads, head_dim], None where another layer has written them.
            sinks: [num_q_heads], logits that take part in the softmax and have no value.

        Returns [num_tokens, num_q_heads * value_head_dim].

        Raises `UnsupportedAttention` for layers that are not causal attention over their own
        sequence, and for arguments that would change the result and are not implemented.
        """
        _refuse_layer(layer, others)
        if save_kv_cache and k is not None and v is not None:
            self._write(layer, forward_batch, k, v)
        assert self._step is not None, "init_forward_metadata comes first"
        pool = self.token_to_kv_pool
        k_cache = self._paged(pool.get_key_buffer(layer.layer_id))
        v_cache = self._paged(pool.get_value_buffer(layer.layer_id))
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        scaled = k_cache.dtype in FLOAT8_DTYPES
        out, lse = attention.run(
            self._plan(self._step, layer, q.dtype, k_cache.dtype),
            q,
            k_cache,
            v_cache,
            scale=layer.scaling,
            softcap=layer.logit_cap if layer.logit_cap > 0 else None,
            k_scale=_float32(layer.k_scale) if scaled else None,
            v_scale=_float32(layer.v_scale) if scaled else None,
        )
        if sinks is not None:
            # A sink adds exp(sink) to the sum that out was divided by, which was exp(lse).
            out = (out * torch.sigmoid(lse - sinks.to(lse.dtype)).unsqueeze(-1)).to(q.dtype)
        result: torch.Tensor = out.reshape(len(q), -1)
        return result

    def support_triton(self) -> bool:
        """Whether SGLang may use its own Triton kernels around this backend."""
        return self.device.type != "cpu"

    def _write(self, layer: Any, batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        pool = self.token_to_kv_pool
        where = KVWriteLoc.for_batch(batch, swa_loc=self._window_slots)
        if layer.k_scale is None:
            pool.set_kv_buffer(layer, where, k, v)
        else:  # with scales, the pool divides in place
            pool.set_kv_buffer(layer, where, k.clone(), v.clone(), layer.k_scale, layer.v_scale)

    def _paged(self, cache: torch.Tensor) -> torch.Tensor:
        """[slots, heads, head_dim] as [pages, page_size, heads, head_dim]; a view."""
        pages = len(cache) // self.page_size
        return cache[: pages * self.page_size].view(pages, self.page_size, *cache.shape[1:])

    def _step_of(self, batch: Any) -> _Step:
        lengths = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
        seq_lens = lengths.cpu().numpy().astype(np.int64)
        rows, is_decode = batch.req_pool_indices, batch.forward_mode.is_decode()
        if is_decode:
            query_lens = np.ones(len(seq_lens), np.int64)
        else:
            query_lens = np.asarray(batch.extend_seq_lens_cpu, np.int64)
            if not query_lens.all():  # a forest has no sequences without a query
                takes_part = np.flatnonzero(query_lens)
                rows = rows[torch.as_tensor(takes_part, device=rows.device)]
                seq_lens, query_lens = seq_lens[takes_part], query_lens[takes_part]
        pages = self.req_to_token[rows, : int(seq_lens.max()) : self.page_size]
        num_pages = -(-seq_lens // self.page_size)
        return _Step(seq_lens, query_lens, num_pages, pages, is_decode)

    def _plan(
        self, step: _Step, layer: Any, dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> attention.Plan:
        # SGLang counts the tokens before the query, we count the query too.
        window = layer.sliding_window_size
        window = None if window is None or window < 0 else reaching(window + 1, step.seq_lens)
        shape = _Shape(
            layer.tp_q_head_num,
            layer.tp_k_head_num,
            layer.qk_head_dim,
            layer.v_head_dim,
            dtype,
            kv_dtype,
            window,
            self._has_window_pool and self.token_to_kv_pool.layers_mapping[layer.layer_id][1],
        )
        plan = step.plans.get(shape)
        if plan is None:
            plan = step.plans[shape] = attention.plan(
                self._forest(step, shape.in_window_pool),
                num_q_heads=shape.num_q_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                value_head_dim=shape.value_head_dim,
                dtype=dtype,
                kv_dtype=kv_dtype,
                device=self.device,
                window=window,
                reserve=RESERVE if step.is_decode else 0,
            )
        return plan

    def _forest(self, step: _Step, in_window_pool: bool) -> attention.Forest:
        if in_window_pool not in step.forests:
            slots = self._in_window_pool(step.pages) if in_window_pool else step.pages
            # What is behind a row's length is not read by anyone, and may be anything.
            tables = (slots // self.page_size).cpu().numpy()
            step.forests[in_window_pool] = attention.forest_from_block_tables(
                tables, step.seq_lens, np.append(0, np.cumsum(step.query_lens)), self.page_size
            )
        return step.forests[in_window_pool]

    def _advanced(
        self, plans: dict[_Shape, attention.Plan], slots: torch.Tensor
    ) -> dict[_Shape, attention.Plan]:
        """The plans that had room for another token of each sequence, moved on to it."""
        moved: dict[_Shape, attention.Plan] = {}
        host: dict[bool, NDArray[Any]] = {}
        for shape, plan in plans.items():
            if shape.in_window_pool not in host:
                written = self._window_slots if shape.in_window_pool else slots
                assert written is not None
                host[shape.in_window_pool] = written.cpu().numpy()
            try:
                plan.advance(host[shape.in_window_pool])
            except attention.PlanExhausted:
                continue
            moved[shape] = plan
        return moved

    def _in_window_pool(self, slots: torch.Tensor) -> torch.Tensor:
        translated: torch.Tensor = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
        return translated


def _float32(scale: Any) -> torch.Tensor | None:
    return None if scale is None else scale.to(torch.float32).reshape(1)


def _refuse_runner(runner: Any) -> None:
    if runner.use_mla_backend:
        raise UnsupportedAttention(
            "the model uses latent attention (MLA), which --attention-backend prefixtree does not "
            "take; --radix-cache-backend prefixtree does"
        )
    if torch.device(runner.device).type != "cpu" and not cuda_graph_fully_disabled():
        raise UnsupportedAttention(_EAGER)
    pool = runner.token_to_kv_pool
    for part in (pool.full_kv_pool, pool.swa_kv_pool) if isinstance(pool, SWAKVPool) else (pool,):
        if not isinstance(part, MHATokenToKVPool):
            raise UnsupportedAttention(
                f"the KV pool is a {type(part).__name__}, expected an MHATokenToKVPool"
            )
        if part.kv_cache_layout != "nhd":
            raise UnsupportedAttention(
                f"the KV pool has the layout {part.kv_cache_layout!r}, expected 'nhd'"
            )
        if part.is_quantized_kv_cache:
            raise UnsupportedAttention(
                f"the KV pool is quantized by {type(part.quant_method).__name__}, expected the "
                "model's dtype or float8"
            )
    if not runner.spec_algorithm.is_none():
        raise UnsupportedAttention("speculative decoding is not supported by this backend")
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().dcp_enabled:
        raise UnsupportedAttention(
            "decode context parallelism is not supported by this backend: start with --dcp-size 1"
        )


def _refuse_layer(layer: Any, others: dict[str, Any]) -> None:
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        raise UnsupportedAttention(f"layer {layer.layer_id} is not causal self-attention")
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        raise UnsupportedAttention(
            f"layer {layer.layer_id} caps logits by {layer.logit_capping_method!r}, expected 'tanh'"
        )
    if layer.xai_temperature_len > 0:
        raise UnsupportedAttention(
            f"layer {layer.layer_id} scales logits by position (xai_temperature_len is "
            f"{layer.xai_temperature_len})"
        )
    for name, value in others.items():
        if value is not None and value is not False:
            raise UnsupportedAttention(
                f"layer {layer.layer_id} gives {name} to its attention, which is not implemented "
                "and would change the result"
            )
