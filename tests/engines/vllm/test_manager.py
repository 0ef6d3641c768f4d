"""vLLM's KV cache manager on the tree, driven at random as its scheduler drives it."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256, xxhash
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from prefixtree.engines.errors import UnsupportedCache
from prefixtree.engines.vllm.block_pool import TreeBlockPool, as_words
from prefixtree.engines.vllm.manager import plant

pytestmark = pytest.mark.engines

BLOCK = 4
LOGPROBS = [None, None, None, 1]  # of the prompt: who wants them computes all of it
ADAPTERS = [None, LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b")]


def make_manager(
    num_blocks: int, eagle: bool = False, window: int | None = None, caching: bool = True
) -> KVCacheManager:
    shape: dict[str, Any] = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    spec = FullAttentionSpec(block_size=BLOCK, **shape)
    if window:
        spec = SlidingWindowSpec(block_size=BLOCK, sliding_window=window, **shape)
    config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(
        config,
        max_model_len=512,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        use_eagle=eagle,
        enable_caching=caching,
        enable_kv_cache_events=True,
    )


class Driver:
    """Requests with common beginnings that come, grow and go, on one manager.

    What is written to a block is the text up to the block's end, with its namespace.
    """

    def __init__(self, manager: KVCacheManager, seed: int, hash_function: Any = sha256) -> None:
        init_none_hash(hash_function)
        self.manager = manager
        self.pool: TreeBlockPool = manager.block_pool
        self.rng = random.Random(seed)
        self.hasher = get_request_block_hasher(BLOCK, hash_function)
        self.kv: dict[int, tuple[object, ...]] = {}
        self.running: dict[Request, tuple[object, ...]] = {}
        self.pinned: list[list[Any]] = []
        self.heads = [[self.rng.randrange(3) for _ in range(24)] for _ in range(3)]
        self.made = 0
        self.hits: list[int] = []
        self.told: set[bytes] = set()

    def request(self) -> tuple[Request, tuple[object, ...]]:
        rng = self.rng
        head = rng.choice(self.heads)[: rng.randrange(4, 24)]
        tokens = head + [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
        salt, adapter = rng.choice([None, "x"]), rng.choice(ADAPTERS)
        self.made += 1
        request = Request(
            request_id=str(self.made),
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=64, prompt_logprobs=rng.choice(LOGPROBS)),
            pooling_params=None,
            lora_request=adapter,
            cache_salt=salt,
            block_hasher=self.hasher,
        )
        return request, (salt, adapter and adapter.lora_name)

    def admit(self) -> None:
        request, namespace = self.request()
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        self.hits.append(hit)
        for i, block in enumerate(blocks.blocks[0]):
            assert self.kv[block.block_id] == self.text(request, namespace, i)
        new = self.rng.randint(1, request.num_tokens - hit)
        got = self.manager.allocate_slots(
            request, new, hit, blocks, num_lookahead_tokens=self.rng.randrange(3)
        )
        if got is not None:
            request.num_computed_tokens = hit
            self.running[request] = namespace
            self.computed(request, new)

    def grow(self) -> None:
        if not self.running:
            return
        request = self.rng.choice(list(self.running))
        left = request.num_tokens - request.num_computed_tokens
        if not left:
            request.append_output_token_ids(self.rng.randrange(2))
            left = 1
        new = self.rng.randint(1, left)
        lookahead = self.rng.randrange(3)
        if self.manager.allocate_slots(request, new, num_lookahead_tokens=lookahead) is None:
            self.end(request)  # preempted
        else:
            self.computed(request, new)

    def computed(self, request: Request, new: int) -> None:
        request.num_computed_tokens += new
        namespace = self.running[request]
        table = self.manager.get_blocks(request.request_id).blocks[0]
        for i, block in enumerate(table[: request.num_computed_tokens // BLOCK]):
            text = self.text(request, namespace, i)
            # What others read is not overwritten with anything else.
            assert block.ref_cnt == 1 or self.kv[block.block_id] == text
            self.kv[block.block_id] = text

    def end(self, request: Request | None = None) -> None:
        if self.running:
            request = request or self.rng.choice(list(self.running))
            del self.running[request]
            self.manager.free(request)

    def pin(self) -> None:
        """As connectors do it: blocks of any requests, and given back one by one."""
        blocks = [block for block in self.pool.blocks if block.block_hash is not None]
        if blocks and len(self.pinned) < 3:
            chosen = self.rng.sample(blocks, self.rng.randint(1, min(4, len(blocks))))
            self.pool.touch(chosen)
            self.pinned.append(chosen)

    def unpin(self) -> None:
        if self.pinned:
            self.rng.shuffle(self.pinned)
            self.pool.free_blocks([self.pinned[-1].pop()])
            self.pinned = [blocks for blocks in self.pinned if blocks]

    def invalidate(self) -> None:
        """A load from elsewhere failed. vLLM computes such blocks again, and so do we here."""
        blocks = [block.block_id for block in self.pool.blocks if block.block_hash is not None]
        if blocks:
            chosen = self.rng.choice(blocks)
            self.manager.evict_blocks({chosen})
            assert self.pool.blocks[chosen].block_hash is None

    def text(self, request: Request, namespace: tuple[object, ...], i: int) -> tuple[object, ...]:
        return (*namespace, *request.all_token_ids[: (i + 1) * BLOCK])

    def check(self) -> None:
        self.pool.index.check()
        cached = {b.block_hash for b in self.pool.blocks if b.block_hash is not None}
        assert self.pool.index.cached_blocks == len(cached)
        used = [block for block in self.pool.blocks[1:] if block.ref_cnt]
        references = [
            block
            for request in self.running
            for block in self.manager.get_blocks(request.request_id).blocks[0]
        ]
        references += [block for blocks in self.pinned for block in blocks]
        assert sum(block.ref_cnt for block in used) == len(references)
        # Free is what nobody uses, less what only leads to blocks that somebody uses.
        free = self.pool.get_num_free_blocks()
        unused = len(self.pool.blocks) - 1 - len(used)
        leads = self.pool.index.cached_blocks - self.pool.index.evictable_blocks
        assert unused - leads <= free <= unused
        for event in self.manager.take_events():
            match event:
                case BlockStored():
                    assert not self.told & set(event.block_hashes)
                    self.told |= set(event.block_hashes)
                    parent = event.parent_block_hash
                    assert parent is None or parent in self.told
                    assert len(event.token_ids) == BLOCK * len(event.block_hashes)
                case BlockRemoved():
                    assert self.told >= set(event.block_hashes)
                    self.told -= set(event.block_hashes)
                case AllBlocksCleared():
                    self.told.clear()
        assert len(self.told) == len(cached)

    def finish(self) -> None:
        while self.running:
            self.end()
        while self.pinned:
            self.unpin()
        self.check()
        assert not self.pool._holds
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1
        assert self.manager.reset_prefix_cache()
        assert not self.pool._hashes
        assert self.pool.index.cached_blocks == 0
        self.check()
        # All of them can be handed out, each once.
        blocks = self.pool.get_new_blocks(len(self.pool.blocks) - 1)
        assert len({block.block_id for block in blocks}) == len(blocks)
        self.pool.free_blocks(blocks)


STEPS = ["admit"] * 4 + ["grow"] * 8 + ["end"] * 2 + ["pin", "unpin", "unpin", "unpin"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru"])
@pytest.mark.parametrize("seed", range(8))
def test_at_random_in_a_small_pool(seed: int, policy: str) -> None:
    manager = make_manager(num_blocks=30, eagle=seed % 2 == 1)
    plant(manager, policy)
    driver = Driver(manager, seed, xxhash if seed % 3 == 0 and xxhash_there() else sha256)
    for _ in range(400):
        getattr(driver, driver.rng.choice(STEPS))()
        driver.check()
    assert max(driver.hits) >= 2 * BLOCK
    assert driver.pool.index.stats().evicted_tokens > 0
    driver.finish()


@pytest.mark.parametrize("seed", range(4))
def test_blocks_whose_load_failed_are_forgotten(seed: int) -> None:
    manager = make_manager(num_blocks=40)
    plant(manager)
    driver = Driver(manager, seed)
    for _ in range(300):
        getattr(driver, driver.rng.choice([*STEPS, "invalidate"]))()
        driver.check()
    driver.finish()


@pytest.mark.parametrize("eagle", [False, True])
def test_hits_are_vllms_where_nothing_is_evicted(eagle: bool) -> None:
    hits = []
    for tree in (False, True):
        manager = make_manager(num_blocks=2000, eagle=eagle)
        if tree:
            plant(manager)
        driver = Driver(manager, seed=3)
        for _ in range(600):
            getattr(driver, driver.rng.choice(["admit", "admit", "grow", "grow", "grow", "end"]))()
        hits.append(driver.hits)
    assert hits[0] == hits[1]
    assert max(hits[0]) > 3 * BLOCK


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru"])
def test_free_blocks_are_listed_in_the_order_in_which_they_go(policy: str) -> None:
    manager = make_manager(num_blocks=100)
    plant(manager, policy)
    driver = Driver(manager, seed=1)
    for _ in range(150):
        getattr(driver, driver.rng.choice(STEPS))()
    for _ in range(len(driver.running) // 2):
        driver.end()
    free = [block.block_id for block in driver.pool.free_block_queue.get_all_free_blocks()]
    assert driver.pool.index.evictable_blocks > 10
    assert len(free) == driver.pool.get_num_free_blocks()
    one_by_one = [driver.pool.get_new_blocks(1)[0].block_id for _ in range(len(free) // 2)]
    at_once = [block.block_id for block in driver.pool.get_new_blocks(len(free) - len(one_by_one))]
    assert one_by_one + at_once == free


def test_a_path_goes_from_its_end() -> None:
    manager = make_manager(num_blocks=8)
    plant(manager)
    driver = Driver(manager, seed=0)
    tokens = list(range(6 * BLOCK))
    request = Request("0", tokens, SamplingParams(max_tokens=1), None, block_hasher=driver.hasher)
    manager.allocate_slots(request, len(tokens))
    table = manager.get_block_ids("0")[0]
    manager.free(request)
    driver.pool.free_blocks(driver.pool.get_new_blocks(3))  # one is empty, two of the end go
    assert [block.block_id for block in driver.pool.longest_prefix(request.block_hashes)] == table[
        :4
    ]


def test_a_path_is_handed_out_as_it_goes_its_end_first() -> None:
    manager = make_manager(num_blocks=8)
    plant(manager)
    driver = Driver(manager, seed=0)
    table = run_alone(driver, list(range(6 * BLOCK)))
    got = [block.block_id for block in driver.pool.get_new_blocks(6)]
    assert got[1:] == table[:0:-1]  # behind the empty one


def run_alone(driver: Driver, tokens: list[int]) -> list[int]:
    """The blocks of a request that came and went."""
    request = request_of(driver, tokens)
    blocks, hit, _ = driver.manager.get_computed_blocks(request)
    driver.manager.allocate_slots(request, len(tokens) - hit, hit, blocks)
    (table,) = driver.manager.get_block_ids(request.request_id)
    driver.manager.free(request)
    return table


def request_of(driver: Driver, tokens: list[int], **options: Any) -> Request:
    params = SamplingParams(max_tokens=1, **options)
    driver.made += 1
    return Request(str(driver.made), tokens, params, None, block_hasher=driver.hasher)


def test_what_is_computed_again_takes_the_place_of_what_nobody_uses() -> None:
    manager = make_manager(num_blocks=12)
    plant(manager)
    driver = Driver(manager, seed=0)
    pool, tokens = driver.pool, list(range(3 * BLOCK))
    first = run_alone(driver, [*tokens, 50, 51, 52, 53])
    manager.take_events()
    again = request_of(driver, [*tokens, 60], prompt_logprobs=1)
    assert manager.get_computed_blocks(again)[1] == 0
    manager.allocate_slots(again, len(tokens) + 1)
    (table,) = manager.get_block_ids(again.request_id)
    assert not set(table) & set(first)
    assert [block.block_id for block in pool.longest_prefix(again.block_hashes)] == table[:3]
    # What lay behind the old copy lies behind the new one, and is all that may go.
    assert (pool.index.cached_blocks, pool.index.evictable_blocks) == (4, 1)
    assert pool.get_num_free_blocks() == 11 - len(table)
    assert not manager.take_events()
    pool.index.check()
    manager.free(again)
    assert run_alone(driver, [*tokens, 50, 51, 52, 53, 54])[:4] == [*table[:3], first[3]]


def test_what_is_computed_again_stays_apart_while_the_first_is_used() -> None:
    manager = make_manager(num_blocks=12)
    plant(manager)
    driver = Driver(manager, seed=0)
    tokens = list(range(2 * BLOCK))
    tables, requests = [], []
    for _ in range(2):
        requests.append(request_of(driver, [*tokens, 50], prompt_logprobs=1))
        manager.allocate_slots(requests[-1], len(tokens) + 1)
        tables.append(manager.get_block_ids(requests[-1].request_id)[0])
    assert not set(tables[0]) & set(tables[1])
    found = driver.pool.longest_prefix(requests[0].block_hashes)
    assert [block.block_id for block in found] == tables[0][:2]
    # The first one ends; with its next block the second one's copy becomes the cached one.
    manager.free(requests[0])
    requests[1].num_computed_tokens = len(tokens) + 1
    requests[1].append_output_token_ids([51, 52, 53])
    manager.allocate_slots(requests[1], 3)
    (table,) = manager.get_block_ids(requests[1].request_id)
    found = driver.pool.longest_prefix(requests[1].block_hashes)
    assert [block.block_id for block in found] == table[:3]
    assert table[:3] == tables[1][:3]
    assert driver.pool.get_num_free_blocks() == 11 - 3
    manager.free(requests[1])
    driver.finish()


def test_words_of_hashes() -> None:
    hashes = [bytes(range(32)), bytes(range(32, 64))]
    words = as_words(hashes)
    assert len(words) == 16
    assert words[0] == 0x03020100
    assert (as_words([bytes([255] * 16)]) == [0x7FFFFFFF] * 4 + [0] * 4).all()
    assert len(as_words([])) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 8}, "have SlidingWindowManager.*--disable-hybrid-kv-cache-manager.*without"),
        ({"caching": False}, "--no-enable-prefix-caching.*without --scheduler-cls"),
    ],
)
def test_what_is_not_served_is_refused_with_what_to_change(
    options: dict[str, Any], said: str
) -> None:
    manager = make_manager(num_blocks=8, **options)
    pool = manager.block_pool
    with pytest.raises(UnsupportedCache, match=said):
        plant(manager)
    assert manager.block_pool is pool


def xxhash_there() -> bool:
    try:
        xxhash(b"")
    except (ImportError, ModuleNotFoundError):
        return False
    return True
