"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from prefixtree.inspector.payload import Frame

SCRIPTS = "frame.js", "text.js", "colours.js", "icicle.js", "pool.js", "panel.js", "app.js"

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'"
)
"""The page loads nothing; a live one asks its own server for data."""


def page(frames: Sequence[Frame], *, title: str, live: bool = False) -> str:
    """The page with these frames; a live one, without any, gets them from its server."""
    parts = {
        "title": html.escape(title),
        "policy": POLICY,
        "style": _asset("style.css"),
        "script": "\n".join(map(_asset, SCRIPTS)),
        "data": script_json({"live": live, "frames": list(frames)}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def script_json(value: object) -> str:
    """JSON that can stand in a <script>: nothing in it ends the element or opens a comment."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("prefixtree.inspector") / "assets" / name).read_text(encoding="utf-8")
