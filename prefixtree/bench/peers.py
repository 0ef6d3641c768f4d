"""Caches of other engines, and ours, behind one protocol, so that one loop can measure them all.

A request costs each of them these steps; a step's timing comprises:

| step     | prefixtree | SGLang                                     | vLLM                       |
|----------|------------|--------------------------------------------|----------------------------|
| `match`  | `match`    | `match_prefix`                             | `get_computed_blocks`      |
| `open`   | `open`     | `match_prefix`, `lock`, slots for the rest | `get_computed_blocks`,     |
|          |            | allocated and noted in the request's row   | `allocate_slots`           |
| `commit` | `commit`   | `insert`, slots of duplicates freed        | (`allocate_slots` did it)  |
| `close`  | `close`    | `unlock`                                   | `free`                     |
| `evict`  | `evict`    | `evict`                                    | (`allocate_slots` does it) |

`prepare` turns token ids into what the engine likes best and is not timed: a new int32 array for
ours (so that it is as warm as the others), an int64 `array` for SGLang, for vLLM a `Request` with
its block hashes computed, which takes longer than all of its other steps. Not timed either is what
SGLang's scheduler does around a commit: it copies the request's row, matches, gathers the path's
slots and locks a second time.

"observed" is ours once more with all that looks at it switched on: its `close` also publishes KV
events, and once a second a scrape and a view for the inspector.

SGLang's caches allocate from `_Slots`, a stack of real slots: its own allocator concatenates all
free slots each time that some come back.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prefixtree.cache import PrefixCache
from prefixtree.columns import Int32s

if TYPE_CHECKING:
    import torch

STEPS = ("match", "open", "commit", "close", "evict")


class PeerMissing(Exception):
    """No such engine, or it cannot be imported; the message says what failed and what to do."""


class Peer(Protocol):
    """A cache of `num_tokens` token slots. Each method is what one timing comprises."""

    name: ClassVar[str]
    steps: ClassVar[tuple[str, ...]]
    """Those of `STEPS` that can be timed apart; calling the others does nothing."""

    def __init__(self, num_tokens: int, block_size: int) -> None: ...

    def prepare(self, tokens: Int32s) -> Any:
        """The prompt in the engine's own form, for the other methods. Not timed."""

    def match(self, prompt: Any) -> int:
        """How many of the prompt's tokens are cached."""

    def lacking(self, prompt: Any, matched: int) -> int:
        """Tokens to evict before `open` has room. Not timed."""

    def open(self, prompt: Any) -> Any:
        """A running request: its match protected, room for the rest."""

    def commit(self, request: Any) -> None:
        """All its KV is written: from now on it is matched."""

    def prefill(self, request: Any, chunk: int) -> None:
        """As `commit`, after each `chunk` tokens."""

    def close(self, request: Any) -> None:
        """The request has ended; what it published stays, evictable."""

    def evict(self, num_tokens: int) -> int:
        """Evicts at least so many tokens, least recently used first; returns how many."""


class Ours:
    name: ClassVar[str] = "prefixtree"
    steps: ClassVar[tuple[str, ...]] = STEPS

    def __init__(self, num_tokens: int, block_size: int) -> None:
        self._block_size = block_size
        self.cache = PrefixCache(-(-num_tokens // block_size), block_size)

    def prepare(self, tokens: Int32s) -> Any:
        return tokens.copy()

    def match(self, prompt: Any) -> int:
        return self.cache.match(prompt).cached

    def lacking(self, prompt: Any, matched: int) -> int:
        needed = -(-(len(prompt) - matched) // self._block_size)
        return max(0, needed - self.cache.stats().free_blocks) * self._block_size

    def open(self, prompt: Any) -> Any:
        return self.cache.open(prompt), len(prompt)

    def commit(self, request: Any) -> None:
        sequence, length = request
        sequence.commit(length)

    def prefill(self, request: Any, chunk: int) -> None:
        sequence, length = request
        for end in range(min(chunk, length), length, chunk):
            sequence.commit(end)
        sequence.commit(length)

    def close(self, request: Any) -> None:
        request[0].close()

    def evict(self, num_tokens: int) -> int:
        return self.cache.evict(-(-num_tokens // self._block_size)).tokens


class Observed(Ours):
    """Ours with all that looks at it, after each request as after a step of an engine."""

    name: ClassVar[str] = "observed"

    def __init__(self, num_tokens: int, block_size: int) -> None:
        from prefixtree.bench.observers import Observers

        super().__init__(num_tokens, block_size)
        self._observers = Observers(self.cache)

    def close(self, request: Any) -> None:
        super().close(request)
        self._observers.step()


class _Slots:
    """A stack of free slots, page-aligned: what the SGLang caches below allocate from."""

    def __init__(self, num_tokens: int, page_size: int) -> None:
        import torch

        self.device = torch.device("cpu")
        self._page_size = page_size
        self._free = torch.arange(-(-num_tokens // page_size), dtype=torch.int64)
        self._top = len(self._free)
        self._offsets = torch.arange(page_size)

    def available_size(self) -> int:
        return self._top * self._page_size

    def alloc(self, num_tokens: int) -> torch.Tensor:
        pages = -(-num_tokens // self._page_size)
        self._top -= pages
        taken = self._free[self._top : self._top + pages].clone()
        if self._page_size == 1:
            return taken
        return (taken[:, None] * self._page_size + self._offsets).reshape(-1)[:num_tokens]

    def free(self, slots: torch.Tensor) -> None:
        pages = slots[:: self._page_size] // self._page_size if self._page_size > 1 else slots
        self._free[self._top : self._top + len(pages)] = pages
        self._top += len(pages)

    def free_segment(self, slots: torch.Tensor, *, start_pos: int) -> None:
        self.free(slots)


class _SGLang:
    """What both of SGLang's caches have in common. A prompt's last, partial page is not kept."""

    name: ClassVar[str]
    steps: ClassVar[tuple[str, ...]] = STEPS

    def __init__(self, num_tokens: int, block_size: int) -> None:
        import torch
        from sglang.srt.mem_cache import base_prefix_cache
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self._params = base_prefix_cache
        self._key = RadixKey
        self._page_size = block_size
        self._slots = _Slots(num_tokens, block_size)
        # The row of a request: where the KV of each of its positions is.
        self._row = torch.zeros(num_tokens, dtype=torch.int64)
        self._cache = self._make()

    def _make(self) -> Any:
        raise NotImplementedError

    def prepare(self, tokens: Int32s) -> Any:
        ids = array("q")
        ids.frombytes(
            tokens[: len(tokens) // self._page_size * self._page_size].astype("q").tobytes()
        )
        return ids

    def match(self, prompt: Any) -> int:
        return int(self._match(prompt).device_prefix_len)

    def lacking(self, prompt: Any, matched: int) -> int:
        return max(0, len(prompt) - matched - self._slots.available_size())

    def open(self, prompt: Any) -> Any:
        found = self._match(prompt)
        matched = found.device_prefix_len
        lock = self._cache.lock(found.last_device_node)
        if matched < len(prompt):
            self._row[matched : len(prompt)] = self._slots.alloc(len(prompt) - matched)
        return prompt, matched, lock

    def commit(self, request: Any) -> None:
        prompt, matched, _ = request
        self._insert(self._key(prompt), len(prompt), matched)

    def prefill(self, request: Any, chunk: int) -> None:
        # As the scheduler does it: each chunk is inserted from the root on.
        prompt, matched, _ = request
        for end in [*range(min(chunk, len(prompt)), len(prompt), chunk), len(prompt)]:
            if end > matched:
                self._insert(self._key(prompt, limit=end), end, matched)
                matched = end

    def close(self, request: Any) -> None:
        self._cache.unlock(request[2])

    def evict(self, num_tokens: int) -> int:
        done = self._cache.evict(self._params.EvictParams(num_tokens=num_tokens))
        return int(done.num_tokens_evicted)

    def _match(self, prompt: Any) -> Any:
        return self._cache.match_prefix(self._params.MatchPrefixParams(key=self._key(prompt)))

    def _insert(self, key: Any, length: int, matched: int) -> None:
        """Publishes the row's first `length` slots, of which the tree gave `matched`."""
        self._cache.insert(
            self._params.InsertParams(
                key=key,
                value=self._row[:length],
                prev_prefix_len=matched,
                inserted_len=matched,
            )
        )


class SGLangPython(_SGLang):
    """Its `RadixCache`, which leaves it to the caller to free duplicates."""

    name: ClassVar[str] = "sglang-python"

    def _insert(self, key: Any, length: int, matched: int) -> None:
        done = self._cache.insert(
            self._params.InsertParams(key=key, value=self._row[:length], inserted_len=matched)
        )
        if done.prefix_len > matched:
            self._slots.free(self._row[matched : done.prefix_len])

    def _make(self) -> Any:
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache.create_simulated(mock_allocator=self._slots, page_size=self._page_size)


class SGLangRust(_SGLang):
    """Its `UnifiedRadixCache` on the tree core written in Rust, its default."""

    name: ClassVar[str] = "sglang-rust"

    def _make(self) -> Any:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        return UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=self._slots,
                page_size=self._page_size,
                tree_components=(ComponentType.FULL,),
                tree_core_backend="rust",
            )
        )


class VLLM:
    """Its `KVCacheManager` for a model of full attention."""

    name: ClassVar[str] = "vllm"
    steps: ClassVar[tuple[str, ...]] = ("match", "open", "close")

    def __init__(self, num_tokens: int, block_size: int) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        hash_function = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(hash_function)
        self._hasher = kv_cache_utils.get_request_block_hasher(block_size, hash_function)
        self._sampling = SamplingParams(max_tokens=1)
        self._request = Request
        self._requests = 0
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self._manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=-(-num_tokens // block_size) + 1,  # its block 0 holds nothing
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            max_model_len=num_tokens,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
        )

    def prepare(self, tokens: Int32s) -> Any:
        self._requests += 1
        return self._request(
            request_id=str(self._requests),
            prompt_token_ids=tokens.tolist(),
            sampling_params=self._sampling,
            pooling_params=None,
            block_hasher=self._hasher,
        )

    def match(self, prompt: Any) -> int:
        return int(self._manager.get_computed_blocks(prompt)[1])

    def lacking(self, prompt: Any, matched: int) -> int:
        return 0

    def open(self, prompt: Any) -> Any:
        self._allocate(prompt, prompt.num_tokens)
        return prompt

    def commit(self, request: Any) -> None:
        pass

    def prefill(self, request: Any, chunk: int) -> None:
        while request.num_computed_tokens < request.num_tokens:
            self._allocate(request, chunk)

    def close(self, request: Any) -> None:
        self._manager.free(request)

    def evict(self, num_tokens: int) -> int:
        return 0

    def _allocate(self, request: Any, most: int) -> None:
        blocks, matched = None, 0
        if not request.num_computed_tokens:
            blocks, matched, _ = self._manager.get_computed_blocks(request)
        count = min(most, request.num_tokens - request.num_computed_tokens - matched)
        if self._manager.allocate_slots(request, count, matched, blocks) is None:
            raise MemoryError(f"vLLM has no room for {count} tokens")
        request.num_computed_tokens += matched + count


_PEERS: dict[str, tuple[tuple[type[Peer], ...], str, str]] = {
    "observed": ((Observed,), "prefixtree.bench.observers", "'prefixtree[events,metrics]'"),
    "sglang": ((SGLangPython, SGLangRust), "sglang.srt.mem_cache.radix_cache", "sglang"),
    "vllm": ((VLLM,), "vllm.v1.core.kv_cache_manager", "vllm"),
}
"""Engine: its caches, the module that they need, the package to install."""


def make_peers(against: Iterable[str]) -> list[type[Peer]]:
    """Ours and the caches of these engines. Raises `PeerMissing`."""
    peers: list[type[Peer]] = [Ours]
    for engine in dict.fromkeys(against):
        if engine not in _PEERS:
            raise PeerMissing(
                f"no engine {engine!r} to measure against, expected {', '.join(_PEERS)}"
            )
        caches, module, package = _PEERS[engine]
        try:
            import_module(module)
        except ImportError as error:
            raise PeerMissing(
                f"{engine} cannot be imported ({error}); install it: pip install {package}"
            ) from error
        peers += caches
    return peers
