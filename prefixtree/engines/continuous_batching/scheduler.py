"""The schedulers of the library, which take what only the tree holds for free.

They stop admitting when less than a margin of the cache is free, and drop all cached blocks first.
Here a cached block that no request uses is as good as a free one: it goes when its room is needed.
"""

from __future__ import annotations

from transformers.generation.continuous_batching.scheduler import (
    FIFOScheduler,
    PrefillFirstScheduler,
    Scheduler,
)

from prefixtree.engines.continuous_batching.allocator import TreeAllocator


class _EvictableIsFree(Scheduler):
    def _try_to_meet_safety_margin(self) -> bool:
        self.cache.pool.try_to_free_sectors()
        available = self.cache.compute_free_capacity(relative=False) + sum(
            allocator.prefixes.evictable_blocks * allocator.bytes_per_block
            for allocator in self.cache.cache_allocators.values()
            if isinstance(allocator, TreeAllocator)
        )
        total = self.cache.num_sectors * self.cache.bytes_per_sector
        return bool(available >= self.safety_margin * total)


class TreeFIFOScheduler(_EvictableIsFree, FIFOScheduler):
    """`scheduler_type="fifo"`, the library's default."""


class TreePrefillFirstScheduler(_EvictableIsFree, PrefillFirstScheduler):
    """`scheduler_type="prefill_first"`."""
