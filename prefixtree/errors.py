"""What the cache refuses. Every refused call leaves the cache as it was."""

from __future__ import annotations


class PrefixTreeError(Exception):
    """Base of the cache's own errors (the allocator has its own: `OutOfBlocks`, `DoubleFree`)."""


class InvalidTokens(PrefixTreeError, ValueError):
    """Tokens are not a non-empty 1-d run of integers in 0..2**31-1."""


class InvalidLength(PrefixTreeError, ValueError):
    """A length or count lies outside what the sequence allows."""


class InvalidBatch(PrefixTreeError, ValueError):
    """A batch names a sequence twice, or one of another cache."""


class SequenceClosed(PrefixTreeError, RuntimeError):
    """The sequence was closed before."""


class NotCommitted(PrefixTreeError, RuntimeError):
    """The call needs KV that is not written yet."""


class RollbackPastFork(PrefixTreeError, ValueError):
    """A rollback would reach into tokens that the sequence shares with those forked off it."""


class SlotRange(PrefixTreeError, IndexError):
    """Slots were asked for positions that the sequence does not have."""
