"""transformers' own continuous batching on the tree: unchanged tokens, and the tree is what ran."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GptOssConfig, GptOssForCausalLM
from transformers.generation.continuous_batching import cache as library
from transformers.generation.continuous_batching import offloading_manager
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

import attention
from allocator import InvalidArgument
from prefixtree.engines import continuous_batching
from prefixtree.engines.continuous_batching import installation
from prefixtree.engines.continuous_batching.allocator import NAME, TreeAllocator
from prefixtree.engines.continuous_batching.scheduler import TreeFIFOScheduler
from prefixtree.engines.continuous_batching.step import Batch
from prefixtree.engines.errors import UnsupportedAttention, UnsupportedModel
from prefixtree.engines.sampling import SamplingParams
from prefixtree.index import PrefixIndex
from tests.engines.models import VOCAB, generated, tiny_model

PAGE = 4


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The library says on every start that psutil is missing."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the adapter called what is behind it."""
    counts: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def counted(*args: object, **kwargs: object) -> object:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("forest_from_block_tables", "plan", "run", "write"):
        count(attention, name)
    count(attention.Plan, "advance")
    for name in ("match", "hold", "extend", "evict", "release"):
        count(PrefixIndex, name)
    count(RequestState, "create_equivalent_initial_request")
    return counts


def greedy(n: int = 1, max_new_tokens: int = 8, **changes: object) -> GenerationConfig:
    """Greedy decoding, and for n > 1 what comes closest: sampling from one token."""
    choice = {"do_sample": True, "top_k": 1} if n > 1 else {"do_sample": False}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=n,
        eos_token_id=-1,
        **{**choice, **changes},
    )


def batching(**changes: object) -> ContinuousBatchingConfig:
    settings = {"page_size": PAGE, "num_blocks": 256, "max_batch_tokens": 32}
    return ContinuousBatchingConfig(**{**settings, "use_cuda_graph": False, **changes})


def prompts_with_stems(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, VOCAB, length).tolist() for length in (9, 21, 34)]
    return [
        stems[rng.integers(3)] + rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
        for _ in range(count)
    ]


def tokens_of(outputs: dict[str, object]) -> list[list[int]]:
    return [output.generated_tokens for output in outputs.values()]


def allocators(model: object) -> list[TreeAllocator]:
    """Those of the manager that the model keeps."""
    manager = model._cached_continuous_batching_manager
    return list(manager.batch_processor.cache.cache_allocators.values())


def check_blocks(cache: library.PagedAttentionCache) -> None:
    """Every block is free, or somebody's, and counted for as often as it is had."""
    sectors = len(cache.pool.free_sectors)
    for allocator in cache.cache_allocators.values():
        allocator.prefixes.check()
        had = Counter(chain.from_iterable(allocator.block_table.values()))
        had.update(allocator.prefixes.tree().blocks.tolist())
        for block, count in had.items():
            assert allocator.ledger.shared_ref_counts.get(block, 1) == count
        free = list(chain.from_iterable(cache.pool._free_blocks[allocator.index].trees.values()))
        assert len(set(free)) == len(free)
        assert not had.keys() & set(free)
        assert (
            len(had) + len(free)
            == len({block // allocator.blocks_per_sector for block in [*had, *free]})
            * allocator.blocks_per_sector
        )
        sectors += (len(had) + len(free)) // allocator.blocks_per_sector
        assert set(allocator._held) == set(allocator.block_table)
    assert sectors == cache.num_sectors


WINDOWS = {"qwen3": 1, "llama": 1, "mistral": 1, "gemma3": 2}


@pytest.mark.parametrize("kind", WINDOWS)
def test_tokens_are_those_of_the_library(kind, calls):
    """Shared prefixes, chunked prefill; then the same prompts again, found in the tree."""
    prompts = prompts_with_stems(10)
    expected = tokens_of(
        tiny_model(kind).generate_batch(prompts, greedy(), continuous_batching_config=batching())
    )
    assert not calls
    model = tiny_model(kind)
    with continuous_batching.install():
        run = {"continuous_batching_config": batching(), "persistent_manager": True}
        assert tokens_of(model.generate_batch(prompts, greedy(), **run)) == expected
        manager = model._cached_continuous_batching_manager
        steps, layers = manager.current_batch, model.config.num_hidden_layers
        assert manager.current_batch > 8  # prompts were cut into chunks
        assert calls["run"] == calls["write"] == steps * layers
        # One plan for each window a step, of one forest for each type of layers, or that of the
        # step before.
        types, windows = len(allocators(model)), WINDOWS[kind]
        assert calls["plan"] + calls["advance"] == steps * windows
        assert calls["forest_from_block_tables"] * windows == calls["plan"] * types
        assert calls["advance"] > 0
        before = [allocator.prefixes.stats() for allocator in allocators(model)]
        assert tokens_of(model.generate_batch(prompts, greedy(), **run)) == expected
        for allocator, stats in zip(allocators(model), before, strict=True):
            delta = allocator.prefixes.stats().delta(stats)
            assert delta.opens == len(prompts)
            assert delta.query_tokens == sum(map(len, prompts))
            # All that is whole blocks, but for the last token.
            assert delta.hit_tokens == sum((len(p) - 1) // PAGE * PAGE for p in prompts)
        check_blocks(manager.batch_processor.cache)
        model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_forks_share_blocks(kind, calls):
    prompts = prompts_with_stems(4)
    expected = tokens_of(
        tiny_model(kind).generate_batch(prompts, greedy(3), continuous_batching_config=batching())
    )
    model = tiny_model(kind)
    with continuous_batching.install():
        got = model.generate_batch(
            prompts, greedy(3), continuous_batching_config=batching(), persistent_manager=True
        )
        assert tokens_of(got) == expected
        assert len(got) == 12
        for allocator in allocators(model):
            # The forks of a prompt wrote the same tokens, which the tree has once.
            longest = max(len(prompt) for prompt in prompts) + 8
            assert allocator.prefixes.cached_blocks <= len(prompts) * (longest // PAGE)
        model.destroy_cached_continuous_batching_manager()


def test_samples_have_the_probabilities_that_a_full_forward_gives(calls):
    """Forks that part, in a cache that is too small for all: each token's probability is right."""
    prompts = prompts_with_stems(5)
    model = tiny_model("gemma3")
    settings = greedy(3, max_new_tokens=14, top_k=0, temperature=1.0)
    with continuous_batching.install():
        got = model.generate_batch(
            prompts,
            settings,
            continuous_batching_config=batching(num_blocks=36, return_logprobs=True, seed=3),
        )
    assert len(got) == 15
    assert len({tuple(output.generated_tokens) for output in got.values()}) > 10
    for output in got.values():
        text = torch.tensor([output.prompt_ids + output.generated_tokens])
        with torch.inference_mode():
            logits = model(text, use_cache=False).logits[0, len(output.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, text[0, len(output.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=1e-4)
    assert calls["evict"]


class Driver:
    """The library's batch processor, driven a step at a time in this thread."""

    def __init__(self, model: object, generation: GenerationConfig, **changes: object) -> None:
        self.model = model
        self.manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching(**changes)
        )
        self.processor = self.manager._create_batch_processor()
        self.results: dict[str, list[int]] = {}

    def step(self) -> bool:
        busy = self.processor.prepare_next_batch()
        if busy:
            self.processor._generation_step(self.model)
            self.processor.update_batch()
        check_blocks(self.processor.cache)
        for request_id, state in self.processor.scheduler.active_requests.items():
            for allocator in self.processor.cache.cache_allocators.values():
                # All that is computed and whole is in the tree, and nothing else.
                assert allocator._held[request_id].blocks == state.position_offset // PAGE
        queue = self.manager.output_router.output_queue
        while not queue.empty():
            result = queue.get()
            assert result.error is None
            self.results[result.request_id] = result.generated_tokens
        return busy

    def active(self) -> list[str]:
        scheduler = self.processor.scheduler
        return [*scheduler.active_requests, *scheduler.waiting_requests]


def swap_space_without_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory cannot be pinned without a GPU."""
    empty = torch.empty

    def unpinned(*args: object, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        return empty(*args, **kwargs)

    monkeypatch.setattr(offloading_manager.torch, "empty", unpinned)


@pytest.mark.parametrize(
    ("kind", "scheduler", "swap"),
    [
        ("qwen3", "fifo", 0.0),
        ("gemma3", "fifo", 0.0),
        ("llama", "prefill_first", 0.0),
        ("qwen3", "prefill_first", 1e-3),
        ("gemma3", "prefill_first", 1e-3),
    ],
)
def test_requests_come_and_go_in_a_small_cache(kind, scheduler, swap, calls, monkeypatch):
    """Forks, cancellations, evictions, and requests that lose their cache and start again."""
    if swap:
        swap_space_without_pinning(monkeypatch)
    rng = np.random.default_rng(len(kind) + len(scheduler))
    prompts = prompts_with_stems(24, seed=2)
    lengths = rng.integers(1, 20, len(prompts))
    with continuous_batching.install():
        driver = Driver(
            tiny_model(kind),
            greedy(2),
            num_blocks=26,
            max_batch_tokens=40,
            scheduler_type=scheduler,
            cpu_offload_space=swap,
        )
        cancelled: set[str] = set()
        restored = 0
        for number, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
            driver.manager.add_request(prompt, str(number), max_new_tokens=length, eos_token_id=-1)
            for _ in range(rng.integers(0, 4)):
                driver.step()
            active = driver.active()
            if active and rng.random() < 0.2:
                victim = active[rng.integers(len(active))]
                driver.manager.cancel_request(victim)
                cancelled.add(victim)
            restored += bool(driver.processor.offloading_manager._request_id_to_cpu_blocks)
        while driver.step():
            restored += bool(driver.processor.offloading_manager._request_id_to_cpu_blocks)
        cache = driver.processor.cache
        for allocator in cache.cache_allocators.values():
            assert not allocator.block_table
            assert allocator.prefixes.evictable_blocks == allocator.prefixes.cached_blocks > 0
            assert allocator.prefixes.stats().hit_tokens > 0
    assert cancelled
    assert calls["evict"]
    assert calls["extend"]
    assert restored if swap else calls["create_equivalent_initial_request"]
    for number, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        params = SamplingParams(max_new_tokens=length, temperature=0)
        for name in (f"{number}", f"{number}__child#0"):
            # Who is cancelled before it forks has no child.
            if not {name, f"{number}"} & cancelled:
                assert driver.results[name] == generated(kind, np.array(prompt), params)


def test_room_is_made_leaf_by_leaf(calls):
    """A prefix in use outlives what was cached beside it; the library drops all at once."""
    hot, others = list(range(33)), prompts_with_stems(6)
    model = tiny_model("qwen3")
    with continuous_batching.install():
        driver = Driver(model, greedy(max_new_tokens=2), num_blocks=24)
        for number, prompt in enumerate(chain.from_iterable([hot, other] for other in others)):
            driver.manager.add_request(prompt, str(number))
            while driver.step():
                pass
        prefixes = driver.processor.cache.cache_allocators["full_attention"].prefixes
    stats = prefixes.stats()
    assert stats.evicted_tokens > 0
    # Five times of six the hot prompt was found whole.
    assert stats.hit_tokens >= 5 * 32
    assert prefixes.match(hot).length == 32


def test_siblings_fork_together_in_a_cache_full_of_what_nobody_uses(calls):
    prompts = prompts_with_stems(8)
    with continuous_batching.install():
        driver = Driver(tiny_model("qwen3"), greedy(4, max_new_tokens=2), num_blocks=16)
        for number, prompt in enumerate(prompts):
            driver.manager.add_request(prompt, str(number))
            while driver.step():
                pass
    assert calls["evict"] > 0
    # None of them began again for want of a block.
    assert calls["create_equivalent_initial_request"] == 0
    assert len(driver.results) == 4 * len(prompts)


def test_what_must_be_free_at_once_is():
    """The library frees a request so that others go on, and counts on its blocks."""
    first, second = prompts_with_stems(1)[0], [1, 2, 3, 4, 5, 6]
    with continuous_batching.install():
        driver = Driver(tiny_model("qwen3"), greedy())
        for number, prompt in enumerate((first, first[:-1], second)):
            driver.manager.add_request(prompt, str(number))
            driver.step()
        cache = driver.processor.cache
        allocator = cache.cache_allocators["full_attention"]
        free = cache.compute_free_capacity(relative=False) // allocator.bytes_per_block
        own = set(allocator.block_table["2"])
        shared = {*allocator.block_table["0"]} & {*allocator.block_table["1"]}
        assert shared
        assert allocator._held["2"].blocks > 0
        for request_id, more in (
            ("2", len(own)),
            ("0", len({*allocator.block_table["0"]} - shared)),
        ):
            cache.free_blocks(request_id, no_cache=True)
            free += more
            assert cache.compute_free_capacity(relative=False) // allocator.bytes_per_block == free


def test_sinks_are_keys_without_values(calls):
    """gpt-oss, whose heads have learned sinks, with layers of both kinds."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(0, 2)
    prompts = prompts_with_stems(5)
    settings = batching(return_logprobs=True)
    expected = model.generate_batch(prompts, greedy(), continuous_batching_config=settings)
    with continuous_batching.install():
        got = model.generate_batch(prompts, greedy(), continuous_batching_config=settings)
    assert calls["run"]
    assert tokens_of(got) == tokens_of(expected)
    for ours, theirs in zip(got.values(), expected.values(), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_what_is_installed_is_taken_out_again():
    before = dict(library.ATTN_TYPE_TO_ALLOCATOR), dict(SCHEDULER_MAPPING)
    with continuous_batching.install() as outer:
        assert issubclass(library.ATTN_TYPE_TO_ALLOCATOR["full_attention"], TreeAllocator)
        assert SCHEDULER_MAPPING["fifo"] is TreeFIFOScheduler
        with continuous_batching.install(eviction="lfu"):
            assert library.ATTN_TYPE_TO_ALLOCATOR["sliding_attention"].eviction == "lfu"
        assert library.ATTN_TYPE_TO_ALLOCATOR["sliding_attention"].eviction == "lru"
        outer.close()
    assert before == (library.ATTN_TYPE_TO_ALLOCATOR, SCHEDULER_MAPPING)


def test_a_model_has_its_attention_back():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    prompt = prompts_with_stems(1)
    with continuous_batching.install():
        run = {"continuous_batching_config": batching(), "persistent_manager": True}
        model.generate_batch(prompt, greedy(), **run)
        assert model.config._attn_implementation == NAME
        with pytest.raises(UnsupportedAttention, match="without the cache"):
            model(torch.tensor(prompt))
        model.destroy_cached_continuous_batching_manager()
        assert model.config._attn_implementation == "sdpa"
        model(torch.tensor(prompt))


def test_a_kept_manager_starts_again_after_the_model_had_its_attention():
    """`stop` gives an eager model its attention back; the same cache is used once more."""
    model = tiny_model("qwen3")
    prompt = prompts_with_stems(1)
    with continuous_batching.install():
        run = {"continuous_batching_config": batching(), "persistent_manager": True}
        first = tokens_of(model.generate_batch(prompt, greedy(), **run))
        assert model.config._attn_implementation == "eager"
        assert tokens_of(model.generate_batch(prompt, greedy(), **run)) == first
        model.destroy_cached_continuous_batching_manager()


def test_another_attention_is_refused_by_name():
    model = tiny_model("qwen3")
    with continuous_batching.install():
        driver = Driver(model, greedy())
        driver.manager.add_request([1, 2, 3], "a")
        model.config._attn_implementation = "sdpa"
        with pytest.raises(UnsupportedAttention, match=r"'flash_prefixtree'.*'sdpa'"):
            driver.step()


def test_latent_attention_is_refused_at_the_start():
    config = SimpleNamespace(kv_lora_rank=32, _attn_implementation="sdpa")
    with pytest.raises(UnsupportedModel, match=r"kv_lora_rank is 32.*use model.generate"):
        TreeAllocator(config=config)


def test_padded_batches_are_refused_by_name():
    cache = {"slots": torch.arange(8), "blocks": torch.arange(2), "block_size": 4}
    ends = torch.tensor([0, 3, 3], dtype=torch.int32)
    with pytest.raises(UnsupportedAttention, match="3 tokens is padded to 8"):
        Batch([], query_ends=ends, kv_ends=ends, **cache)


def test_bad_arguments_change_nothing(monkeypatch):
    before = dict(library.ATTN_TYPE_TO_ALLOCATOR)
    with pytest.raises(InvalidArgument, match="nearest"):
        continuous_batching.install(eviction="nearest")
    assert before == library.ATTN_TYPE_TO_ALLOCATOR
    monkeypatch.setattr(installation.transformers, "__version__", "6.0.0")
    with pytest.warns(UserWarning, match=r"5\.19 to 5\.23"):
        continuous_batching.install().close()
