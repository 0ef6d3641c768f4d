"""What the errors say, and what they are."""

import copy
import pickle

import pytest

from allocator import (
    AllocatorError,
    BrokenInvariant,
    DoubleFree,
    ForeignBlock,
    InvalidArgument,
    KVMismatch,
    OutOfBlocks,
    PolicyFailed,
    SlotOutOfRange,
)

ERRORS = [
    OutOfBlocks(7, 3, 2),
    DoubleFree([4, 5]),
    ForeignBlock([-1]),
    InvalidArgument("count is -1"),
    BrokenInvariant("block 3"),
    KVMismatch("k has"),
    PolicyFailed("policy 'x' failed"),
    SlotOutOfRange("slot 9"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_crosses_processes_unchanged(error: AllocatorError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (DoubleFree, ValueError),
        (ForeignBlock, ValueError),
        (InvalidArgument, ValueError),
        (KVMismatch, ValueError),
        (SlotOutOfRange, IndexError),
        (BrokenInvariant, AssertionError),
        (PolicyFailed, BrokenInvariant),
        (OutOfBlocks, Exception),
    ],
)
def test_an_error_is_also_the_builtin_that_callers_expect(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, AllocatorError)
    assert issubclass(error, builtin)


def test_out_of_blocks_says_all_three_numbers() -> None:
    error = OutOfBlocks(needed=17, free=5, evictable=11)
    assert (error.needed, error.free, error.evictable) == (17, 5, 11)
    assert str(error) == "17 blocks needed, 5 free and 11 evictable"
    assert OutOfBlocks(17, 5).evictable == 0


def test_a_block_error_names_some_blocks_and_carries_all() -> None:
    assert str(DoubleFree([3, 9])).endswith(": 3, 9")
    error = ForeignBlock(range(100, 120))
    assert error.blocks == tuple(range(100, 120))
    assert str(error).endswith(": 100, 101, 102, 103, 104, 105, 106, 107 and 12 more")
