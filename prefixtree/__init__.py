"""A paged radix-tree KV cache manager that LLM serving engines embed.

Importing this package does not import torch.
"""

from allocator import BrokenInvariant, OutOfBlocks, PolicyFailed
from prefixtree.batch import Batch
from prefixtree.cache import Forgotten, Match, Pin, PrefixCache
from prefixtree.errors import (
    CacheBroken,
    CannotServe,
    DecodeFailed,
    InvalidBatch,
    InvalidLength,
    InvalidNamespace,
    InvalidSnapshot,
    InvalidTokens,
    NotAligned,
    NotCommitted,
    NotPinned,
    NotPreempted,
    PrefixTreeError,
    PriorityUnused,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
)
from prefixtree.evictions import Evicted, Eviction, EvictionCount
from prefixtree.explain import Explanation, Why
from prefixtree.forest import Forest
from prefixtree.histogram import Histogram
from prefixtree.sequence import Sequence
from prefixtree.stats import Stats
from prefixtree.view import NodeView, TreeView
from prefixtree.view_summary import TreeSummary

__all__ = [
    "Batch",
    "BrokenInvariant",
    "CacheBroken",
    "CannotServe",
    "DecodeFailed",
    "Evicted",
    "Eviction",
    "EvictionCount",
    "Explanation",
    "Forest",
    "Forgotten",
    "Histogram",
    "InvalidBatch",
    "InvalidLength",
    "InvalidNamespace",
    "InvalidSnapshot",
    "InvalidTokens",
    "Match",
    "NodeView",
    "NotAligned",
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
    "TreeSummary",
    "TreeView",
    "Why",
]
