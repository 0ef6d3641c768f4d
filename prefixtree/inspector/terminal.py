"""The tree in a terminal."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import urlopen

from allocator.errors import InvalidArgument
from prefixtree.tree import Namespace, as_namespace
from prefixtree.view_text import Limits, Show, one_line, render

if TYPE_CHECKING:
    from prefixtree.view import TreeView

LEAST_WIDTH, MOST_WIDTH = 40, 1000
"""Columns of a screen."""
MOST_NODES = 10_000
DEFAULT_DEPTH = 8


class CannotWatch(Exception):
    """What is at the address is no inspector, or it does not answer."""


@dataclass(frozen=True)
class Selection:
    """Which part of a tree to show, and how much of it fits."""

    min_tokens: int | None = None
    depth: int | None = None
    namespace: Namespace | None = None
    width: int = 80
    nodes: int = 40

    @classmethod
    def of_query(cls, query: Mapping[str, str]) -> Self:
        """Raises `InvalidArgument` for what is not to be understood."""
        numbers = {}
        for name in ("min_tokens", "depth", "width", "nodes"):
            if name in query:
                if not query[name].isdecimal() or len(query[name]) > 18:
                    raise InvalidArgument(f"{name} is {query[name]!r:.40}, expected a whole number")
                numbers[name] = int(query[name])
        namespace = namespace_of(query["namespace"]) if "namespace" in query else None
        return cls(**numbers, namespace=namespace)

    def as_query(self) -> str:
        """What `of_query` reads."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if isinstance(self.namespace, tuple):
            given["namespace"] = json.dumps(self.namespace)
        return urlencode(given)


def namespace_of(text: str) -> Namespace:
    """A namespace as it is written in a shell: its name, or a JSON list for a tuple."""
    if not text.startswith("["):
        return text
    try:
        return as_namespace(tuple(json.loads(text)))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"namespace is {text!r:.80}, expected JSON: {error}") from None


def screen(view: TreeView, show: Show, selection: Selection) -> str:
    """The cache in figures, and the selected part of its tree.

    Raises `InvalidNamespace` and `InvalidArgument` as `TreeView.filter`, `DecodeFailed`.
    """
    chosen = view.filter(
        min_tokens=selection.min_tokens, depth=selection.depth, namespace=selection.namespace
    )
    stats = view.stats
    head = [
        f"{stats.cached_tokens:,} cached tokens in {stats.nodes:,} nodes: {stats.pinned_tokens:,}"
        f" in use by {stats.open_sequences:,} sequences, {stats.evictable_tokens:,} evictable",
        f"{stats.used_blocks:,} of {stats.num_blocks:,} blocks of {stats.block_size} used"
        f"   hit rate {stats.hit_rate:.1%}   ▶ hot path",
    ]
    if len(chosen) < len(view):
        head.append(f"{len(chosen):,} of {len(view):,} nodes selected")
    limits = Limits(
        width=min(max(selection.width, LEAST_WIDTH), MOST_WIDTH),
        children=8,
        nodes=min(max(selection.nodes, 1), MOST_NODES),
        depth=selection.depth or DEFAULT_DEPTH,
    )
    return "\n".join([*head, "", render(chosen, show, limits)])


def printer() -> Callable[[str], None]:
    """Prints a screen: with colours where rich is installed and the output is a terminal."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return print
    console = Console(highlight=False)

    def paint(text: str) -> None:
        for line in text.split("\n"):
            styled = Text(
                line, style="bold" if re.search("[├└]▶", line) else "", no_wrap=True, end="\n"
            )
            styled.highlight_regex(r"pins [1-9]\d*", "blue")
            styled.highlight_regex(r"pending [1-9]\d*", "yellow")
            styled.highlight_regex(r"hits [1-9]\d*", "green")
            styled.highlight_regex(r"^[│├└─ ]+", "dim")
            console.print(styled, overflow="ellipsis", soft_wrap=not console.is_terminal)

    return paint


def watch(url: str, selection: Selection, seconds: float = 1.0) -> Iterator[str]:
    """The screens of a running process, each when it is another than the last. Without end.

    Raises `CannotWatch`.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise CannotWatch(f"URL is {url!r}, expected http://HOST:PORT/")
    address = urljoin(url if url.endswith("/") else url + "/", "tree.txt")
    before = None
    while True:
        text = _fetch(f"{address}?{selection.as_query()}", url)
        if text != before:
            yield text
        before = text
        time.sleep(seconds)


def clear() -> None:
    """Begins the screen anew, where there is one."""
    if sys.stdout.isatty():
        print("\x1b[H\x1b[2J", end="")


def _fetch(address: str, url: str) -> str:
    try:
        with urlopen(address, timeout=10) as answer:
            if answer.headers.get_content_type() != "text/plain":
                raise CannotWatch(f"{url} is not an inspector")
            body: bytes = answer.read()
            # Whoever answers there: nothing but text gets to the terminal.
            return "\n".join(map(one_line, body.decode().split("\n")))
    except HTTPError as error:
        body = error.read(2000)
        try:
            reason = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            reason = f"{error.code} {error.reason}: not an inspector"
        raise CannotWatch(f"{url}: {reason}") from None
    except (URLError, OSError, UnicodeDecodeError) as error:
        raise CannotWatch(f"{url} does not answer: {getattr(error, 'reason', error)}") from None
