"""FreeExtents against a plain set of free ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator import BrokenInvariant, FreeExtents


def extents_of(free: set[int]) -> list[tuple[int, int]]:
    """Maximal runs (start, length) of a set, found one id at a time."""
    return [
        (start, next(n for n in range(1, len(free) + 1) if start + n not in free))
        for start in sorted(free)
        if start - 1 not in free
    ]


def assert_holds(extents: FreeExtents, free: set[int]) -> None:
    extents.check()
    assert list(extents) == extents_of(free)
    assert len(extents) == len(extents_of(free))
    assert extents.total == len(free)


@given(st.integers(1, 40), st.data())
def test_any_sequence_of_takes_and_adds(size: int, data: st.DataObject) -> None:
    extents = FreeExtents(size)
    free = set(range(size))
    for _ in range(data.draw(st.integers(0, 30), "operations")):
        action = data.draw(st.sampled_from(["take_at", "take_best", "take_all", "add"]), "action")
        if action == "take_at":
            start = data.draw(st.integers(-1, size), "start")
            count = data.draw(st.integers(0, size), "count")
            length = dict(extents_of(free)).get(start, 0)
            assert extents.take_at(start, count) == min(length, count)
            free -= set(range(start, start + min(length, count)))
        elif action == "take_best" and free:
            count = data.draw(st.integers(1, size), "count")
            lengths = [length for _, length in extents_of(free)]
            fitting = [length for length in lengths if length >= count]
            best = min(fitting) if fitting else max(lengths)
            chosen = dict(extents_of(free))
            start, taken = extents.take_best(count)
            assert chosen[start] == best
            assert taken == min(best, count)
            free -= set(range(start, start + taken))
        elif action == "take_all":
            assert sorted(extents.take_all()) == extents_of(free)
            free.clear()
        elif action == "add" and len(free) < size:
            taken_runs = extents_of(set(range(size)) - free)
            start, length = data.draw(st.sampled_from(taken_runs), "run")
            skipped = data.draw(st.integers(0, length - 1), "skipped")
            added = data.draw(st.integers(1, length - skipped), "added")
            extents.add(start + skipped, added)
            free |= set(range(start + skipped, start + skipped + added))
        assert_holds(extents, free)


@given(st.permutations(range(12)))
def test_ids_added_one_by_one_in_any_order_end_as_one_extent(order: list[int]) -> None:
    extents = FreeExtents(12)
    extents.take_best(12)
    for count, start in enumerate(order, 1):
        extents.add(start, 1)
        assert_holds(extents, set(order[:count]))
    assert list(extents) == [(0, 12)]


def test_the_rest_of_an_extent_lies_behind_the_ids_taken() -> None:
    extents = FreeExtents(10)
    assert extents.take_best(4) == (0, 4)
    assert extents.take_at(4, 3) == 3
    assert list(extents) == [(7, 3)]


@pytest.mark.parametrize(("start", "length"), [(0, 2), (2, 3), (7, 4), (9, 1)])
def test_check_finds_ids_that_were_added_twice(start: int, length: int) -> None:
    extents = FreeExtents(10)
    extents.add(start, length)
    with pytest.raises(BrokenInvariant):
        extents.check()


@pytest.mark.parametrize("length", [0, -1])
def test_check_finds_empty_extents(length: int) -> None:
    extents = FreeExtents(10)
    extents.take_best(10)
    extents.add(4, length)
    with pytest.raises(BrokenInvariant, match=f"extent at 4 has length {length}"):
        extents.check()


# No call leads to the states below: they are what check() is there to find after a defect.


def test_check_finds_neighbours_that_did_not_merge() -> None:
    extents = FreeExtents(8)
    extents.take_best(8)
    extents.add(0, 2)
    extents._insert(2, 3)
    extents.total += 3
    with pytest.raises(BrokenInvariant, match="extent at 2 overlaps or touches one up to 2"):
        extents.check()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("_length", {0: 2, 3: 4}, "by their end"),
        ("_start", {2: 0, 9: 3}, "by their end"),
        ("_stacks", {2: {0: None}, 5: {4: None}}, "by length"),
        ("_stacks", {2: {0: None}}, "by length"),
        ("_lengths", [5], "lengths of free extents"),
        ("_lengths", [5, 2], "lengths of free extents"),
        ("total", 8, "8 free ids counted"),
    ],
)
def test_check_finds_an_index_that_disagrees(attribute: str, value: object, message: str) -> None:
    extents = FreeExtents(8)
    extents.take_best(3)
    extents.add(0, 2)
    extents.check()
    assert list(extents) == [(0, 2), (3, 5)]
    setattr(extents, attribute, value)
    with pytest.raises(BrokenInvariant, match=message):
        extents.check()
