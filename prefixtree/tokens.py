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


def as_tokens(tokens: TokensLike) -> Int32s:
    """Token ids as a contiguous int32 array.

    Raises `InvalidTokens` for ids that are not integers or outside 0..2**31-1 (named with their
    position) and for anything not 1-d. O(n); an int32 array is only scanned, not converted.
    """
    if isinstance(tokens, (list, tuple, range)):
        values = _from_python_ints(tokens)
    else:
        try:
            values = np.asarray(tokens.cpu() if hasattr(tokens, "cpu") else tokens)
        except (TypeError, ValueError, RuntimeError):  # torch's bfloat16 or meta, ragged objects
            raise InvalidTokens(f"tokens must be integers, got {tokens!r:.60}") from None
        if values.ndim != 1:
            raise InvalidTokens(
                f"tokens must be a 1-d run of integers, got {tokens!r:.60} of shape {values.shape}"
            )
        if values.dtype.kind not in "iu":
            raise InvalidTokens(f"tokens must be integers, got {values.dtype} ({tokens!r:.60})")
    if values.dtype == np.int32 and values.flags.c_contiguous:
        # One scan instead of two: seen as unsigned, negative ids are the largest.
        if not len(values) or values.view(np.uint32).max() <= MAX_TOKEN:
            return values.view(np.int32)
    elif not len(values) or (values.min() >= 0 and values.max() <= MAX_TOKEN):
        return np.ascontiguousarray(values, np.int32)
    at = int(((values < 0) | (values > MAX_TOKEN)).argmax())
    raise InvalidTokens(f"token ids must be 0..{MAX_TOKEN}, got {values[at]} at {at}")


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


def common_prefix(edge: bytes, data: bytes, at: int) -> int:
    """How many tokens `edge` and `data` from token `at` on agree in. O(edge) in C."""
    left = np.frombuffer(edge, np.int32)
    return agreement(
        left, np.frombuffer(data, np.int32, min(len(left), len(data) // 4 - at), 4 * at)
    )
