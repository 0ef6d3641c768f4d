"""The page in a browser: what it shows and how it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import prefixtree as pt
from prefixtree.inspector import serve
from prefixtree.inspector.page import page
from prefixtree.inspector.payload import frame, frame_without_text

from .browser import CHROMIUM, Browser
from .caches import AWKWARD, Grown, from_utf8, large, small

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

BOXES = """
[...document.querySelectorAll("h1, dl div, nav label, nav button, nav input, #time > *, canvas, h2,"
  + " .legend li, #said, #detail, #block, summary")].map((element) => {
    const box = element.getBoundingClientRect();
    return [element.id || element.tagName + " " + element.textContent.slice(0, 20),
      box.left, box.top, box.right, box.bottom];
  }).filter(([, left, top, right, bottom]) => right > left && bottom > top)
"""
UNTIL = """
new Promise((done) => {{ const wait = () => {} ? done() : setTimeout(wait, 20); wait(); }})
"""
# Parts of one node's detail lie inside each other, and a label around its select.
INSIDE = {"detail"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> tuple[Browser, pt.PrefixCache]:
    """The small cache's page."""
    cache, _ = small()
    path = tmp_path / "page.html"
    cache.tree().to_html(path, from_utf8)
    browser.open(path)
    return browser, cache


def selected(browser: Browser) -> Any:
    return browser.run("app.icicle.selected")


def test_the_page_counts_what_the_cache_does(opened: tuple[Browser, pt.PrefixCache]) -> None:
    browser, cache = opened
    stats = cache.stats()
    found = browser.run(
        """(() => {
        const f = app.frame, { left, total } = layout(f, "tokens");
        const sum = (values) => values.reduce((a, b) => a + b, 0);
        return {
            cached: sum(f.length), pinned: sum(f.length.filter((_, i) => f.pins[i])),
            free: f.freeBlocks, refs: [...f.refs],
            size: layout(f, "tokens").sum, held: layout(f, "blocks").sum,
            fits: f.parent.every((p, i) => p < 0 || (left[i] >= left[p]
              && left[i] + total[i] <= left[p] + total[p])),
        };
    })()"""
    )
    view = cache.tree()
    assert found == {
        "cached": stats.cached_tokens,
        "pinned": stats.pinned_tokens,
        "free": stats.free_blocks,
        "refs": cache._pool.refs.tolist(),
        "size": int((view.length + view.pending).sum()),
        "held": len(view.blocks),
        "fits": True,
    }
    assert browser.errors() == []
    assert len(browser.requests()) == 1  # the file itself


def test_awkward_text_is_shown_as_text(opened: tuple[Browser, pt.PrefixCache]) -> None:
    browser, _ = opened
    browser.run("app.icicle.select(search(app.frame, 'document.title')[0])")
    assert browser.run("document.title") == "prefixtree"
    shown = browser.run("byId('text').textContent")
    assert shown == AWKWARD.replace("\u202e", "\\u{202e}").replace("\x07", "\\x07")
    assert browser.run("byId('text').children.length") == 0


def test_search_finds_and_goes_on(opened: tuple[Browser, pt.PrefixCache]) -> None:
    browser, _ = opened
    browser.press("/")
    browser.type("SHARED prefix")
    browser.press("Enter")
    assert browser.run("byId('matches').value") == "1 of 2"
    first = selected(browser)
    assert "shared prefix" in browser.run("byId('text').textContent")
    browser.press("Enter")
    assert selected(browser) != first
    browser.press("Enter")
    assert selected(browser) == first
    browser.run("byId('query').value = 'nowhere'; byId('query').dispatchEvent(new Event('input'))")
    browser.press("Enter")
    assert browser.run("byId('matches').value") == "0 matches"


def test_search_finds_what_goes_on_in_a_node_below(
    opened: tuple[Browser, pt.PrefixCache],
) -> None:
    browser, _ = opened
    found = """search(app.frame, QUERY).map((item) => app.frame.texts[app.frame.nodeOf[item]])"""
    for query, begins in {
        "then TWO": "shared prefix, then ",
        "x, then oneac": "shared prefix, then ",  # over three nodes
        "ea": "one",
        "eab": None,
        "tt": None,  # siblings do not follow each other
    }.items():
        expected = [] if begins is None else [begins]
        assert browser.run(found.replace("QUERY", repr(query))) == expected, query


@pytest.mark.parametrize("decode", [None, lambda ids: "".join("abcdef"[i % 6] for i in ids)])
def test_search_finds_all_that_a_path_says(
    browser: Browser, tmp_path: Path, decode: Callable[[list[int]], str] | None
) -> None:
    view = Grown(3, 80, 2).cache.tree()
    path = tmp_path / "page.html"
    view.to_html(path, decode)
    browser.open(path)
    texts = browser.run("app.frame.texts")
    joint = "" if decode else " "
    parent = view.parent.tolist()
    above: list[str] = []
    for up in parent:
        above.append(above[up] + texts[up] + joint if up >= 0 else "")
    draw = Random(1)
    several = 0
    for _ in range(60):
        node = draw.randrange(len(texts))
        whole = above[node] + texts[node]
        first = draw.randrange(len(whole))
        query = whole[first : first + draw.randrange(1, 12)].rstrip() or whole
        expected = {
            start
            for end, text in enumerate(texts)
            for at in range(len(above[end]) + len(text))
            if (above[end] + text).startswith(query, at)
            for start in [begin(end, at, above, parent)]
        }
        run = f"search(app.frame, {query!r}).map((item) => app.frame.nodeOf[item])"
        assert browser.run(run) == sorted(expected), query
        several += query not in texts[min(expected)]
    assert several > 10


def begin(node: int, at: int, above: list[str], parent: list[int]) -> int:
    """The node on the path to `node` that character `at` is in."""
    while len(above[node]) > at:
        node = parent[node]
    return node


def test_the_keyboard_reaches_everything(opened: tuple[Browser, pt.PrefixCache]) -> None:
    browser, _ = opened
    seen = []
    for _ in range(14):
        browser.press("Tab")
        seen.append(browser.run("document.activeElement.id || document.activeElement.tagName"))
    order = ["width", "colour", "zoom-in", "zoom-out", "zoom-reset", "query", "next", "icicle"]
    assert seen[: len(order)] == order
    assert {"blocks", "SUMMARY"} <= set(seen)

    browser.run("byId('icicle').focus()")
    browser.press("ArrowDown", "ArrowDown")
    below = selected(browser)
    assert browser.run("app.frame.depth[app.icicle.selected]") == 1
    browser.press("ArrowRight")
    beside = selected(browser)
    browser.press("ArrowLeft")
    assert (selected(browser), beside != below) == (below, True)
    browser.press("Enter")
    zoomed = browser.run("app.icicle.to - app.icicle.from")
    assert zoomed < 1
    browser.press("+")
    assert browser.run("app.icicle.to - app.icicle.from") == pytest.approx(zoomed / 2)
    browser.press("-", "Backspace")
    assert browser.run("app.icicle.to - app.icicle.from") > zoomed
    browser.press("0")
    assert browser.run("[app.icicle.from, app.icicle.to]") == [0, 1]
    browser.press("ArrowUp")
    assert browser.run("app.frame.parent[app.icicle.selected]") == -1

    browser.run("byId('blocks').focus()")
    browser.press("ArrowRight", "ArrowRight", "Enter")
    assert browser.run("byId('block').textContent").startswith("Block 1: ")
    assert browser.run("app.frame.owner[1]") == selected(browser)


def test_the_mouse_selects_zooms_and_drags(opened: tuple[Browser, pt.PrefixCache]) -> None:
    browser, _ = opened
    left, top, width = browser.run(
        "(({ left, top, width }) => [left, top, width])(byId('icicle').getBoundingClientRect())"
    )
    browser.click(left + 20, top + 33)
    item = selected(browser)
    assert browser.run(f"app.frame.depth[{item}]") == 1
    assert browser.run("byId('detail').textContent").startswith("tokens")
    browser.click(left + 20, top + 33, count=2)
    narrow = browser.run("app.icicle.to - app.icicle.from")
    assert narrow < 1
    browser.mouse("mouseWheel", left + width / 2, top + 10, deltaX=0, deltaY=-100)
    assert browser.run("app.icicle.to - app.icicle.from") < narrow
    before = browser.run("app.icicle.from")
    browser.mouse("mousePressed", left + 300, top + 10, button="left", clickCount=1)
    browser.mouse("mouseMoved", left + 250, top + 10, button="left")
    browser.mouse("mouseReleased", left + 250, top + 10, button="left", clickCount=1)
    assert browser.run("app.icicle.from") > before
    assert selected(browser) == item


def test_every_width_and_colour_draws_something_else(
    opened: tuple[Browser, pt.PrefixCache],
) -> None:
    browser, _ = opened
    pictures = set()
    for control, values in (
        ("width", ("tokens", "blocks", "hits")),
        ("colour", ("namespace", "hits", "idle")),
    ):
        for value in values:
            browser.run(
                f"byId('{control}').value = '{value}';"
                f"byId('{control}').dispatchEvent(new Event('change'))"
            )
            browser.settle()
            pictures.add(browser.run("byId('icicle').toDataURL()"))
    assert len(pictures) == 6
    assert browser.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_tiers_have_a_colour_each(browser: Browser, tmp_path: Path, dark: bool) -> None:
    names = {"": "none", "<script>document.title='run'</script>": "", "GPU\n": "GPU\\n"}
    names["x" * 120] = ""  # one word, wider than the page
    shown = {name: told or name for name, told in names.items()}
    view = small()[0].tree()
    told = [list(names)[node % 4] for node in range(len(view))]
    path = tmp_path / "page.html"
    view.to_html(path, from_utf8, tier=lambda node: told[node.index])
    browser.open(path, width=400, dark=dark)
    browser.run("byId('colour').focus()")
    browser.press("t")  # to the choice that begins with it
    assert browser.run("byId('colour').value") == "tier"
    legend = browser.run(
        """[...byId("legend").children].map((entry) => [entry.textContent,
          getComputedStyle(entry.firstChild).backgroundColor, entry.children.length])"""
    )
    assert [name for name, _, _ in legend] == [shown[name] for name in sorted(names)]
    colours = {name: colour for name, colour, _ in legend}
    assert len(set(colours.values())) == 4
    assert {swatches for _, _, swatches in legend} == {1}
    drawn = set()
    for node, name in enumerate(told):
        box, pixel = browser.run(
            f"""(() => {{ const item = app.frame.itemOf[{node}], {{ icicle, frame }} = app;
              const {{ left, total, sum }} = layout(frame, "tokens");
              const x = (left[item] + total[item] / 2) / sum * icicle.width;
              const y = frame.depth[item] * ROW + 1, scale = devicePixelRatio;
              const [r, g, b] = icicle.context.getImageData(x * scale, y * scale, 1, 1).data;
              return [total[item] / sum * icicle.width, `rgb(${{r}}, ${{g}}, ${{b}})`]; }})()"""
        )
        if box > 3:
            assert pixel == colours[shown[name]]
            drawn.add(name)
        browser.run(f"app.selected(app.frame.itemOf[{node}])")
        assert f"tier {shown[name]}, " in browser.run("byId('said').textContent")
        assert f"tier{shown[name]}blocks" in browser.run("byId('detail').textContent")
    assert drawn == set(names)
    assert browser.run("document.documentElement.scrollWidth") <= 400
    assert browser.run("document.title") == "prefixtree"
    assert browser.errors() == []


def test_tier_is_no_choice_where_nobody_tells_tiers(
    opened: tuple[Browser, pt.PrefixCache],
) -> None:
    browser, _ = opened
    browser.run("byId('colour').focus()")
    browser.press("t")
    assert browser.run("byId('colour').value") == "state"
    browser.run("app.selected(1)")
    assert "tier" not in browser.run("byId('said').textContent + byId('detail').textContent")


def test_the_slider_moves_through_time(browser: Browser, tmp_path: Path) -> None:
    cache = pt.PrefixCache(64, 4)
    frames = []
    for number in range(5):
        with cache.open([1, 2, 3, 4, 5, number]) as sequence:
            sequence.commit(6)
        frames.append(frame_without_text(cache.tree(), f"moment {number}"))
    path = tmp_path / "page.html"
    path.write_text(page(frames, title="film"), encoding="utf-8")
    browser.open(path)
    assert browser.run("byId('moment').value") == "moment 0"
    browser.run("app.icicle.select(1); byId('slider').focus()")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.run("byId('moment').value") == "moment 2"
    assert browser.run("app.frame.stats.opens") == 3
    # What was one node is two since: the selection is on the upper one, which begins there.
    assert browser.run("app.frame.length[app.icicle.selected]") == 5
    assert browser.run("byId('query').disabled")
    browser.run("app.play()")
    browser.run(UNTIL.format("app.at === 4 && !app.playing"))
    assert browser.run("byId('moment').value") == "moment 4"
    assert browser.errors() == []


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["small", "large", "film", "empty"])
def test_nothing_overlaps(
    browser: Browser, tmp_path: Path, width: int, dark: bool, kind: str
) -> None:
    cache = {"large": lambda: large(2000), "empty": lambda: pt.PrefixCache(4, 4)}.get(
        kind, lambda: small()[0]
    )()
    view = cache.tree()
    frames = [frame(view, from_utf8, "a moment with a label")] * (3 if kind == "film" else 1)
    path = tmp_path / "page.html"
    path.write_text(page(frames, title="a rather long title of a page.snapshot"), encoding="utf-8")
    browser.open(path, width=width, dark=dark)
    browser.run("app.icicle.select(Math.min(1, app.frame.count - 1))")
    browser.settle()
    assert browser.run("document.documentElement.scrollWidth") <= width
    boxes = browser.run(BOXES)
    assert len(boxes) > 20
    for at, (name, left, top, right, bottom) in enumerate(boxes):
        assert left >= 0, name
        assert right <= width, name
        for other, left2, top2, right2, bottom2 in boxes[at + 1 :]:
            apart = (
                right <= left2 + 1 or right2 <= left + 1 or bottom <= top2 + 1 or bottom2 <= top + 1
            )
            inside = left <= left2 and right2 <= right and top <= top2 and bottom2 <= bottom
            assert apart or (inside and name in INSIDE), (name, other)
    assert browser.errors() == []
    contrast = browser.run(
        """(() => { const light = (text) => { const [r, g, b] = text.match(/\\d+/g).map(Number);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const style = getComputedStyle(document.body);
          return light(style.color) - light(style.backgroundColor); })()"""
    )
    assert (contrast > 150) if dark else (contrast < -150)


def test_a_live_page_follows_the_cache(browser: Browser) -> None:
    cache = pt.PrefixCache(16, 4)
    until = UNTIL.format("app.frame && app.frame.stats.opens === {}")
    with serve(cache, token_text=True, decode=from_utf8) as inspector:
        browser.open(inspector.url)
        browser.run(until.replace("{}", "0"))
        for number in range(2):
            with cache.open([*b"live", number]) as sequence:
                sequence.commit(5)
            inspector.publish()
            browser.run(until.replace("{}", str(number + 1)))
            assert browser.run("app.frame.nodes") == [1, 3][number]
        assert browser.run("byId('connection').textContent") == "live"
        assert browser.errors() == []
    browser.run(UNTIL.format("byId('connection').className === 'lost'"))


def test_many_nodes_are_drawn_by_few_rectangles(browser: Browser, tmp_path: Path) -> None:
    cache = pt.PrefixCache(30_000, 4)
    for number in range(20_000):
        with cache.open([number]) as sequence:
            sequence.commit(1)
    path = tmp_path / "page.html"
    cache.tree().to_html(path)
    browser.open(path)
    drawn = browser.run(
        """(() => { const context = app.icicle.context; let count = 0;
          const fill = context.fillRect.bind(context);
          context.fillRect = (...box) => { count++; fill(...box); };
          app.icicle.paint(); return [count, app.icicle.width]; })()"""
    )
    assert drawn[1] * 0.5 < drawn[0] < drawn[1] + 10
