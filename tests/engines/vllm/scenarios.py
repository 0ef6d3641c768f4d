"""Runs one vLLM engine through all scenarios and prints what came out, as one line of JSON.

`python -m tests.engines.vllm.scenarios MODEL_FOLDER [tree] [attention] [speculative] [one_group]`:
with which of our parts, with drafts looked up in the prompt, with one group of KV caches for all.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import Any

import torch

from prefixtree.index import PrefixIndex

CALLS: Counter[str] = Counter()
BLOCK = 32


def count(owner: Any, name: str) -> None:
    """Counts the calls of a function, where its users look it up."""
    inner = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return inner(*args, **kwargs)

    setattr(owner, name, counted)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(5, 290), k=length)


def make_llm(folder: str, parts: tuple[str, ...]) -> Any:
    """A vLLM with a pool that 8 requests overflow and prefill in chunks of 64 tokens."""
    from vllm import LLM

    options: dict[str, Any] = {}
    if "tree" in parts:
        options["scheduler_cls"] = "prefixtree.engines.vllm.scheduler.PrefixTreeScheduler"
    if "one_group" in parts:
        options["disable_hybrid_kv_cache_manager"] = True
    if "speculative" in parts:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        }
    return LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        num_gpu_blocks_override=28,
        distributed_executor_backend="uni",
        seed=0,
        **options,
    )


def generate(llm: Any, prompts: list[list[int]], salt: str | None = None, **params: Any) -> Any:
    from vllm import SamplingParams

    inputs: list[Any] = [{"prompt_token_ids": tokens} for tokens in prompts]
    if salt is not None:
        inputs = [{**one, "cache_salt": salt} for one in inputs]
    params = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params}
    return llm.generate(inputs, SamplingParams(**params), use_tqdm=False)


def tokens_of(outputs: Any) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


class Engine:
    """A vLLM in this process, looked into."""

    def __init__(self, folder: str, parts: tuple[str, ...]) -> None:
        self.llm = make_llm(folder, parts)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.preemptions = self.drafted = 0
        self.layers = self.llm.llm_engine.model_config.hf_config.num_hidden_layers
        scheduler = self.core.scheduler
        inner = scheduler._preempt_request

        def preempt(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return inner(*args, **kwargs)

        scheduler._preempt_request = preempt

    def tokens(self, prompts: list[list[int]], **params: Any) -> list[list[list[int]]]:
        return tokens_of(generate(self.llm, prompts, **params))

    def cached(self, tokens: list[int], salt: str | None = None) -> int:
        (output,) = generate(self.llm, [tokens], salt=salt, max_tokens=1)
        return int(output.num_cached_tokens)

    def random_arrivals(self, seed: int) -> dict[str, list[int]]:
        """Requests that come at random, some with a common beginning; every third one is aborted
        once it has produced 4 tokens, whenever that is."""
        from vllm import SamplingParams

        rng = random.Random(seed)
        engine = self.llm.llm_engine
        heads = [prompt(seed + i, 3 * BLOCK) for i in range(3)]
        produced: dict[str, list[int]] = {}
        waiting = list(range(30))
        while waiting or engine.has_unfinished_requests():
            for _ in range(rng.randrange(3)):
                if waiting:
                    number = waiting.pop(0)
                    tokens = rng.choice(heads)[: rng.randrange(20, 96)]
                    tokens = tokens + prompt(rng.randrange(1000), rng.randrange(1, 100))
                    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
                    engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
            for output in engine.step():
                produced[output.request_id] = list(output.outputs[0].token_ids)
                if int(output.request_id) % 3 == 0 and len(output.outputs[0].token_ids) >= 4:
                    engine.abort_request([output.request_id])
        return {name: got[:4] if int(name) % 3 == 0 else got for name, got in produced.items()}


def run(engine: Engine) -> dict[str, Any]:
    shared = prompt(1, 2 * BLOCK + 7)
    results: dict[str, Any] = {}
    results["shared"] = engine.tokens([shared + prompt(10 + i, 5 + i) for i in range(8)])
    results["again"] = engine.tokens([shared + prompt(10 + i, 5 + i) for i in range(8)])
    results["equal"] = engine.tokens([prompt(2, 70)] * 3)
    torch.manual_seed(
        7
    )  # seeds of requests do not work with chunked prefill on vLLM's CPU platform
    results["samples"] = engine.tokens([prompt(3, 70)], n=4, temperature=1.0, max_tokens=40)
    results["chunked"] = engine.tokens([prompt(4, 300), prompt(4, 200) + prompt(5, 60)])
    results["full"] = engine.tokens([prompt(20 + i, 60) for i in range(12)], max_tokens=60)
    results["preempted"] = engine.preemptions > 0
    results["random"] = engine.random_arrivals(seed=5)
    engine.llm.reset_prefix_cache()
    one = prompt(6, 100)
    results["cached"] = [
        engine.cached(one),
        engine.cached(one),
        engine.cached(one, salt="a"),
        engine.cached(one, salt="b"),
        engine.cached(one, salt="a"),
        engine.cached(one[:97]),
        engine.cached(one[:96]),
    ]
    results["free"] = engine.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    results["reset"] = bool(engine.llm.reset_prefix_cache())
    results["cached after reset"] = engine.cached(one)
    return results


def main(folder: str, *parts: str) -> None:
    steps: Counter[str] = Counter()
    if "tree" in parts:
        from prefixtree.engines.vllm.block_pool import TreeBlockPool

        for name in ("longest_prefix", "cache_full_blocks", "touch", "evict", "release"):
            count(TreeBlockPool, name)
    if "attention" in parts:
        import attention

        for name in ("write", "run", "plan", "forest_from_block_tables"):
            count(attention, name)
        count(attention.Plan, "advance")
    engine = Engine(folder, parts)
    CALLS.clear()
    model = engine.core.model_executor
    inner = model.execute_model

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        steps["all"] += scheduled.total_num_scheduled_tokens > 0
        engine.drafted += len(scheduled.scheduled_spec_decode_tokens)
        return inner(scheduled, *args, **kwargs)

    model.execute_model = execute_model
    results = run(engine)
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    seen = {"pool": type(pool).__name__, "drafted": engine.drafted, "layers": engine.layers}
    if isinstance(getattr(pool, "index", None), PrefixIndex):
        pool.index.check()
        seen["evicted"] = pool.index.stats().evicted_tokens
    print(json.dumps({"results": results, "calls": CALLS, "steps": steps["all"], **seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
