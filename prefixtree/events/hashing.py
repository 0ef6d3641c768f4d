"""Names of whole blocks that the same tokens, and all before them, have everywhere.

A chain: the hash of a block is one of the hash before it and of the block's tokens. At the
beginning of a path stands a hash of the namespace and the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import xxhash

from allocator import InvalidArgument
from allocator.errors import as_integer
from prefixtree.tree import Namespace

Algorithm: TypeAlias = Literal["xxh3-128", "sha256"]


class ChainedHash:
    """A hash function for chains, and what the chains of each namespace begin with."""

    size: int
    """Bytes of a hash."""

    def __init__(self, algorithm: Algorithm, seed: int) -> None:
        """Raises `InvalidArgument` for another algorithm and a seed outside 0..2**64-1."""
        seed = as_integer("seed", seed)
        if not 0 <= seed < 2**64:
            raise InvalidArgument(f"seed is {seed}, expected 0..2**64-1")
        self._seed = seed
        if algorithm == "xxh3-128":
            self.size = 16
            self._hash: Callable[[bytes], bytes] = partial(xxhash.xxh3_128_digest, seed=seed)
        elif algorithm == "sha256":
            self.size = 32
            self._hash = _sha256
        else:
            raise InvalidArgument(f"hash is {algorithm!r}, expected 'xxh3-128' or 'sha256'")

    def begin(self, namespace: Namespace) -> bytes:
        """What stands in front of the namespace's paths."""
        name = json.dumps(namespace, separators=(",", ":")).encode()
        return self._hash(self._seed.to_bytes(8, "little") + name)

    def extend(self, before: bytes, tokens: bytes, step: int) -> list[bytes]:
        """The hashes of the pieces of `step` bytes that `tokens` consists of."""
        function, hashes = self._hash, []
        for at in range(0, len(tokens), step):
            before = function(before + tokens[at : at + step])
            hashes.append(before)
        return hashes


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
