"""docs/embedding.md: its engine against decoding without any cache, and its examples."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from prefixtree import PrefixCache

GUIDE = Path(__file__).parents[2] / "docs" / "embedding.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
(ENGINE,) = (block for block in BLOCKS if "class Engine" in block)
EXAMPLES = [block for block in BLOCKS if block is not ENGINE]


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The engine of the guide as a module."""
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)
    exec(compile(ENGINE, str(GUIDE), "exec"), module.__dict__)
    return module


def without_cache(
    guide: ModuleType, decoder: torch.nn.Module, prompt: list[int], end: int, seed: int
):
    """The whole text through the model for each token."""

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    text = list(prompt)
    while len(text) < end:
        with torch.inference_mode():
            logits = decoder(torch.tensor(text), torch.arange(len(text)), attend)[-1]
        noise = np.random.default_rng([seed, len(text)]).gumbel(size=guide.VOCAB)
        text.append(int((logits.numpy() + noise).argmax()))
    return text


def test_the_engine_is_as_long_as_is_said():
    assert len(ENGINE.splitlines()) <= 150


@pytest.mark.parametrize("seed", range(4))
def test_the_engine_generates_what_decoding_without_a_cache_does(guide, seed):
    """Shared stems, forks, chunks and a cache that is too small for all, requests at any time."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    block_size, num_blocks = int(rng.integers(1, 6)), 24
    cache = PrefixCache(num_blocks, block_size)
    decoder = guide.Decoder()
    engine = guide.Engine(guide.Runner(decoder, num_blocks, block_size), cache, 16)
    room = num_blocks * block_size
    stems = [rng.integers(0, guide.VOCAB, room // 3).tolist() for _ in range(2)]
    requests = []
    while len(requests) < 10 or engine.running or engine.waiting:
        if len(requests) < 10 and rng.random() < 0.3:
            prompt = stems[rng.integers(2)][: rng.integers(1, room // 3 + 1)]
            prompt = prompt + rng.integers(0, guide.VOCAB, rng.integers(0, 3)).tolist()
            new, n = int(rng.integers(1, room // 4)), int(rng.integers(1, 4))
            first = 10 * len(requests)
            done = engine.submit(prompt, new, n=n, seed=first)
            requests.append((prompt, len(prompt) + new, range(first, first + n), done))
        if engine.running or engine.waiting:
            engine.step()
            cache.check()
    stats = cache.stats()
    assert stats.open_sequences == 0
    assert stats.hit_tokens > 0
    assert stats.evicted_tokens > 0
    assert stats.opens > len(requests)  # somebody gave way and was opened again
    for prompt, end, seeds, done in requests:
        expected = [without_cache(guide, decoder, prompt, end, seed) for seed in seeds]
        assert sorted(done) == sorted(expected)


def test_a_prompt_of_two_requests_is_computed_once(guide):
    computed = []

    class Runner(guide.Runner):
        def __call__(self, tokens, *others):
            computed.append(len(tokens))
            return super().__call__(tokens, *others)

    engine = guide.Engine(Runner(guide.Decoder(), 32, 4), PrefixCache(32, 4), 64)
    for last in (50, 51, 52):
        engine.submit([*range(30), last], 2, n=2)
    while engine.running or engine.waiting:
        engine.step()
    # The stem and three last tokens, then a token of each sample.
    assert sum(computed) == 30 + 3 + 6


def test_what_can_never_run_is_refused(guide):
    engine = guide.Engine(guide.Runner(guide.Decoder(), 2, 4), PrefixCache(2, 4), 64)
    with pytest.raises(AssertionError, match="never run"):
        engine.submit(range(5), 4)
    assert not engine.waiting


@pytest.mark.parametrize("block", [ENGINE, *EXAMPLES], ids=range(len(BLOCKS)))
def test_the_examples_run_as_they_stand(block, capsys):
    module = ModuleType("__main__")
    exec(compile(block, str(GUIDE), "exec"), module.__dict__)
    assert capsys.readouterr().out
