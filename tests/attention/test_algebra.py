"""Laws of merging partials."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import IDENTITY, Partial, merge, scan
from attention.algebra import merge_


def partials(count: int, shape: tuple[int, ...], seed: int) -> list[Partial]:
    """Random partials over no, one or many keys each: some rows are the identity."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        o = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
        lse = 20 * torch.randn(shape, generator=generator, dtype=torch.float64)
        empty = torch.rand(shape, generator=generator) < 0.3
        made.append(Partial(o.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)))
    return made


def assert_equal(a: Partial, b: Partial) -> None:
    # An lse of up to 80 is rounded by 1e-14, and so is the logarithm of each weight: a relative
    # error, on each of a few merges, of an o of up to 4.
    torch.testing.assert_close(a.o, b.o, rtol=0, atol=2e-13)
    torch.testing.assert_close(a.lse, b.lse, rtol=0, atol=1e-13)


@given(st.integers(0, 10_000))
def test_merge_is_associative_and_commutative(seed: int) -> None:
    a, b, c = partials(3, (3, 2), seed)
    assert_equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_equal(merge(a, b), merge(b, a))


@given(st.integers(0, 10_000))
def test_the_identity_changes_no_bit(seed: int) -> None:
    (a,) = partials(1, (3, 2), seed)
    for merged in (merge(a, IDENTITY), merge(IDENTITY, a)):
        assert torch.equal(merged.o, a.o)
        assert torch.equal(merged.lse, a.lse)


def test_two_identities_are_the_identity() -> None:
    o, lse = merge(IDENTITY, IDENTITY)
    assert o.eq(0).all()
    assert lse == -torch.inf


def test_merging_parts_of_the_keys_attends_to_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 30, generator=generator, dtype=torch.float64) * 10
    values = torch.randn(30, 4, generator=generator, dtype=torch.float64)

    def attend(keys: slice) -> Partial:
        part = logits[:, keys]
        return Partial(torch.softmax(part, 1) @ values[keys], torch.logsumexp(part, 1))

    merged = merge(merge(attend(slice(0, 1)), attend(slice(1, 20))), attend(slice(20, 30)))
    assert_equal(merged, attend(slice(0, 30)))


def test_a_learned_sink_is_a_key_without_a_value() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 30, generator=generator, dtype=torch.float64) * 3
    values = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    sinks = torch.tensor([-torch.inf, 0.5, 7.0], dtype=torch.float64)
    part = Partial(torch.softmax(logits, 2) @ values, torch.logsumexp(logits, 2))
    with_sink = torch.cat([logits, sinks.expand(5, 3).unsqueeze(2)], dim=2)
    expected = Partial(
        torch.softmax(with_sink, 2)[..., :-1] @ values, torch.logsumexp(with_sink, 2)
    )
    assert_equal(merge(part, (IDENTITY.o, sinks)), expected)


@given(st.integers(0, 10_000))
def test_merging_in_place_is_merging(seed: int) -> None:
    a, b = partials(2, (3, 2), seed)
    expected = merge(a, b)
    merge_(a, b)
    assert_equal(a, expected)


def test_a_lost_partial_is_not_hidden() -> None:
    lost = Partial(torch.full((1, 4), torch.nan), torch.full((1,), torch.nan))
    kept = Partial(torch.ones(1, 4), torch.zeros(1))
    assert merge(kept, lost).o.isnan().all()
    merge_(kept, lost)
    assert kept.o.isnan().all()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scan_is_the_running_merge(length: int, dim: int) -> None:
    parts = partials(length, (3,), seed=length)
    o = torch.stack([part.o for part in parts], dim=dim % 2)
    lse = torch.stack([part.lse for part in parts], dim=dim % 2)
    scanned = scan(o, lse, dim=dim)
    running = parts[0]
    for index, part in enumerate(parts):
        if index:
            running = merge(running, part)
        row = Partial(scanned.o.select(dim % 2, index), scanned.lse.select(dim % 2, index))
        assert_equal(row, running)
