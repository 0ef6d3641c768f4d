"""A consumer that knows the wire format only."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

import prefixtree as pt
from prefixtree.events import Event

FIELDS = {
    "BlockStored": [
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
    ],
    "BlockRemoved": ["block_hashes", "medium"],
    "AllBlocksCleared": [],
}

Key = tuple[tuple[Any, ...] | None, bytes]
"""The parts of a namespace, and the tokens of a path up to a whole block's end as int32."""


def packed(tokens: Any) -> bytes:
    return b"".join(int(token).to_bytes(4, "little") for token in tokens)


def parts_of(namespace: pt.Namespace) -> tuple[Any, ...] | None:
    if namespace == "":
        return None
    return namespace if isinstance(namespace, tuple) else (namespace,)


class Mirror:
    """What is cached, by what the events say; each of them is held against what came before it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.parents: dict[Any, Any] = {}
        self.children: Counter[Any] = Counter()
        self.paths: dict[Any, Key] = {}
        self.longest = 10**9
        """Tokens of a path that are remembered, to save memory."""

    @property
    def keys(self) -> Counter[Key]:
        """Each once but for namespaces of the same parts: ("a",) and "a"."""
        return Counter(self.paths.values())

    def apply(self, event: Any) -> None:
        """An event as decoded from msgpack: a map, or an array."""
        if isinstance(event, list):
            kind, *values = event
            event = dict(zip(FIELDS[kind], values, strict=False))
        else:
            kind = event.pop("type")
            assert event.keys() <= set(FIELDS[kind])
        {
            "BlockStored": self.stored,
            "BlockRemoved": self.removed,
            "AllBlocksCleared": self.cleared,
        }[kind](**event)

    def stored(
        self,
        block_hashes: list[Any],
        parent_block_hash: Any,
        token_ids: list[int],
        block_size: int,
        lora_id: Any,
        medium: Any,
        lora_name: Any,
        extra_keys: list[list[Any]] | None = None,
    ) -> None:
        size = self.block_size
        assert block_size == size
        assert len(token_ids) == size * len(block_hashes) > 0
        assert extra_keys is None or len(extra_keys) == len(block_hashes)
        for index, name in enumerate(block_hashes):
            assert name not in self.paths, "stored twice"
            parts = None if extra_keys is None else tuple(extra_keys[index])
            above = b""
            if parent_block_hash is not None:
                assert parent_block_hash in self.paths, "stored before its parent"
                known, above = self.paths[parent_block_hash]
                assert known == parts
            tokens = packed(token_ids[index * size : (index + 1) * size])
            self.paths[name] = (parts, (above + tokens)[-4 * self.longest :])
            self.parents[name] = parent_block_hash
            self.children[parent_block_hash] += 1
            parent_block_hash = name

    def removed(self, block_hashes: list[Any], medium: Any) -> None:
        assert block_hashes
        for name in block_hashes:
            assert name in self.paths, "removed without having been stored"
            assert not self.children.pop(name, 0), "removed before what is behind it"
            del self.paths[name]
            self.children[self.parents.pop(name)] -= 1

    def cleared(self) -> None:
        self.paths.clear()
        self.parents.clear()
        self.children.clear()


def decoded(events: list[Event]) -> list[Any]:
    """The events as they come out of their bytes."""
    back: list[Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(events))
    return back


def whole_blocks(cache: pt.PrefixCache) -> Counter[Key]:
    """The whole blocks that a cache holds, counted from its tree."""
    found: Counter[Key] = Counter()
    paths: dict[pt.NodeView | None, bytes] = {}
    view = cache.tree()
    size = view.block_size
    for node in view:
        paths[node] = paths.get(node.parent, b"") + packed(node.tokens)
        for end in range(node.start // size + 1, (node.start + len(node.tokens)) // size + 1):
            found[parts_of(node.namespace), paths[node][: 4 * end * size]] += 1
    return found
