"""Whole engines: with any of our parts they say what a stock vLLM says, and our parts were used.

Each engine runs in a process of its own, about 20 seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny_models import save_tiny_model

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[3]
ENTRY_POINT = "[vllm.general_plugins]\nprefixtree = prefixtree.engines.vllm.plugin:register\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the models, and with the entry point as `pip install` makes it."""
    folder = tmp_path_factory.mktemp("models")
    installed = folder / "site" / "prefixtree-0.1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: prefixtree\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINT)
    return folder


def start(
    folder: Path, module: str, kind: str, *parts: str, **environment: str
) -> subprocess.Popen[str]:
    """An engine in a process group of its own."""
    if not (folder / kind).exists():
        save_tiny_model(kind, folder / kind)
    paths = [str(ROOT), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PREFIXTREE_ATTENTION": str(int("attention" in parts)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",  # all there is lies in the folder
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.engines.vllm.{module}", str(folder / kind), *parts],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=(folder / "errors").open("w"),
        text=True,
        start_new_session=True,
    )


def errors(folder: Path) -> str:
    """The end of what the last engine said of what went wrong."""
    return (folder / "errors").read_text()[-4000:]


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    """What the scenarios give with a model and parts of ours; each engine runs once."""

    @cache
    def serve(kind: str, *parts: str) -> dict[str, Any]:
        engine = start(folder, "scenarios", kind, *parts)
        said, _ = engine.communicate()
        assert engine.returncode == 0, errors(folder)
        out: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return out

    return serve


PARTS = [("tree",), ("attention",), ("tree", "attention")]


@pytest.mark.parametrize(
    ("kind", "parts"), [*(("qwen3", parts) for parts in PARTS), ("llama", PARTS[-1])]
)
def test_tokens_are_those_of_a_stock_engine(served: Any, kind: str, parts: tuple[str, ...]) -> None:
    stock, ours = served(kind), served(kind, *parts)
    assert stock["results"]["preempted"]
    for name, expected in stock["results"].items():
        assert ours["results"][name] == expected, name
    used(ours, parts)


def test_tokens_of_a_model_with_sliding_windows(served: Any) -> None:
    """The attention takes vLLM's groups of KV caches, the tree wants one."""
    stock, ours = served("gemma3"), served("gemma3", "attention")
    for name, expected in stock["results"].items():
        assert ours["results"][name] == expected, name
    used(ours, ("attention",), groups=3)
    stock, ours = served("gemma3", "one_group"), served("gemma3", "one_group", "tree", "attention")
    for name, expected in stock["results"].items():
        assert ours["results"][name] == expected, name
    used(ours, ("tree", "attention"), groups=2)


def test_tokens_with_drafts(served: Any) -> None:
    stock = served("qwen3", "speculative")
    ours = served("qwen3", "tree", "attention", "speculative")
    for name in ("shared", "again", "equal", "chunked", "full", "cached", "reset"):
        assert ours["results"][name] == stock["results"][name], name
    assert ours["results"]["shared"] == served("qwen3")["results"]["shared"]
    assert ours["drafted"] > 0
    used(ours, ("tree", "attention"))


def test_a_cache_hits_in_its_own_namespace_only(served: Any) -> None:
    """Of a prompt of 100 tokens and of its first 97 and 96, in blocks of 32."""
    for parts in [(), *PARTS]:
        assert served("qwen3", *parts)["results"]["cached"] == [0, 96, 0, 0, 96, 96, 64]


def used(ours: dict[str, Any], parts: tuple[str, ...], groups: int = 1) -> None:
    calls, steps = ours["calls"], ours["steps"]
    if "tree" in parts:
        assert ours["pool"] == "TreeBlockPool"
        assert ours["evicted"] > 0
        for name in ("longest_prefix", "cache_full_blocks", "touch", "evict", "release"):
            assert calls[name] > 20, name
    if "attention" in parts:
        # Planned or advanced once a step for each group of layers with one block table and window.
        assert groups * steps <= calls["plan"] + calls["advance"] < groups * steps * 1.1
        assert calls["advance"] > groups * steps / 3
        assert calls["run"] == calls["write"] == ours["layers"] * steps


def test_an_engine_killed_at_work_starts_again(folder: Path) -> None:
    assert answers_until_killed(folder) == answers_until_killed(folder)


def answers_until_killed(folder: Path) -> list[str]:
    """The first answers of an engine, all of whose processes are killed while it goes on."""
    engine = start(folder, "endless", "qwen3", "attention", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert engine.stdout is not None
    lines = (line for line in engine.stdout if line.startswith("[["))
    try:
        answers = list(islice(lines, 3))
        assert engine.poll() is None
    finally:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.communicate()
    assert len(answers) == 3, errors(folder)
    return answers
