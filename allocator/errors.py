"""The errors of the allocator. Each one carries its values as attributes and survives pickling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import SupportsFloat, SupportsIndex

_NAMED = 8  # block ids in a message; the attribute has all of them


class AllocatorError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidArgument(AllocatorError, ValueError):
    """An argument without a meaning here: a size of 0, a negative count, ids of another dtype."""


class BrokenInvariant(AllocatorError, AssertionError):
    """The state contradicts itself. Raised by the `check()` methods, and as `PolicyFailed`."""


class PolicyFailed(BrokenInvariant):
    """An eviction policy gave no key that has a place in the order; its own error is the cause.

    What asked for the key was under way already, so the state is not to be trusted any more.
    """


class OutOfBlocks(AllocatorError):
    """More blocks are needed than there are.

    Attributes: `needed`, `free` and `evictable`, in blocks. `evictable` counts the blocks that a
    cache on top of the pool could have given back; the pool itself knows of none.
    """

    def __init__(self, needed: int, free: int, evictable: int = 0) -> None:
        super().__init__(needed, free, evictable)
        self.needed = needed
        self.free = free
        self.evictable = evictable

    def __str__(self) -> str:
        return f"{self.needed} blocks needed, {self.free} free and {self.evictable} evictable"


class _BlockError(AllocatorError, ValueError):
    """An error about particular blocks. Attribute: `blocks`, their ids."""

    problem: str

    def __init__(self, blocks: Iterable[int]) -> None:
        self.blocks = tuple(int(block) for block in blocks)
        super().__init__(self.blocks)

    def __str__(self) -> str:
        named = ", ".join(map(str, self.blocks[:_NAMED]))
        more = len(self.blocks) - _NAMED
        return f"{self.problem}: {named}" + (f" and {more} more" if more > 0 else "")


class DoubleFree(_BlockError):
    """Blocks released more often than they are referenced."""

    problem = "released more often than referenced"


class ForeignBlock(_BlockError):
    """Block ids that the pool has not handed out: out of its range, or free."""

    problem = "not a block in use of this pool"


class BlockTaken(_BlockError):
    """Blocks given to a tree that has them already, or given twice."""

    problem = "given twice"


class KVMismatch(AllocatorError, ValueError):
    """Keys, values or slots that do not fit the storage: shape, dtype, device or layer."""


class SlotOutOfRange(AllocatorError, IndexError):
    """A slot that lies in no block of the storage."""


def as_integer(name: str, value: SupportsIndex) -> int:
    """`value` as a Python integer; InvalidArgument when it is none, as 2.0 or "2" are not."""
    try:
        return index(value)
    except TypeError:
        raise InvalidArgument(f"{name} is {value!r}, expected an integer") from None


def at_least(least: int, name: str, value: SupportsIndex) -> int:
    """`value` as a Python integer; InvalidArgument when it is none or below `least`."""
    number = as_integer(name, value)
    if number < least:
        raise InvalidArgument(f"{name} is {number}, expected at least {least}")
    return number


def as_real(name: str, value: SupportsFloat) -> float:
    """`value` as a finite Python float; InvalidArgument for "2", NaN, inf and what is no number."""
    try:
        if isinstance(value, (str, bytes, bytearray)):  # float() would read them
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"{name} is {value!r:.60}, expected a finite number") from None
    if not math.isfinite(number):
        raise InvalidArgument(f"{name} is {number}, expected a finite number")
    return number
