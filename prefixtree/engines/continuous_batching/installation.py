"""Puts this package into the registries of the transformers library, and takes it out again."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Self

try:
    import transformers
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
except ImportError as error:
    raise ImportError(
        "prefixtree.engines.continuous_batching needs the transformers library (5.19 to 5.23 are "
        "tested): pip install prefixtree[transformers]"
    ) from error

from allocator import make_policy
from prefixtree.engines.continuous_batching.allocator import (
    NAME,
    TreeAllocator,
    TreeSlidingAllocator,
)
from prefixtree.engines.continuous_batching.function import attend
from prefixtree.engines.continuous_batching.scheduler import (
    TreeFIFOScheduler,
    TreePrefillFirstScheduler,
)

_TESTED = (5, 19), (5, 23)


class Installation:
    """Made by `install`. Usable as a context manager."""

    def __init__(self, entries: list[tuple[dict[str, Any], str, Any]]) -> None:
        self._before = [(registry, name, registry[name]) for registry, name, _ in entries]
        for registry, name, value in entries:
            registry[name] = value

    def close(self) -> None:
        """Gives the registries their entries back. Managers that exist keep what they have.

        Closing twice is no error; of several installations the last one is closed first.
        """
        for registry, name, value in self._before:
            registry[name] = value
        self._before = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def install(*, eviction: str = "lru") -> Installation:
    """Continuous batching of all models that start it from now on keeps its KV in a prefix tree.

    eviction: the order in which cached prefixes go, see `allocator.make_policy`.

    Each model's attention implementation is ours from when its manager makes its cache until that
    cache is gone (`manager.stop()`). CUDA graphs and compiled forward passes are refused by
    name. Raises `InvalidArgument` for an unknown policy; warns when the library's version is one
    that was not tested.
    """
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if not _TESTED[0] <= version <= _TESTED[1]:
        warnings.warn(
            f"transformers {transformers.__version__}: its continuous batching was tested with "
            "versions 5.19 to 5.23",
            stacklevel=2,
        )
    make_policy(eviction)
    transformers.AttentionInterface.register(NAME, attend)
    full = type("TreeAllocator", (TreeAllocator,), {"eviction": eviction})
    sliding = type("TreeSlidingAllocator", (TreeSlidingAllocator,), {"eviction": eviction})
    return Installation(
        [
            (ATTN_TYPE_TO_ALLOCATOR, "full_attention", full),
            (ATTN_TYPE_TO_ALLOCATOR, "sliding_attention", sliding),
            (SCHEDULER_MAPPING, "fifo", TreeFIFOScheduler),
            (SCHEDULER_MAPPING, "prefill_first", TreePrefillFirstScheduler),
        ]
    )
