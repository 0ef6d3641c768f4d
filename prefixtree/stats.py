"""What the cache did and holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from allocator import InvalidArgument
from allocator.errors import at_least
from prefixtree.evictions import EvictionCount
from prefixtree.histogram import Histogram


@dataclass
class Counters:
    """Counted since the cache was made."""

    opens: int = 0
    forks: int = 0
    rollbacks: int = 0
    closes: int = 0
    preemptions: int = 0
    resumes: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0


class Stats(NamedTuple):
    """A snapshot: tokens, nodes and blocks as they are now, events since the cache was made.

    Immutable, so any thread may read it.
    """

    num_blocks: int
    block_size: int
    reserved_blocks: int
    """Never handed out: 1 under `reserve_block_0`, else 0."""
    free_blocks: int
    free_extents: int
    """Runs of consecutive free blocks: 1 where all free ones lie together."""
    evictable_blocks: int
    """Blocks that come free when everything that is not pinned is evicted."""
    retired_blocks: int
    """Blocks that sequences gave up at a commit and keep until they go on: another copy stayed."""
    cached_tokens: int
    """Tokens whose KV is in the tree, each once: pinned_tokens + evictable_tokens."""
    pinned_tokens: int
    evictable_tokens: int
    pending_tokens: int
    """Tokens of open sequences that nobody matches yet: not committed, or, under
    `align="block"`, no whole block."""
    nodes: int
    """Nodes in the tree, without the root."""
    branches: int
    """Those of them, and of the roots of namespaces, that have nodes below them."""
    open_sequences: int
    prefilling_sequences: int
    """Those whose prompt is not committed whole: what a request may wait for (`Match.pending`)."""
    logical_tokens: int
    """Tokens of all open sequences, shared ones counted for each: what no sharing would keep."""
    kept_prefixes: int
    """Pins made by `PrefixCache.pin` and not taken off."""
    kept_tokens: int
    """Tokens of these prefixes, shared ones counted for each."""
    attended_tokens: int
    """Tokens of the last `PrefixCache.forest`, each once: what attention over it reads the K and V
    of. 0 before the first."""
    attended_logical_tokens: int
    """The same with shared ones counted for each sequence: what attention without sharing reads."""
    opens: int
    forks: int
    """Sequences made by fork."""
    rollbacks: int
    closes: int
    preemptions: int
    resumes: int
    query_tokens: int
    """Prompt tokens of all opened sequences; a resume does not count again."""
    hit_tokens: int
    """Those of them whose KV was there."""
    joins: int
    """Commits at which a sequence moved over to the copy that another had committed before."""
    joined_tokens: int
    """Tokens that were computed twice for that."""
    evicted_tokens: int
    """Those that were forgotten count, too."""
    evicted_nodes: int
    """Nodes evicted whole."""
    trimmed_nodes: int
    """Nodes that lost only their tail, because that made room enough."""
    evictions: tuple[EvictionCount, ...]
    """The same by policy and reason, for those pairs that occurred."""
    match_lengths: Histogram
    """Tokens of a prompt whose KV was there, one observation an `open`; the sum is hit_tokens."""
    path_nodes: Histogram
    """How deep paths are: nodes on a path when a sequence, a fork or a pin takes it, without the
    tail that the sequence writes itself."""
    reuse_gaps: Histogram
    """Seconds that a cached prefix that nothing used lay idle until it was used again, by the end
    of what is used of it."""
    idle_times: Histogram
    """Seconds between the last use of a node and its eviction, one observation a node."""
    block_lifetimes: Histogram
    """Seconds from the opening of the sequence that wrote a node to the node's eviction, one
    observation for each block that came free."""

    @property
    def used_blocks(self) -> int:
        """Blocks that hold KV or are reserved for it."""
        return self.num_blocks - self.free_blocks

    @property
    def pinned_blocks(self) -> int:
        """Blocks that open sequences and pins hold: no eviction frees them."""
        aside = self.retired_blocks + self.reserved_blocks
        return self.used_blocks - self.evictable_blocks - aside

    @property
    def hit_rate(self) -> float:
        """hit_tokens / query_tokens, 0.0 before the first query."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0

    @property
    def fan_out(self) -> float:
        """Nodes below one that has any, on average; 0.0 in an empty tree."""
        return self.nodes / self.branches if self.branches else 0.0

    @property
    def shared_tokens(self) -> int:
        """Tokens whose KV need not be held, because those who use it share one copy."""
        return self.logical_tokens + self.kept_tokens - self.pinned_tokens - self.pending_tokens

    @property
    def sharing_factor(self) -> float:
        """Tokens of all open sequences and pins to those held for them; 1.0 without sharing."""
        held = self.pinned_tokens + self.pending_tokens
        return (held + self.shared_tokens) / held if held else 1.0

    @property
    def unused_slots(self) -> int:
        """Token slots that are in no free block, yet hold no token and are reserved for none: ends
        of last blocks, and what splits, evictions and rollbacks left of a block."""
        blocks = self.pinned_blocks + self.evictable_blocks
        return blocks * self.block_size - self.cached_tokens - self.pending_tokens

    @property
    def fragmentation(self) -> float:
        """The share of `unused_slots` in the blocks that nodes hold; 0.0 when they hold none."""
        blocks = self.pinned_blocks + self.evictable_blocks
        return self.unused_slots / (blocks * self.block_size) if blocks else 0.0

    def saved_bytes(self, bytes_per_token: int) -> int:
        """Bytes of K and V that sharing saves now, given those of one token in all layers.

        Raises `InvalidArgument` unless that is an integer >= 1.
        """
        return self.shared_tokens * at_least(1, "bytes_per_token", bytes_per_token)

    def saved_attention_bytes(self, bytes_per_token: int) -> int:
        """Bytes of K and V that one step of attention over the last forest need not read.

        What a kernel reads that goes through each node once for all its sequences, against one that
        goes through each sequence; `bytes_per_token` are those of one token in all layers. Raises
        as `saved_bytes`.
        """
        saved = self.attended_logical_tokens - self.attended_tokens
        return saved * at_least(1, "bytes_per_token", bytes_per_token)

    def delta(self, earlier: Stats) -> Stats:
        """What happened since `earlier`, of the same cache: counts and histograms are differences,
        all that is a state (blocks, tokens, nodes, sequences) is as it is in this one.

        Raises `InvalidArgument` when `earlier` counts more: it is later, or of another cache.
        """
        counts = {name: getattr(self, name) - getattr(earlier, name) for name in COUNTERS}
        spread = {name: getattr(self, name).since(getattr(earlier, name)) for name in HISTOGRAMS}
        known = {(past.policy, past.reason): past for past in earlier.evictions}
        evictions = [
            _since(now, known.pop((now.policy, now.reason), None)) for now in self.evictions
        ]
        for name, count in counts.items():
            if count < 0:
                raise InvalidArgument(
                    f"earlier has {name}={getattr(earlier, name)}, expected at most"
                    f" {getattr(self, name)}: statistics of the same cache, taken before these"
                )
        if known or any(min(some[2:]) < 0 for some in evictions):
            raise InvalidArgument(
                "earlier counts evictions that these statistics do not, expected some of the same"
                " cache, taken before"
            )
        happened = tuple(some for some in evictions if any(some[2:]))
        return self._replace(**counts, **spread, evictions=happened)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python values, for `json.dumps`: all fields, and the numbers derived from them."""
        values = self._asdict()
        values["evictions"] = [count._asdict() for count in self.evictions]
        values.update((name, values[name].as_dict()) for name in HISTOGRAMS)
        values.update((name, getattr(self, name)) for name in DERIVED)
        return values


COUNTERS = (
    *(field.name for field in fields(Counters)),
    *("joins", "joined_tokens", "evicted_tokens", "evicted_nodes", "trimmed_nodes"),
)
"""The fields of `Stats` that count events, and so only grow."""
HISTOGRAMS = ("match_lengths", "path_nodes", "reuse_gaps", "idle_times", "block_lifetimes")
"""Those that are histograms."""
DERIVED = (
    *("used_blocks", "pinned_blocks", "hit_rate", "shared_tokens", "sharing_factor"),
    *("unused_slots", "fragmentation", "fan_out"),
)


def _since(now: EvictionCount, past: EvictionCount | None) -> EvictionCount:
    if past is None:
        return now
    counts = (new - old for new, old in zip(now[2:], past[2:], strict=True))
    return EvictionCount(now.policy, now.reason, *counts)
