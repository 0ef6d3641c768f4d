"""A paged radix-tree KV cache manager that LLM serving engines embed.

Importing this package does not import torch.
"""

from allocator import BrokenInvariant, OutOfBlocks, PolicyFailed
from prefixtree.batch import Batch
from prefixtree.cache import Forgotten, Match, Pin, PrefixCache
from prefixtree.errors import (
    CacheBroken,
    InvalidBatch,
    InvalidLength,
    InvalidNamespace,
    InvalidTokens,
    NotCommitted,
    NotPinned,
    NotPreempted,
    PrefixTreeError,
    PriorityUnused,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
)
from prefixtree.forest import Forest
from prefixtree.sequence import Sequence
from prefixtree.stats import Stats
from prefixtree.view import NodeView, TreeView

__all__ = [
    "Batch",
    "BrokenInvariant",
    "CacheBroken",
    "Forest",
    "Forgotten",
    "InvalidBatch",
    "InvalidLength",
    "InvalidNamespace",
    "InvalidTokens",
    "Match",
    "NodeView",
    "NotCommitted",
    "NotPinned",
    "NotPreempted",
    "OutOfBlocks",
    "Pin",
    "PolicyFailed",
    "PrefixCache",
    "PrefixTreeError",
    "PriorityUnused",
    "RollbackPastFork",
    "Sequence",
    "SequenceClosed",
    "SlotRange",
    "Stats",
    "TreeView",
]
