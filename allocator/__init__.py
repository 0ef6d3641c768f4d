"""Blocks of a paged KV cache: ids, reference counts, free space, eviction orders, K/V tensors.

Importing this package does not import torch; the first use of `KVStorage` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from allocator.block_set import BlockSet
from allocator.errors import (
    AllocatorError,
    BlockTaken,
    BrokenInvariant,
    DoubleFree,
    ForeignBlock,
    InvalidArgument,
    KVMismatch,
    OutOfBlocks,
    PolicyFailed,
    SlotOutOfRange,
)
from allocator.eviction import EvictionOrder
from allocator.extents import FreeExtents
from allocator.policies import (
    DEFAULT_PRIORITY,
    FIFO,
    LFU,
    LRU,
    MAX_PRIORITY,
    MRU,
    SLRU,
    Ageing,
    Cost,
    EvictionPolicy,
    Priority,
    Usage,
    make_policy,
    policy_names,
    uses_priority,
)
from allocator.pool import BlockPool

if TYPE_CHECKING:
    from allocator.storage import KVStorage

__all__ = [
    "DEFAULT_PRIORITY",
    "FIFO",
    "LFU",
    "LRU",
    "MAX_PRIORITY",
    "MRU",
    "SLRU",
    "Ageing",
    "AllocatorError",
    "BlockPool",
    "BlockSet",
    "BlockTaken",
    "BrokenInvariant",
    "Cost",
    "DoubleFree",
    "EvictionOrder",
    "EvictionPolicy",
    "ForeignBlock",
    "FreeExtents",
    "InvalidArgument",
    "KVMismatch",
    "KVStorage",
    "OutOfBlocks",
    "PolicyFailed",
    "Priority",
    "SlotOutOfRange",
    "Usage",
    "make_policy",
    "policy_names",
    "uses_priority",
]


def __getattr__(name: str) -> type[KVStorage]:
    if name == "KVStorage":
        from allocator.storage import KVStorage

        return KVStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
