"""An attention backend of vLLM that reads what requests share once.

vLLM hands its attention block tables. Requests that share a prefix have the same blocks at the
beginning of theirs, whoever manages them, so this works with vLLM's own cache manager as well as
with the tree's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

import attention
from prefixtree.engines.errors import UnsupportedAttention

_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class TreeAttentionBackend(AttentionBackend):
    """Decoder attention over block tables, of any head size and block size."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *_FLOAT8]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeAttentionMetadataBuilder]:
        return TreeAttentionMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


@dataclass
class TreeAttentionMetadata(AttentionMetadata):
    """One step's batch: what every layer of a group of KV caches has in common.

    Attributes:
        num_queries: of all requests together, without padding.
        query_start_loc: int [S + 1], seq_lens: int [S], block_table: int [S, max_blocks], on the
            host, without requests that have no query in this step.
    """

    num_queries: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    _plans: dict[tuple[object, ...], attention.Plan] = field(default_factory=dict)
    _forests: dict[int, attention.Forest] = field(default_factory=dict)

    def plan(
        self, impl: TreeAttentionImpl, query: torch.Tensor, k_cache: torch.Tensor
    ) -> attention.Plan:
        """The plan for a layer: made by the first of its kind, the others take it."""
        num_blocks, _, block_size, _ = k_cache.shape
        kind = (impl.num_heads, impl.num_kv_heads, impl.head_size, impl.sliding_window)
        key = (*kind, query.dtype, k_cache.dtype, block_size)
        if key not in self._plans:
            if block_size not in self._forests:
                self._forests[block_size] = attention.forest_from_block_tables(
                    self.block_table, self.seq_lens, self.query_start_loc, block_size
                )
            self._plans[key] = attention.plan(
                self._forests[block_size],
                num_q_heads=impl.num_heads,
                num_kv_heads=impl.num_kv_heads,
                head_dim=impl.head_size,
                dtype=query.dtype,
                kv_dtype=k_cache.dtype,
                device=query.device,
                layout="HND",
                window=impl.sliding_window,
                num_blocks=num_blocks,
            )
        return self._plans[key]


class TreeAttentionMetadataBuilder(AttentionMetadataBuilder[TreeAttentionMetadata]):
    """Brings the batch to the host, where attention is planned: one copy of the block table a step.

    CUDA graphs of whole steps are not supported (the base class says so), those of the pieces
    between attention calls are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # the base class's is abstract
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeAttentionMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedAttention(
                f"causal is {common.causal!r}: prefixtree's backend has causal attention only"
            )
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        runs = starts.diff() > 0  # padding has none
        return TreeAttentionMetadata(
            num_queries=int(starts[-1]),
            query_start_loc=torch.cat([starts[:1], starts[1:][runs]]),
            seq_lens=common.seq_lens[: common.num_reqs].cpu()[runs],
            block_table=common.block_table_tensor[: common.num_reqs].cpu()[runs],
        )


class TreeAttentionImpl(AttentionImpl[TreeAttentionMetadata]):
    """One layer.

    Its cache is [num_blocks, num_kv_heads, block_size, 2 * head_size] of any strides, the keys
    before the values in the last dimension, on every platform.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """As vLLM calls it. Raises `UnsupportedAttention` for encoders and cross-attention."""
        if attn_type != AttentionType.DECODER:
            raise UnsupportedAttention(
                f"attention type {attn_type!r}: prefixtree's backend has decoder attention only"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes).float()
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes K and V [num_tokens, num_kv_heads, head_size] to their slots; -1 is nowhere."""
        k_cache, v_cache = self._halves(kv_cache)
        count = len(slot_mapping)  # of a padded batch only these
        k_scale, v_scale = self._scales(layer)
        attention.write(
            key[:count],
            value[:count],
            k_cache,
            v_cache,
            slot_mapping,
            layout="HND",
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [num_tokens, num_heads, head_size] into output, of the same shape."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedAttention("prefixtree's backend quantises no outputs")
        if attn_metadata is None:  # vLLM warms up
            return output.fill_(0)
        count = attn_metadata.num_queries
        k_cache, v_cache = self._halves(kv_cache)
        plan = attn_metadata.plan(self, query, k_cache)
        k_scale, v_scale = self._scales(layer)
        slopes = self.alibi_slopes
        out, lse = attention.run(
            plan,
            query[:count],
            k_cache,
            v_cache,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            alibi_slopes=None if slopes is None else slopes.to(query.device),
            k_scale=k_scale,
            v_scale=v_scale,
        )
        if self.sinks is not None:
            sinks = self.sinks.to(query.device, torch.float32)
            out, _ = attention.merge((out, lse), (torch.zeros_like(sinks[:, None]), sinks))
        output[:count] = out.view_as(output[:count])
        return output

    def _halves(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kv_cache_dtype in _FLOAT8:
            kv_cache = kv_cache.view(_FLOAT8[self.kv_cache_dtype])
        k_cache, v_cache = kv_cache.split(self.head_size, dim=-1)
        return k_cache, v_cache

    def _scales(self, layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.kv_cache_dtype not in _FLOAT8:
            return None, None
        return layer._k_scale, layer._v_scale
