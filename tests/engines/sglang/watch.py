"""A plugin for tests: counts the calls that SGLang's scheduler process makes of ours, in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from prefixtree.engines.sglang import plugin
from prefixtree.index import PrefixIndex

FILE = "PREFIXTREE_TEST_COUNTS"
"""Environment variable: path of the counts."""

NAMES = (
    "match_prefix",
    "checkpoint",
    "evict",
    "evicted_tokens",
    "inc_lock_ref",
    "dec_lock_ref",
    "path_device_indices",
    "extend",
    "duplicates",
    "checks",
    "init_forward_metadata",
    "forward_extend",
    "forward_decode",
    "plan",
    "advance",
    "run",
)

_CHECKED = 20  # checkpoints between two checks of all invariants


def register() -> None:
    """The entry point, in each process of SGLang."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache import registry

    plugin.register()
    ATTENTION_BACKENDS[plugin.NAME] = _watching(plugin.make_attention, _watch_attention)
    registry._RADIX_CACHE_REGISTRY[plugin.NAME] = _watching(plugin.make_cache, _watch_cache)


def read(path: str) -> dict[str, int]:
    return dict(zip(NAMES, np.fromfile(path, np.int64).tolist(), strict=True))


def _watching(make: Callable[[Any], Any], watch: Callable[[Any, np.ndarray], None]) -> Any:
    def make_watched(context: Any) -> Any:
        made = make(context)
        # A file, since the process is killed when its server ends.
        watch(made, np.memmap(os.environ[FILE], np.int64, "r+", shape=(len(NAMES),)))
        return made

    return make_watched


def _count(owner: Any, name: str, counts: np.ndarray, then: Callable[..., None] | None = None):
    original = getattr(owner, name)

    @wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[NAMES.index(name)] += 1
        result = original(*args, **kwargs)
        if then is not None:
            then(result, *args)
        return result

    setattr(owner, name, counted)


def _watch_attention(backend: Any, counts: np.ndarray) -> None:
    import attention

    for name in ("init_forward_metadata", "forward_extend", "forward_decode"):
        _count(backend, name, counts)
    _count(attention, "plan", counts)
    _count(attention, "run", counts)
    _count(attention.Plan, "advance", counts)


def _watch_cache(cache: Any, counts: np.ndarray) -> None:
    def add(name: str, number: int) -> None:
        counts[NAMES.index(name)] += number

    def check(*_: Any) -> None:
        if counts[NAMES.index("checkpoint")] % _CHECKED == 0:
            add("checks", 1)
            cache.index.check()

    for name in ("match_prefix", "inc_lock_ref", "dec_lock_ref", "path_device_indices"):
        _count(cache, name, counts)
    _count(cache, "checkpoint", counts, check)
    _count(
        cache, "evict", counts, lambda result, *_: add("evicted_tokens", result.num_tokens_evicted)
    )
    _count(PrefixIndex, "extend", counts, lambda known, *_: add("duplicates", known))
