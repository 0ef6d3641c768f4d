"""What models of the transformers library pass on to their attention function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prefixtree.engines.errors import UnsupportedAttention

# Keywords that do not change the result of attention.
_WITHOUT_EFFECT = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "use_cache",
}


def check_keywords(
    layer: int,
    module: torch.nn.Module,
    keywords: Mapping[str, Any],
    others: frozenset[str] = frozenset(),
) -> None:
    """Raises UnsupportedAttention for what would change the result and is not implemented.

    keywords: all that the function does not implement; those named in `others`
    may have any value.
    """
    causal = keywords.get("is_causal")
    if causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedAttention(f"layer {layer} is not causal")
    for name, argument in keywords.items():
        if name in _WITHOUT_EFFECT or name in others or name == "is_causal":
            continue
        if name == "dropout" and not argument:
            continue
        if argument is not None:
            shown = "a tensor" if isinstance(argument, torch.Tensor) else repr(argument)
            raise UnsupportedAttention(
                f"layer {layer} gives {name} ({shown:.60}) to its attention, which is not "
                "implemented and would change the result"
            )
