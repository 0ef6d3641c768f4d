"""Tokens as they come from users, turned into what the tree compares."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as AbstractSequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int32s
from prefixtree.errors import InvalidTokens

TokensLike: TypeAlias = "AbstractSequence[int] | npt.NDArray[np.integer[Any]] | Any"
"""A list, tuple, range, `array.array`, numpy array or torch tensor (any device) of token ids."""

MAX_TOKEN = 2**31 - 1

INT32 = np.dtype(np.int32)
PACKED = (INT32.itemsize,)
"""Strides of a contiguous array of one dimension."""


def as_tokens(tokens: TokensLike) -> Int32s:
    """Token ids as a contiguous int32 array.

    Raises `InvalidTokens` for ids that are not integers or outside 0..2**31-1 (named with their
    position) and for anything not 1-d. O(n); an int32 array is only scanned, not converted.
    """
    values: npt.NDArray[Any] = _as_array(tokens)
    if values.dtype == INT32 and values.strides == PACKED:
        if not len(values) or np.minimum.reduce(values) >= 0:
            return values
    elif not len(values) or (values.min() >= 0 and values.max() <= MAX_TOKEN):
        return np.ascontiguousarray(values, np.int32)
    at = int(((values < 0) | (values > MAX_TOKEN)).argmax())
    raise InvalidTokens(f"token ids must be 0..{MAX_TOKEN}, got {values[at]} at {at}")


def _as_array(tokens: TokensLike) -> npt.NDArray[np.integer[Any]]:
    """The ids in one dimension, of whatever integer type; no copy of an array."""
    if type(tokens) is not np.ndarray:
        if isinstance(tokens, (list, tuple, range)):
            return _from_python_ints(tokens)
        try:
            tokens = np.asarray(tokens.cpu() if hasattr(tokens, "cpu") else tokens)
        except (TypeError, ValueError, RuntimeError):  # torch's bfloat16 or meta, ragged objects
            raise InvalidTokens(f"tokens must be integers, got {tokens!r:.60}") from None
    if tokens.ndim != 1:
        raise InvalidTokens(
            f"tokens must be a 1-d run of integers, got {tokens!r:.60} of shape {tokens.shape}"
        )
    if tokens.dtype.kind not in "iu":
        raise InvalidTokens(f"tokens must be integers, got {tokens.dtype} ({tokens!r:.60})")
    return tokens


def _from_python_ints(tokens: AbstractSequence[int]) -> npt.NDArray[np.integer[Any]]:
    try:
        return np.frombuffer(array("i", tokens), np.int32)
    except OverflowError:
        at, token = next((i, t) for i, t in enumerate(tokens) if not -(2**31) <= t <= MAX_TOKEN)
        raise InvalidTokens(f"token ids must be 0..{MAX_TOKEN}, got {token} at {at}") from None
    except TypeError:
        odd = ((i, t) for i, t in enumerate(tokens) if not hasattr(t, "__index__"))
        at, token = next(odd, (0, tokens[0]))
        raise InvalidTokens(f"tokens must be integers, got {token!r:.60} at {at}") from None


def as_prompt(tokens: TokensLike) -> Int32s:
    """As `as_tokens`, and not empty."""
    values = as_tokens(tokens)
    if not len(values):
        raise InvalidTokens("a sequence needs at least 1 token, got an empty prompt")
    return values


def agreement(left: Int32s, right: Int32s) -> int:
    """In how many first tokens the two agree. O(the shorter) in C."""
    count = min(len(left), len(right))
    differs = left[:count] != right[:count]
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count
