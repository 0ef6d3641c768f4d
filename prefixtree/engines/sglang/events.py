"""What came into the tree and what went, told in SGLang's own KV events."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from sglang.srt.mem_cache.radix_cache import RadixKey

from prefixtree.columns import Int32s


@dataclass(slots=True)
class _Node:
    """As much of a node of SGLang's tree as its event recorder looks at."""

    key: Any
    parent: _Node | None
    hash_value: list[str] | None
    event_hash_value: list[str] | None


_ROOT = _Node(RadixKey(array("q")), None, [], None)


class _Stored(NamedTuple):
    """What a page was announced as: of its tokens, of them in their namespace, the namespace."""

    hash_value: str
    event_hash_value: str
    namespace: tuple[str | None, str | None]


class PageEvents:
    """Hands pages to a KVCacheEventRecorder, which hashes and formats them as for SGLang's caches.

    Pages of the tree are known by their block ids; each is remembered from its store to its
    removal, about 500 bytes.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._pages: dict[int, _Stored] = {}

    def stored(self, before: int | None, key: Any, blocks: Int32s) -> None:
        """Pages are findable now.

        Args:
            before: block of the page before them, None where they begin a path.
            key: RadixKey of their tokens alone, with their namespace.
            blocks: int32 [pages].
        """
        if not len(blocks):
            return
        parent = _ROOT
        if before is not None:
            known = self._pages[before]
            parent = _Node(key, _ROOT, [known.hash_value], [known.event_hash_value])
        node = _Node(key, parent, None, None)
        self._recorder.record_store(node)
        assert node.hash_value is not None
        # Without a namespace the recorder makes one hash only.
        event_hashes = node.event_hash_value or node.hash_value
        namespace = (key.extra_key, key.cache_salt)
        for block, own, event in zip(blocks.tolist(), node.hash_value, event_hashes, strict=True):
            self._pages[block] = _Stored(own, event, namespace)

    def removed(self, blocks: Int32s) -> None:
        """These pages are gone; int32 [pages]."""
        gone = [self._pages.pop(block) for block in blocks.tolist()]
        page_size = self._recorder.page_size
        for (extra_key, cache_salt), group in groupby(gone, key=attrgetter("namespace")):
            pages = list(group)
            # The recorder reads how many tokens they have, not which.
            tokens = array("q", bytes(8 * page_size * len(pages)))
            key = RadixKey(tokens, extra_key, cache_salt=cache_salt)
            hashes = [page.hash_value for page in pages]
            event_hashes = [page.event_hash_value for page in pages]
            self._recorder.record_remove(_Node(key, _ROOT, hashes, event_hashes))

    def cleared(self) -> None:
        """Everything is gone."""
        self._pages.clear()
        self._recorder.record_all_cleared()
