"""The tree behind vLLM's KV cache manager."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from prefixtree.engines.errors import UnsupportedCache
from prefixtree.engines.vllm.block_pool import TreeBlockPool

logger = init_logger(f"vllm.{__name__}")

_INSTEAD = "without --scheduler-cls prefixtree.engines.vllm.scheduler.PrefixTreeScheduler"


class TreeManager(FullAttentionManager):
    """The manager of full attention, whose hits are a walk of the tree."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[bytes],
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: TreeBlockPool,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        blocks = block_pool.longest_prefix(block_hashes[: max_length // alignment_tokens])
        if drop_eagle_block and blocks:
            blocks.pop()  # its tokens are computed again, for the hidden states of the draft head
        return (blocks,), len(blocks) * alignment_tokens


def plant(manager: KVCacheManager, eviction: Any = "lru") -> None:
    """Puts the tree behind a manager that has given out no block yet.

    Served are models with one group of full-attention layers, multi-head latent attention among
    them. Others (groups of sliding windows, state-space layers, encoders) free blocks from the
    front of a sequence, which a tree that gives up leaves first has no use for.

    Args:
        eviction: as for `PrefixIndex`.

    Raises `UnsupportedCache` for what is not served, with what to change.
    """
    _refuse(manager)
    coordinator, old = manager.coordinator, manager.block_pool
    single = coordinator.single_type_managers[0]
    # What a pool is made with differs from release to release; it keeps all of it by that name.
    options = {name: getattr(old, name) for name in signature(BlockPool).parameters}
    pool = TreeBlockPool(**options, eviction=eviction)
    on_tree = TreeManager(
        single.kv_cache_spec,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=single.kv_cache_group_id,
        scheduler_block_size=single.scheduler_block_size,
        dcp_world_size=single.dcp_world_size,
        pcp_world_size=single.pcp_world_size,
        needs_kv_cache_zeroing=single.records_new_block_ids,
    )
    on_tree.use_eagle = single.use_eagle
    coordinator.single_type_managers = (on_tree,)
    coordinator.block_pool = manager.block_pool = pool
    logger.info("prefixtree holds the prefix cache: %d blocks, %s", pool.num_gpu_blocks, eviction)


def _refuse(manager: KVCacheManager) -> None:
    if not manager.enable_caching:
        raise UnsupportedCache(
            "prefix caching is off, by --no-enable-prefix-caching or because vLLM has none for "
            f"this model here: start with it, or {_INSTEAD}"
        )
    managers = manager.coordinator.single_type_managers
    kinds = [type(single) for single in managers]
    if kinds != [FullAttentionManager]:
        names = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise UnsupportedCache(
            f"the model's groups of KV caches have {names}, expected one FullAttentionManager: "
            "with sliding windows, start with --disable-hybrid-kv-cache-manager, which keeps what "
            f"is behind them; else {_INSTEAD}"
        )
