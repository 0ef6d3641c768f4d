"""Blocks of the transformers library's continuous batching, remembered by a prefix tree.

Its cache asks one allocator for each type of layer for blocks, and gives them back. These keep what
has been computed in a `PrefixIndex` for as long as nobody needs the room: a request begins behind
its longest cached prefix, and room is made leaf by leaf, by the policy, and no more than needed.

The library's ledger counts who has a block; the tree is one of those who can have it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.generation.continuous_batching.cache_allocators import (
    CachePool,
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import BlockLedger

from prefixtree.engines.continuous_batching.step import Batch
from prefixtree.engines.errors import UnsupportedAttention, UnsupportedModel
from prefixtree.index import Prefix, PrefixIndex

NAME = "flash_prefixtree"
"""Of the attention. The library's continuous batching makes masks for all that is no "flash"."""


LAYOUT = "HND"
"""A block has the K and V of several layers, so a run of blocks is no run of a layer's tokens. What
is inside of one would do for either layout; in this one nobody looks for runs."""


@dataclass
class _Held:
    """What one request has of the tree."""

    blocks: int
    """How many of its blocks, from its first on, are there."""
    prefix: Prefix | None
    """Their tokens, held; None for a fork that has added nothing yet."""


class TreeLedger(BlockLedger):
    """Who has how many blocks, and what the cache asks the ledger to drop."""

    def __init__(self, prefixes: PrefixIndex) -> None:
        super().__init__()
        self._prefixes = prefixes

    def reset(self) -> None:
        super().reset()
        self._prefixes.clear()

    def freed(self, blocks: list[int]) -> list[int]:
        """Those of the blocks that nobody has any more, now that one who had them all lets go."""
        return [block for block in blocks if self.release(block)]

    def evict_cached_blocks(self) -> list[int]:
        """All that no request uses: the cache asks when nothing else would let it go on."""
        return self.evict(self._prefixes.evictable_blocks)

    def evict(self, num_blocks: int) -> list[int]:
        return self.freed(self._prefixes.evict(num_blocks).tolist())


class TreeAllocator(FullAttentionCacheAllocator):
    """Blocks of the full-attention layers.

    Attributes: prefixes (the `PrefixIndex`, thread-safe: its statistics and its tree may be looked
    at while requests run), window (how many tokens these layers see, None for all).
    """

    supports_block_sharing = True
    supports_block_table = False  # the library's own kernels would read it
    eviction: ClassVar[str] = "lru"
    window: int | None = None

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        """As the library calls it. Raises `UnsupportedModel` for latent attention (MLA)."""
        if getattr(config, "kv_lora_rank", None) is not None:
            # The library would give keys the room of values, and fail at the first request.
            raise UnsupportedModel(
                f"the model has latent attention (kv_lora_rank is {config.kv_lora_rank}), for which"
                " the library's continuous batching has no cache: use model.generate"
            )
        super().__init__(config=config, **kwargs)
        self.batch: Batch | None = None
        self._config = config
        self._held: dict[str, _Held] = {}
        self._matched: Prefix | None = None
        self._prompt: list[int] = []
        # The model has its attention back as soon as there is no such cache any more.
        weakref.finalize(self, _restore_attention, config, config._attn_implementation)
        config._attn_implementation = NAME

    def register_cache_tensor(
        self,
        bytes_per_sector: int,
        non_trash_bytes: int,
        cache_tensor: torch.Tensor,
        pool: CachePool,
    ) -> None:
        super().register_cache_tensor(bytes_per_sector, non_trash_bytes, cache_tensor, pool)
        heads, dim = self.num_key_value_heads, self.head_dim
        pages = self.cache_tensor.view(
            -1, self.pages_per_block, 2, self.tokens_per_page, heads, dim
        )
        self._kv = {
            layer: (pages[:, at, 0].transpose(1, 2), pages[:, at, 1].transpose(1, 2))
            for at, layer in enumerate(self.layer_indices)
        }
        self.prefixes = PrefixIndex(
            len(pages), self.tokens_per_page, eviction=self.eviction, thread_safe=True
        )
        self.ledger: TreeLedger = TreeLedger(self.prefixes)
        self.write_trash_index = -1  # a slot that is not written

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, each [blocks, KV heads, tokens per block, head_dim], in place."""
        return self._kv[layer]

    # What the cache asks before it looks at the free blocks: room is made here.

    def needs_new_sectors(self, request_id: str, past_length: int, query_length: int) -> int:
        self._make_room(self.needs_new_blocks(request_id, past_length, query_length))
        needed: int = super().needs_new_sectors(request_id, past_length, query_length)
        return needed

    def count_non_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        needed: int = super().count_non_shareable_blocks(source_request_id, past_length)
        self._make_room(needed)
        return needed

    # A request's way through the cache.

    def match_prefix_blocks(self, prompt_ids: list[int]) -> list[int]:
        # The last token of a prompt is always computed, for its logits.
        self._prompt = prompt_ids
        self._matched = self.prefixes.match(prompt_ids[:-1])
        blocks: list[int] = self.prefixes.blocks(self._matched).tolist()
        return blocks

    def acquire_prefix_blocks(self, request_id: str, prefix_len: int, block_ids: list[int]) -> None:
        """`prefix_len`: what all types of layers have of the prompt that was matched last."""
        prefix = self._matched
        if prefix is None or prefix.length != prefix_len:
            prefix = self.prefixes.match(self._prompt[:prefix_len])
        self._hold(request_id, prefix, len(self._prompt))
        super().acquire_prefix_blocks(request_id, prefix_len, block_ids)

    def allocate_cache_to_request(
        self, request_id: str, past_length: int, query_length: int
    ) -> None:
        if request_id not in self.block_table:
            # Nothing was found, or its KV comes back from the library's swap space.
            prompt = None if past_length else max(len(self._prompt), query_length)
            self._hold(request_id, self.prefixes.match([]), prompt)
        super().allocate_cache_to_request(request_id, past_length, query_length)

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        shared = self.count_shareable_blocks(source_request_id, past_length)
        copied: tuple[list[int], list[int]] = super().fork_blocks(
            source_request_id, dest_request_id, past_length
        )
        self._held[dest_request_id] = _Held(shared, None)
        self._make_room(len(copied[1]))  # for a sibling
        return copied

    def mark_complete_blocks(
        self, request_id: str, token_ids: list[int], new_new_blocks: int
    ) -> None:
        """The next `new_new_blocks` blocks of a request are computed: others find them from now on.

        Where the tree has their tokens already, the request goes on with the tree's blocks.
        """
        held = self._held.get(request_id)
        if held is None:  # it was cancelled while its batch was computed
            return
        table, size = self.block_table[request_id], self.tokens_per_page
        if held.prefix is None:
            held.prefix = self.prefixes.match(token_ids[: held.blocks * size])
            self.prefixes.hold(held.prefix)
        begin, end = held.prefix.length // size, held.blocks + new_new_blocks
        tokens = token_ids[begin * size : end * size]
        known = self.prefixes.extend(held.prefix, tokens, table[begin:end]) // size
        held.blocks = end
        for block in table[begin + known : end]:
            self.ledger.acquire(block)
        if known:
            own, there = table[begin : begin + known], slice(begin * size, (begin + known) * size)
            found = self.prefixes.blocks(held.prefix, there.start, there.stop).tolist()
            for block in found:
                self.ledger.acquire(block)
            table[begin : begin + known] = found
            self._free(self.ledger.freed(own))

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """With `no_cache` the blocks must be free at once; others that are older may be instead."""
        held = self._held.pop(request_id, None)
        if held is not None and held.prefix is not None:
            self.prefixes.release(held.prefix)
        table = self.block_table.pop(request_id, [])
        self._free(self.ledger.freed(table))
        if no_cache and held is not None:
            only_cached = [
                b for b in table[: held.blocks] if b not in self.ledger.shared_ref_counts
            ]
            self._free(self.ledger.evict(len(only_cached)))

    def free_all_requests(self) -> None:
        super().free_all_requests()
        # A cache that is kept starts again with this, and the model had its attention back.
        self._config._attn_implementation = NAME

    # What a step reads and writes, for the attention of this package.

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """A request's blocks: an entry for each of them, not for each token."""
        return self.block_table[request_id][
            : -(-(past_length + query_length) // self.tokens_per_page)
        ]

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Slots (block * tokens per block + offset) of the new tokens."""
        positions = np.arange(past_length, past_length + query_length)
        blocks = np.asarray(self.block_table[request_id])[positions // self.tokens_per_page]
        slots: list[int] = (
            blocks * self.tokens_per_page + positions % self.tokens_per_page
        ).tolist()
        return slots

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedAttention(
            f"this cache is read by the attention {NAME!r}, which the model had when its manager "
            f"started; it has {self._config._attn_implementation!r} now"
        )

    def _hold(self, request_id: str, prefix: Prefix, prompt: int | None) -> None:
        self.prefixes.hold(prefix, query_tokens=prompt)
        self._held[request_id] = _Held(prefix.length // self.tokens_per_page, prefix)

    def _make_room(self, num_blocks: int) -> None:
        """Evicts until so many blocks are free, as far as there is something to evict."""
        free = self.pool.count_free_blocks(self.index)
        free += self.pool.num_free_sectors * self.blocks_per_sector
        if num_blocks > free:
            self._free(self.ledger.evict(num_blocks - free))

    def _free(self, blocks: list[int]) -> None:
        self.pool.free_blocks(self.index, blocks)


class TreeSlidingAllocator(TreeAllocator):
    """Blocks of the layers with a sliding window.

    They keep the KV of the whole sequence, not of its last window in a ring: what lies behind the
    window of one request is the prefix of another, and only so can models that have such layers
    share anything. Attention reads the window only.
    """

    layer_type = "sliding_attention"

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.sliding_window: int = config.sliding_window
        self.window = config.sliding_window


def _restore_attention(config: Any, previous: str) -> None:
    if config._attn_implementation == NAME:
        config._attn_implementation = previous
