"""An attention backend of vLLM that reads what requests share once.

vLLM hands its attention block tables. Requests that share a prefix have the same blocks at the
beginning of theirs, whoever manages them, so this works with vLLM's own cache manager as well as
with the tree's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

import attention
from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.steps import Step

_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}

_INSTEAD = (
    "prefixtree's attention is causal decoder attention over blocks of keys and values: start"
    " without --attention-backend CUSTOM (on the CPU: without PREFIXTREE_ATTENTION=1)"
)


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
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """Any. On a CPU, preferably that in which a run of blocks is one of tokens for each head:
        torch's kernels read it in place, and heads that lie apart faster than interleaved ones."""
        if not current_platform.is_cpu():
            return None
        first = KVCacheLayout.LHBNC
        return (first, *(layout for layout in KVCacheLayout if layout is not first))

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why it cannot serve a layer, and what to do; vLLM asks this when it starts."""
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        return [*reasons, _INSTEAD] if reasons else reasons


class NoLatentAttention(TreeAttentionBackend):
    """What stands for vLLM's latent attention on a CPU where the tree's attention was asked for:
    vLLM would take its own, whatever was asked for, and say so in a line of its log."""

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        raise UnsupportedAttention(f"MLA not supported; {_INSTEAD}")


@dataclass
class TreeAttentionMetadata(AttentionMetadata):
    """One step's batch, without requests that have no query in it."""

    step: Step


class TreeAttentionMetadataBuilder(AttentionMetadataBuilder[TreeAttentionMetadata]):
    """Brings the batch to the host, where attention is planned: one copy of the used part of the
    block table a step.

    CUDA graphs of whole steps are not supported (the base class says so), those of the pieces
    between attention calls are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # the base class's is abstract
        """As vLLM calls it. Raises `UnsupportedAttention` for what the backend cannot serve."""
        super().__init__(*args, **kwargs)
        self._refuse()
        self._step: Step | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeAttentionMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedAttention(
                f"a batch is not causal (causal is {common.causal!r}); {_INSTEAD}"
            )
        count, size = common.num_reqs, self.kv_cache_spec.block_size
        starts = common.query_start_loc_cpu[: count + 1].numpy()
        lengths = common.seq_lens[:count].cpu().numpy()
        used = -(-int(lengths.max()) // size)
        tables = common.block_table_tensor[:count, :used].cpu().numpy()
        runs = starts[1:] > starts[:-1]  # padding has no query
        # Copies, as vLLM writes the next step over this one.
        self._step = Step(
            tables[runs], lengths[runs], np.append(0, starts[1:][runs]), size, self._step
        )
        return TreeAttentionMetadata(self._step)

    def _refuse(self) -> None:
        """What vLLM asks its backends itself, but not on the CPU."""
        config, spec = self.vllm_config, self.kv_cache_spec
        reasons = TreeAttentionBackend.validate_configuration(
            head_size=spec.head_size,
            dtype=config.model_config.dtype,
            kv_cache_dtype=config.cache_config.cache_dtype,
            block_size=spec.block_size,
            use_mla=isinstance(spec, MLAAttentionSpec),
            has_sink=False,
            use_sparse=False,
            use_mm_prefix=config.model_config.is_mm_prefix_lm,
            use_per_head_quant_scales=False,
            device_capability=None,
            attn_type=AttentionType.DECODER,
            use_non_causal=config.attention_config.use_non_causal,
            use_pcp=config.parallel_config.prefill_context_parallel_size > 1,
            use_dcp=config.parallel_config.decode_context_parallel_size > 1,
            use_rswa=config.model_config.rswa_window is not None,
        )
        if reasons:
            raise UnsupportedAttention("; ".join(reasons))


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
            raise UnsupportedAttention(f"attention type {attn_type!r} not supported; {_INSTEAD}")
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
        step = attn_metadata.step
        count = step.num_queries
        k_cache, v_cache = self._halves(kv_cache)
        plan = step.plan(
            self.sliding_window,
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            dtype=query.dtype,
            kv_dtype=k_cache.dtype,
            device=query.device,
            num_blocks=len(k_cache),
        )
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
        # Whichever is inside in memory: asked for tokens by heads, the planner knows that blocks
        # side by side may be one run of tokens.
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_cache, v_cache

    def _scales(self, layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.kv_cache_dtype not in _FLOAT8:
            return None, None
        return layer._k_scale, layer._v_scale
