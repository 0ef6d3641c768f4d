"""The latest view, handed from the thread that uses the cache to those that serve."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixtree.cache import PrefixCache
    from prefixtree.stats import Stats
    from prefixtree.view import TreeView

REFRESH_SECONDS = 1.0
"""How often a thread-safe cache is looked at while somebody watches."""


class Published:
    """Views are immutable: what one thread has put here, any other may read.

    The cache itself is touched by `publish`, and by the others only when it is thread-safe.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._changed = threading.Condition()
        self._view: TreeView
        self._looked = 0.0
        self._stopped = False
        self.number = 0
        """Of the latest view; grows from one to the next."""
        self.publish()

    def publish(self) -> None:
        """Takes a view now."""
        view = self._cache.tree()
        with self._changed:
            self._view = view
            self._looked = time.monotonic()
            self.number += 1
            self._changed.notify_all()

    def latest(self) -> tuple[int, TreeView]:
        """The latest view and its number. Raises what a broken cache does."""
        self._refresh()
        with self._changed:
            return self.number, self._view

    def stats(self) -> Stats:
        """The statistics: those of now of a thread-safe cache, else those of the latest view.

        Raises what a broken cache does.
        """
        if self._cache.thread_safe:
            return self._cache.stats()
        with self._changed:
            return self._view.stats

    def wait(self, number: int, seconds: float) -> int | None:
        """The latest view's number, at once when it is above `number`, else after `seconds`.

        None when stopped. Raises what a broken cache does.
        """
        end = time.monotonic() + seconds
        while True:
            self._refresh()
            with self._changed:
                left = end - time.monotonic()
                if self._stopped:
                    return None
                if self.number > number or left <= 0:
                    return self.number
                self._changed.wait(min(left, REFRESH_SECONDS))

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _refresh(self) -> None:
        """Takes a view of a thread-safe cache when the last one is old and no longer true."""
        if not self._cache.thread_safe:
            return
        with self._changed:
            if time.monotonic() - self._looked < REFRESH_SECONDS:
                return
            self._looked = time.monotonic()
            known = self._view.stats
        # Whatever changes the tree changes a number of the statistics.
        if self._cache.stats() != known:
            self.publish()
