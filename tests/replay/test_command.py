"""The command `replay`, from its options to its exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from allocator import policy_names
from prefixtree import PrefixCache
from prefixtree.__main__ import main
from tests.replay.conftest import Write, agent, agent_turn, mooncake

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def trace(write: Write) -> str:
    """30 requests of one prefix and ten bodies, three times each."""
    rows = [mooncake(1000 * n, 1024, 8, [0, 1 + n % 10]) for n in range(30)]
    return str(write("trace.jsonl.gz", rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: TRACE"),
        (["x", "--capacities", "10,0"], "--capacities: expected a whole number >= 1, not '0'"),
        (["x", "--capacities", ""], "--capacities: expected a whole number >= 1, not ''"),
        (["x", "--policies", "lru,best"], "--policies: expected names out of lru, "),
        (["x", "--block-size", "0"], "--block-size: expected a whole number >= 1, not '0'"),
        (["x", "--limit", "0"], "--limit: expected a whole number >= 1, not '0'"),
        (["x", "--running", "-1"], "--running: expected a whole number >= 1, not '-1'"),
        (["x", "--disturb", "1.5"], "--disturb: expected a number 0..1, not '1.5'"),
        (["x", "--disturb", "nan"], "--disturb: expected a number 0..1, not 'nan'"),
        (["x", "--seed", "-1"], "--seed: expected a whole number >= 0, not '-1'"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["replay", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_input_that_cannot_be_used_is_named_and_gives_status_2(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.write_text('{"timestamp": 0}')
    for options, message in (
        ([str(bad)], f"{bad}, line 1: the object has no field 'input_length'"),
        ([trace, "--capacities", "15"], "a capacity of 15 tokens, expected at least a block of 16"),
    ):
        assert main(["replay", *options]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""


def test_a_file_that_cannot_be_written_gives_status_2(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [trace, "--policies", "lru", "--capacities", "4096"]
    for option in ("--json", "--record", "--plot"):
        assert main(["replay", *short, option, str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert f"cannot write {tmp_path}: Is a directory" in captured.err
        assert captured.out == ""  # before the replay, which may take long
    assert main(["replay", *short, "--plot", str(tmp_path / "x.odd")]) == 2
    captured = capsys.readouterr()
    assert "cannot write" in captured.err
    assert "30 requests" in captured.out


def test_the_help_loads_nothing_heavy() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['prefixtree', 'replay', '--help']\n"
        "try:\n"
        "    runpy.run_module('prefixtree', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'matplotlib', 'tqdm', 'prefixtree.replay.run'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--capacities" in done.stdout


def test_a_replay_as_a_user_starts_it(trace: str, tmp_path: Path) -> None:
    written, drawn = tmp_path / "out.json", tmp_path / "out.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "prefixtree", "replay", trace),
            *("--capacities", "16384,2064,100", "--running", "1"),
            *("--json", str(written), "--plot", str(drawn)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert drawn.read_bytes().startswith(PNG)
    found = json.loads(written.read_text())
    # Ten bodies are new once each and the prefix once, in thirty prompts of two blocks.
    unlimited = (60 - 11) / 60
    assert found["unlimited_hit_rate"] == pytest.approx(unlimited)
    assert f"unlimited cache: {unlimited:.2%} hit" in done.stdout
    assert found["footprint_tokens"] == 11 * 512 + 30 * 8
    tiny, small, large = found["limits"]
    assert (tiny["refused"], tiny["hit_rate"]) == (30, 0)
    assert "100 tokens, 30 requests larger than that" in done.stdout
    # Beside the prefix and the prompt there is room for one more body and a block.
    assert 29 / 60 < small["hit_rate"] < large["hit_rate"] == found["unlimited_hit_rate"]
    runs = found["runs"]
    assert [run["policy"] for run in runs] == list(policy_names()) * 3
    for run, limit in zip(runs, [x for x in found["limits"] for _ in policy_names()], strict=True):
        assert run["capacity"] == limit["capacity"]
        assert run["hit_rate"] + run["gap_points"] / 100 == pytest.approx(limit["hit_rate"])
        assert run["gap_points"] >= 0
        if run["capacity"] == 16384:
            assert run["hit_rate"] == unlimited
            assert run["evicted_tokens"] == 0
            assert run["operations"]["match"]["calls"] == 30
    assert re.search(rf"^lru +{unlimited:.2%} +0\.00 +0 ", done.stdout, re.MULTILINE)


def test_sessions_by_default_in_capacities_that_hold_each_request(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    turns = [agent_turn(n, 4 * n + 4, 2, list(range(n + 1))) for n in range(20)]
    files = [str(write(name, agent(turns))) for name in ("one.json", "two.json.gz")]
    written = tmp_path / "out.json"
    options = ["--block-size", "1", "--json", str(written), "--limit", "30"]
    assert main(["replay", *files, *options]) == 0
    found = json.loads(written.read_text())
    assert found["requests"] == 30
    assert {limit["refused"] for limit in found["limits"]} == {0}
    assert [limit["capacity"] for limit in found["limits"]] == [62]
    assert "0 requests larger" not in capsys.readouterr().out


def test_disturbances_are_reported(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--policies", "lru,fifo", "--capacities", "4096", "--disturb", "0.3"]
    assert main(["replay", trace, *options]) == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"\d+ aborted, \d+ preempted, \d+ prefixes forgotten", output)) == 2
    assert "slru" not in output


def test_a_cache_that_does_not_come_out_empty_gives_status_1(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preempt = PrefixCache._preempt

    def leaky(self: PrefixCache, *args: object) -> None:
        self._pool.allocate(1)
        preempt(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PrefixCache, "_preempt", leaky)
    assert main(["replay", trace, "--capacities", "16384", "--disturb", "0.5"]) == 1
    assert "THE CACHE IS BROKEN: BrokenInvariant: block " in capsys.readouterr().out
