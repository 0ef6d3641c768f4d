"""SGLang's radix cache on a `PrefixIndex`: its scheduler's calls, translated."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefResult,
    EvictResult,
    IncLockRefResult,
    InsertResult,
    MatchResult,
)
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import default_radix_cache_factory

from allocator import DEFAULT_PRIORITY, MAX_PRIORITY, EvictionPolicy, Usage, policy_names
from prefixtree.columns import Int32s
from prefixtree.engines.errors import UnsupportedCache
from prefixtree.engines.sglang.events import PageEvents
from prefixtree.index import Prefix, PrefixIndex
from prefixtree.scheduling import depth_first
from prefixtree.tree import Namespace


class FILO:
    """Newest first: SGLang's policy of that name."""

    name = "filo"

    def key(self, usage: Usage) -> int:
        return -usage.created


class PrefixTreeCache(BasePrefixCache):  # type: ignore[misc]
    """The prefix cache of one SGLang scheduler.

    SGLang's allocator hands out slots as before; pages whose KV is computed come into the tree at
    checkpoints and go back to the allocator when they are evicted. SGLang's node handles are
    `Prefix` objects. Extra keys and salts are namespaces, so that nothing is shared across them.

    Attributes: index (the tree: `index.stats()`, `index.tree()`, `index.explain(tokens,
    namespace=(extra_key, cache_salt))`), and those that SGLang asks of every cache.
    """

    disable = False

    def __init__(self, params: Any) -> None:
        """For CacheInitParams. Raises `UnsupportedCache` for an eviction policy that is not here
        and for bigram keys (EAGLE)."""
        if params.is_eagle:
            raise UnsupportedCache(
                "speculative decoding with EAGLE keys its cache by pairs of tokens, which "
                "--radix-cache-backend prefixtree does not"
            )
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size: int = params.page_size
        self.device = torch.device(self.token_to_kv_pool_allocator.device)
        self._policy = _policy(params.eviction_policy, params.eviction_policy_config)
        self.kv_events = KVCacheEventRecorder(
            enabled=params.enable_kv_cache_events,
            page_size=self.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self._events = PageEvents(self.kv_events) if params.enable_kv_cache_events else None
        if params.enable_metrics:
            self.init_metrics_collector()
        self.reset()

    @classmethod
    def for_server(cls, context: Any) -> Any:
        """The cache for a TreeCacheBuildContext; SGLang's own where caching is switched off.

        Raises `UnsupportedCache` for what keeps more than plain KV pages in its tree: separate
        pools for sliding windows, recurrent state, host tiers and sharded pages.
        """
        if context.disable_radix_cache:
            return default_radix_cache_factory(context)
        allocator = context.params.token_to_kv_pool_allocator
        for unsupported, what in (
            (context.is_hybrid_swa, "a pool of its own for sliding windows: start the server with "
             "--disable-hybrid-swa-memory, or without"),
            (context.is_hybrid_ssm, "recurrent state, which needs a server without"),
            (context.enable_hierarchical_cache, "a host tier: start without "
             "--enable-hierarchical-cache, or without"),
            (allocator.page_size != context.params.page_size, "pages shared out over ranks, which "
             "need a server without"),
        ):  # fmt: skip
            if unsupported:
                raise UnsupportedCache(f"this server has {what} --radix-cache-backend prefixtree")
        return cls(context.params)

    def reset(self) -> None:
        """Forget everything; the caller empties the allocator."""
        # Ids from 1 on, page 0 is for padding.
        num_blocks = self.token_to_kv_pool_allocator.size // self.page_size + 1
        self.index = PrefixIndex(num_blocks, self.page_size, eviction=self._policy)
        self.root_node = self.index.match([])
        if self._events is not None:
            self._events.cleared()

    def root_node_handle(self, extra_key: str | None = None) -> Prefix:
        """The empty prefix of a namespace without a salt."""
        return self.index.match([], namespace=(extra_key, None))

    def match_prefix(self, params: Any) -> MatchResult:
        """The longest cached prefix, in whole pages; renews its place in the eviction order."""
        prefix = self._touched(params.key)
        return MatchResult(
            device_prefix_len=prefix.length,
            last_device_node=prefix,
            last_host_node=prefix,
            best_match_node=prefix,
        )

    def touch_prefix(self, key: Any) -> None:
        """Renew the place in the eviction order of what is cached of the key."""
        self._touched(key)

    def insert(self, params: Any) -> InsertResult:
        """Make the KV of a key findable, whose slots are `params.value`, int64 [len(key)].

        Without a value the tokens stand for the slots, as in SGLang's own caches, in simulations.
        """
        key = params.key
        tokens = _tokens(key.token_ids, 0, len(key) - len(key) % self.page_size)
        slots = torch.from_numpy(tokens) if params.value is None else params.value
        blocks = self._blocks(slots[: len(tokens)])
        inserted = self.index.insert(tokens, blocks, namespace=_namespace(key))
        self._announce(key, tokens, inserted.prefix, inserted.known)
        self._prefer(inserted.prefix, params.priority)
        return InsertResult(
            prefix_len=inserted.known,
            total_len=len(tokens),
            last_device_node=inserted.prefix,
        )

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """Put what the request has computed, up to that position, behind the prefix it holds.

        Pages that the tree has already are freed and the request's row goes on with the tree's.
        O(new tokens).
        """
        key = RadixKey([], req.extra_key, cache_salt=req.cache_salt)
        if req.lock is None:  # of a request that was not admitted through a match
            req.lock = self.lock(self.index.match([], namespace=_namespace(key)))
        prefix: Prefix = req.lock.node
        start = prefix.length
        stop = max(start, up_to - up_to % self.page_size)
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start:stop]
        tokens = _tokens(req.full_untruncated_fill_ids, start, stop)
        known = self.index.extend(prefix, tokens, self._blocks(row))
        if known:
            duplicates = row[:known].to(torch.int64, copy=True)
            theirs = self._slots(self.index.blocks(prefix, start, start + known))
            self.req_to_token_pool.write(
                (req.kv.req_pool_idx, slice(start, start + known)), theirs.to(row.dtype)
            )
            self.token_to_kv_pool_allocator.free_segment(duplicates, start_pos=start)
        self._announce(key, tokens, prefix, start + known)
        self._prefer(prefix, req.priority or 0)
        if self._by_priority and req.finished():
            # A prompt outlives what was generated from it.
            prompt = _tokens(req.origin_input_ids, 0, len(req.origin_input_ids))
            found = self.index.match(prompt, namespace=prefix.namespace)
            self._prefer(found, (req.priority or 0) + 1)
        req.kv.cache_protected_len = prefix.length
        req.kv.cache_inserted_len = max(req.kv.cache_inserted_len, prefix.length)
        req.last_node = prefix

    def evict(self, params: Any) -> EvictResult:
        """Free at least `params.num_tokens` slots, or all that no request holds."""
        began = time.perf_counter()
        blocks = self.index.evict(-(-params.num_tokens // self.page_size))
        if len(blocks):
            self.token_to_kv_pool_allocator.free_segment(self._slots(blocks), start_pos=0)
        if self._events is not None:
            self._events.removed(blocks)
        evicted = len(blocks) * self.page_size
        self.update_eviction_metrics(evicted, began)
        return EvictResult(num_tokens_evicted=evicted)

    def inc_lock_ref(self, node: Prefix) -> IncLockRefResult:
        """Keep a prefix from eviction. O(depth)."""
        before = self.evictable_size()
        self.index.hold(node)
        return IncLockRefResult(delta=self.evictable_size() - before)

    def dec_lock_ref(self, node: Prefix, params: Any = None) -> DecLockRefResult:
        """The opposite of `inc_lock_ref`. O(depth)."""
        before = self.evictable_size()
        self.index.release(node)
        return DecLockRefResult(delta=self.evictable_size() - before)

    def path_device_indices(self, node: Prefix) -> torch.Tensor:
        """int64 [node.length], the slots of a prefix."""
        return self._slots(self.index.blocks(node))

    def dfs_weight_order(self, node_handles: Any) -> list[int]:
        """Indices of the handles, depth first, down the subtree with most of them first."""
        numbers: dict[Namespace, int] = {}
        paths = []
        for node in node_handles:
            number = numbers.setdefault(node.namespace, len(numbers))
            paths.append(np.append(number, self.index.blocks(node)).astype(np.int32).tobytes())
        return depth_first(paths)

    def evictable_size(self) -> int:
        """Tokens that no request holds."""
        return self.index.evictable_blocks * self.page_size

    def protected_size(self) -> int:
        """Tokens that requests hold."""
        return self.total_size() - self.evictable_size()

    def total_size(self) -> int:
        """Tokens in the tree."""
        return self.index.cached_blocks * self.page_size

    def pretty_print(self) -> None:
        """Print the tree."""
        print(self.index.tree())

    def _touched(self, key: Any) -> Prefix:
        prefix = self.index.match(_tokens(key.token_ids, 0, len(key)), namespace=_namespace(key))
        self.index.touch(prefix)
        return prefix

    def _blocks(self, slots: torch.Tensor) -> NDArray[Any]:
        """Of slots of whole pages in order, the pages."""
        size = self.page_size
        if size == 1:
            return slots.cpu().numpy()
        firsts: NDArray[Any] = slots[::size].cpu().numpy()
        return firsts // size

    def _slots(self, blocks: Int32s) -> torch.Tensor:
        slots = blocks.astype(np.int64)
        if self.page_size > 1:
            slots = (slots[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)
        return torch.from_numpy(slots).to(self.device)

    def _announce(self, key: Any, tokens: NDArray[Any], prefix: Prefix, known: int) -> None:
        """Tell of the pages of a prefix behind its first `known` tokens; its last are `tokens`."""
        if self._events is None or known == prefix.length:
            return
        size = self.page_size
        before = None if known == 0 else int(self.index.blocks(prefix, known - size, known)[0])
        new = RadixKey(
            tokens[len(tokens) - (prefix.length - known) :].tolist(),
            key.extra_key,
            cache_salt=key.cache_salt,
        )
        self._events.stored(before, new, self.index.blocks(prefix, known))

    @property
    def _by_priority(self) -> bool:
        return self._policy == "priority"

    def _prefer(self, prefix: Prefix, priority: int) -> None:
        """Raise the path to the priority, counted from the default one, where it is lower."""
        if self._by_priority:
            wanted = min(max(DEFAULT_PRIORITY + priority, 0), MAX_PRIORITY)
            self.index.promote(prefix, priority=wanted)


def _namespace(key: Any) -> Namespace:
    return (key.extra_key, key.cache_salt)


def _tokens(token_ids: Any, start: int, stop: int) -> NDArray[Any]:
    """Positions start..stop-1 of an array("q") or a list, without a copy of the rest."""
    if isinstance(token_ids, list):
        return np.asarray(token_ids[start:stop], np.int64)
    # A copy: while a view lives, the array cannot grow.
    return np.frombuffer(token_ids, np.int64)[start:stop].astype(np.int32)


def _policy(name: str, config: Any) -> str | EvictionPolicy:
    name = name.lower()
    if name != FILO.name and name not in policy_names():
        known = ", ".join(sorted((*policy_names(), FILO.name)))
        raise UnsupportedCache(
            f"--radix-eviction-policy is {name!r}, expected one of {known} with "
            "--radix-cache-backend prefixtree"
        )
    if config:
        raise UnsupportedCache(
            f"--radix-eviction-policy-config is {config!r}, expected none with "
            "--radix-cache-backend prefixtree"
        )
    return FILO() if name == FILO.name else name
