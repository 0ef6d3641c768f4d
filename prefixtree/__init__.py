"""A paged radix-tree KV cache manager that LLM serving engines embed.

Importing this package does not import torch.
"""

from allocator import BrokenInvariant, OutOfBlocks
from prefixtree.cache import Batch, Match, PrefixCache
from prefixtree.errors import (
    InvalidBatch,
    InvalidLength,
    InvalidTokens,
    NotCommitted,
    PrefixTreeError,
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
    "Forest",
    "InvalidBatch",
    "InvalidLength",
    "InvalidTokens",
    "Match",
    "NodeView",
    "NotCommitted",
    "OutOfBlocks",
    "PrefixCache",
    "PrefixTreeError",
    "RollbackPastFork",
    "Sequence",
    "SequenceClosed",
    "SlotRange",
    "Stats",
    "TreeView",
]
