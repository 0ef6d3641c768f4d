"""The commands `inspect` and `serve-inspector`, and `replay --record`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest

import prefixtree as pt
from prefixtree.__main__ import main
from prefixtree.inspector import serve
from prefixtree.inspector import terminal as terminal_module
from prefixtree.replay import record
from prefixtree.replay.record import Recorder
from tests.replay.conftest import mooncake

from .caches import data_of, from_utf8, small


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "cache.snapshot"
    small()[0].save(path)
    return path


def test_a_snapshot_is_shown(snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(snapshot)]) == 0
    shown = capsys.readouterr().out
    stats = pt.PrefixCache.restore(snapshot).stats()
    assert f"{stats.cached_tokens:,} cached tokens in {stats.nodes:,} nodes" in shown
    assert "namespace ('tenant', 1)" in shown
    assert "▶ " in shown


@pytest.mark.parametrize(
    ("options", "there", "gone"),
    [
        (["--depth", "1"], "20 tokens", " 3 tokens"),
        (["--namespace", '["tenant", 1]'], "namespace ('tenant', 1)", "root\n"),
        (["--min-tokens", "20"], "tokens", "namespace ('tenant', 1)"),
    ],
)
def test_a_part_of_it_is_shown(
    options: list[str],
    there: str,
    gone: str,
    snapshot: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(snapshot), *options, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert there in shown
    assert gone not in shown
    assert "nodes selected" in shown
    (frame,) = data_of(page.read_text(encoding="utf-8"))["frames"]
    count = int(re.findall(r"(\d+) of \d+ nodes selected", shown)[0])
    assert len(frame["texts"]) == count


def test_what_cannot_be_shown_is_named_and_gives_status_2(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered = tmp_path / "tampered"
    data = bytearray(snapshot.read_bytes())
    data[-1] ^= 1
    tampered.write_bytes(data)
    closed = "http://127.0.0.1:9/"
    for options, message in (
        ([str(tampered)], "InvalidSnapshot: "),
        ([str(tmp_path / "nothing")], "FileNotFoundError: "),
        ([str(snapshot), "--namespace", "nobody"], "namespace 'nobody' holds nothing"),
        ([str(snapshot), "--namespace", "["], "namespace is '[', expected JSON"),
        ([str(snapshot), "--html", str(tmp_path / "no" / "page.html")], "No such file"),
        ([], "expected a SNAPSHOT or --watch URL"),
        ([str(snapshot), "--watch", closed], "expected a SNAPSHOT or --watch URL"),
        (["--watch", closed, "--html", "x"], "--html is of a snapshot"),
        (["--watch", closed], f"CannotWatch: {closed} does not answer: "),
        (["--watch", "file:///etc/passwd"], "expected http://HOST:PORT/"),
    ):
        assert main(["inspect", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--depth", "--min-tokens"])
def test_numbers_are_checked(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "x", option, "0"])
    assert caught.value.code == 2
    assert f"{option}: expected a whole number >= 1, not '0'" in capsys.readouterr().err


def test_a_running_process_is_followed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = pt.PrefixCache(16, 4)
    with serve(cache, token_text=True, decode=from_utf8) as inspector:
        rounds = 0

        def pause(seconds: float) -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 1:
                with cache.open(list(b"new text")) as sequence:
                    sequence.commit(8)
                inspector.publish()
            if rounds == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(terminal_module.time, "sleep", pause)
        assert main(["inspect", "--watch", inspector.url, "--depth", "2"]) == 130
    shown = capsys.readouterr().out
    assert shown.count("cached tokens in") == 2  # it was asked three times, and changed once
    assert "8 cached tokens in 1 nodes" in shown
    assert "'new text'" in shown


def test_rich_paints_the_same_text(snapshot: Path) -> None:
    pytest.importorskip("rich")
    script = (
        "import sys; sys.modules.update({%s}); from prefixtree.__main__ import main;"
        f"sys.exit(main(['inspect', {str(snapshot)!r}]))"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", script % without],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "70", "PATH": "", "PYTHONIOENCODING": "utf-8"},
        ).stdout
        for without in ("", "'rich': None, 'rich.console': None")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("source", ["snapshot", "demo"])
def test_the_inspector_is_served(source: str, snapshot: Path) -> None:
    arguments = ["--token-text"] if source == "demo" else [str(snapshot)]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefixtree", "serve-inspector", *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        url = process.stdout.readline().split()[0]
        with urlopen(url + "tree.json", timeout=60) as answer:
            shown = json.load(answer)
        assert shown["stats"]["nodes"] > 0
        assert (shown["texts"] is not None) == (source == "demo")
    finally:
        process.kill()
        process.wait()


def test_a_server_that_cannot_begin_gives_status_2(
    snapshot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-inspector", str(snapshot), "--port", port]) == 2
    assert f"CannotServe: cannot listen at '127.0.0.1' port {port}" in capsys.readouterr().err
    assert main(["serve-inspector", "nothing"]) == 2
    assert "FileNotFoundError" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve-inspector", "--port", "65536"])


def test_a_replay_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, page = tmp_path / "trace.jsonl", tmp_path / "page.html"
    rows = [mooncake(1000 * n, 1024, 8, [n % 3, 5 + n]) for n in range(150)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    options = ["--policies", "lru,fifo", "--capacities", "16384,32768"]
    assert main(["replay", str(trace), *options, "--record", str(page)]) == 0
    frames = data_of(page.read_text(encoding="utf-8"))["frames"]
    assert [int(frame["label"].split()[0]) for frame in frames] == [
        *range(4, 150, 4),
        150,
    ]
    assert {frame["stats"]["num_blocks"] for frame in frames} == {1024}
    opens = [frame["stats"]["opens"] for frame in frames]
    assert opens == sorted(opens)


def test_a_record_is_bounded_by_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_NODES", 100)
    cache = pt.PrefixCache(1024, 4)
    recorder = Recorder()
    requests: Any = [SimpleNamespace(time_s=float(n)) for n in range(64)]
    for number, _ in enumerate(recorder.watching(requests, cache)):
        with cache.open([number, 1]) as sequence:
            sequence.commit(2)
    assert [played for played, _, _ in recorder._frames] == [32, 64]
