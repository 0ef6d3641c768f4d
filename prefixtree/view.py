"""The tree to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from prefixtree.tree import DEFAULT, Namespace, RadixTree

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class NodeView:
    """One node as it was when the view was taken."""

    tokens: tuple[int, ...]
    """Committed tokens; empty for the root."""
    start: int
    """Position of the first token in its path."""
    slots: tuple[int, ...]
    pins: int
    """Open sequences, and pins for good, whose path passes through."""
    hits: int
    """How often a sequence joined it: by a match, a fork, or the same tokens computed again."""
    children: tuple[NodeView, ...]


@dataclass(frozen=True)
class TreeView:
    """A picture of the tree; later changes of the cache do not show in it."""

    roots: dict[Namespace, NodeView]
    """The empty node on top of each namespace that holds anything, and of the default one."""

    @property
    def root(self) -> NodeView:
        """That of the default namespace."""
        return self.roots[DEFAULT]

    @classmethod
    def of(cls, tree: RadixTree) -> TreeView:
        nodes = tree.nodes
        linked = [int(node) for node in tree.nodes.rows() if nodes.length[node]]
        # Deepest first, so that a node's children are there before it.
        linked.sort(key=lambda node: nodes.start[node], reverse=True)
        below: dict[int, list[NodeView]] = {}
        for node in linked:
            view = NodeView(
                tokens=tuple(np.frombuffer(tree.edge(node), np.int32).tolist()),
                start=nodes.start[node],
                slots=tuple(tree.slots(node, 0, nodes.length[node]).tolist()),
                pins=nodes.pins[node],
                hits=nodes.uses[node],
                children=_by_first_token(below.pop(node, [])),
            )
            below.setdefault(nodes.parent[node], []).append(view)
        return cls(
            {
                namespace: NodeView((), 0, (), 0, 0, _by_first_token(below.pop(root, [])))
                for namespace, root in tree.roots()
            }
        )

    def __iter__(self) -> Iterator[NodeView]:
        """All nodes but the roots, depth first, namespace after namespace."""
        waiting = [node for root in self.roots.values() for node in root.children][::-1]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))

    def __str__(self) -> str:
        return self.render()

    def render(
        self, decode: Decode | None = None, *, width: int = 80, max_children: int = 8
    ) -> str:
        """The tree as text, one line a node: tokens, pins, hits and the tokens' text.

        `decode` turns token ids into text; without it the ids are shown. Lines are cut to `width`;
        of more than `max_children` children the most hit are shown and the rest is counted.
        """
        lines = []
        for namespace, root in self.roots.items():
            lines.append(f"namespace {namespace!r}" if namespace else "root")
            # (node or text, indentation of its line, of the lines below it)
            waiting = _lines_below(root, "", max_children)[::-1]
            while waiting:
                node, head, indent = waiting.pop()
                if isinstance(node, str):
                    lines.append(head + node)
                    continue
                label = f"{head}{len(node.tokens)} tokens  pins {node.pins}  hits {node.hits}  "
                room = width - len(label)
                lines.append((label + _excerpt(node.tokens, decode, room)).rstrip())
                waiting.extend(_lines_below(node, indent, max_children)[::-1])
        return "\n".join(lines)


def _lines_below(
    node: NodeView, indent: str, max_children: int
) -> list[tuple[NodeView | str, str, str]]:
    shown: list[NodeView | str] = list(node.children)
    if len(shown) > max_children:
        by_use = sorted(node.children, key=lambda child: -child.hits)[:max_children]
        kept = {id(child) for child in by_use}
        rest = [child for child in node.children if id(child) not in kept]
        tokens = sum(len(child.tokens) for child in rest)
        shown = [child for child in node.children if id(child) in kept]
        shown.append(f"... {len(rest)} more children of {tokens} tokens")
    last = len(shown) - 1
    return [
        (child, indent + ("└─ " if i == last else "├─ "), indent + ("   " if i == last else "│  "))
        for i, child in enumerate(shown)
    ]


def _by_first_token(children: list[NodeView]) -> tuple[NodeView, ...]:
    return tuple(sorted(children, key=lambda child: child.tokens[0]))


def _excerpt(tokens: tuple[int, ...], decode: Decode | None, room: int) -> str:
    """The first and last of the tokens' text in `room` columns, on one line."""
    if room < 12:
        return ""
    # Only what can be seen is decoded; a token is at least one column in most tokenizers.
    if decode is None:
        text = " ".join(map(str, tokens[:room]))
        return text if len(text) <= room else text[: room - 1] + "…"
    text = one_line(decode(list(tokens)))
    if len(text) > room - 2:
        half = (room - 3) // 2
        text = text[:half] + "…" + text[-half:]
    return f"'{text}'"


def one_line(text: str) -> str:
    """Text on one line: control characters and line ends are shown escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
