"""What the cache did and holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Counted since the cache was made."""

    opens: int = 0
    forks: int = 0
    rollbacks: int = 0
    closes: int = 0
    preemptions: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """A snapshot: tokens, nodes and blocks as they are now, events since the cache was made."""

    num_blocks: int
    block_size: int
    free_blocks: int
    evictable_blocks: int
    """Blocks that come free when everything that is not pinned is evicted."""
    retired_blocks: int
    """Blocks that sequences gave up at a commit and keep until they go on: another copy stayed."""
    cached_tokens: int
    """Tokens whose KV is in the tree, each once: pinned_tokens + evictable_tokens."""
    pinned_tokens: int
    evictable_tokens: int
    nodes: int
    """Nodes in the tree, without the root."""
    open_sequences: int
    logical_tokens: int
    """Tokens of all open sequences, shared ones counted for each: what no sharing would keep."""
    opens: int
    forks: int
    """Sequences made by fork."""
    rollbacks: int
    closes: int
    preemptions: int
    query_tokens: int
    """Prompt tokens of all opened sequences; a resume does not count again."""
    hit_tokens: int
    """Those of them whose KV was there."""
    evicted_tokens: int
    """Those that were forgotten count, too."""
    evicted_nodes: int
    """Nodes evicted whole."""
    trimmed_nodes: int
    """Nodes that lost only their tail, because that made room enough."""

    @property
    def used_blocks(self) -> int:
        """Blocks that hold KV or are reserved for it."""
        return self.num_blocks - self.free_blocks

    @property
    def hit_rate(self) -> float:
        """hit_tokens / query_tokens, 0.0 before the first query."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0
