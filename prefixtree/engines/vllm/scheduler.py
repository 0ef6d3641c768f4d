"""vLLM's scheduler with the tree behind its KV cache manager, for `scheduler_cls`."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from prefixtree.engines.vllm.manager import plant


class PrefixTreeScheduler(Scheduler):
    """The scheduler; where vLLM schedules asynchronously, making one makes the asynchronous kind.

    `additional_config={"prefixtree": {"eviction": "slru"}}` chooses an eviction policy.
    """

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> PrefixTreeScheduler:
        if vllm_config.scheduler_config.async_scheduling:
            cls = PrefixTreeAsyncScheduler
        return super().__new__(cls)

    # vLLM has no hook for the manager. It assigns this before it hands the manager to anyone.
    @property
    def kv_cache_manager(self) -> KVCacheManager:
        return self._kv_cache_manager

    @kv_cache_manager.setter
    def kv_cache_manager(self, manager: KVCacheManager) -> None:
        options = (self.vllm_config.additional_config or {}).get("prefixtree", {})
        plant(manager, **options)
        self._kv_cache_manager = manager


class PrefixTreeAsyncScheduler(PrefixTreeScheduler, AsyncScheduler):
    """As `PrefixTreeScheduler`, one step ahead of the model."""
