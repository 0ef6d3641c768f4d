"""Attention over a forest of shared KV: plan once a step, run once a layer."""

from attention.algebra import IDENTITY, Partial, merge, scan
from attention.errors import InvalidForest, PlanExhausted, PlanMismatch
from attention.forest import Forest, ForestArrays
from attention.node_sets import NodeSets
from attention.plan import Plan, plan
from attention.reference import attend
from attention.running import run

__all__ = [
    "IDENTITY",
    "Forest",
    "ForestArrays",
    "InvalidForest",
    "NodeSets",
    "Partial",
    "Plan",
    "PlanExhausted",
    "PlanMismatch",
    "attend",
    "merge",
    "plan",
    "run",
    "scan",
]
