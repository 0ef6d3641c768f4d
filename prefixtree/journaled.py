"""What `events` calls of a cache."""

from __future__ import annotations

from contextlib import AbstractContextManager

from allocator import InvalidArgument
from prefixtree.guard import guarded
from prefixtree.journal import Changes, Journal
from prefixtree.tree import RadixTree


class Journaled:
    """Of classes that have a tree, and what `guarded` needs."""

    _tree: RadixTree
    _lock: AbstractContextManager[object]
    _broken: str

    @guarded
    def _begin_journal(self) -> None:
        if self._tree.journal is not None:
            raise InvalidArgument("the cache has KV events already, expected one without")
        self._tree.journal = Journal(self._tree)

    @guarded
    def _changes(self) -> Changes | None:
        return None if self._tree.journal is None else self._tree.journal.take()

    def _end_journal(self) -> None:
        with self._lock:  # also of a broken cache
            self._tree.journal = None
