"""What SGLang calls in each of its processes before it reads its arguments."""

from __future__ import annotations

import os
from typing import Any

from prefixtree.engines.versions import warn_if_untested

NAME = "prefixtree"
TESTED = ("0.5.23",)


def register() -> None:
    """Make the name known to SGLang, for its radix cache and its attention. Idempotent.

    Imports SGLang's registries only: nothing of ours but this module until a server wants it.
    """
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )
    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(make_attention)
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    if get_radix_cache_factory(NAME) is None:
        register_radix_cache_backend(NAME, make_cache)


def platform() -> str | None:
    """An entry point: the platform of CPUs without SGLang's kernels, only where it is asked for.

    SGLang asks all that are installed when none is named in SGLANG_PLATFORM, to find the one.
    """
    return "prefixtree.engines.sglang.platform:Cpu" if os.environ.get("SGLANG_PLATFORM") else None


def make_attention(runner: Any) -> Any:
    """The attention backend of a ModelRunner; raises `UnsupportedAttention`, see there."""
    warn_if_untested("sglang", TESTED)
    from prefixtree.engines.sglang.attention import PrefixTreeAttention

    return PrefixTreeAttention(runner)


def make_cache(context: Any) -> Any:
    """The radix cache for a TreeCacheBuildContext; raises `UnsupportedCache`, see there."""
    warn_if_untested("sglang", TESTED)
    from prefixtree.engines.sglang.cache import PrefixTreeCache

    return PrefixTreeCache.for_server(context)
