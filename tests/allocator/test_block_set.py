"""A set of blocks that somebody else hands out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator import BlockSet, BlockTaken, BrokenInvariant, DoubleFree, InvalidArgument


def ids(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(blocks, np.int32)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(-1, 8), max_size=4)), max_size=20))
def test_agrees_with_a_set(steps: list[tuple[bool, list[int]]]) -> None:
    held: set[int] = set()
    blocks = BlockSet(8, 4)
    for adding, some in steps:
        distinct = set(some)
        if adding:
            if not distinct <= set(range(8)):
                with pytest.raises(InvalidArgument, match="expected 0\\.\\.7"):
                    blocks.add(ids(*some))
            elif held & distinct or len(distinct) < len(some):
                with pytest.raises(BlockTaken):
                    blocks.add(ids(*some))
            else:
                blocks.add(ids(*some))
                held |= distinct
        elif distinct <= held:
            blocks.remove(ids(*distinct))
            held -= distinct
        elif distinct <= set(range(8)):
            with pytest.raises(DoubleFree):
                blocks.remove(ids(*distinct))
        assert set(np.flatnonzero(blocks.refs).tolist()) == held
        assert set(blocks.refs.tolist()) <= {0, 1}
        assert (len(blocks), blocks.num_free) == (len(held), 8 - len(held))
        free = [block not in held for block in range(8)]
        runs = sum(now and not before for before, now in zip([False, *free], free, strict=False))
        assert blocks.num_free_extents == runs
        blocks.check()


def test_the_errors_name_the_blocks() -> None:
    blocks = BlockSet(8, 4)
    blocks.add(ids(1, 2))
    with pytest.raises(BlockTaken, match="given twice: 2"):
        blocks.add(ids(2, 3))
    with pytest.raises(BlockTaken, match="given twice: 3"):
        blocks.add(ids(3, 3))
    with pytest.raises(DoubleFree, match="5"):
        blocks.remove(ids(1, 5))


def test_a_wrong_count_is_found() -> None:
    blocks = BlockSet(8, 4)
    blocks._refs[3] = 1
    with pytest.raises(BrokenInvariant, match="0 blocks held as counted, 1 in the set"):
        blocks.check()
