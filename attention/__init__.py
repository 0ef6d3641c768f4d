"""Attention over a forest of shared KV: plan once a step, run once a layer."""

from attention.algebra import IDENTITY, Partial, merge, scan
from attention.block_tables import forest_from_block_tables
from attention.drafts import draft_trees
from attention.errors import (
    InvalidForest,
    InvalidSlots,
    PlanExhausted,
    PlanFull,
    PlanMismatch,
    UnsupportedBackend,
    WriteMismatch,
)
from attention.explain import Explanation
from attention.forest import Forest, ForestArrays
from attention.node_sets import NodeSets
from attention.plan import Plan, plan
from attention.reference import attend
from attention.running import run
from attention.write import write

__all__ = [
    "IDENTITY",
    "Explanation",
    "Forest",
    "ForestArrays",
    "InvalidForest",
    "InvalidSlots",
    "NodeSets",
    "Partial",
    "Plan",
    "PlanExhausted",
    "PlanFull",
    "PlanMismatch",
    "UnsupportedBackend",
    "WriteMismatch",
    "attend",
    "draft_trees",
    "forest_from_block_tables",
    "merge",
    "plan",
    "run",
    "scan",
    "write",
]
