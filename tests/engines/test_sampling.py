"""The sampler: exact boundaries of its distributions, its random streams, its parameters."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from prefixtree.engines.errors import InvalidLogits, InvalidSampling
from prefixtree.engines.sampling import STREAM, SamplingParams, sample, streams, uniforms

VOCAB = 11


def rows(params: SamplingParams, count: int) -> np.ndarray:
    return streams(params, range(count))


def token_at(monkeypatch, logits, u, *, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The tokens drawn from one row of logits when the stream gives the uniforms `u`."""
    u = np.asarray(u, np.float64)
    monkeypatch.setattr("prefixtree.engines.sampling.uniforms", lambda keys, positions: u)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    table = torch.as_tensor(logits).expand(len(u), -1)
    return sample(table, rows(params, len(u)), np.zeros(len(u), np.int64))


def around(boundary: Fraction) -> list[float]:
    """A uniform just below and one just above a boundary, further off than float64 rounds."""
    return [float(boundary) - 1e-12, float(boundary) + 1e-12]


def check_cells(monkeypatch, logits, cells: list[tuple[int, Fraction]], **params) -> None:
    """`cells` divide [0, 1): from left to right a token and its probability."""
    assert sum(width for _, width in cells) == 1
    low = Fraction(0)
    for token, width in cells:
        inside = [around(low)[1], float(low + width / 2), around(low + width)[0]]
        drawn = token_at(monkeypatch, logits, inside, **params)
        assert drawn.tolist() == [token] * 3, (token, low, width)
        low += width
    assert token_at(monkeypatch, logits, [0.0], **params)[0] == cells[0][0]
    assert token_at(monkeypatch, logits, [1 - 2.0**-53], **params)[0] == cells[-1][0]


# Probabilities 1/8, 1/2, 0, 1/4, 1/8 as logits that float32 holds well enough for 1e-12 cells.
LOGITS = torch.tensor([1, 4, 0, 2, 1], dtype=torch.float64).log()


def test_inverse_of_the_cumulative_distribution_in_order_of_ids(monkeypatch):
    eighth = Fraction(1, 8)
    cells = [(0, eighth), (1, 4 * eighth), (3, 2 * eighth), (4, eighth)]
    check_cells(monkeypatch, LOGITS, cells)
    # A shift of all logits is no change of the distribution, however far.
    check_cells(monkeypatch, LOGITS + 4096, cells)


def test_temperature_divides_the_logits(monkeypatch):
    # At 1/2 the weights are squared: 1, 16, 0, 4, 1.
    cells = [(0, 1), (1, 16), (3, 4), (4, 1)]
    cells = [(token, Fraction(weight, 22)) for token, weight in cells]
    check_cells(monkeypatch, LOGITS, cells, temperature=0.5)
    check_cells(monkeypatch, LOGITS, [(1, Fraction(1))], temperature=1e-320)


@pytest.mark.parametrize(
    ("top_k", "cells"),
    [
        (1, [(1, 1)]),
        (2, [(1, 4), (3, 2)]),
        (3, [(1, 4), (3, 2), (0, 1)]),  # 0 and 4 are equally likely: the lower id is kept
        (4, [(1, 4), (3, 2), (0, 1), (4, 1)]),
    ],
)
def test_top_k_keeps_exactly_k(monkeypatch, top_k, cells):
    total = sum(weight for _, weight in cells)
    cells = [(token, Fraction(weight, total)) for token, weight in cells]
    check_cells(monkeypatch, LOGITS, cells, top_k=top_k)


@pytest.mark.parametrize(
    ("top_p", "cells"),
    [
        (1e-300, [(1, 1)]),
        (0.5, [(1, 1)]),  # reached exactly by the first token
        (0.5 + 1e-9, [(1, 4), (3, 2)]),
        (0.75, [(1, 4), (3, 2)]),
        (0.8, [(1, 4), (3, 2), (0, 1)]),
        (0.9, [(1, 4), (3, 2), (0, 1), (4, 1)]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(monkeypatch, top_p, cells):
    total = sum(weight for _, weight in cells)
    cells = [(token, Fraction(weight, total)) for token, weight in cells]
    check_cells(monkeypatch, LOGITS, cells, top_p=top_p)


def test_top_p_is_a_share_of_what_top_k_leaves(monkeypatch):
    # Of 4/6 and 2/6 the first reaches 0.6, of all 8/8 it would not.
    check_cells(monkeypatch, LOGITS, [(1, Fraction(1))], top_k=2, top_p=0.6)
    check_cells(monkeypatch, LOGITS, [(1, Fraction(2, 3)), (3, Fraction(1, 3))], top_p=0.6)


def test_top_k_beyond_the_vocabulary_is_off(monkeypatch):
    cells = [(1, 4), (3, 2), (0, 1), (4, 1)]
    cells = [(token, Fraction(weight, 8)) for token, weight in cells]
    check_cells(monkeypatch, LOGITS, cells, top_k=99, top_p=0.999)


def test_all_tokens_equal(monkeypatch):
    logits = torch.zeros(4)
    check_cells(monkeypatch, logits, [(i, Fraction(1, 4)) for i in range(4)])
    check_cells(monkeypatch, logits, [(i, Fraction(1, 2)) for i in range(2)], top_k=2)
    check_cells(monkeypatch, logits, [(i, Fraction(1, 3)) for i in range(3)], top_p=0.7)


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


def test_streams_are_functions_of_seed_sample_and_position():
    def draws(seed: int, samples: range, positions: range) -> np.ndarray:
        keys = streams(SamplingParams(seed=seed), samples)["key"]
        return uniforms(
            np.repeat(keys, len(positions)), np.tile(np.array(positions), len(samples))
        ).reshape(len(samples), len(positions))

    table = draws(5, range(20), range(200))
    assert ((table >= 0) & (table < 1)).all()
    assert len(np.unique(table)) == table.size
    np.testing.assert_array_equal(table[7:9, 50:60], draws(5, range(7, 9), range(50, 60)))
    assert not np.isin(draws(6, range(20), range(200)), table).any()
    assert abs(table.mean() - 0.5) < 5 * (1 / 12 / table.size) ** 0.5


def test_the_generator_is_splitmix64():
    # The first outputs of the published generator for the state 1234567.
    expected = np.array(
        [6457827717110365317, 3203168211198807973, 9817491932198370423], dtype=np.uint64
    )
    drawn = uniforms(np.full(3, 1234567, np.uint64), np.arange(3))
    assert drawn.tolist() == ((expected >> np.uint64(11)) * 2.0**-53).tolist()


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
