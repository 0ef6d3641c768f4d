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
    NotHeld,
    NotPinned,
    NotPreempted,
    PrefixGone,
    PrefixTreeError,
    PriorityUnused,
    RollbackPastFork,
    SequenceClosed,
    SlotRange,
    TierFailed,
)
from prefixtree.evictions import Evicted, Eviction, EvictionCount
from prefixtree.explain import Explanation, Why
from prefixtree.forest import Forest
from prefixtree.histogram import Histogram
from prefixtree.index import Dropped, Inserted, Prefix, PrefixIndex
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
    "Dropped",
    "Evicted",
    "Eviction",
    "EvictionCount",
    "Explanation",
    "Forest",
    "Forgotten",
    "Histogram",
    "Inserted",
    "InvalidBatch",
    "InvalidLength",
    "InvalidNamespace",
    "InvalidSnapshot",
    "InvalidTokens",
    "Match",
    "NodeView",
    "NotAligned",
    "NotCommitted",
    "NotHeld",
    "NotPinned",
    "NotPreempted",
    "OutOfBlocks",
    "Pin",
    "PolicyFailed",
    "Prefix",
    "PrefixCache",
    "PrefixGone",
    "PrefixIndex",
    "PrefixTreeError",
    "PriorityUnused",
    "RollbackPastFork",
    "Sequence",
    "SequenceClosed",
    "SlotRange",
    "Stats",
    "TierFailed",
    "TreeSummary",
    "TreeView",
    "Why",
]
