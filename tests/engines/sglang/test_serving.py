"""SGLang with our cache, our attention and both gives the tokens that it gives without.

Needs SGLang (docs/testing.md says how it was installed); an engine for each configuration, about a
minute each on two cores: `python -m pytest tests/engines/sglang`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.engines.sglang import endless, scenarios, watch

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang"),
]

STOCK = {"attention_backend": "torch_native"}
CACHE = {**STOCK, "radix_cache_backend": "prefixtree"}
ATTENTION = {"attention_backend": "prefixtree"}
BOTH = {**ATTENTION, "radix_cache_backend": "prefixtree"}

RUNS = [
    pytest.param("qwen3", {**BOTH, "page_size": 1}, id="qwen3-both"),
    pytest.param("qwen3", {**BOTH, "page_size": 16}, id="qwen3-both-paged"),
    pytest.param("qwen3", {**CACHE, "page_size": 4}, id="qwen3-cache"),
    pytest.param("qwen3", {**ATTENTION, "enable_mixed_chunk": True}, id="qwen3-attention-mixed"),
    pytest.param(
        "llama",
        {**BOTH, "disable_overlap_schedule": True, "radix_eviction_policy": "priority"},
        id="llama-both",
    ),
    pytest.param("llama", {**BOTH, "page_size": 16, "schedule_policy": "dfs-weight"}, id="llama"),
    pytest.param("gemma3", ATTENTION, id="gemma3-attention"),
]


@cache
def run(kind: str, options: str) -> dict[str, Any]:
    """The results of all scenarios, see `scenarios`."""
    with TemporaryDirectory() as folder:
        spec = {"kind": kind, "options": json.loads(options), "folder": folder}
        done = subprocess.run(
            [sys.executable, "-m", scenarios.__name__, json.dumps(spec)],
            capture_output=True,
            text=True,
            timeout=600,
        )
        results = Path(folder, "results.json")
        assert results.exists(), f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return json.loads(results.read_text())


def answers(results: Any) -> Iterator[dict[str, Any]]:
    """The answers in a scenario's results, in order."""
    if isinstance(results, list):
        for result in results:
            yield from answers(result)
    elif "tokens" in results:
        yield results
    else:
        yield from answers(results["before"])
        yield from answers(results["after"])


@pytest.mark.parametrize(("kind", "options"), RUNS)
def test_same_tokens_and_our_code_made_them(kind: str, options: dict[str, Any]) -> None:
    stock, ours = run(kind, json.dumps(STOCK)), run(kind, json.dumps(options))
    page_size = options.get("page_size", 1)
    for name in ("shared", "several", "long", "crowded", "namespaces", "flushed"):
        for expected, got in zip(answers(stock[name]), answers(ours[name]), strict=True):
            assert got["tokens"] == expected["tokens"], name
    # Who was aborted has ended anywhere.
    for expected, got in zip(stock["coming_and_going"], ours["coming_and_going"], strict=True):
        length = min(len(expected["tokens"]), len(got["tokens"]))
        assert got["tokens"][:length] == expected["tokens"][:length]
        assert got["finish"] in ("abort", "length")
    assert any(got["finish"] == "abort" for got in ours["coming_and_going"])
    assert any(got["finish"] == "length" for got in ours["coming_and_going"])

    if kind == "qwen3":  # the others end their texts too early to fill the pool
        assert any(got["retractions"] for got in ours["crowded"])
    # In a cold run it depends on the moment who finds what of whom.
    for name, expected, got in (
        ("shared", stock["shared"][1], ours["shared"][1]),
        ("long", stock["long"], ours["long"]),
    ):
        cached = [answer["cached"] // page_size * page_size for answer in answers(expected)]
        assert [answer["cached"] for answer in answers(got)] == cached, name
    assert [got["cached"] for got in ours["namespaces"]] == [0, 0, 0, 64, 64, 64]
    assert ours["flushed"]["success"]
    assert ours["flushed"]["after"][0]["cached"] == 0

    assert not any(stock["calls"].values())
    calls = ours["calls"]
    cache_calls = watch.NAMES[: watch.NAMES.index("init_forward_metadata")]
    attention_calls = watch.NAMES[watch.NAMES.index("init_forward_metadata") :]
    for names, used in (
        (cache_calls, "radix_cache_backend" in options),
        (attention_calls, options["attention_backend"] == "prefixtree"),
    ):
        for name in names:
            assert (calls[name] > 0) == used, name
    if options["attention_backend"] == "prefixtree":
        layers = 3 if kind == "gemma3" else 2
        assert calls["run"] == calls["forward_extend"] == calls["init_forward_metadata"] * layers
        assert calls["advance"] > calls["plan"]
    if "radix_cache_backend" in options:
        assert calls["inc_lock_ref"] == calls["dec_lock_ref"]
        assert calls["evicted_tokens"] > scenarios.POOL


def test_an_engine_that_was_killed_starts_again(tmp_path: Path) -> None:
    """What is of one process only, or of none, is all that our code has."""
    spec = {"kind": "qwen3", "options": BOTH, "folder": str(tmp_path)}
    first, second = (generated_until_killed(spec) for _ in range(2))
    common = min(len(first), len(second))
    assert first[:common] == second[:common]


def generated_until_killed(spec: dict[str, Any]) -> list[int]:
    """Start an engine and kill all of its processes while it generates; what it had by then."""
    import psutil

    tokens = Path(spec["folder"], "tokens.json")
    tokens.unlink(missing_ok=True)
    with subprocess.Popen([sys.executable, "-m", endless.__name__, json.dumps(spec)]) as engine:
        try:
            while not tokens.exists() or len(json.loads(tokens.read_text())) < 20:
                assert engine.poll() is None, "the engine ended"
                time.sleep(0.1)
        finally:
            process = psutil.Process(engine.pid)
            processes = [process, *process.children(recursive=True)]
            for process in processes:
                process.kill()
        assert engine.wait() == -signal.SIGKILL
    assert len(processes) > 1
    while any(map(_runs, processes[1:])):
        time.sleep(0.1)
    return json.loads(tokens.read_text())


def _runs(process: Any) -> bool:
    import psutil

    try:
        # Where nobody asks how it ended, a process stays as a zombie.
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
