"""vLLM's scheduler with the tree behind its KV cache manager, for `scheduler_cls`."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from allocator import InvalidArgument, make_policy, policy_names
from prefixtree.engines.vllm.manager import plant

NAME = "prefixtree"
"""Key of the tree's options in vLLM's `additional_config`."""


def tree_options(additional_config: Any) -> dict[str, Any]:
    """What vLLM's `additional_config` says for the tree: nothing, or an eviction policy's name.

    Raises `InvalidArgument` for anything else, with what is expected.
    """
    options = {} if not isinstance(additional_config, dict) else additional_config.get(NAME, {})
    expected = 'expected {"eviction": one of ' + ", ".join(policy_names()) + "}"
    if not isinstance(options, dict):
        raise InvalidArgument(f"additional_config[{NAME!r}] is {options!r}, {expected}")
    unknown = ", ".join(repr(name) for name in options if name != "eviction")
    if unknown:
        raise InvalidArgument(f"additional_config[{NAME!r}] has {unknown}, {expected}")
    make_policy(options.get("eviction", "lru"))
    return options


class PrefixTreeScheduler(Scheduler):
    """The scheduler; where vLLM schedules asynchronously, making one makes the asynchronous kind.

    `additional_config={"prefixtree": {"eviction": "slru"}}` chooses an eviction policy. Making one
    raises `InvalidArgument` for a policy that is not there, and for any other option, and
    `UnsupportedCache` for models that it cannot serve, see `manager.plant`.
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
        plant(manager, **tree_options(self.vllm_config.additional_config))
        self._kv_cache_manager = manager


class PrefixTreeAsyncScheduler(PrefixTreeScheduler, AsyncScheduler):
    """As `PrefixTreeScheduler`, one step ahead of the model."""
