"""What the page draws: a view as JSON, its arrays as base64 of little-endian int32.

| key | is |
|---|---|
| `label` | what the frame is of |
| `stats` | `Stats.as_dict` |
| `namespaces` | [R] as text |
| `tiers` | names, sorted; empty where nobody tells tiers |
| `arrays` | those of `ARRAYS`: [N] as in `TreeView`; `held`: [N] blocks each; `blocks`, `aside`; |
|  | where tiers are told, `tier`: [N] index into `tiers` |
| `texts` | [N] the nodes' text, or null where it is not shown |
| `joint` | what comes between the text of a node and that of one below, where text is shown |

All else that the page shows (positions, depths, sums, reference counts) it counts from these.
"""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefixtree.columns import Int32s
from prefixtree.errors import TierFailed
from prefixtree.view_text import Decode, text_of

if TYPE_CHECKING:
    from prefixtree.view import Tier, TreeView

ARRAYS = "parent", "length", "pending", "offset", "pins", "hits", "idle", "age", "writer"

TEXT_BUDGET = 8 << 20
"""Tokens of text in one page, about: so that it loads at once."""
LEAST_TEXT = 48
"""Tokens of text that every node may have."""

Frame = dict[str, Any]


def frame(
    view: TreeView, decode: Decode | None, label: str = "", *, tier: Tier | None = None
) -> Frame:
    """The view with its text: decoded, or token ids. O(nodes + tokens).

    Raises `DecodeFailed` and `TierFailed`.
    """
    joint = "" if decode else " "
    shown = frame_without_text(view, label, tier=tier)
    return {**shown, "texts": texts(view, decode), "joint": joint}


def frame_without_text(view: TreeView, label: str = "", *, tier: Tier | None = None) -> Frame:
    """The view without anything of its tokens. Raises `TierFailed`. O(nodes)."""
    arrays = {name: getattr(view, name) for name in ARRAYS}
    tiers: list[str] = []
    if tier is not None:
        tiers, arrays["tier"] = tiers_of(view, tier)
    arrays["held"] = np.diff(view.block_ends)
    arrays["blocks"] = view.blocks
    arrays["aside"] = view.aside
    return {
        "label": label,
        "stats": view.stats.as_dict(),
        "namespaces": [
            name if isinstance(name, str) else ", ".join(map(repr, name))
            for name in view.namespaces
        ],
        "tiers": tiers,
        "arrays": {name: _packed(values) for name, values in arrays.items()},
        "texts": None,
    }


def texts(view: TreeView, decode: Decode | None) -> list[str]:
    """Each node's text. Of one that is too long its begin and its end. Raises `DecodeFailed`."""
    room = max(LEAST_TEXT, TEXT_BUDGET // max(len(view), 1))
    ends = view.token_ends.tolist()
    found = []
    for first, stop in pairwise(ends):
        if stop == first:
            found.append("")
        elif stop - first <= room:
            found.append(text_of(view.tokens[first:stop], decode))
        else:
            head = text_of(view.tokens[first : first + room // 2], decode)
            tail = text_of(view.tokens[stop - room // 4 : stop], decode)
            left_out = stop - first - room // 2 - room // 4
            found.append(f"{head}\n[… {left_out} tokens left out …]\n{tail}")
    return found


def tiers_of(view: TreeView, tier: Tier) -> tuple[list[str], Int32s]:
    """The tiers' names, sorted, and [N] each node's as an index into them. Raises `TierFailed`."""
    asked = f"tier function {getattr(tier, '__qualname__', repr(tier))}"
    told: list[str] = []
    for node in view:
        try:
            name = tier(node)
        except Exception as error:
            # Not what the error says: it may hold tokens, and a page without text is told of this.
            kind = type(error).__name__
            raise TierFailed(f"{asked} raised {kind} for node {node.index}, {node!r}") from error
        if not isinstance(name, str):
            raise TierFailed(
                f"{asked} returned a {type(name).__name__} for node {node.index}, {node!r},"
                " expected a str"
            )
        told.append(name)
    names = sorted(set(told))
    number = {name: at for at, name in enumerate(names)}
    return names, np.fromiter((number[name] for name in told), np.int32, len(told))


def _packed(values: npt.NDArray[Any]) -> str:
    # Counts beyond int32 would take a cache of 2**31 tokens on one path: shown as the largest.
    narrow = np.minimum(values, np.iinfo(np.int32).max).astype("<i4")
    return base64.b64encode(narrow.tobytes()).decode("ascii")
