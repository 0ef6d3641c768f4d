"""transformers' generate() with the sampler of this project."""

import numpy as np
import torch

from prefixtree.demo.baseline import SeededDraw, run_generate
from prefixtree.demo.job import Job, Outcome, agreement, first_difference, tokens_asked
from prefixtree.demo.model import next_logits, random_llama
from prefixtree.engines.sampling import SamplingParams, sample, streams


def test_the_logits_processor_allows_what_the_sampler_draws_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(3)
    params = [
        SamplingParams(n=3, temperature=0.7, seed=5),
        SamplingParams(n=2, temperature=1.5, seed=6, top_k=4),
    ]
    rows = np.concatenate([streams(each, range(each.n)) for each in params])
    positions = np.array([7, 7, 7, 30, 30])
    draw = SeededDraw(rows, positions)
    drawn = []
    for step in range(40):
        logits = torch.randn(5, 50, generator=generator)
        forced = draw(torch.zeros(5, 1, dtype=torch.int64), logits)
        expected = sample(logits, rows, positions + step)
        assert forced.argmax(dim=-1).tolist() == expected.tolist()
        assert forced.max(dim=-1).values.tolist() == [0.0] * 5
        assert forced.isneginf().sum().item() == 5 * 49
        drawn.append(tuple(expected))
    assert len(set(drawn)) > 30
    assert positions.tolist() == [7, 7, 7, 30, 30]


def test_generate_gives_each_row_the_tokens_it_would_get_alone() -> None:
    """Against a loop without batch, padding or cache."""
    text_model = random_llama(1)
    prompts = [text_model.encode(text) for text in ("def f(x):\n", "import math\n\n\ndef g(y):\n")]
    for temperature in (0.0, 1.0):
        job = Job(
            prompts,
            [
                SamplingParams(max_new_tokens=5, n=2, temperature=temperature, seed=seed)
                for seed in (11, 12)
            ],
        )
        outcome = run_generate(text_model.model, job, "test")
        for problem, index in job.rows:
            params = job.params[problem]
            tokens = list(prompts[problem])
            for _ in range(5):
                logits = next_logits(text_model.model, tokens)[None]
                row = streams(params, [index])
                tokens.append(int(sample(logits, row, np.array([len(tokens)]))[0]))
            assert outcome.tokens[problem][index] == tokens[len(prompts[problem]) :]
        # Rows are padded to the longer prompt, and the last token is not computed.
        kept = 4 * (len(prompts[1]) + 4)
        assert outcome.tokens_computed == kept
        config = text_model.model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 32 * 4
        assert outcome.kv_bytes == kept * per_token
        assert tokens_asked(job, outcome) == 2 * sum(map(len, prompts)) + 4 * 4


def test_tokens_behind_a_stop_token_are_not_part_of_a_sample() -> None:
    text_model = random_llama(2)
    prompt = text_model.encode("def f(x):\n")
    params = SamplingParams(max_new_tokens=12, n=6, temperature=1.5)
    free = run_generate(text_model.model, Job([prompt], [params]), "test").tokens[0]
    stop = tuple({sample[i % 3 + 1] for i, sample in enumerate(free)})
    job = Job(
        [prompt],
        [SamplingParams(max_new_tokens=12, n=6, temperature=1.5, stop_tokens=stop)],
    )
    for whole, stopped in zip(
        free, run_generate(text_model.model, job, "test").tokens[0], strict=True
    ):
        end = next(i for i, token in enumerate(whole) if token in stop)
        assert stopped == whole[: end + 1]


def outcome(*tokens: list[list[int]]) -> Outcome:
    return Outcome(list(tokens), tokens_computed=1, kv_bytes=1, seconds=1.0)


def test_the_first_difference_is_found_also_in_length() -> None:
    expected = outcome([[1, 2, 3], [4, 5]], [[6], [7, 8]])
    assert first_difference(expected, outcome([[1, 2, 3], [4, 5]], [[6], [7, 8]])) is None
    assert agreement(expected, expected) == (8, 8)
    shorter = outcome([[1, 2, 3], [4]], [[6], [9, 8]])
    found = first_difference(expected, shorter)
    assert found is not None
    assert (found.problem, found.sample, found.position) == (0, 1, 1)
    assert (found.expected, found.actual) == (5, None)
    assert agreement(expected, shorter) == (6, 8)
    found = first_difference(shorter, expected)
    assert found is not None
    assert (found.expected, found.actual) == (None, 5)
