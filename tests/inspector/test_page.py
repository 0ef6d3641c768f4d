"""The page as a file: everything in it, nothing that gets out of its place."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import prefixtree as pt
from prefixtree.inspector import payload
from prefixtree.inspector.page import page, script_json
from prefixtree.inspector.payload import frame, frame_without_text

from .caches import AWKWARD, data_of, from_utf8, large, small, unpacked


class Scripts(HTMLParser):
    """The elements that a parser finds."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    small()[0].tree().to_html(path, from_utf8, title=AWKWARD)
    text = path.read_text(encoding="utf-8")
    found = Scripts()
    found.feed(text)
    assert found.tags.count("script") == 2
    assert "link" not in found.tags
    assert "b" not in found.tags
    assert not re.search(r"https?://|@import|url\(", text)
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


def test_text_comes_through_as_it_is() -> None:
    cache, _ = small()
    (only,) = data_of(page([frame(cache.tree(), from_utf8)], title="x"))["frames"]
    assert AWKWARD in only["texts"]
    ids = frame(cache.tree(), None)["texts"]
    assert " ".join(map(str, AWKWARD.encode())) in ids


def test_nothing_in_json_ends_a_script() -> None:
    text = script_json(["</script>", "<!--<script>", "\ud800", "{{data}}"])
    assert "<" not in text
    assert data_of(page([], title="{{data}}")) == {"live": False, "frames": []}


def test_without_text_nothing_of_a_token_is_there() -> None:
    cache = pt.PrefixCache(16, 4)
    with cache.open([123456789] * 9) as sequence:
        sequence.commit(9)
    text = page([frame_without_text(cache.tree())], title="x")
    assert "123456789" not in text
    assert "123456789" in page([frame(cache.tree(), None)], title="x")
    packed = data_of(text)["frames"][0]["arrays"]
    assert packed.keys() == {*payload.ARRAYS, "held", "blocks", "aside"}


def test_each_node_is_asked_once_for_its_tier(tmp_path: Path) -> None:
    view = small()[0].tree()
    asked: list[pt.NodeView] = []

    def tier(node: pt.NodeView) -> str:
        asked.append(node)
        return "host" if node.pins else AWKWARD

    path = tmp_path / "page.html"
    for shown in (view, view.filter(depth=1)):
        asked.clear()
        shown.to_html(path, from_utf8, tier=tier)
        assert asked == list(shown)
        (only,) = data_of(path.read_text(encoding="utf-8"))["frames"]
        assert only["tiers"] == sorted(["host", AWKWARD])
        told = [only["tiers"][at] for at in unpacked(only)["tier"]]
        assert told == ["host" if pins else AWKWARD for pins in shown.pins]


def test_without_a_function_there_are_no_tiers() -> None:
    for only in (frame(small()[0].tree(), None), frame_without_text(small()[0].tree())):
        assert only["tiers"] == []
        assert "tier" not in only["arrays"]


def test_long_text_is_cut_in_the_middle() -> None:
    cache = pt.PrefixCache(payload.TEXT_BUDGET // 1000, 4096)
    size = payload.TEXT_BUDGET * 2
    with cache.open([7, *[1] * (size - 2), 8]) as sequence:
        sequence.commit(size)
    (text,) = frame(cache.tree(), lambda tokens: "".join(map(str, tokens)))["texts"]
    assert len(text) < payload.TEXT_BUDGET
    assert text[0] == "7"
    assert text[-1] == "8"
    left_out = int(re.findall(r"\[… (\d+) tokens left out …\]", text)[0])
    assert left_out + len(re.sub(r"\n.*\n", "", text)) == size


def test_a_page_of_many_nodes_stays_small() -> None:
    view = large(3000).tree()
    text = page([frame(view, from_utf8, tier=lambda node: "x" * 9)], title="x")
    assert text.count("x" * 9) == 1
    assert len(text) < 200 * len(view) + 100_000
