"""The statistics for Prometheus.

A collector is given a function that returns statistics and calls it whenever it is scraped, in the
scraper's thread. `PrefixCache.stats` itself will do for a cache made with `thread_safe=True`. For
any other, let the thread that uses the cache take a snapshot each step, and return the latest:

    class Engine:
        def step(self) -> None:
            ...
            self.stats = self.cache.stats()

    REGISTRY.register(StatsCollector(lambda: engine.stats))

Names end in their unit, and those of counters in `_total`, which the tables below leave away.
Needs the extra `metrics`; without it the import raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from allocator.errors import at_least
from prefixtree.histogram import Histogram
from prefixtree.stats import Stats

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "metrics need prometheus_client: pip install 'prefixtree[metrics]'"
    ) from error

__all__ = ["CONTENT_TYPE", "StatsCollector", "exposition"]

GAUGES = {
    "blocks": ("num_blocks", "Blocks of the pool."),
    "block_tokens": ("block_size", "Token slots of a block."),
    "free_blocks": ("free_blocks", "Blocks that nothing holds."),
    "free_extents": ("free_extents", "Runs of consecutive free blocks."),
    "evictable_blocks": ("evictable_blocks", "Blocks that evicting all unpinned nodes would free."),
    "pinned_blocks": ("pinned_blocks", "Blocks that open sequences and pins hold."),
    "retired_blocks": (
        "retired_blocks",
        "Blocks given up at a commit, held until their sequence goes on.",
    ),
    "reserved_blocks": ("reserved_blocks", "Blocks that are never handed out."),
    "cached_tokens": ("cached_tokens", "Tokens whose KV is in the tree, each once."),
    "pinned_tokens": ("pinned_tokens", "Cached tokens that open sequences or pins use."),
    "evictable_tokens": ("evictable_tokens", "Cached tokens that nothing uses."),
    "pending_tokens": ("pending_tokens", "Tokens of open sequences that nobody can match yet."),
    "logical_tokens": (
        "logical_tokens",
        "Tokens of all open sequences, shared ones counted for each.",
    ),
    "shared_tokens": ("shared_tokens", "Tokens whose KV need not be held thanks to sharing."),
    "unused_slots": ("unused_slots", "Token slots of blocks in use that no token takes."),
    "nodes": ("nodes", "Nodes of the tree."),
    "branches": ("branches", "Nodes and roots that have nodes below them."),
    "open_sequences": ("open_sequences", "Sequences that are open."),
    "prefilling_sequences": (
        "prefilling_sequences",
        "Open sequences whose prompt is not committed whole.",
    ),
    "kept_prefixes": ("kept_prefixes", "Prefixes pinned for good."),
    "kept_tokens": ("kept_tokens", "Tokens of those prefixes, shared ones counted for each."),
    "attended_tokens": (
        "attended_tokens",
        "Tokens whose KV attention reads at the last step planned, each once.",
    ),
    "attended_logical_tokens": (
        "attended_logical_tokens",
        "Tokens whose KV attention would read at that step without sharing.",
    ),
}
"""Name without the prefix: attribute of `Stats`, help."""

COUNTERS = {
    "opens": ("opens", "Sequences opened."),
    "forks": ("forks", "Sequences made by fork."),
    "rollbacks": ("rollbacks", "Rollbacks of sequences."),
    "closes": ("closes", "Sequences closed."),
    "preemptions": ("preemptions", "Sequences preempted."),
    "resumes": ("resumes", "Preempted sequences resumed."),
    "query_tokens": ("query_tokens", "Prompt tokens of all opened sequences."),
    "hit_tokens": ("hit_tokens", "Prompt tokens whose KV was there."),
    "joins": ("joins", "Commits that found the same tokens committed by another sequence."),
    "joined_tokens": ("joined_tokens", "Tokens that were computed twice for that."),
}
"""As `GAUGES`."""

EVICTIONS = {
    "evicted_nodes": ("nodes", "Nodes evicted whole."),
    "trimmed_nodes": ("trimmed", "Nodes that lost only their tail to an eviction."),
    "evicted_tokens": ("tokens", "Cached tokens evicted or forgotten."),
    "evicted_blocks": ("blocks", "Blocks that evictions freed."),
}
"""Counters by policy and reason. Name: field of `EvictionCount`, help."""

HISTOGRAMS = {
    "match_length_tokens": ("match_lengths", "Tokens of a prompt whose KV was there."),
    "path_nodes": ("path_nodes", "Nodes on a path when a sequence, a fork or a pin takes it."),
    "reuse_gap_seconds": ("reuse_gaps", "Time that a cached prefix lay idle until its next use."),
    "idle_before_eviction_seconds": (
        "idle_times",
        "Time between the last use of a node and its eviction.",
    ),
    "block_lifetime_seconds": (
        "block_lifetimes",
        "Time from the opening of the sequence that wrote a block to its eviction.",
    ),
}
"""As `GAUGES`."""


class StatsCollector(Collector):
    """A collector for a registry of prometheus_client."""

    def __init__(self, read: Callable[[], Stats], *, bytes_per_token: int | None = None) -> None:
        """`read` is called at each scrape, from the scraper's thread.

        With `bytes_per_token`, those of K and V of one token in all layers, the bytes that sharing
        saves, in memory and in what attention reads, are among the metrics. Raises
        `InvalidArgument` unless that is an integer >= 1.
        """
        self._read = read
        self._bytes = (
            None if bytes_per_token is None else at_least(1, "bytes_per_token", bytes_per_token)
        )

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not read the statistics."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        for name, (attribute, text) in GAUGES.items():
            yield GaugeMetricFamily(f"prefixtree_{name}", text, getattr(stats, attribute))
        if self._bytes is not None:
            text = "Bytes of K and V that need not be held thanks to sharing."
            saved = stats.saved_bytes(self._bytes)
            yield GaugeMetricFamily("prefixtree_saved_bytes", text, saved)
            text = "Bytes of K and V that attention at the last step planned need not read."
            saved = stats.saved_attention_bytes(self._bytes)
            yield GaugeMetricFamily("prefixtree_saved_attention_bytes", text, saved)
        for name, (attribute, text) in COUNTERS.items():
            yield CounterMetricFamily(f"prefixtree_{name}", text, getattr(stats, attribute))
        for name, (attribute, text) in EVICTIONS.items():
            family = CounterMetricFamily(f"prefixtree_{name}", text, labels=["policy", "reason"])
            for count in stats.evictions:
                family.add_metric([count.policy, count.reason], getattr(count, attribute))
            yield family
        for name, (attribute, text) in HISTOGRAMS.items():
            yield _histogram(f"prefixtree_{name}", text, getattr(stats, attribute))


def exposition(stats: Stats) -> bytes:
    """The statistics in the text format of `CONTENT_TYPE`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatsCollector(lambda: stats))
    return generate_latest(registry)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [str(float(bound)) for bound in histogram.bounds] + ["+Inf"]
    buckets = list(zip(bounds, map(float, histogram.cumulative()), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)
