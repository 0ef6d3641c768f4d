"""Many lists in one buffer, beside as many lists of Python."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from prefixtree import ragged
from prefixtree.ragged import LONG, RaggedInts

ROWS = 5

rows = st.integers(0, ROWS - 1)
sizes = st.sampled_from([0, 1, 3, 40, LONG - 1, LONG, 3 * LONG])
changes = st.lists(
    st.one_of(
        st.tuples(st.just("set"), rows, sizes),
        st.tuples(st.just("extend"), st.lists(rows, min_size=1, unique=True), sizes),
        st.tuples(st.just("drop_front"), rows, sizes),
        st.tuples(st.just("truncate"), rows, sizes),
        st.tuples(st.just("hand_front"), rows, sizes),
        st.tuples(st.just("clear"), rows, sizes),
    ),
    max_size=40,
)


@pytest.fixture(autouse=True, scope="module")
def _rebuilt_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "LEAST", 64)
        yield


@given(changes)
def test_lists_keep_what_was_put_in(changes: list[tuple[str, int | list[int], int]]) -> None:
    real, model = RaggedInts(), [[] for _ in range(ROWS)]
    real.reach(ROWS - 1)
    fresh = iter(range(10**9))

    def some(count: int) -> list[int]:
        return [next(fresh) for _ in range(count)]

    for change, which, size in changes:
        if isinstance(which, list):
            counts = [size // (1 + place) for place in range(len(which))]
            parts = [some(count) for count in counts]
            packed = np.array([entry for part in parts for entry in part], np.int32)
            real.extend(np.array(which), np.array(counts), packed)
            for row, part in zip(which, parts, strict=True):
                model[row] += part
        elif change == "set":
            model[which] = some(size)
            real.set(which, np.array(model[which], np.int32))
        elif change == "drop_front":
            count = min(size, len(model[which]))
            real.drop_front(which, count)
            del model[which][:count]
        elif change == "hand_front":
            count, other = min(size, len(model[which])), (which + 1) % ROWS
            real.clear(other)
            real.hand_front(which, count, other)
            model[other], model[which] = model[which][:count], model[which][count:]
        elif change == "truncate":
            del model[which][size:]
            real.truncate(which, len(model[which]))
        else:
            real.clear(which)
            model[which].clear()
        assert [real.get(row).tolist() for row in range(ROWS)] == model
    counts = np.array([len(entries) // 2 for entries in model])
    gathered = real.gather(np.arange(ROWS), counts).tolist()
    halves = zip(model, counts.tolist(), strict=True)
    assert gathered == [entry for entries, count in halves for entry in entries[:count]]


def test_room_that_a_list_is_given_is_there() -> None:
    lists = RaggedInts()
    lists.set(0, np.arange(40, dtype=np.int32))  # with room for 45
    lists.set(1, np.arange(18, dtype=np.int32))  # 45 + 18 <= 64 < 45 + 20
    lists.extend(np.array([1]), np.array([2]), np.arange(2, dtype=np.int32))
    assert lists.get(1).tolist() == [*range(18), 0, 1]
    assert lists.get(0).tolist() == [*range(40)]


def test_a_buffer_is_used_again_only_with_room_to_spare() -> None:
    lists = RaggedInts()
    lists.set(0, np.arange(40, dtype=np.int32))
    lists.set(1, np.arange(10, dtype=np.int32))
    lists.clear(0)
    lists.set(2, np.arange(48, dtype=np.int32))  # room 54 behind the 11 of list 1: one too many
    lists.extend(np.array([2]), np.array([6]), np.arange(6, dtype=np.int32))
    assert lists.get(2).tolist() == [*range(48), *range(6)]
    assert lists.get(1).tolist() == [*range(10)]
