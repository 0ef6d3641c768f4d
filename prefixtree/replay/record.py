"""A replay as a film: views of the cache, at most so many, for the inspector's page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from prefixtree.cache import PrefixCache
from prefixtree.inspector.page import page
from prefixtree.inspector.payload import Frame, frame_without_text
from prefixtree.replay.request import Request

MOST_FRAMES = 60
MOST_NODES = 400_000
"""Of all frames together: some 25 MB of page."""


class Recorder:
    """Takes a view of the cache after every so many requests.

    When that gets too much, every second one goes and from then on half as many are taken: what
    stays is spread evenly over the replay, whose length need not be known.
    """

    def __init__(self) -> None:
        self._frames: list[tuple[int, int, Frame]] = []  # request, nodes, what is shown
        self._every = 1

    def watching(self, requests: Iterable[Request], cache: PrefixCache) -> Iterator[Request]:
        """The same requests; a view is taken when the next one is asked for, and at the end."""
        played = 0
        for played, request in enumerate(requests, 1):
            yield request
            if played % self._every == 0:
                self._take(played, request.time_s, cache)
        if played % self._every:
            self._take(played, request.time_s, cache)

    def write(self, path: Path, title: str) -> None:
        """The page with a slider over the time. Raises OSError."""
        shown = page([frame for _, _, frame in self._frames], title=title)
        path.write_text(shown, encoding="utf-8")

    def _take(self, played: int, time_s: float, cache: PrefixCache) -> None:
        view = cache.tree()
        label = f"{played:,} requests, {time_s:,.1f} s"
        self._frames.append((played, len(view), frame_without_text(view, label)))
        while len(self._frames) > 2 and self._is_too_much():
            self._every *= 2
            self._frames = [kept for kept in self._frames if kept[0] % self._every == 0]

    def _is_too_much(self) -> bool:
        return (
            len(self._frames) > MOST_FRAMES
            or sum(nodes for _, nodes, _ in self._frames) > MOST_NODES
        )
