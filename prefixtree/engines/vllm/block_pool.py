"""vLLM's pool of blocks, with the tree in place of the order in which it forgets cached blocks.

vLLM names a full block by a hash over all tokens up to its end, LoRA adapter, cache salt and
multimodal inputs among what is hashed. The tree's tokens are the words of these hashes, a block of
eight a block of KV. So two requests share here what they share in vLLM, by vLLM's own rules, a walk
compares a sixteenth of a token a token, and no rule about what may be shared is written twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.request import Request

from prefixtree.columns import Int32s
from prefixtree.errors import PrefixGone
from prefixtree.index import Prefix, PrefixIndex

_NO_SIGN = np.int32(np.iinfo(np.int32).max)
WORDS = 8
"""Tokens of the tree for a block: the int32 words of a hash of 32 bytes, 0 behind shorter ones."""


def as_words(hashes: Sequence[bytes]) -> Int32s:
    """Hashes of one length as tokens of the tree, int32 [len(hashes) * WORDS].

    Tokens have no sign, so that 31 bits of each 32 are compared: 248 of a SHA-256.
    """
    words = np.frombuffer(b"".join(hashes), np.int32) & _NO_SIGN
    short = WORDS - len(words) // max(len(hashes), 1)
    if short and len(hashes):
        words = np.pad(words.reshape(len(hashes), -1), ((0, 0), (0, short)))
    return words.ravel()


class FreeBlocks(FreeKVCacheBlockQueue):
    """The blocks that no request references, in the order in which they are handed out.

    First those that hold nothing, vLLM's linked list, then those that the tree gives up.
    """

    def __init__(self, blocks: list[KVCacheBlock], pool: TreeBlockPool) -> None:
        self._pool = pool
        self._empty = 0
        super().__init__(blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out. vLLM's methods count with it, and know of their list."""
        return self._empty + self._pool.index.evictable_blocks

    @num_free_blocks.setter
    def num_free_blocks(self, count: int) -> None:
        self._empty = count - self._pool.index.evictable_blocks

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        empty = min(n, self._empty)
        return super().popleft_n(empty) + self._pool.evict(n - empty)

    def remove(self, block: KVCacheBlock) -> None:
        if block.block_hash is None:  # others are in the tree, where `touch` holds them
            super().remove(block)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        super().append_n([block for block in blocks if block.block_hash is None])
        for block in blocks:
            self._pool.release(block)

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        blocks = self.get_all_free_blocks()
        return iter(blocks[blocks.index(cursor) + 1 if cursor in blocks else 0 :])

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """In the order in which they go."""
        cached = self._pool.index.eviction_order().tolist()
        return super().get_all_free_blocks() + [self._pool.blocks[block] for block in cached]


class TreeBlockPool(BlockPool):
    """A `BlockPool` whose cached blocks are in a `PrefixIndex`.

    vLLM's reference counts say which blocks requests use, as ever. A block that is used keeps the
    path to it: the path to the last block of each request is held until nobody uses that block.
    Nothing is cached twice. Of two copies of the same tokens the one that is used is cached: where
    a request computes again what is here (it asked for the logprobs of its prompt, say), its blocks
    take the place of those that nobody uses. Where both are used, at the same time that is, the
    first stays; who came second keeps its own to itself, and what it computes behind them goes
    below the first.
    """

    def __init__(self, num_gpu_blocks: int, *, eviction: Any = "lru", **options: Any) -> None:
        """As `BlockPool`; `eviction` as for `PrefixIndex`."""
        self.index = PrefixIndex(num_gpu_blocks, WORDS, eviction=eviction)
        self._holds: dict[int, list[Prefix]] = {}  # last block of a path to holds on it
        self._hashes: dict[int, Sequence[bytes]] = {}  # cached block to a list its path begins
        self._found: tuple[Prefix, list[KVCacheBlock]] | None = None  # what is touched next
        super().__init__(num_gpu_blocks, **options)
        self.free_block_queue = FreeBlocks(self.blocks[1:], self)  # not the null block

    def longest_prefix(self, hashes: Sequence[bytes]) -> list[KVCacheBlock]:
        """The cached blocks of the longest prefix of these hashes that is there."""
        prefix = self.index.match(as_words(hashes))
        blocks = [self.blocks[block] for block in self.index.blocks(prefix).tolist()]
        self._found = prefix, blocks.copy()
        return blocks

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Puts what the tree has not yet there, and only that gets a hash and an event."""
        if num_cached_blocks >= num_full_blocks:
            return
        before = blocks[num_cached_blocks - 1] if num_cached_blocks else None
        prefix = self._take_hold(before)
        start = num_cached_blocks if prefix else 0
        hashes = request.block_hashes
        words = as_words(hashes[start:num_full_blocks])
        ids = [block.block_id for block in blocks[start:num_full_blocks]]
        if prefix:
            known = start + self.index.extend(prefix, words, ids) // WORDS
        else:
            prefix, known_words = self.index.insert(words, ids)
            known = known_words // WORDS
            self.index.hold(prefix)
        if known > start:
            self._take_over(prefix, hashes, blocks, start, known)
        if known == num_full_blocks:  # the path may end with a block that is not this request's
            path = self.index.blocks(prefix)
            self.index.release(prefix)
            self._hold_used(path)
            return
        self._holds.setdefault(ids[-1], []).append(prefix)
        self._hashes.update((block.block_id, hashes) for block in blocks[known:num_full_blocks])
        super().cache_full_blocks(
            request, blocks, known, num_full_blocks, block_size, kv_cache_group_id
        )

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        super().touch(blocks)
        left = [block for block in blocks if block.block_hash is not None]
        if left and self._found is not None and left == self._found[1]:
            prefix, self._found = self._found[0], None  # a second request gets a hold of its own
            with suppress(PrefixGone):
                self.index.hold(prefix)
                self._holds.setdefault(left[-1].block_id, []).append(prefix)
                return
        while left:  # once, unless a connector touches blocks of several paths at a time
            path = self._hold(max(left, key=self._depth))
            left = [
                block
                for block in left
                if self._depth(block) > len(path) or path[self._depth(block) - 1] != block.block_id
            ]

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Forgets blocks, used or not, with all that follows the blocks before them."""
        for block_id in block_ids:
            if block_id in self._hashes:
                self._forget(self.blocks[block_id])

    def reset_prefix_cache(self) -> bool:
        if not super().reset_prefix_cache():
            return False
        self._hashes.clear()
        dropped = self.index.clear().blocks.tolist()
        self.free_block_queue.append_n([self.blocks[block] for block in dropped])
        return True

    def evict(self, num_blocks: int) -> list[KVCacheBlock]:
        """Takes blocks out of the tree that nobody uses; `get_new_blocks` tells of it."""
        evicted = self.index.evict(num_blocks, last_first=True).tolist() if num_blocks else []
        for block in evicted:
            del self._hashes[block]
        return [self.blocks[block] for block in evicted]

    def release(self, block: KVCacheBlock) -> None:
        """Nobody uses the block any more, perhaps blocks before it."""
        for prefix in self._holds.pop(block.block_id, ()):
            self._hold_used(self.index.blocks(prefix))
            self.index.release(prefix)

    def _depth(self, block: KVCacheBlock) -> int:
        """Blocks of the path that ends with a cached block."""
        return int(block.block_hash_num_tokens or 0) // self.hash_block_size

    def _hold(self, block: KVCacheBlock) -> Int32s:
        """Keeps the path to a cached block while the block is used; returns the path's blocks."""
        prefix = self.index.match(as_words(self._hashes[block.block_id][: self._depth(block)]))
        self.index.hold(prefix)
        self._holds.setdefault(block.block_id, []).append(prefix)
        return self.index.blocks(prefix)

    def _hold_used(self, path: Int32s) -> None:
        """Keeps what of a path is used, at most once: requests come with holds of their own."""
        for block in map(self.blocks.__getitem__, path[::-1].tolist()):
            if block.ref_cnt:
                if block.block_id not in self._holds:
                    self._hold(block)
                return

    def _take_over(
        self,
        prefix: Prefix,
        hashes: Sequence[bytes],
        blocks: list[KVCacheBlock],
        start: int,
        known: int,
    ) -> None:
        """Puts a request's blocks start..known-1 where cached ones with the same KV are unused."""
        cached = self.index.blocks(prefix, start * WORDS, known * WORDS).tolist()
        pairs = zip(map(self.blocks.__getitem__, cached), blocks[start:known], strict=True)
        kept = [block if block.ref_cnt else own for block, own in pairs]
        ids = [block.block_id for block in kept]
        freed = [self.blocks[i] for i in self.index.replace(prefix, ids, start * WORDS).tolist()]
        taken = [block for block in kept if block.block_hash is None]
        for old, new in zip(freed, taken, strict=True):
            self.move_block_hashes(old, new)  # to the world outside nothing has changed
            del self._hashes[old.block_id]
            self._hashes[new.block_id] = hashes
        self.free_block_queue.prepend_n(freed)

    def _take_hold(self, block: KVCacheBlock | None) -> Prefix | None:
        """A hold on the path to a block, which moves to a later block."""
        if block is None or block.block_id not in self._holds:
            return None
        holds = self._holds[block.block_id]
        prefix = holds.pop()
        if not holds:
            del self._holds[block.block_id]
        return prefix

    def _forget(self, block: KVCacheBlock) -> None:
        depth = self._depth(block)
        path = self._hashes[block.block_id][:depth]
        for held in list(self._holds):
            if self._hashes[held][:depth] == path and self._depth(self.blocks[held]) >= depth:
                for prefix in self._holds.pop(held):
                    self.index.release(prefix)
        dropped = self.index.forget(as_words(path[:-1]) if depth > 1 else None).blocks.tolist()
        for gone in map(self.blocks.__getitem__, dropped):
            del self._hashes[gone.block_id]
            self._maybe_evict_cached_block(gone)
            if not gone.ref_cnt:
                self.free_block_queue.append(gone)
        above = self.index.match(as_words(path[:-1]))
        self._hold_used(self.index.blocks(above))
