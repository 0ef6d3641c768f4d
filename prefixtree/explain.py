"""Why a match stopped where it stopped."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from prefixtree.columns import Int32s
from prefixtree.evictions import Eviction, EvictionLog
from prefixtree.tokens import agreement
from prefixtree.tree import ROOT, Namespace, Place, RadixTree


class Why(StrEnum):
    """What kept a match from going on."""

    COMPLETE = "complete"
    """Nothing: all tokens are cached."""
    PENDING = "pending"
    """An open sequence has the next tokens in its prompt and will commit them."""
    EVICTED = "evicted"
    """The next token was cached behind the same prefix and was evicted."""
    OTHER_NAMESPACE = "other namespace"
    """Another namespace has more of these tokens."""
    PARTIAL_BLOCK = "partial block"
    """The next tokens agree with cached ones, but not for a whole block (`align="block"`)."""
    NEVER_SEEN = "never seen"
    """Nobody has committed the next token behind this prefix, or longer ago than is remembered."""


class Explanation(NamedTuple):
    """How far a prompt is cached, and why no further."""

    tokens: int
    """Tokens of the prompt."""
    cached: int
    pending: int
    why: Why
    eviction: Eviction | None
    """What was evicted right behind the match, if it was and is still remembered."""
    elsewhere: tuple[tuple[Namespace, int], ...]
    """Namespaces that have more of the prompt, and how much; at most 8, the longest first."""

    def __str__(self) -> str:
        head = f"{self.cached} of {self.tokens} tokens cached"
        if self.why is Why.COMPLETE:
            return head
        if self.pending:
            head += f", {self.pending} more pending"
        if self.eviction is not None:
            gone = self.eviction
            by = f" by policy {gone.policy!r}" if gone.policy else ""
            return f"{head}; then {gone.tokens} tokens were evicted{by}, reason: {gone.reason}"
        if self.elsewhere:
            namespace, cached = self.elsewhere[0]
            return f"{head}; namespace {namespace!r} has {cached}"
        return f"{head}; then {self.why.value}"


_SHOWN = 8


def explain(
    tree: RadixTree,
    log: EvictionLog,
    wanted: Int32s,
    namespace: Namespace,
    place: Place | None,
    pending: int,
) -> Explanation:
    """`place` is where the walk of `wanted` ended, None when the namespace holds nothing.

    O(len(wanted)) for the walk; O(nodes) under alignment, O(namespaces) for the others; O(evictions
    since it was asked last), tens of milliseconds when none of those remembered was looked at.
    """
    cached = place.matched if place else 0
    eviction, why = None, Why.COMPLETE
    elsewhere: list[tuple[Namespace, int]] = []
    if cached < len(wanted):
        node, at = (place.child if place.within else place.node, cached) if place else (ROOT, 0)
        eviction = log.find(node, at, int(wanted[at]))
        for other, root in tree.roots():
            if other != namespace and (further := tree.walk(wanted, root).matched) > cached:
                elsewhere.append((other, further))
        elsewhere.sort(key=lambda found: -found[1])
        if pending:
            why = Why.PENDING
        elif eviction:
            why = Why.EVICTED
        elif place and _agrees_in_part(tree, place, wanted):
            why = Why.PARTIAL_BLOCK
        elif elsewhere:
            why = Why.OTHER_NAMESPACE
        else:
            why = Why.NEVER_SEEN
    return Explanation(len(wanted), cached, pending, why, eviction, tuple(elsewhere[:_SHOWN]))


def _agrees_in_part(tree: RadixTree, place: Place, wanted: Int32s) -> bool:
    """Whether tokens behind the match are cached, fewer than a block of them."""
    if tree.align == 1:
        return False
    if len(wanted) - place.matched < tree.align:
        return True
    if place.within:
        behind = np.frombuffer(tree.edge(place.child), np.int32)[place.within :]
        return agreement(behind, wanted[place.matched :]) > 0
    nodes = tree.nodes
    below = np.flatnonzero(
        (np.asarray(nodes.parent) == place.node) & (np.asarray(nodes.linked) > 0)
    )
    first = int(wanted[place.matched])
    return any(not tree.is_root(node) and tree.token(node, 0) == first for node in below.tolist())
