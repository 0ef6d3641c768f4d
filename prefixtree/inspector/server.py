"""The page over HTTP, live: the standard library's server in threads of its own.

| path | is |
|---|---|
| `/` | the page |
| `/tree.json` | the latest view, as `payload` writes it |
| `/tree.txt` | the same as text; takes the fields of `Selection` |
| `/events` | server-sent events: "tree" with the view's number whenever there is a new one |
| `/metrics` | the statistics for Prometheus; 501 without the extra `metrics` |
| `/healthz` | `{"status": "ok", "view": number}` |

All are GET, and none changes anything. To add one, put a function into `ROUTES`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, SupportsIndex
from urllib.parse import parse_qsl, urlsplit

from allocator import AllocatorError
from allocator.errors import InvalidArgument, as_integer
from prefixtree.errors import CannotServe, InvalidNamespace, PrefixTreeError
from prefixtree.inspector.page import POLICY, page
from prefixtree.inspector.payload import frame, frame_without_text
from prefixtree.inspector.published import Published
from prefixtree.inspector.terminal import Selection, screen
from prefixtree.view_text import Decode, excerpts, nothing

if TYPE_CHECKING:
    from prefixtree.cache import PrefixCache
    from prefixtree.view import Tier

BEAT_SECONDS = 10.0
"""So often a stream of events that has no news says that it is there."""
MOST_STREAMS = 16
"""Each open page holds a thread."""


class Answer(NamedTuple):
    content_type: str
    body: bytes


class Inspector:
    """A running server; made by `serve`. A context manager that closes it.

    A cache made with `thread_safe=True` is looked at whenever somebody watches. Of any other the
    page shows what the last `publish` saw: only the thread that uses such a cache may read it.
    """

    def __init__(
        self,
        cache: PrefixCache,
        server: _Server,
        token_text: bool,
        decode: Decode | None,
        tier: Tier | None,
    ) -> None:
        self.published = Published(cache)
        self.token_text = token_text
        self.decode = decode
        self.tier = tier
        self._json: tuple[int, bytes] = (0, b"")
        self._writing = threading.Lock()
        self._server = server
        server.inspector = self
        self._thread = threading.Thread(
            target=server.serve_forever, args=(0.1,), name="prefixtree-inspector", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        host = str(self._server.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def publish(self) -> None:
        """Shows the cache as it is now. To be called by a thread that may use the cache.

        O(nodes log nodes + blocks), as `PrefixCache.tree`; what is sent is made in the server's
        threads, once however many pages are open.
        """
        self.published.publish()

    def close(self) -> None:
        """Stops listening; open pages are told so. Does nothing the second time."""
        self.published.stop()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tree_json(self) -> bytes:
        with self._writing:
            number, view = self.published.latest()
            if self._json[0] != number:
                shown = (
                    frame(view, self.decode, tier=self.tier)
                    if self.token_text
                    else frame_without_text(view, tier=self.tier)
                )
                self._json = number, _as_json(shown)
            return self._json[1]


def serve(
    cache: PrefixCache,
    *,
    host: str = "127.0.0.1",
    port: SupportsIndex = 0,
    token_text: bool = False,
    decode: Decode | None = None,
    tier: Tier | None = None,
) -> Inspector:
    """Shows the cache in browsers, live, from threads of this process; returns at once.

    `port` 0 is any that is free: see `Inspector.url`. Whoever can reach the address can look:
    this machine only unless `host` is another address. Tokens are not shown unless `token_text`:
    as `decode` turns them into text, or as ids. Nothing that is served changes the cache.

    `tier` names where a node's KV is, and the page then colours by tier, too. A thread of the
    server asks it, once for each node of every new view that a page wants, while the cache may
    already have gone on; KV that moves under a tree that stays is shown after a `publish`.

    Raises `CannotServe` when the address cannot be listened at, a port in use for example, and
    `InvalidArgument` for a port outside 0..65535 or a `decode` that could never be seen.
    """
    number = as_integer("port", port)
    if not 0 <= number <= 65535:
        raise InvalidArgument(f"port is {number}, expected 0..65535")
    if decode is not None and not token_text:
        raise InvalidArgument("decode is given, but token_text is off: expected both or neither")
    try:
        server = _Server(host, number)
    except OSError as error:
        raise CannotServe(f"cannot listen at {host!r} port {number}: {error}") from error
    try:
        return Inspector(cache, server, token_text, decode, tier)
    except BaseException:
        server.server_close()
        raise


def _front(inspector: Inspector, query: dict[str, str]) -> Answer:
    return Answer("text/html; charset=utf-8", page([], title="prefixtree", live=True).encode())


def _tree_json(inspector: Inspector, query: dict[str, str]) -> Answer:
    return Answer("application/json", inspector._tree_json())


def _tree_txt(inspector: Inspector, query: dict[str, str]) -> Answer:
    selection = Selection.of_query(query)
    show = excerpts(inspector.decode) if inspector.token_text else nothing
    text = screen(inspector.published.latest()[1], show, selection)
    return Answer("text/plain; charset=utf-8", text.encode("utf-8", "backslashreplace"))


def _metrics(inspector: Inspector, query: dict[str, str]) -> Answer:
    from prefixtree.metrics import CONTENT_TYPE, exposition

    return Answer(CONTENT_TYPE, exposition(inspector.published.stats()))


def _healthz(inspector: Inspector, query: dict[str, str]) -> Answer:
    return Answer(
        "application/json", _as_json({"status": "ok", "view": inspector.published.number})
    )


ROUTES: dict[str, Callable[[Inspector, dict[str, str]], Answer]] = {
    "/": _front,
    "/tree.json": _tree_json,
    "/tree.txt": _tree_txt,
    "/metrics": _metrics,
    "/healthz": _healthz,
}
"""What is served but for `/events`, by path."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Lets a port be used again at once after a close; on Windows it would take over another's.
    allow_reuse_address = os.name == "posix"
    inspector: Inspector

    def __init__(self, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error worth a traceback in somebody's engine."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "prefixtree"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN, "the Host header names another machine")
            return
        address = urlsplit(self.path)
        if address.path == "/events":
            self._stream()
            return
        route = ROUTES.get(address.path)
        if route is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
            return
        try:
            answer = route(self.server.inspector, dict(parse_qsl(address.query)))
        except (InvalidArgument, InvalidNamespace) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except ImportError as error:
            self._refuse(HTTPStatus.NOT_IMPLEMENTED, str(error))
        except (PrefixTreeError, AllocatorError) as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        else:
            self._send(HTTPStatus.OK, answer)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The engine's log is not ours to write to."""

    def _is_ours(self) -> bool:
        """Whether a page of another site, whose name was made to lead here, is kept out."""
        if not ip_address(str(self.server.server_address[0])).is_loopback:
            return True
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host == "localhost":
            return True
        try:
            return ip_address(host or "").is_loopback
        except ValueError:
            return False

    def _stream(self) -> None:
        published = self.server.inspector.published
        if not self.server.streams.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_STREAMS} pages are open already")
            return
        try:
            self.close_connection = True
            self.send_response(HTTPStatus.OK)
            self._headers("text/event-stream")
            self.end_headers()
            seen = 0
            while (number := published.wait(seen, BEAT_SECONDS)) is not None:
                news = f"event: tree\ndata: {number}\n\n" if number > seen else ": still here\n\n"
                self.wfile.write(news.encode())
                self.wfile.flush()
                seen = number
        except (OSError, PrefixTreeError):
            pass  # the page has gone, or the cache is broken: the page asks again and is told so
        finally:
            self.server.streams.release()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send(status, Answer("application/json", _as_json({"error": message})))

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        self.send_response(status)
        self._headers(answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _headers(self, content_type: str) -> None:
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY + "; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")


def _as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
