"""What cannot be served is refused when vLLM starts, with what to change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from allocator import InvalidArgument
from prefixtree.engines.errors import UnsupportedAttention
from prefixtree.engines.vllm.attention import (
    TreeAttentionBackend,
    TreeAttentionImpl,
    TreeAttentionMetadataBuilder,
)
from prefixtree.engines.vllm.scheduler import PrefixTreeScheduler, tree_options

pytestmark = pytest.mark.engines

SERVED = AttentionSelectorConfig(
    head_size=80, dtype=torch.bfloat16, kv_cache_dtype="fp8", block_size=48, has_sink=True
)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "ENCODER_ONLY not supported"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "ENCODER_DECODER not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype not supported"),
    ],
)
def test_vllm_asks_the_backend_before_it_takes_it(wrong: dict[str, Any], reason: str) -> None:
    def reasons(config: AttentionSelectorConfig) -> list[str]:
        return TreeAttentionBackend.validate_configuration(
            device_capability=None, **config._asdict()
        )

    assert reasons(SERVED) == []
    first, instead = reasons(SERVED._replace(**wrong))
    assert reason in first
    assert "without --attention-backend CUSTOM" in instead


def test_layers_of_encoders_are_refused_where_vllm_does_not_ask() -> None:
    with pytest.raises(UnsupportedAttention, match=r"encoder_only.*PREFIXTREE_ATTENTION"):
        TreeAttentionImpl(4, 32, 1.0, attn_type=AttentionType.ENCODER_ONLY)


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("attention_config", "use_non_causal", True, "non-causal"),
        ("model_config", "is_mm_prefix_lm", True, "multimodal"),
        ("model_config", "rswa_window", 8, "R-SWA"),
        ("model_config", "dtype", torch.float64, "dtype"),
        ("cache_config", "cache_dtype", "nvfp4", "kv_cache_dtype"),
        ("parallel_config", "decode_context_parallel_size", 2, "DCP"),
        ("parallel_config", "prefill_context_parallel_size", 2, "PCP"),
    ],
)
def test_models_are_refused_where_vllm_does_not_ask(
    part: str, name: str, value: Any, reason: str
) -> None:
    config = vllm_config()
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    device = torch.device("cpu")
    TreeAttentionMetadataBuilder(spec, [], config, device)
    setattr(getattr(config, part), name, value)
    with pytest.raises(UnsupportedAttention, match=f"{reason}.*PREFIXTREE_ATTENTION"):
        TreeAttentionMetadataBuilder(spec, [], config, device)


def test_latent_attention_is_refused_where_vllm_does_not_ask() -> None:
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    with pytest.raises(UnsupportedAttention, match="MLA not supported"):
        TreeAttentionMetadataBuilder(spec, [], vllm_config(), torch.device("cpu"))


def vllm_config() -> Any:
    """The parts of vLLM's configuration that the backend looks at, as for a plain model."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(use_non_causal=False),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype=torch.float32, is_mm_prefix_lm=False, rswa_window=None),
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1, decode_context_parallel_size=1
        ),
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"evictoin": "lru"}, "has 'evictoin', expected .*eviction.*lru"),
        ({"eviction": "newest"}, "eviction policy is 'newest', expected one of 'lru'"),
        ({"eviction": 3}, "eviction policy is 3"),
        ("lru", "is 'lru', expected .*eviction"),
        (None, "is None, expected .*eviction"),
    ],
)
def test_unknown_options_are_refused(options: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        tree_options({"prefixtree": options})
    # As vLLM's own constructor does it, whatever the manager.
    scheduler = object.__new__(PrefixTreeScheduler)
    scheduler.vllm_config = SimpleNamespace(additional_config={"prefixtree": options})
    with pytest.raises(InvalidArgument, match=said):
        scheduler.kv_cache_manager = None


def test_options_of_others_are_theirs() -> None:
    assert tree_options({}) == tree_options({"gdn": 1}) == tree_options(object()) == {}
    assert tree_options({"prefixtree": {"eviction": "slru"}}) == {"eviction": "slru"}
