"""A cache's events as Python objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Protocol, Self

from allocator import InvalidArgument
from prefixtree.errors import EventsClosed
from prefixtree.events.hashing import Algorithm, ChainedHash
from prefixtree.events.ledger import Ledger, Told
from prefixtree.events.messages import Event
from prefixtree.journal import Changes
from prefixtree.tree import DEFAULT, Namespace


class Cache(Protocol):
    """What a `PrefixCache` and a `PrefixIndex` offer here."""

    @property
    def block_size(self) -> int: ...
    def _begin_journal(self) -> None: ...
    def _changes(self) -> Changes | None: ...
    def _end_journal(self) -> None: ...


def no_adapter(namespace: Namespace) -> None:
    """No namespace is that of an adapter."""


class KVEvents:
    """The events of one cache or index, for consumers in this process and for `ZmqPublisher`.

    Whole blocks of `block_size` tokens are told of: those whose tokens can all be matched, at any
    alignment of the cache. A block is stored in the events exactly while it is in the cache, seen
    whenever they are taken; what came and went in between is not told.

    Hashes are chained over blocks and begin with the namespace, so equal tokens have different
    hashes in different namespaces. They depend on nothing else, so caches with the same `hash` and
    `seed` agree about them.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        hash: Algorithm = "xxh3-128",
        seed: int = 0,
        block_hashes: Literal["int", "bytes"] = "int",
        medium: str | None = "GPU",
        lora_name: Callable[[Namespace], str | None] = no_adapter,
    ) -> None:
        """From now on the cache notes what changes; all that it holds already is told first.

        With the hash "xxh3-128", whoever knows the `seed` can make up blocks that collide; it
        matters to consumers only, the cache itself compares tokens. `block_hashes` are the
        last 64 bits as an integer, what routers expect, or all bytes. `medium` says where the
        blocks lie, and `lora_name` which adapter a namespace is for; both are sent as they are.
        `lora_name` is called by `take` and `publish`, when a namespace has new paths.

        Raises `InvalidArgument` for an unknown hash or form of it, a seed outside 0..2**64-1, and
        a cache that has events already.
        """
        if block_hashes not in ("int", "bytes"):
            raise InvalidArgument(f"block_hashes is {block_hashes!r}, expected 'int' or 'bytes'")
        chain = ChainedHash(hash, seed)
        self.ledger = Ledger(
            cache.block_size, chain, block_hashes == "bytes", medium, lora_name(DEFAULT)
        )
        """What was taken so far; of events that a publisher sends, before that."""
        self._lora_name = lora_name
        self._changes: Changes | None = None  # of a `collect` that failed
        self._cache = cache
        self._closed = False
        cache._begin_journal()

    def take(self) -> list[Event]:
        """What changed since the last call, in an order in which it can be carried out.

        Removed first, children before parents; then stored, parents before children. To be called
        as the cache is, and not while a publisher sends these events. O(blocks that changed), with
        a hash for each that came. Raises as `collect`.
        """
        told = self.collect()
        return self.ledger.apply(told) if told else []

    def everything(self) -> Iterator[Event]:
        """All that was taken so far, for a consumer that knows nothing or missed something.

        `AllBlocksCleared`, and then what is stored. Does not touch the cache.
        """
        return self.ledger.everything()

    @property
    def stored_blocks(self) -> int:
        """Blocks that the events taken so far leave stored."""
        return len(self.ledger)

    def collect(self) -> Told | None:
        """What changed, not hashed yet; None when nothing did. To be called as the cache is.

        The first half of `take`, and the one that touches the cache. Raises `EventsClosed`, what a
        broken cache does, and what `lora_name` does; the next call then tells the same again.
        """
        if self._closed:
            raise EventsClosed("the events of the cache are closed")
        changes = self._changes = self._changes or self._cache._changes()
        if not changes:
            return None
        names = {run: self._lora_name(space) for run, space in changes.namespaces.items()}
        self._changes = None
        return Told(changes, names)

    def close(self) -> None:
        """The cache notes nothing any more. More than once does no harm."""
        if not self._closed:
            self._closed = True
            self._cache._end_journal()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
