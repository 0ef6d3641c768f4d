"""Blocks of a paged KV cache: ids, reference counts, free space, eviction orders, K/V tensors.

Importing this package does not import torch; the first use of `KVStorage` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from allocator.errors import (
    AllocatorError,
    BrokenInvariant,
    DoubleFree,
    ForeignBlock,
    InvalidArgument,
    KVMismatch,
    OutOfBlocks,
    SlotOutOfRange,
)
from allocator.eviction import EvictionOrder
from allocator.extents import FreeExtents
from allocator.policies import (
    FIFO,
    LFU,
    LRU,
    MRU,
    SLRU,
    EvictionPolicy,
    Usage,
    make_policy,
    policy_names,
)
from allocator.pool import BlockPool

if TYPE_CHECKING:
    from allocator.storage import KVStorage

__all__ = [
    "FIFO",
    "LFU",
    "LRU",
    "MRU",
    "SLRU",
    "AllocatorError",
    "BlockPool",
    "BrokenInvariant",
    "DoubleFree",
    "EvictionOrder",
    "EvictionPolicy",
    "ForeignBlock",
    "FreeExtents",
    "InvalidArgument",
    "KVMismatch",
    "KVStorage",
    "OutOfBlocks",
    "SlotOutOfRange",
    "Usage",
    "make_policy",
    "policy_names",
]


def __getattr__(name: str) -> type[KVStorage]:
    if name == "KVStorage":
        from allocator.storage import KVStorage

        return KVStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
