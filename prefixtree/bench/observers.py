"""All that looks at a cache at once: what it costs to be seen."""

from __future__ import annotations

import time
import weakref

from prefixtree.cache import PrefixCache
from prefixtree.events import KVEvents, ZmqPublisher
from prefixtree.inspector import serve
from prefixtree.metrics import exposition

SECONDS = 1.0
"""Between two looks of Prometheus and of the inspector; more often than either is usual."""


class Observers:
    """Of one cache, until it is collected: KV events sent, an inspector served, metrics scraped.

    Statistics are not among them: whoever takes them at each step pays for each `stats()`.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._publisher = ZmqPublisher(KVEvents(cache), "tcp://127.0.0.1:*")
        self._inspector = serve(cache)
        self._next = time.monotonic() + SECONDS
        for each in (self._publisher, self._inspector):
            weakref.finalize(self, each.close)

    def step(self) -> None:
        """What an engine does after each of its steps, and what else is due."""
        self._publisher.publish()
        if time.monotonic() >= self._next:
            exposition(self._cache.stats())
            self._inspector.publish()
            self._next = time.monotonic() + SECONDS
