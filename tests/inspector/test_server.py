"""The live server: what it shows, to whom, and that it changes nothing."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import prefixtree as pt
from allocator import BrokenInvariant, InvalidArgument
from prefixtree.errors import CannotServe
from prefixtree.inspector import Inspector, serve
from prefixtree.inspector import published as published_module
from prefixtree.inspector.payload import frame, frame_without_text

from .caches import data_of, from_utf8, small

SECONDS = 30
ROOT = Path(__file__).parents[2]


def ask(inspector: Inspector, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", inspector.port, timeout=SECONDS)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextmanager
def events(inspector: Inspector) -> Iterator[Iterator[int]]:
    """The numbers of the views that a page is told of."""
    connection = http.client.HTTPConnection("127.0.0.1", inspector.port, timeout=SECONDS)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"

    def numbers() -> Iterator[int]:
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield int(line[6:])

    yield numbers()
    connection.close()


def test_the_page_and_its_data_are_served() -> None:
    cache, _ = small()
    with serve(cache) as inspector:
        status, body = ask(inspector, "/")
        assert status == 200
        assert data_of(body.decode()) == {"live": True, "frames": []}
        status, body = ask(inspector, "/tree.json")
        assert (status, json.loads(body)) == (200, frame_without_text(cache.tree()))
        assert json.loads(ask(inspector, "/healthz")[1]) == {"status": "ok", "view": 1}
        assert ask(inspector, "/etc/passwd")[0] == 404
        status, body = ask(inspector, "/tree.json", "HEAD")
        assert (status, body) == (200, b"")


def test_tokens_are_shown_only_when_asked_for() -> None:
    cache, _ = small()
    with serve(cache) as inspector:
        assert json.loads(ask(inspector, "/tree.json")[1])["texts"] is None
        assert b"shared" not in ask(inspector, "/tree.txt")[1]
        assert b"115 104 97" not in ask(inspector, "/tree.txt")[1]
    with serve(cache, token_text=True, decode=from_utf8) as inspector:
        shown = json.loads(ask(inspector, "/tree.json")[1])
        assert shown == frame(cache.tree(), from_utf8)
        assert b"shared prefix" in ask(inspector, "/tree.txt?width=200")[1]
    with pytest.raises(InvalidArgument, match="decode is given, but token_text is off"):
        serve(cache, decode=from_utf8)


def test_a_decode_that_fails_is_told_to_the_page() -> None:
    def broken(tokens: list[int]) -> str:
        raise ValueError("no such id")

    with serve(small()[0], token_text=True, decode=broken) as inspector:
        for path in ("/tree.json", "/tree.txt"):
            status, body = ask(inspector, path)
            assert status == 500
            assert "DecodeFailed" in json.loads(body)["error"]
            assert "broken raised ValueError" in json.loads(body)["error"]


def test_tiers_are_shown_with_token_text_and_without() -> None:
    cache, _ = small()

    def tier(node: pt.NodeView) -> str:
        return "device" if node.pins else "disk"

    with serve(cache, tier=tier) as inspector:
        shown = json.loads(ask(inspector, "/tree.json")[1])
        assert shown == frame_without_text(cache.tree(), tier=tier)
        assert (shown["tiers"], shown["texts"]) == (["device", "disk"], None)
    with serve(cache, token_text=True, decode=from_utf8, tier=tier) as inspector:
        shown = json.loads(ask(inspector, "/tree.json")[1])
        assert shown == frame(cache.tree(), from_utf8, tier=tier)


def test_a_tier_that_fails_is_told_to_the_page_without_tokens() -> None:
    def broken(node: pt.NodeView) -> str:
        raise ValueError(f"no place for {bytes(node.tokens)!r}")

    with serve(small()[0], tier=broken) as inspector:
        status, body = ask(inspector, "/tree.json")
        assert status == 500
        assert "broken raised ValueError for node 0, <NodeView" in json.loads(body)["error"]
        assert b"TierFailed" in body
        assert b"script" not in body  # the node's tokens
        assert ask(inspector, "/tree.txt")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "X"])
def test_nothing_can_be_changed(method: str) -> None:
    cache, _ = small()
    before = cache.tree().to_dicts()
    with serve(cache) as inspector:
        for path in ("/", "/tree.json", "/events", "/healthz"):
            assert ask(inspector, path, method)[0] == 501
    assert cache.tree().to_dicts() == before


def test_a_page_of_another_site_gets_nothing() -> None:
    with serve(small()[0]) as inspector:
        for host in (
            "evil.example",
            f"evil.example:{inspector.port}",
            "127.0.0.1.evil.example",
            "",
        ):
            for path in ("/", "/tree.json", "/events"):
                assert ask(inspector, path, Host=host)[0] == 403
        for host in ("localhost", f"127.0.0.1:{inspector.port}", "[::1]:5"):
            assert ask(inspector, "/healthz", Host=host)[0] == 200


def test_the_selection_of_text_is_checked() -> None:
    with serve(small()[0]) as inspector:
        for query, message in (
            ("depth=x", "depth is 'x', expected a whole number"),
            ("depth=0", "depth is 0"),
            ("min_tokens=-1", "min_tokens is '-1'"),
            ("namespace=nobody", "namespace 'nobody' holds nothing"),
            ("namespace=[", "expected JSON"),
        ):
            status, body = ask(inspector, f"/tree.txt?{query}")
            assert (status, message in json.loads(body)["error"]) == (400, True), body
        assert b"hits" in ask(inspector, '/tree.txt?namespace=["tenant",1]&width=1')[1]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            CannotServe, match=rf"cannot listen at '127.0.0.1' port {port}: .*in use"
        ):
            serve(small()[0], port=port)
    with pytest.raises(CannotServe, match="cannot listen at 'no such host' port 0"):
        serve(small()[0], host="no such host")
    for wrong in (-1, 65536):
        with pytest.raises(InvalidArgument, match=f"port is {wrong}, expected 0..65535"):
            serve(small()[0], port=wrong)


class Watched(pt.PrefixCache):
    """Says which threads read it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(16, 4, **options)
        self.readers: set[int] = set()

    def tree(self) -> pt.TreeView:
        self.readers.add(threading.get_ident())
        return super().tree()

    def stats(self) -> pt.Stats:
        self.readers.add(threading.get_ident())
        return super().stats()


def test_a_cache_of_one_thread_is_read_by_that_thread_only(monkeypatch: Any) -> None:
    monkeypatch.setattr(published_module, "REFRESH_SECONDS", 0.0)
    cache = Watched()
    with serve(cache) as inspector, events(inspector) as told:
        assert next(told) == 1
        with cache.open([1, 2, 3]) as sequence:
            sequence.commit(3)
        assert json.loads(ask(inspector, "/tree.json")[1])["stats"]["cached_tokens"] == 0
        inspector.publish()
        assert next(told) == 2
        assert json.loads(ask(inspector, "/tree.json")[1])["stats"]["cached_tokens"] == 3
    assert cache.readers == {threading.get_ident()}


def test_a_thread_safe_cache_is_looked_at_while_somebody_watches(monkeypatch: Any) -> None:
    monkeypatch.setattr(published_module, "REFRESH_SECONDS", 0.01)
    cache = Watched(thread_safe=True)
    with serve(cache) as inspector, events(inspector) as told:
        assert next(told) == 1
        with cache.open([1, 2, 3]) as sequence:
            sequence.commit(3)
        number = next(told)
        while json.loads(ask(inspector, "/tree.json")[1])["stats"]["closes"] == 0:
            number = next(told)
        assert number > 1
    assert len(cache.readers) > 1


def test_a_broken_cache_is_told_to_the_page(monkeypatch: Any) -> None:
    monkeypatch.setattr(published_module, "REFRESH_SECONDS", 0.0)
    cache, _ = small()
    cache.thread_safe = True
    with serve(cache) as inspector:
        cache._tree.cached_tokens += 1
        with pytest.raises(BrokenInvariant):
            cache.check()
        status, body = ask(inspector, "/tree.json")
        assert (status, "CacheBroken" in json.loads(body)["error"]) == (500, True)


def test_closing_ends_streams_and_frees_the_port() -> None:
    inspector = serve(small()[0])
    with events(inspector) as told:
        assert next(told) == 1
        inspector.close()
        assert list(told) == []
    inspector.close()
    with serve(small()[0], port=inspector.port) as again:
        assert again.port == inspector.port
        assert again.url == f"http://127.0.0.1:{again.port}/"


def test_the_inspector_is_loaded_only_where_it_is_used() -> None:
    script = """
import sys, prefixtree
cache = prefixtree.PrefixCache(16, 4)
heavy = "http.server", "prefixtree.inspector"
print(cache.tree(), [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "root []\n"


def test_pages_beyond_what_is_reasonable_are_refused() -> None:
    with serve(small()[0]) as inspector:
        for _ in range(16):
            inspector._server.streams.acquire()
        assert ask(inspector, "/events")[0] == 503
        assert ask(inspector, "/healthz")[0] == 200
