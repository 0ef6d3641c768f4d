"""The cache that SGLang's scheduler calls, against SGLang's own and against a plain model."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from prefixtree.engines import versions
from prefixtree.engines.errors import UnsupportedCache
from prefixtree.engines.sglang import plugin
from prefixtree.engines.sglang.cache import PrefixTreeCache

pytestmark = pytest.mark.engines

SIZE = 4096
KEYS = [(None, None), ("adapter", None), (None, "tenant"), ("adapter", "tenant")]


class Allocator:
    """Slots in order, and what came back."""

    device = "cpu"
    size = SIZE

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.next = page_size
        self.freed: list[int] = []

    def slots(self, tokens: int) -> torch.Tensor:
        pages = -(-tokens // self.page_size)
        self.next += pages * self.page_size
        return torch.arange(self.next - pages * self.page_size, self.next)[:tokens]

    def available_size(self) -> int:
        return self.size - self.next + len(self.freed)

    def free_segment(self, slots: torch.Tensor, *, start_pos: int) -> None:
        assert start_pos % self.page_size == 0
        self.freed += slots.tolist()


def cache_of(cls: Any, page_size: int = 1, **changes: Any) -> Any:
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(8, 256, "cpu", False),
        token_to_kv_pool_allocator=Allocator(page_size),
        page_size=page_size,
    )
    for name, value in changes.items():
        setattr(params, name, value)
    return cls(params)


def key(tokens: list[int], names: tuple[str | None, str | None] = (None, None)) -> RadixKey:
    return RadixKey(array("q", tokens), names[0], cache_salt=names[1])


def insert(cache: Any, tokens: list[int], names: Any = (None, None), priority: int = 0) -> Any:
    slots = cache.token_to_kv_pool_allocator.slots(len(tokens))
    return cache.insert(InsertParams(key=key(tokens, names), value=slots, priority=priority))


def match(cache: Any, tokens: list[int], names: Any = (None, None)) -> Any:
    return cache.match_prefix(MatchPrefixParams(key=key(tokens, names)))


def texts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share prefixes of any length."""
    random = np.random.default_rng(seed)
    made = [random.integers(0, 9, 30).tolist()]
    for _ in range(count - 1):
        base = made[random.integers(len(made))]
        cut = random.integers(0, len(base) + 1)
        made.append(base[:cut] + random.integers(0, 9, random.integers(1, 25)).tolist())
    return made


def flat(events: list[Any]) -> list[tuple[Any, ...]]:
    """One entry a page, whatever events they came in."""
    pages = []
    for event in events:
        if isinstance(event, BlockStored):
            parent, size = event.parent_block_hash, event.block_size
            for index, block in enumerate(event.block_hashes):
                tokens = tuple(event.token_ids[index * size : (index + 1) * size])
                pages.append(
                    ("stored", block, parent, tokens, event.medium, event.cache_salt, size)
                )
                parent = block
        elif isinstance(event, BlockRemoved):
            pages += [("removed", block, event.medium) for block in event.block_hashes]
        else:
            assert isinstance(event, AllBlocksCleared)
            pages.append(("cleared",))
    return pages


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_matches_and_sizes_are_those_of_sglangs_tree(page_size: int, seed: int) -> None:
    stock, ours = cache_of(RadixCache, page_size), cache_of(PrefixTreeCache, page_size)
    random = np.random.default_rng(seed)
    held: list[tuple[Any, Any]] = []
    prompts = texts(seed, 40)
    for tokens in prompts:
        names = KEYS[random.integers(len(KEYS))]
        assert insert(ours, tokens, names).prefix_len == insert(stock, tokens, names).prefix_len
        wanted = prompts[random.integers(len(prompts))]
        found, expected = match(ours, wanted, names), match(stock, wanted, names)
        assert found.device_prefix_len == expected.device_prefix_len
        torch.testing.assert_close(
            ours.path_device_indices(found.last_device_node),
            stock.path_device_indices(expected.last_device_node),
        )
        if random.random() < 0.5:
            held.append((found, expected))
            ours_delta = ours.inc_lock_ref(found.last_device_node).delta
            assert ours_delta == stock.inc_lock_ref(expected.last_device_node).delta
        elif held:
            found, expected = held.pop(random.integers(len(held)))
            ours_delta = ours.dec_lock_ref(found.last_device_node).delta
            assert ours_delta == stock.dec_lock_ref(expected.last_device_node).delta
        for size in ("evictable_size", "protected_size", "total_size"):
            assert getattr(ours, size)() == getattr(stock, size)(), size
        assert ours.available_and_evictable_str() == stock.available_and_evictable_str()
    ours.index.check()
    ours.pretty_print()
    evictable = ours.evictable_size()
    assert 0 < evictable < ours.total_size()
    assert ours.evict(EvictParams(num_tokens=SIZE)).num_tokens_evicted == evictable
    for found, expected in held:
        torch.testing.assert_close(
            ours.path_device_indices(found.last_device_node),
            stock.path_device_indices(expected.last_device_node),
        )


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("dynamo", [False, True])
def test_events_are_those_of_sglangs_tree(page_size: int, dynamo: bool) -> None:
    options = {"enable_kv_cache_events": True, "dynamo_kv_event_format": dynamo}
    stock = cache_of(RadixCache, page_size, **options)
    ours = cache_of(PrefixTreeCache, page_size, **options)
    for index, tokens in enumerate(texts(7, 40)):
        names = KEYS[index % len(KEYS)]
        insert(stock, tokens, names)
        insert(ours, tokens, names)
        assert flat(ours.take_events()) == flat(stock.take_events())
    for cache in (stock, ours):
        cache.evict(EvictParams(num_tokens=SIZE))
    removed = flat(ours.take_events())
    assert sorted(removed) == sorted(flat(stock.take_events()))
    assert removed
    ours.reset()
    assert flat(ours.take_events()) == [("cleared",)]


def test_eviction_takes_what_was_not_looked_up_lately_and_no_more_than_asked_for() -> None:
    cache = cache_of(PrefixTreeCache, 4)
    for start in (0, 100, 200):
        insert(cache, list(range(start, start + 16)))
    match(cache, list(range(16)))
    cache.touch_prefix(key(list(range(200, 216))))
    assert cache.evict(EvictParams(num_tokens=5)).num_tokens_evicted == 8
    kept = [match(cache, list(range(start, start + 16))) for start in (0, 100, 200)]
    assert [found.device_prefix_len for found in kept] == [16, 8, 16]
    assert sorted(cache.token_to_kv_pool_allocator.freed) == list(range(4 + 16 + 8, 4 + 32))


def request(cache: Any, row: int, tokens: list[int], priority: int | None = None) -> Any:
    """As much of SGLang's Req as a checkpoint looks at, admitted through a match."""
    found = match(cache, tokens)
    length = found.device_prefix_len
    slots = cache.req_to_token_pool.req_to_token[row]
    slots[:length] = cache.path_device_indices(found.last_device_node)
    slots[length : len(tokens)] = cache.token_to_kv_pool_allocator.slots(len(tokens) - length)
    return SimpleNamespace(
        extra_key=None,
        cache_salt=None,
        lock=cache.lock(found.last_device_node),
        last_node=found.last_device_node,
        full_untruncated_fill_ids=array("q", tokens),
        origin_input_ids=array("q", tokens[: len(tokens) // 2]),
        priority=priority,
        finished=lambda: True,
        kv=SimpleNamespace(req_pool_idx=row, cache_protected_len=length, cache_inserted_len=0),
    )


@pytest.mark.parametrize("page_size", [1, 4])
def test_checkpoints_go_on_from_the_node_and_hand_back_duplicates(page_size: int) -> None:
    cache = cache_of(PrefixTreeCache, page_size)
    tokens = list(range(50))
    first, second = request(cache, 1, tokens), request(cache, 2, tokens)
    rows = cache.req_to_token_pool.req_to_token
    own = rows[2].clone()
    for up_to in (21, 37, 50):
        whole = up_to - up_to % page_size
        for req in (first, second):
            cache.checkpoint(req, up_to=up_to)
            assert req.kv.cache_protected_len == req.last_node.length == whole
        assert torch.equal(rows[1, :whole], rows[2, :whole])
        assert torch.equal(rows[2, whole:50], own[whole:50])
        assert cache.token_to_kv_pool_allocator.freed == own[:whole].tolist()
        assert cache.protected_size() == cache.total_size() == whole
    for req in (first, second):
        cache.unlock(req.lock)
    assert cache.evictable_size() == cache.total_size() == 50 - 50 % page_size
    assert match(cache, [*tokens, 7]).device_prefix_len == 50 - 50 % page_size
    cache.index.check()


def test_a_request_that_was_not_matched_is_inserted_from_the_root() -> None:
    cache = cache_of(PrefixTreeCache)
    req = request(cache, 1, list(range(20)))
    cache.unlock(req.lock)
    req.lock = None
    cache.checkpoint(req, up_to=20)
    assert match(cache, list(range(20))).device_prefix_len == 20
    cache.unlock(req.lock)
    assert cache.evictable_size() == 20


@pytest.mark.parametrize("cls", [RadixCache, PrefixTreeCache])
def test_without_slots_the_tokens_stand_for_them(cls: Any) -> None:
    cache = cache_of(cls)
    assert cache.insert(InsertParams(key=key([7, 8, 9]), value=None)).prefix_len == 0
    found = match(cache, [7, 8, 5])
    assert cache.path_device_indices(found.last_device_node).tolist() == [7, 8]


def test_low_priorities_go_first_and_outputs_before_prompts() -> None:
    cache = cache_of(PrefixTreeCache, eviction_policy="priority")
    requests = [
        request(cache, row, list(range(100 * row, 100 * row + 20)), priority)
        for row, priority in ((1, 5), (2, None), (3, 2))
    ]
    for req in requests:
        cache.checkpoint(req, up_to=20)
        cache.unlock(req.lock)
    for lengths in ([20, 10, 20], [20, 0, 20], [20, 0, 10], [20, 0, 0], [10, 0, 0], [0, 0, 0]):
        cache.evict(EvictParams(num_tokens=10))
        prompts = [list(range(100 * row, 100 * row + 20)) for row in (1, 2, 3)]
        found = [cache.index.match(tokens, namespace=(None, None)) for tokens in prompts]
        assert [prefix.length for prefix in found] == lengths


def test_a_shared_prefix_has_the_highest_priority_of_its_users() -> None:
    cache = cache_of(PrefixTreeCache, eviction_policy="priority")
    insert(cache, [1, 2, 3], priority=9)
    insert(cache, [1, 2, 3, 4], priority=-9)
    insert(cache, [5, 6, 7], priority=3)
    cache.evict(EvictParams(num_tokens=4))
    assert match(cache, [1, 2, 3, 4]).device_prefix_len == 3
    assert match(cache, [5, 6, 7]).device_prefix_len == 0


@pytest.mark.parametrize(
    ("policy", "first"), [("lru", 1), ("mru", 0), ("fifo", 0), ("filo", 2), ("lfu", 1), ("slru", 1)]
)
def test_policies(policy: str, first: int) -> None:
    cache = cache_of(PrefixTreeCache, eviction_policy=policy)
    prompts = [[10 * index, 1, 2] for index in range(3)]
    for tokens in prompts:
        insert(cache, tokens)
    for index in (1, 2, 0, 2, 0):
        match(cache, prompts[index])
    cache.evict(EvictParams(num_tokens=3))
    gone = [match(cache, tokens).device_prefix_len == 0 for tokens in prompts]
    assert gone == [index == first for index in range(3)]


def test_heaviest_subtree_first_as_sglang() -> None:
    stock, ours = cache_of(RadixCache), cache_of(PrefixTreeCache)
    prompts = [[1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 2, 4, 6, 7], [8], [8, 9], [1, 2, 4, 6]]
    for cache in (stock, ours):
        for tokens in prompts:
            insert(cache, tokens)
    asked = [prompts[index] for index in (4, 0, 3, 2, 5, 3, 6, 1, 4, 3)] + [[77]]
    orders = [
        cache.dfs_weight_order([match(cache, tokens).last_device_node for tokens in asked])
        for cache in (stock, ours)
    ]
    assert [asked[index] for index in orders[0]] == [asked[index] for index in orders[1]]


def context(**changes: Any) -> Any:
    params = CacheInitParams(False, ReqToTokenPool(8, 256, "cpu", False), Allocator(1), 1)
    plain = {
        "params": params,
        "disable_radix_cache": False,
        "is_hybrid_swa": False,
        "is_hybrid_ssm": False,
        "enable_hierarchical_cache": False,
    }
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"is_hybrid_swa": True}, "--disable-hybrid-swa-memory"),
        ({"is_hybrid_ssm": True}, "recurrent state"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
    ],
)
def test_servers_that_want_more_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    assert isinstance(plugin.make_cache(context()), PrefixTreeCache)
    with pytest.raises(UnsupportedCache, match=named):
        plugin.make_cache(context(**changes))


def test_pages_shared_out_over_ranks_are_refused() -> None:
    server = context()
    server.params.page_size = 4
    with pytest.raises(UnsupportedCache, match="ranks"):
        plugin.make_cache(server)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    server = context()
    server.params.eviction_policy = "tlru"
    with pytest.raises(
        UnsupportedCache, match="'tlru', expected one of cost, fifo, filo, lfu, lru"
    ):
        plugin.make_cache(server)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_eagle": True},
        {"eviction_policy": "tlru"},
        {"eviction_policy": "slru", "eviction_policy_config": {"protected_threshold": 3}},
    ],
)
def test_settings_that_are_not_here_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedCache):
        cache_of(PrefixTreeCache, **changes)


def test_untested_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: "0.6.1")
    with pytest.warns(versions.UntestedVersion, match=r"0\.6\.1.*0\.5\.23"):
        plugin.make_cache(context())


def test_registering_twice_is_once() -> None:
    from sglang.srt.mem_cache.registry import registered_radix_cache_backends
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    plugin.register()
    plugin.register()
    assert ATTENTION_BACKEND_CHOICES.count("prefixtree") == 1
    assert registered_radix_cache_backends().count("prefixtree") == 1
