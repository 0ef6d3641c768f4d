"""BlockPool against a dictionary of reference counts."""

import copy
import pickle
from collections import Counter
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from allocator import (
    BlockPool,
    BrokenInvariant,
    DoubleFree,
    ForeignBlock,
    InvalidArgument,
    OutOfBlocks,
)
from tests.allocator.test_extents import extents_of


def assert_well_placed(blocks: Sequence[int], free: set[int], after: int | None) -> None:
    """`blocks`, taken from `free`, continue behind `after`, then fit best; or are all there are."""
    if len(blocks) == len(free):
        first = after + 1 if after is not None and after + 1 in free else 0
        assert list(blocks) == sorted(free, key=lambda block: (block < first, block))
        return
    free = set(free)
    rest = list(blocks)
    while rest and after is not None and after + 1 in free:
        after += 1
        assert rest.pop(0) == after
        free.remove(after)
    while rest:
        extents = dict(extents_of(free))
        fitting = [length for length in extents.values() if length >= len(rest)]
        best = min(fitting) if fitting else max(extents.values())
        start, taken = rest[0], min(best, len(rest))
        assert extents.get(start) == best
        assert rest[:taken] == list(range(start, start + taken))
        free -= set(rest[:taken])
        rest = rest[taken:]


FORMS = {
    "list": list,
    "tuple": tuple,
    "int32": lambda ids: np.array(ids, np.int32),
    "int64": lambda ids: np.array(ids, np.int64),
    "strided": lambda ids: np.repeat(np.array(ids, np.int32), 2)[::2],
    "read-only": lambda ids: np.frombuffer(np.array(ids, np.int64).tobytes(), np.int64),
}
forms = st.sampled_from(sorted(FORMS))


class PoolMachine(RuleBasedStateMachine):
    """Any calls, right and wrong ones, next to a model that counts one reference at a time."""

    @initialize(num_blocks=st.sampled_from([24, 17, 12, 5, 2, 1]))
    def create(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.counts = dict.fromkeys(range(num_blocks), 0)

    def free(self) -> set[int]:
        return {block for block, count in self.counts.items() if not count}

    def references(self) -> list[int]:
        """Every block as often as it is referenced."""
        return [block for block, count in self.counts.items() for _ in range(count)]

    def some_references(self, data: st.DataObject) -> list[int]:
        references = self.references()
        picks = st.lists(st.sampled_from(range(len(references))), min_size=1, unique=True)
        return [references[pick] for pick in data.draw(picks, "references")]

    def allocate(self, count: int, after: int | None) -> None:
        free = self.free()
        if count > len(free):
            with pytest.raises(OutOfBlocks) as error:
                self.pool.allocate(count, after)
            assert (error.value.needed, error.value.free) == (count, len(free))
            return
        blocks = self.pool.allocate(count, after)
        assert blocks.dtype == np.int32
        assert blocks.shape == (count,)
        assert_well_placed(blocks.tolist(), free, after)
        self.counts.update(dict.fromkeys(blocks.tolist(), 1))

    def retain(self, blocks: list[int], form: str) -> None:
        foreign = {block for block in blocks if not self.counts.get(block)}
        if foreign:
            with pytest.raises(ForeignBlock) as error:
                self.pool.retain(FORMS[form](blocks))
            # Ids out of range are looked for first; the free ones are then not named.
            out_of_range = foreign - set(self.counts)
            assert set(error.value.blocks) == (out_of_range or foreign)
            return
        self.pool.retain(FORMS[form](blocks))
        for block in blocks:
            self.counts[block] += 1

    def release(self, blocks: list[int], form: str) -> None:
        foreign = set(blocks) - set(self.counts)
        if foreign:
            with pytest.raises(ForeignBlock) as error:
                self.pool.release(FORMS[form](blocks))
            assert set(error.value.blocks) == foreign
            return
        double = {block for block, times in Counter(blocks).items() if times > self.counts[block]}
        if double:
            with pytest.raises(DoubleFree) as error:
                self.pool.release(FORMS[form](blocks))
            assert set(error.value.blocks) == double
            return
        freed = self.pool.release(FORMS[form](blocks))
        for block in blocks:
            self.counts[block] -= 1
        assert freed.dtype == np.int32
        assert freed.tolist() == sorted(b for b in set(blocks) if not self.counts[b])

    @rule(data=st.data(), place=st.sampled_from(["anywhere", "behind", "behind, with room"]))
    def allocate_up_to_one_too_many(self, data: st.DataObject, place: str) -> None:
        free = self.free()
        few = st.integers(1, min(3, len(free) + 1))
        count = data.draw(few | st.just(len(free)) | st.integers(0, len(free) + 1), "count")
        used = self.references() if place != "anywhere" else []
        if place == "behind, with room":
            used = [block for block in used if block + 1 in free]
        self.allocate(count, data.draw(st.sampled_from(used), "after") if used else None)

    @precondition(references)
    @rule(data=st.data(), form=forms)
    def retain_blocks_in_use(self, data: st.DataObject, form: str) -> None:
        self.retain(self.some_references(data), form)

    @precondition(references)
    @rule(data=st.data(), form=forms)
    def release_blocks_in_use(self, data: st.DataObject, form: str) -> None:
        self.release(self.some_references(data), form)

    # One rule for most wrong calls: rules are drawn evenly, and the pool must also fill up.
    @rule(
        call=st.sampled_from(["allocate", "retain", "release"]),
        blocks=st.lists(st.integers(-1, 24), min_size=1, max_size=3),
        form=forms,
    )
    def name_any_block(self, call: str, blocks: list[int], form: str) -> None:
        if call == "retain":
            self.retain(blocks, form)
        elif call == "release":
            self.release(blocks, form)
        elif not self.counts.get(blocks[0]):
            with pytest.raises(ForeignBlock) as error:
                self.pool.allocate(len(blocks), after=blocks[0])
            assert error.value.blocks == (blocks[0],)

    @invariant()
    def counts_what_is_free(self) -> None:
        assert self.pool.num_free == len(self.free())

    # No invariant: what came free last is kept apart until somebody looks.
    @rule()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        assert self.pool.refs.tolist() == list(self.counts.values())

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.agrees_with_the_model()


TestPoolMachine = PoolMachine.TestCase


def pool_with_holes() -> BlockPool:
    """20 blocks, free are 2..3, 6..10 and 17..19."""
    pool = BlockPool(20, 4)
    pool.allocate(20)
    pool.release([2, 3, 6, 7, 8, 9, 10, 17, 18, 19])
    return pool


@pytest.mark.parametrize(
    ("count", "after", "blocks"),
    [
        (0, None, []),
        (0, 5, []),
        (2, None, [2, 3]),
        (1, None, [2]),
        (3, None, [17, 18, 19]),
        (4, None, [6, 7, 8, 9]),
        (6, None, [6, 7, 8, 9, 10, 2]),
        (8, None, [6, 7, 8, 9, 10, 17, 18, 19]),
        (9, None, [6, 7, 8, 9, 10, 17, 18, 19, 2]),
        (10, None, [2, 3, 6, 7, 8, 9, 10, 17, 18, 19]),
        (10, 5, [6, 7, 8, 9, 10, 17, 18, 19, 2, 3]),
        (10, 4, [2, 3, 6, 7, 8, 9, 10, 17, 18, 19]),
        (2, 5, [6, 7]),
        (2, 4, [2, 3]),
        (3, 1, [2, 3, 17]),
        (2, 19, None),
    ],
)
def test_where_an_allocation_goes(count: int, after: int | None, blocks: list[int] | None) -> None:
    pool = pool_with_holes()
    if blocks is None:
        with pytest.raises(ForeignBlock):
            pool.allocate(count, after)
    else:
        assert pool.allocate(count, after).tolist() == blocks
    pool.check()


def test_a_growing_sequence_stays_contiguous_while_there_is_room() -> None:
    pool = BlockPool(100, 16)
    pool.allocate(10)
    blocks = pool.allocate(3).tolist()
    for _ in range(20):
        blocks += pool.allocate(1, after=blocks[-1]).tolist()
    assert blocks == list(range(10, 33))


def test_the_last_block_of_the_pool_can_be_continued_elsewhere() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(4)
    pool.release([0, 1])
    assert pool.allocate(2, after=3).tolist() == [0, 1]


def test_ids_of_numpy_are_as_good_as_those_of_python() -> None:
    pool = BlockPool(np.int64(8), np.int32(16))
    blocks = pool.allocate(np.int64(2))
    assert pool.allocate(np.uint8(2), after=blocks[-1]).tolist() == [2, 3]
    pool.check()
    assert type(pool.num_blocks) is int
    assert type(pool.num_free) is int


def test_the_reference_counts_cannot_be_written_from_outside() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(3)
    pool.retain([1, 1])
    pool.release([0, 1])
    assert pool.refs.tolist() == [0, 2, 1, 0]
    with pytest.raises(ValueError, match="read-only"):
        pool.refs[0] = 1


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_of_a_pool_lives_on_its_own(twin_of) -> None:
    pool = pool_with_holes()
    twin = twin_of(pool)
    twin.allocate(10)
    assert twin.num_free == 0
    assert (twin.refs == 1).all()
    assert pool.num_free == 10
    pool.check()
    twin.check()


def test_the_arrays_given_and_returned_are_the_callers() -> None:
    pool = BlockPool(8, 16)
    for blocks in (pool.allocate(4)[::-1].copy(), pool.allocate(4)):
        before = blocks.tolist()
        freed = pool.release(blocks)
        assert blocks.tolist() == before
        blocks[:] = freed[:] = 7
    pool.check()
    assert pool.num_free == 8


def test_no_blocks_of_a_full_pool_are_the_callers_too() -> None:
    pool = BlockPool(2, 16)
    pool.allocate(2)
    pool.allocate(0).shape = (0, 1)
    assert pool.allocate(0).shape == (0,)


CALLS = {
    "more blocks than there are": (lambda p: p.allocate(11), OutOfBlocks, "11 .* 10 free"),
    "more blocks, continued": (lambda p: p.allocate(11, 1), OutOfBlocks, "11 .* 10 free"),
    "a negative count": (lambda p: p.allocate(-1), InvalidArgument, "count is -1"),
    "half a block": (lambda p: p.allocate(1.5), InvalidArgument, "count is 1.5"),
    "behind a free block": (lambda p: p.allocate(1, 6), ForeignBlock, ": 6$"),
    "behind no block": (lambda p: p.allocate(1, 20), ForeignBlock, ": 20$"),
    "behind a negative block": (lambda p: p.allocate(1, -1), ForeignBlock, ": -1$"),
    "behind a fraction": (lambda p: p.allocate(1, 0.0), InvalidArgument, "after is 0.0"),
    "retain a free block": (lambda p: p.retain([0, 2]), ForeignBlock, ": 2$"),
    "retain past the end": (lambda p: p.retain([0, 20]), ForeignBlock, ": 20$"),
    "retain below 0": (lambda p: p.retain([0, -1]), ForeignBlock, ": -1$"),
    "retain an id past int32": (lambda p: p.retain([0, 2**32 + 1]), ForeignBlock, f": {2**32 + 1}"),
    "retain a uint64": (
        lambda p: p.retain(np.array([2**63 + 1], np.uint64)),
        ForeignBlock,
        f": {2**63 + 1}$",
    ),
    "release past the end": (lambda p: p.release([0, 20]), ForeignBlock, ": 20$"),
    "release below 0": (lambda p: p.release([0, -20]), ForeignBlock, ": -20$"),
    "release a run past the end": (lambda p: p.release([18, 19, 20]), ForeignBlock, ": 20$"),
    "release a run from below 0": (lambda p: p.release([-1, 0, 1]), ForeignBlock, ": -1$"),
    "release a free block": (lambda p: p.release([0, 2, 19]), DoubleFree, ": 2, 19$"),
    "release twice at once": (lambda p: p.release([0, 1, 4, 1]), DoubleFree, ": 1$"),
    "release twice in a row": (
        lambda p: p.release(np.array([11, 12, 12, 14], np.int32)),
        DoubleFree,
        ": 12$",
    ),
    "floats": (lambda p: p.release(np.array([0.0])), InvalidArgument, "float64"),
    "booleans": (lambda p: p.retain(np.array([True])), InvalidArgument, "bool"),
    "two dimensions": (lambda p: p.retain(np.array([[0, 1]])), InvalidArgument, r"\(1, 2\)"),
    "one number": (lambda p: p.release(0), InvalidArgument, r"\(\)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_names_what_was_wrong_and_changes_nothing(name: str) -> None:
    call, error, message = CALLS[name]
    pool = pool_with_holes()
    before = pool.refs.copy()
    with pytest.raises(error, match=message):
        call(pool)
    pool.check()
    assert pool.refs.tolist() == before.tolist()
    assert pool.num_free == 10


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "message"),
    [
        (0, 16, "num_blocks is 0"),
        (-1, 16, "num_blocks is -1"),
        (2**31, 16, "num_blocks is 2147483648"),
        (4, 0, "block_size is 0"),
        (4.0, 16, "num_blocks is 4.0"),
        (4, "16", "block_size is '16'"),
    ],
)
def test_a_pool_of_no_size(num_blocks, block_size, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        BlockPool(num_blocks, block_size)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_comes_free_in_any_form(form: str) -> None:
    pool = BlockPool(8, 16)
    pool.allocate(8)
    assert pool.release(FORMS[form]([2, 3, 4])).tolist() == [2, 3, 4]
    assert pool.num_free_extents == 1


def test_what_is_let_go_out_of_order_comes_free_in_order() -> None:
    pool = BlockPool(8, 16)
    pool.allocate(8)
    assert pool.release(np.array([2, 4, 3, 5], np.int32)).tolist() == [2, 3, 4, 5]
    assert pool.allocate(4).tolist() == [2, 3, 4, 5]


def test_ids_whose_difference_wraps_around_are_no_run() -> None:
    pool = BlockPool(200, 16)
    pool.allocate(200)
    with pytest.raises(ForeignBlock, match=r": -128$"):
        pool.release(np.array([127, -128], np.int8))
    assert pool.refs.all()


@given(st.lists(st.integers(0, 199), unique=True), st.integers(0, 200))
def test_many_runs_at_once(released: list[int], count: int) -> None:
    pool = BlockPool(200, 16)
    pool.allocate(200)
    assert pool.release(released).tolist() == sorted(released)
    pool.check()
    if count <= len(released):
        blocks = pool.allocate(count).tolist()
        assert_well_placed(blocks, set(released), None)
        pool.check()


# No call leads to these states: they are what check() is there to find after a defect.
@pytest.mark.parametrize(
    ("block", "refs", "message"),
    [
        (0, 0, "block 0 is not free with 0 references"),
        (0, -1, "block 0 is not free with -1 references"),
        (2, 1, "block 2 is free with 1 references"),
        (2, -1, "block 2 is free with -1 references"),
    ],
)
def test_check_finds_a_count_that_disagrees(block: int, refs: int, message: str) -> None:
    pool = pool_with_holes()
    pool.check()
    pool._refs[block] = refs
    with pytest.raises(BrokenInvariant, match=message):
        pool.check()


def test_check_finds_free_blocks_past_the_end() -> None:
    pool = pool_with_holes()
    pool._free.add(20, 1)
    with pytest.raises(BrokenInvariant, match="ends at 21 of 20 blocks"):
        pool.check()


def test_check_finds_a_wrong_number_of_free_blocks() -> None:
    pool = pool_with_holes()
    pool._num_free += 1
    with pytest.raises(BrokenInvariant, match="11 free blocks counted of 10"):
        pool.check()
