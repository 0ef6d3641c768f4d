"""The sampler: who wins its race, its random streams, its parameters."""

import itertools

import numpy as np
import pytest
import torch

from prefixtree.engines.errors import InvalidLogits, InvalidSampling
from prefixtree.engines.sampling import STREAM, SamplingParams, gumbels, sample, splitmix, streams

VOCAB = 11
CPU = torch.device("cpu")


def rows(params: SamplingParams, count: int) -> np.ndarray:
    return streams(params, range(count))


def drawn_with(monkeypatch, logits, noise, **params) -> list[int]:
    """The tokens drawn from one row of logits, once with each row of noise."""
    noise = torch.as_tensor(noise, dtype=torch.float64)
    monkeypatch.setattr("prefixtree.engines.sampling.gumbels", lambda *_: noise)
    count = len(noise)
    table = torch.as_tensor(logits).expand(count, -1)
    streams_of = rows(SamplingParams(**params), count)
    return sample(table, streams_of, np.zeros(count, np.int64)).tolist()


def reachable(monkeypatch, logits, **params) -> set[int]:
    """The tokens that can be drawn: each is favoured in turn by more than any logits differ."""
    return set(drawn_with(monkeypatch, logits, torch.eye(len(logits)) * 1e6, **params))


# Probabilities 1/8, 1/2, 0, 1/4, 1/8.
LOGITS = torch.tensor([1, 4, 0, 2, 1], dtype=torch.float64).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_noise_decides_just_where_it_makes_up_for_the_logits(monkeypatch, temperature):
    for left, right in itertools.permutations([0, 1, 3], 2):
        handicap = float(LOGITS[left] - LOGITS[right]) / temperature
        noise = torch.full((2, 5), -1e6, dtype=torch.float64)
        noise[:, left] = 0
        noise[0, right], noise[1, right] = handicap - 1e-9, handicap + 1e-9
        drawn = drawn_with(monkeypatch, LOGITS, noise, temperature=temperature)
        assert drawn == [left, right]


def test_a_temperature_next_to_nothing_is_greedy(monkeypatch):
    assert drawn_with(monkeypatch, LOGITS, torch.eye(5) * 700, temperature=1e-320) == [1] * 5


def test_a_forbidden_token_is_never_drawn(monkeypatch):
    assert reachable(monkeypatch, LOGITS) == {0, 1, 3, 4}


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [
        (1, {1}),
        (2, {1, 3}),
        (3, {1, 3, 0}),  # 0 and 4 are equally likely: the lower id is kept
        (4, {1, 3, 0, 4}),
        (99, {1, 3, 0, 4}),
    ],
)
def test_top_k_keeps_exactly_k(monkeypatch, top_k, kept):
    assert reachable(monkeypatch, LOGITS, top_k=top_k) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-300, {1}),
        (0.5, {1}),  # reached exactly by the first token
        (0.5 + 1e-9, {1, 3}),
        (0.75, {1, 3}),
        (0.8, {1, 3, 0}),
        (0.9, {1, 3, 0, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(monkeypatch, top_p, kept):
    assert reachable(monkeypatch, LOGITS, top_p=top_p) == kept


def test_top_p_is_a_share_of_what_top_k_leaves(monkeypatch):
    # Of 4/6 and 2/6 the first reaches 0.6, of all 8/8 it would not.
    assert reachable(monkeypatch, LOGITS, top_k=2, top_p=0.6) == {1}
    assert reachable(monkeypatch, LOGITS, top_p=0.6) == {1, 3}
    assert reachable(monkeypatch, LOGITS, top_k=99, top_p=0.999) == {0, 1, 3, 4}


def test_all_tokens_equal(monkeypatch):
    assert reachable(monkeypatch, torch.zeros(4)) == {0, 1, 2, 3}
    assert reachable(monkeypatch, torch.zeros(4), top_k=2) == {0, 1}
    assert reachable(monkeypatch, torch.zeros(4), top_p=0.7) == {0, 1, 2}


def test_a_rounding_error_in_the_logits_changes_no_token_but_at_a_tie():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(4000, 64)))
    table, positions = rows(SamplingParams(seed=3), 4000), np.arange(4000)
    nudged = logits + torch.from_numpy(rng.normal(size=(4000, 64))) * 1e-7
    # The two best of 64 are within 1e-6 of each other in about one row of a million.
    assert (sample(logits, table, positions) == sample(nudged, table, positions)).all()


def test_greedy_takes_the_first_of_equals_and_ignores_truncation():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    params = SamplingParams(temperature=0, top_k=2, top_p=0.1)
    assert sample(logits, rows(params, 2), np.zeros(2, np.int64)).tolist() == [1, 0]


def mixed_batch(count: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(size=(count, VOCAB)).astype(np.float32) * 2)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(temperature=0.7, top_k=4, seed=2),
        SamplingParams(temperature=1.5, top_p=0.8, seed=3),
        SamplingParams(top_k=6, top_p=0.6, seed=4),
    ]
    table = np.concatenate([streams(kinds[i % 5], [i // 5]) for i in range(count)])
    return logits, table, rng.integers(0, 1000, count)


def test_a_row_does_not_depend_on_its_batch(monkeypatch):
    logits, table, positions = mixed_batch(40)
    together = sample(logits, table, positions)
    alone = [sample(logits[i : i + 1], table[i : i + 1], positions[i : i + 1]) for i in range(40)]
    assert together.tolist() == np.concatenate(alone).tolist()
    order = np.random.default_rng(0).permutation(40)
    shuffled = sample(logits[torch.from_numpy(order)], table[order], positions[order])
    assert shuffled.tolist() == together[order].tolist()
    monkeypatch.setattr("prefixtree.engines.sampling._CHUNK", {"cpu": 3 * VOCAB})
    assert sample(logits, table, positions).tolist() == together.tolist()


def test_the_frequencies_follow_the_distribution():
    # 2,000 draws of p = 1/2: the count is within 5 standard deviations (5 * sqrt(500) = 112),
    # and as the streams are fixed it is the same count in every run.
    count = 2000
    table = rows(SamplingParams(seed=9), count)
    drawn = sample(LOGITS.expand(count, -1), table, np.arange(count))
    counts = np.bincount(drawn, minlength=5)
    for token, share in enumerate([1 / 8, 1 / 2, 0, 1 / 4, 1 / 8]):
        assert abs(counts[token] - share * count) <= 5 * (count * share * (1 - share)) ** 0.5


def test_noise_is_a_function_of_seed_sample_position_and_token():
    def noise(seed: int, samples: range, positions: range) -> torch.Tensor:
        keys = np.repeat(streams(SamplingParams(seed=seed), samples)["key"], len(positions))
        return gumbels(keys, np.tile(np.array(positions), len(samples)), VOCAB, CPU).reshape(
            len(samples), len(positions), VOCAB
        )

    table = noise(5, range(20), range(100))
    assert table.isfinite().all()
    assert len(table.unique()) == table.numel()
    assert torch.equal(table[7:9, 50:60], noise(5, range(7, 9), range(50, 60)))
    assert not torch.isin(noise(6, range(20), range(100)), table).any()
    # Of a Gumbel variable, exp(-exp(-x)) is uniform.
    uniform = (-(-table).exp()).exp()
    assert abs(float(uniform.mean()) - 0.5) < 5 * (1 / 12 / table.numel()) ** 0.5


def test_the_generator_is_splitmix64():
    # The first outputs of the published generator for the state 1234567.
    expected = np.array(
        [6457827717110365317, 3203168211198807973, 9817491932198370423], dtype=np.uint64
    )
    drawn = splitmix(torch.tensor(1234567), torch.arange(3))
    assert drawn.numpy().view(np.uint64).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}], ids=lambda p: str(p)
)
@pytest.mark.parametrize(
    "bad",
    [[0.0, float("nan"), 1.0], [float("inf"), 0.0, 1.0], [-float("inf")] * 3],
    ids=["nan", "inf", "all forbidden"],
)
def test_logits_without_a_finite_maximum_are_refused(params, bad):
    logits = torch.tensor([[0.0, 1.0, 2.0], bad, [0.0, 1.0, 2.0]])
    with pytest.raises(InvalidLogits) as error:
        sample(logits, rows(SamplingParams(**params), 3), np.zeros(3, np.int64))
    assert error.value.rows == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("n", 0),
        ("n", "2"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stop_tokens", [1]),
        ("stop_tokens", (1, -1)),
        ("stop_tokens", (1.0,)),
        ("stop_tokens", (2**31,)),
    ],
)
def test_parameters_outside_their_range_are_named(name, value):
    with pytest.raises(InvalidSampling, match=name) as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)


def test_parameters_at_the_ends_of_their_range():
    params = SamplingParams(
        max_new_tokens=1, temperature=0, top_p=1, seed=2**64 - 1, stop_tokens=(0, 2**31 - 1)
    )
    assert streams(params, [0, 1]).dtype == STREAM
