"""The engine on tiny models: the tokens of the transformers library, whatever the schedule."""

import numpy as np
import pytest

from prefixtree.engines.engine import Engine
from prefixtree.engines.requests import Completion
from prefixtree.engines.sampling import SamplingParams
from prefixtree.engines.transformers import PagedModel
from tests.engines.models import KINDS, VOCAB, generated, tiny_model

GREEDY = SamplingParams(max_new_tokens=10, temperature=0)

_rng = np.random.default_rng(2)
SHARED = _rng.integers(0, VOCAB, 13)
PROMPTS = [np.concatenate([SHARED, _rng.integers(0, VOCAB, n)]) for n in (5, 1, 20, 9)]
PROMPTS += [_rng.integers(0, VOCAB, 30), PROMPTS[2][:25]]


def check_empty(engine: Engine) -> None:
    """Nothing is left behind: no pin, no block."""
    assert engine.idle
    engine.cache.check()
    assert engine.cache.stats().open_sequences == 0
    engine.cache.clear()
    assert engine.cache.stats().free_blocks == engine.model.num_blocks


def check_tokens(kind: str, completions: list[list[Completion]], params: SamplingParams) -> None:
    for prompt, samples in zip(PROMPTS, completions, strict=True):
        for index, completion in enumerate(samples):
            assert completion.tokens == generated(kind, prompt, params, index)
            assert completion.finish_reason == "length"


# Blocks of 4 tokens, and all prompts with their 10 tokens need 37 of them.
SCHEDULES = {
    "all at once": (64, 256),
    "chunks": (64, 7),
    "preemption": (16, 256),
    "chunks and preemption": (12, 9),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(kind, schedule):
    num_blocks, max_batch_tokens = SCHEDULES[schedule]
    with PagedModel(tiny_model(kind), num_blocks, 4) as paged:
        engine = Engine(paged, max_batch_tokens=max_batch_tokens)
        check_tokens(kind, engine.generate(PROMPTS, GREEDY), GREEDY)
        stats = engine.stats()
        asked = sum(map(len, PROMPTS))
        assert stats.prompt_tokens == asked
        assert stats.peak_blocks <= num_blocks
        if "preemption" in schedule:
            assert stats.preemptions > 0
        else:
            # Every distinct prefix once. The last prompt is a prefix of another: it is cached
            # whole, and only its last token is computed again.
            prefixes = {tuple(p[: i + 1]) for p in PROMPTS for i in range(len(p))}
            assert stats.prefill_tokens == len(prefixes) + 1 < asked
            assert stats.decode_tokens == 9 * len(PROMPTS)
        check_empty(engine)


@pytest.mark.parametrize("num_blocks", [96, 20])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=8, n=4, temperature=0),
        SamplingParams(max_new_tokens=8, n=4, seed=7),
        SamplingParams(max_new_tokens=8, n=3, temperature=0.8, top_k=20, top_p=0.9, seed=8),
    ],
    ids=["greedy", "sampled", "truncated"],
)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_samples_are_those_of_full_forwards(kind, params, num_blocks):
    with PagedModel(tiny_model(kind), num_blocks, 4) as paged:
        engine = Engine(paged, max_batch_tokens=40)
        completions = engine.generate(PROMPTS, params)
        check_tokens(kind, completions, params)
        if params.temperature > 0:
            assert len({tuple(sample.tokens) for sample in completions[0]}) == params.n
        if num_blocks == 20:
            assert engine.stats().preemptions > 0
        check_empty(engine)


def test_requests_may_come_while_others_decode():
    with PagedModel(tiny_model("mistral"), 64, 4) as paged:
        engine = Engine(paged, max_batch_tokens=8)
        texts: dict[int, list[int]] = {}
        for prompt in PROMPTS:
            texts[engine.submit(prompt, GREEDY)] = []
            for event in engine.step():
                texts[event.request_id].append(event.token)
        assert texts[0]
        for event in engine.stream():
            texts[event.request_id].append(event.token)
        assert list(texts.values()) == [generated("mistral", p, GREEDY) for p in PROMPTS]
        check_empty(engine)


def test_a_prompt_that_is_cached_whole_writes_nothing():
    prompt = PROMPTS[0]
    with PagedModel(tiny_model("qwen3"), 64, 4) as paged:
        engine = Engine(paged)
        params = SamplingParams(max_new_tokens=1, temperature=0)
        first = engine.generate([prompt], params)
        before = [tensor.clone() for tensor in (*paged.storage.k, *paged.storage.v)]
        assert engine.generate([prompt, prompt], params) == first * 2
        after = [*paged.storage.k, *paged.storage.v]
        assert all((old == new).all() for old, new in zip(before, after, strict=True))
        assert engine.stats().prefill_tokens == len(prompt) + 2
        assert engine.generate([prompt], GREEDY)[0][0].tokens == generated("qwen3", prompt, GREEDY)
        check_empty(engine)
