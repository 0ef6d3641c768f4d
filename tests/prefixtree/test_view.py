"""Views of the tree: all of it is there, once, and nothing that is done to them is felt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import prefixtree as pt
from allocator import InvalidArgument
from prefixtree.errors import DecodeFailed, InvalidNamespace, TierFailed
from prefixtree.inspector.payload import frame, frame_without_text
from prefixtree.notebook import lefts
from prefixtree.view_text import hot_path
from tests.inspector.caches import Grown, large, small, unpacked

grown = st.builds(Grown, st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 5))


def path_of(node: pt.NodeView | None) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while node is not None:
        tokens = node.tokens + node.pending_tokens + tokens
        node = node.parent
    return tokens


@given(grown)
def test_the_sum_of_everything_shown_is_the_recount(run: Grown) -> None:
    cache = run.cache
    view, stats = cache.tree(), cache.stats()
    cache.check()  # what the statistics say is a recount
    rows = view.to_dicts()
    shown = unpacked(frame_without_text(view))
    for lengths, pins, pending, writers, blocks in (
        (view.length, view.pins, view.pending, view.writer, view.blocks),
        *[(shown[n] for n in ("length", "pins", "pending", "writer", "blocks"))],
        (
            *(np.array([row[n] for row in rows], int) for n in ("length", "pins", "pending")),
            np.unique([user for row in rows for user in row["users"]]),
            np.array([block for row in rows for block in row["blocks"]], int),
        ),
    ):
        assert lengths.sum() == stats.cached_tokens
        assert lengths[pins > 0].sum() == stats.pinned_tokens
        assert lengths[pins == 0].sum() == stats.evictable_tokens
        assert np.count_nonzero(lengths) == stats.nodes
        assert np.count_nonzero(writers) == stats.open_sequences
        assert pending.sum() == sum(len(s) - s.committed for s in run.running)
        refs = np.bincount([*blocks, *view.aside], minlength=stats.num_blocks)
        assert refs.tolist() == cache._pool.refs.tolist()
        assert np.count_nonzero(refs == 0) == stats.free_blocks
    assert sum(len(node.tokens) for node in view) == stats.cached_tokens
    assert sorted(slot for node in view for slot in node.slots) == sorted(
        {slot for node in view for slot in node.slots}
    )


@given(grown)
def test_rows_are_the_tree_depth_first(run: Grown) -> None:
    view = run.cache.tree()
    walked: list[int] = []

    def walk(node: pt.NodeView) -> int:
        if node.index >= 0:
            walked.append(node.index)
        below = 1
        heads = [child.tokens[:1] + child.pending_tokens[:1] for child in node.children]
        assert [head[:1] for head in heads] == sorted(head[:1] for head in heads)
        for child in node.children:
            assert child.parent == node
            assert child.depth == node.depth + 1
            assert child.start == node.start + len(node.tokens)
            assert child.namespace == node.namespace
            below += walk(child)
        if node.index >= 0:
            assert view.size[node.index] == below
        return below

    for root in view.roots.values():
        walk(root)
    assert walked == list(range(len(view)))
    for sequence in run.running:
        ends = [node for node in view if node.users == (sequence._serial,)]
        assert path_of(max(ends, key=lambda node: node.depth)) == tuple(sequence.tokens().tolist())
        assert sum(sequence._serial in node.users for node in view) == max(n.depth for n in ends)


@given(grown, st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_find_is_a_search_of_all_paths(run: Grown, wanted: list[int]) -> None:
    view = run.cache.tree()
    expected = set()
    for node in view:
        path = path_of(node)
        for end in range(len(path) + 1):
            at = end - len(wanted)
            if at >= 0 and list(path[at:end]) == wanted:
                owner: pt.NodeView | None = node
                while owner is not None and owner.start > at:
                    owner = owner.parent
                expected.add(owner.index if owner else None)
    assert {node.index for node in view.find(wanted)} == expected


@given(
    grown,
    st.none() | st.integers(0, 4),
    st.none() | st.booleans(),
    st.none() | st.integers(1, 4),
)
def test_a_filtered_view_is_a_tree_of_what_was_asked_for(
    run: Grown, min_tokens: int | None, pinned: bool | None, depth: int | None
) -> None:
    view = run.cache.tree()
    chosen = view.filter(min_tokens=min_tokens, pinned=pinned, depth=depth)
    kept = set()
    for node in view:
        right = min_tokens is None or len(node.tokens + node.pending_tokens) >= min_tokens
        right &= pinned is None or (node.pins > 0) == pinned
        right &= depth is None or node.depth <= depth
        above: pt.NodeView | None = node
        while right and above is not None and above.index >= 0:
            kept.add(above.index)
            above = above.parent
    assert len(chosen) == len(kept)
    for one, whole in zip(chosen, sorted(kept), strict=True):
        other = view[whole]
        assert path_of(one) == path_of(other)
        assert (one.slots, one.depth, one.pins, one.hits) == (
            *(other.slots, other.depth, other.pins, other.hits),
        )
        assert one.namespace == other.namespace
        assert (one.parent is None or one.parent.index < 0) == (other.parent.index < 0)
    assert [chosen[0].index] == [0] if kept else not list(chosen)
    below = [node for root in chosen.roots.values() for node in root.children]
    assert sum(int(chosen.size[node.index]) for node in below) == len(kept)


def test_a_view_can_be_filtered_by_namespace() -> None:
    cache, _ = small()
    view = cache.tree()
    parts = [view.filter(namespace=name) for name in view.namespaces]
    assert [part[0].namespace for part in parts] == list(view.namespaces)
    assert sum(map(len, parts)) == len(view)
    with pytest.raises(InvalidNamespace, match=r"'nobody' holds nothing, expected one of '', \("):
        view.filter(namespace="nobody")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda view: view.filter(min_tokens=-1), "min_tokens is -1"),
        (lambda view: view.filter(depth=0), "depth is 0"),
        (lambda view: view.filter(depth=1.5), "depth is 1.5"),
        (lambda view: view.render(width=0), "width is 0"),
        (lambda view: view.render(max_nodes=0), "max_nodes is 0"),
    ],
)
def test_bad_numbers_are_named(call: Callable[[pt.TreeView], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call(small()[0].tree())


def test_a_view_does_not_change() -> None:
    cache, sequences = small()
    view = cache.tree()
    before = view.to_dicts()
    for sequence in sequences:
        sequence.close()
    cache.clear()
    assert view.to_dicts() == before
    assert len(cache.tree()) == 0
    for name, value in vars(view).items():
        if isinstance(value, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                value[:] = 0
            assert not value.flags.writeable, name
    with pytest.raises(AttributeError):
        view.stats = None  # type: ignore[misc, assignment]


def broken_tokenizer(tokens: list[int]) -> str:
    raise KeyError(tokens[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda view, path, decode: view.render(decode),
        lambda view, path, decode: view.to_dicts(decode),
        lambda view, path, decode: view.to_html(path, decode),
    ],
)
def test_a_decode_that_fails_is_named_and_the_cache_is_as_before(use: Any, tmp_path: Any) -> None:
    cache, _ = small()
    before = cache.tree().to_dicts()
    with pytest.raises(DecodeFailed, match=r"broken_tokenizer raised KeyError for the \d+ tokens"):
        use(cache.tree(), tmp_path / "page.html", broken_tokenizer)
    with pytest.raises(DecodeFailed, match=r"returned a int for the \d+ tokens .*, expected a str"):
        use(cache.tree(), tmp_path / "page.html", lambda tokens: 5)
    assert not (tmp_path / "page.html").exists()
    cache.check()
    assert cache.tree().to_dicts() == before


def lost(node: pt.NodeView) -> str:
    raise KeyError(node.tokens)


def test_a_tier_that_fails_is_named_and_the_cache_is_as_before(tmp_path: Path) -> None:
    cache, _ = small()
    before = cache.tree().to_dicts()
    path = tmp_path / "page.html"
    wrong: Any = lambda node: len(node.tokens)  # noqa: E731
    node = r"for node 0, <NodeView \d+ tokens at 0, \d+ pins>"
    with pytest.raises(TierFailed, match=rf"tier function lost raised KeyError {node}$"):
        cache.tree().to_html(path, tier=lost)
    with pytest.raises(TierFailed, match=rf"<lambda> returned a int {node}, expected a str$"):
        cache.tree().to_html(path, tier=wrong)
    path.write_text("a page of before", encoding="utf-8")
    with pytest.raises(TierFailed):
        cache.tree().to_html(path, tier=lost)
    assert path.read_text(encoding="utf-8") == "a page of before"
    cache.check()
    assert cache.tree().to_dicts() == before


def test_the_text_fits_whatever_the_tree() -> None:
    cache = large(1500)
    for number in range(50):
        with cache.open([1, 2, number], namespace=("n", number)) as sequence:
            sequence.commit(3)
    for width in (20, 80):
        lines = cache.tree().render(width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) <= 2 * 40 + 2 * 8 + 1
    assert lines[-1] == "... 44 more namespaces"
    shown = sum("tokens  pins" in line for line in lines)
    hidden = sum(int(line.split("... ")[1].split()[0]) for line in lines[:-1] if "... " in line)
    assert shown + hidden == len(cache.tree()) - 44


def test_hits_idleness_and_age_are_counted() -> None:
    cache = pt.PrefixCache(64, 4)
    for path in ([1, 2], [3, 4], [1, 2], [1, 5]):
        with cache.open(path) as sequence:
            sequence.commit(2)
    held = cache.open([3, 4])
    rows = {tuple(row["tokens"]): row for row in cache.tree().to_dicts()}
    assert {path: (row["hits"], row["idle"]) for path, row in rows.items()} == {
        (1,): (2, 0),
        (2,): (1, 1),  # since its last use, one other has ended
        (5,): (0, 0),
        (3, 4): (1, 0),
        (): (0, 0),
    }
    ages = [rows[path]["age"] for path in ((1,), (2,), (3, 4), (5,), ())]
    assert ages == sorted(ages, reverse=True)
    assert rows[()]["users"] == rows[3, 4]["users"] == [held._serial]


def test_the_hot_path_is_marked() -> None:
    cache = pt.PrefixCache(64, 4)
    for path, times in (([1, 2, 3], 1), ([1, 2, 4], 3), ([5, 5], 1)):
        for _ in range(times):
            with cache.open(path) as sequence:
                sequence.commit(len(path))
    view = cache.tree()
    assert [path_of(view[int(row)]) for row in np.flatnonzero(hot_path(view))] == [
        (1, 2),
        (1, 2, 4),
    ]
    assert str(view).splitlines() == [
        "root",
        "├▶ 2 tokens  pins 0  hits 3  1 2",
        "│  ├─ 1 tokens  pins 0  hits 0  3",
        "│  └▶ 1 tokens  pins 0  hits 2  4",
        "└─ 2 tokens  pins 0  hits 0  5 5",
    ]


def test_text_with_control_characters_stays_on_its_line() -> None:
    cache = pt.PrefixCache(16, 4)
    with cache.open(list("a\nb\x1b[31m\u202e".encode())) as sequence:
        sequence.commit(len(sequence))
    text = cache.tree().render(lambda tokens: bytes(tokens).decode())
    assert text.splitlines()[1].endswith(r"'a\nb\x1b[31m\u202e'")


def test_wide_and_combining_characters_are_counted_as_columns() -> None:
    cache = pt.PrefixCache(64, 4)
    with cache.open(list(range(100))) as sequence:
        sequence.commit(100)
    for char, columns in (("漢", 2), ("🎉", 2), ("é", 1), ("e\u0301", 1)):
        (_, line) = cache.tree().render(lambda tokens, c=char: c * len(tokens)).splitlines()
        head = line.split("'")[0]
        half = (80 - len(head) - 3) // 2 // columns
        assert line[len(head) :].count(char[0]) == 2 * half
        assert line.endswith("'")


def test_a_tree_as_deep_as_it_has_nodes() -> None:
    cache = pt.PrefixCache(4000, 4)
    path = list(range(3000))
    for length in range(3000, 0, -1):
        with cache.open(path[:length]) as sequence:
            sequence.commit(length)
    view = cache.tree()
    assert len(view) == 3000
    assert view.depth.max() == 3000
    assert view.find([1500, 1501])[0].depth == 1501
    assert len(str(view).splitlines()) <= 20
    assert view.filter(depth=2000).size[0] == 2000
    assert len(frame(view, None)["texts"]) == 3000
    cache._repr_html_()


def test_networkx_gets_the_same_tree() -> None:
    networkx = pytest.importorskip("networkx")
    view = small()[0].tree()
    graph = view.to_networkx(lambda tokens: "x" * len(tokens))
    assert networkx.is_forest(graph)
    assert len(graph) == len(view) + len(view.namespaces)
    for node in view:
        (above,) = graph.predecessors(node.index)
        assert above == (node.parent.index if node.parent else None)
        assert graph.nodes[node.index]["tokens"] == [*node.tokens, *node.pending_tokens]
        assert len(graph.nodes[node.index]["text"]) == len(graph.nodes[node.index]["tokens"])
    assert graph.nodes[-1]["namespace"] == ""


def test_pandas_gets_the_same_tree() -> None:
    pandas = pytest.importorskip("pandas")
    cache, _ = small()
    table = cache.tree().to_pandas(lambda tokens: "x")
    assert isinstance(table, pandas.DataFrame)
    assert table["length"].sum() == cache.stats().cached_tokens
    assert table["parent"].isna().sum() == int((cache.tree().parent < 0).sum())
    assert table.columns[-1] == "text"
    assert len(pt.PrefixCache(4, 4).tree().to_pandas()) == 0


@pytest.mark.parametrize("name", ["pandas", "networkx"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"to_{name} needs {name}: pip install {name}"):
        getattr(small()[0].tree(), f"to_{name}")()


@given(grown)
def test_boxes_of_notebooks_lie_within_those_above(run: Grown) -> None:
    view = run.cache.tree()
    left, below = lefts(view, view.below), view.below
    for root in view.roots.values():
        for node in root.children:
            assert left[node.index] == sum(below[n.index] for n in view if is_before(n, node))
    for node in view:
        edge = left[node.index]
        for child in node.children:
            assert left[child.index] == edge
            edge += below[child.index]
        assert edge + len(node.tokens + node.pending_tokens) == left[node.index] + below[node.index]


def is_before(one: pt.NodeView, other: pt.NodeView) -> bool:
    return one.depth == 1 and one.index < other.index


def test_notebooks_show_every_node_that_can_be_seen() -> None:
    cache, sequences = small()
    for shown in (cache._repr_html_(), cache.tree()._repr_html_()):
        root = ElementTree.fromstring(f"<div>{shown}</div>")
        boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
        view = cache.tree()
        assert len(boxes) == sum(len(n.tokens + n.pending_tokens) > 0 for n in view)
        edges = [(float(b.get("x", "")), float(b.get("width", "")), b.get("y")) for b in boxes]
        for row in {y for *_, y in edges}:
            level = sorted((x, width) for x, width, y in edges if y == row)
            for (x, width), (following, _) in pairwise(level):
                assert x + width <= following + 0.2
            assert level[-1][0] + level[-1][1] <= 640
    for sequence in sequences:
        bar = ElementTree.fromstring(f"<div>{sequence._repr_html_()}</div>")
        titles = [title.text or "" for title in bar.iter("{http://www.w3.org/2000/svg}title")]
        assert sum(map(int, titles)) == len(sequence)
    sequences[0].close()
    assert sequences[0]._repr_html_() == "<code>&lt;Sequence closed&gt;</code>"
    assert "empty" in pt.PrefixCache(4, 4)._repr_html_()
