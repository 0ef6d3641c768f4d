"""The command `bench cache`, on sizes so small that the figures mean nothing."""

import gzip
import importlib
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixtree.__main__ import main
from prefixtree.bench import peers
from prefixtree.bench.cache import powers
from prefixtree.bench.measure import Rounds, Row, Timings, in_turn
from prefixtree.bench.operations import NODE_TOKENS, by_nodes, leaf_prompt
from prefixtree.bench.peers import STEPS, Ours
from prefixtree.bench.played import play
from prefixtree.bench.report import table

SMALL = ["--max-nodes", "20", "--max-tokens", "100", "--max-sequences", "5"]
SMALL += ["--rounds", "2", "--block-size", "4"]


class Slower(Ours):
    """Ours again under another name, as a peer that does not evict apart."""

    name = "slower"
    steps = ("match", "open", "close")


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers._PEERS, "slower", ((Slower,), "prefixtree", "slower"))


def bench(*options: str) -> int:
    return main(["bench", "cache", *options])


def test_every_operation_is_measured_at_every_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench(*SMALL, "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    measured = {(row["operation"], row["size"], row["unit"]) for row in figures["rows"]}
    inserting = ("match", "open", "commit", "open + commit", "close")
    assert measured == {
        *((operation, 20, "nodes") for operation in (*inserting, "evict 64 tokens")),
        *((f"{operation} a prompt", 100, "tokens") for operation in inserting),
        ("chunked prefill", 100, "tokens"),
        *product(("append + commit", "forest"), (1, 4, 5), ("sequences",)),
    }
    for row in figures["rows"]:
        assert list(row["median_us"]) == ["prefixtree"]
        assert row["median_us"]["prefixtree"] > 0
        assert row["rounds"] == 2
    assert (figures["block_size"], figures["clock"]) == (4, "wall")
    assert [weight["cache"] for weight in figures["memory"]] in (["prefixtree"], [])
    printed = capsys.readouterr().out
    assert all(operation in printed for operation, _, _ in measured)


def test_peers_do_the_same_and_the_ratio_is_printed(
    slower: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert bench(*SMALL, "--against", "slower", "--json", str(file)) == 0
    rows = {(r["operation"], r["size"]): r for r in json.loads(file.read_text())["rows"]}
    assert set(rows["open", 20]["median_us"]) == {"prefixtree", "slower"}
    assert set(rows["open + commit a prompt", 100]["median_us"]) == {"prefixtree", "slower"}
    assert set(rows["evict 64 tokens", 20]["median_us"]) == {"prefixtree"}
    header, first = capsys.readouterr().out.split("\n\n")[1].splitlines()[:2]
    assert header.split() == ["nodes", "prefixtree", "slower"]
    ours, theirs = (rows["match", 20]["median_us"][name] for name in ("prefixtree", "slower"))
    assert first.endswith(f"({ours / theirs:.2f})")


def test_plots_are_drawn(tmp_path: Path) -> None:
    file = tmp_path / "figures.png"
    assert bench(*SMALL, "--plot", str(file), "--clock", "cpu") == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-nodes", "0"], "--max-nodes: expected a whole number >= 1, not '0'"),
        (["--rounds", "many"], "--rounds: expected a whole number >= 1, not 'many'"),
        (["--seconds", "nan"], "--seconds: expected a number >= 0, not 'nan'"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(*options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_engine_that_is_not_there_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    assert bench(*SMALL, "--against", "sglang") == 2
    error = capsys.readouterr().err
    assert "sglang cannot be imported" in error
    assert "pip install sglang" in error


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*SMALL, "--against", "vlllm") == 2
    assert (
        "no engine 'vlllm' to measure against, expected observed, sglang, vllm"
        in capsys.readouterr().err
    )


def test_a_missing_library_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(*SMALL, "--plot", str(tmp_path / "a.png")) == 2
    assert "pip install 'prefixtree[bench]'" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--json", str(tmp_path / "no" / "a.json")) == 2
    assert "a.json: No such file or directory" in capsys.readouterr().err


def test_a_trace_is_played_at_both_block_sizes(
    slower: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, file = tmp_path / "trace.jsonl.gz", tmp_path / "figures.json"
    lines = [
        {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [7, 8]},
        {"timestamp": 1, "input_length": 700, "output_length": 1, "hash_ids": [7, 9]},
        {"timestamp": 2, "input_length": 600, "output_length": 1, "hash_ids": [7, 8]},
    ]
    trace.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    options = ["--trace", str(trace), "--json", str(file), "--against", "slower"]
    assert bench(*options, "--pool-tokens", "1000", "--plot", str(tmp_path / "a.png")) == 0
    played = json.loads(file.read_text())["played"]
    assert [(p["block_size"], p["requests"], p["tokens"]) for p in played] == [
        (1, 3, 1900),
        (16, 3, 1900),
    ]
    for result in played:
        # The third prompt is the first one again; 1,000 tokens are room for both.
        assert result["hit_tokens"] == {"prefixtree": 512 + 600, "slower": 512 + 600}
        assert result["steps"]["match"]["prefixtree"]["count"] == 3
        assert set(result["steps"]["open + commit"]) == {"prefixtree", "slower"}
        assert set(result["steps"]["commit"]) == {"prefixtree"}
    assert "blocks of 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "trace.jsonl"), ('{"timestamp": 0, "input_length": 600}', "output_length")],
)
def test_a_trace_that_cannot_be_read_is_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(content)
    assert bench("--trace", str(trace)) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_larger_than_the_pool_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [7, 8]}
    trace.write_text(json.dumps(line))
    assert bench("--trace", str(trace), "--pool-tokens", "599") == 2
    assert "a prompt of 600 tokens, --pool-tokens 599" in capsys.readouterr().err


@pytest.mark.parametrize("block_size", [1, 16])
def test_playing_evicts_what_a_prompt_lacks(block_size: int) -> None:
    prompts = [np.full(64, token, np.int32) for token in (1, 2, 3, 1)]
    played = play(prompts, [Ours], 128, block_size)
    assert played.hit_tokens == {"prefixtree": 0}
    assert played.steps["evict"]["prefixtree"]["count"] == 2
    assert played.steps["request"]["prefixtree"]["count"] == 4


def test_trees_grow_to_the_sizes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Ours] = []

    class Kept(Ours):
        def __init__(self, num_tokens: int, block_size: int) -> None:
            super().__init__(num_tokens, block_size)
            made.append(self)

    sizes = (10, 150, 300)
    for size, measured in zip(sizes, by_nodes([Kept], sizes, 16, Rounds(3, 9.0)), strict=True):
        stats = made[0].cache.stats()
        assert stats.nodes == pytest.approx(size, abs=3 * len(sizes))
        assert stats.cached_tokens == stats.nodes * NODE_TOKENS
        assert stats.evicted_tokens % NODE_TOKENS == 0
        assert {row.rounds for row in measured.rows} == {3}


def test_prompts_of_leaves_share_their_head_only() -> None:
    cache = Ours(10**5, 1)
    for leaf, cached in ((0, 0), (1, NODE_TOKENS), (98, NODE_TOKENS), (99, 0)):
        request: Any = cache.open(cache.prepare(leaf_prompt(leaf)))
        assert request[0].cached_len == cached
        cache.commit(request)
    assert set(Ours.steps) == set(STEPS)


def test_ours_prefills_in_chunks() -> None:
    cache = Ours(1000, 1)
    request = cache.open(np.arange(500, dtype=np.int32))
    cache.prefill(request, 200)
    assert request[0].committed == 500


def test_rounds_end_with_their_number_or_the_time() -> None:
    assert list(Rounds(3, 60.0)) == [0, 1, 2]
    assert list(Rounds(3, 0.0)) == [0]


def test_each_goes_first_in_turn() -> None:
    assert [in_turn("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert in_turn("abc", 1) == ["b", "c", "a"]


def test_sizes_end_with_the_largest() -> None:
    assert powers(10, 1000, 25_000) == [1000, 10_000, 25_000]
    assert powers(10, 1000, 10_000) == [1000, 10_000]
    assert powers(4, 1, 1) == [1]
    assert powers(10, 1000, 7) == [7]


def test_a_row_has_the_median_of_each_cache() -> None:
    timings = Timings()
    for name, times in {"a": (1.0, 9.0, 2.0), "b": (4.0,)}.items():
        for microseconds in times:
            timings.note("match", name, microseconds)
    timings.note("open", "a", 100.0)
    assert timings.row("match", "m", 7, "nodes") == Row("m", 7, "nodes", {"a": 2.0, "b": 4.0}, 3)
    assert timings.summary("match")["a"] == {
        "count": 3,
        "mean_us": 4.0,
        "median_us": 2.0,
        "least_us": 1.0,
        "total_us": 12.0,
    }


def test_times_are_taken_by_the_clock_given() -> None:
    ticks = iter([1_000, 9_000])
    timings = Timings(lambda: next(ticks))
    assert timings.time("match", "a", str, 7) == "7"
    assert timings.last("match", "a") == 8.0


def test_the_table_has_our_time_over_theirs() -> None:
    rows = [
        Row("match", 1_000, "nodes", {"prefixtree": 5.0, "x": 20.0}, 1),
        Row("evict", 1_000, "nodes", {"prefixtree": 2_500.0}, 1),
        Row("match", 10_000, "nodes", {"prefixtree": 6.0, "x": 200_000.0}, 1),
    ]
    assert [line.split() for line in table(rows).splitlines()] == [
        ["nodes", "prefixtree", "x"],
        ["match", "1,000", "5.0", "us", "20.0", "us", "(0.25)"],
        ["match", "10,000", "6.0", "us", "200", "ms", "(0.00)"],
        ["evict", "1,000", "2.5", "ms", "-"],
    ]


def test_what_it_costs_to_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observers = pytest.importorskip("prefixtree.bench.observers")
    monkeypatch.setattr(observers, "SECONDS", 0.0)
    counts = dict.fromkeys(("publish", "view", "scrape"), 0)

    def counted(name: str, call: Any) -> Any:
        def counting(*given: Any) -> Any:
            counts[name] += 1
            return call(*given)

        return counting

    publisher = observers.ZmqPublisher
    monkeypatch.setattr(publisher, "publish", counted("publish", publisher.publish))
    inspector = importlib.import_module("prefixtree.inspector.server").Inspector
    monkeypatch.setattr(inspector, "publish", counted("view", inspector.publish))
    monkeypatch.setattr(observers, "exposition", counted("scrape", observers.exposition))
    trace, file = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    line = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [7, 8]}
    trace.write_text(3 * (json.dumps(line) + "\n"))
    assert bench("--trace", str(trace), "--json", str(file), "--against", "observed") == 0
    for result in json.loads(file.read_text())["played"]:
        assert result["hit_tokens"]["observed"] == result["hit_tokens"]["prefixtree"] == 1200
        assert set(result["steps"]["request"]) == {"prefixtree", "observed"}
    assert counts == dict.fromkeys(counts, 6)  # 3 requests at 2 block sizes
