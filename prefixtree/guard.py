"""What stands between a caller and the cache: one lock, and no work on a broken cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from allocator import BrokenInvariant, DoubleFree, ForeignBlock
from prefixtree.errors import CacheBroken


class Guarded(Protocol):
    _lock: AbstractContextManager[object]
    _broken: str


P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Guarded)


def guarded(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Runs a method under the cache's lock.

    Once an invariant has shown itself broken, every call raises `CacheBroken`: a wrong reference
    count would sooner or later hand one request another one's KV.
    """

    def call(self: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            if self._broken:
                raise CacheBroken(f"the cache is broken since: {self._broken}")
            try:
                return method(self, *args, **kwargs)
            except (BrokenInvariant, DoubleFree, ForeignBlock) as error:
                self._broken = f"{type(error).__name__}: {error}"
                raise

    functools.update_wrapper(call, method)
    return call
