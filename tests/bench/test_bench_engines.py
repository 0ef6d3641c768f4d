"""The command `bench engines`, on so little work that the figures mean nothing.

The whole command runs with transformers; with SGLang and vLLM where they are installed, each about
two minutes on two cores.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixtree.__main__ import main
from prefixtree.bench.engines import compare, drivers, figures, report, watch, workload
from prefixtree.bench.engines.figures import Compared, compared, differing, figures_of
from prefixtree.bench.engines.job import Run
from prefixtree.bench.engines.serving import Answer, Reply, play
from prefixtree.bench.engines.watch import Step, Watch
from prefixtree.bench.engines.workload import FIRST_TOKEN, Text, Turn, Workload, few_shot, fold
from prefixtree.replay.request import Request

TREE = "--header 70 --problems 2 --problem 20 --samples 3 --output 4"
MODEL = "--hidden 64 --q-heads 4 --kv-heads 2 --head-dim 32 --vocabulary 300"


def bench(engine: str, *options: str) -> int:
    given = [*TREE.split(), *MODEL.split(), "--rounds", "1", "--step-tokens", "256"]
    return main(["bench", "engines", engine, *given, *options])


ENGINES = [
    pytest.param("transformers", 6 * 80, id="transformers"),
    pytest.param(
        "sglang",
        6 * 90 + 70,
        id="sglang",
        marks=pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang"),
    ),
    pytest.param(
        "vllm",
        6 * 64 + 64,
        id="vllm",
        marks=pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
    ),
]


@pytest.mark.parametrize(("engine", "hits"), ENGINES)
def test_an_engine_stock_and_with_ours(
    engine: str, hits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    assert bench(engine, "--json", str(file), "--plot", str(picture)) == 0
    result = json.loads(file.read_text())
    assert result["requests"] == 8
    assert result["differing"] == [[]]
    for kind in ("stock", "ours"):
        (run,) = result[kind]
        # Of each sample the prompt but its last block; an engine may share the header before.
        assert hits <= run["prefix-hit tokens"] <= hits + 70
        assert run["steps"] >= 4
        for figure in ("scheduler, mean a step", "decode attention, mean a step", "TTFT, median"):
            assert run[figure] > 0
        answers = run["answers"]
        assert [len(answer["tokens"]) for answer in answers] == [2] * 2 + [4] * 6
        # The samples part.
        assert len({tuple(answer["tokens"]) for answer in answers[2:]}) > 3
    out = capsys.readouterr().out
    assert "tokens: the same in all 8 requests" in out
    assert "decode attention, median a step" in out
    assert picture.stat().st_size > 0


def test_sessions_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chat(number: int, parent: int, blocks: list[int], prompt: int, output: int) -> str:
        lengths = {"input_length": prompt, "output_length": output}
        ids = {"chat_id": number, "parent_chat_id": parent, "hash_ids": blocks}
        return json.dumps({**ids, **lengths, "timestamp": number})

    chats = [
        chat(0, -1, [0, 1], 32, 5),
        chat(1, -1, [0, 2], 32, 4),
        chat(2, 0, [0, 1, 3], 44, 4),
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(chats))
    figures_file = tmp_path / "figures.json"
    options = ["--trace", str(file), "--scale", "1", "--json", str(figures_file)]
    assert bench("transformers", *options, "--clock", "cpu") == 0
    result = json.loads(figures_file.read_text())
    assert result["prompt_tokens"] == 32 + 32 + 44
    answers = {one["request"]: one for one in result["ours"][0]["answers"]}
    assert set(answers) == {"0.0.0", "0.1.0", "0.0.1"}
    assert answers["0.0.1"]["cached"] == 32
    assert "sessions of trace.jsonl, 1 token in 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--with", "cache"), "transformers with cache: expected one of attention,cache"),
        (("--with", "tree"), "no part 'tree', expected cache, attention"),
        (("--pool-tokens", "90"), "a pool of 90 tokens: the longest sequence needs 112"),
        (("--trace", "nothing.jsonl"), "nothing.jsonl: No such file"),
        (("--json", "no/such/folder"), "no/such/folder: No such file"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("transformers", *options) == 2
    assert message in capsys.readouterr().err


def test_an_engine_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drivers, "find_spec", lambda _: None)
    assert bench("vllm") == 2
    assert "vllm is not installed here" in capsys.readouterr().err


def test_a_run_that_ends_with_an_error_shows_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("transformers", "--kv-heads", "3") == 1
    err = capsys.readouterr().err
    assert "transformers ended with 1" in err
    assert "Traceback" in err


def requests() -> list[Request]:
    def request(session: int, prompt: int, output: int, *blocks: tuple[int, int]) -> Request:
        firsts, lengths = zip(*blocks, strict=True)
        return Request(0.0, session, prompt, output, np.array(firsts), np.array(lengths))

    return [
        request(1, 30, 10, (0, 20), (100, 20)),
        request(2, 25, 0, (0, 20), (200, 5)),
        request(1, 45, 3, (0, 20), (100, 20), (300, 8)),
        request(3, 8, 1, (400, 9)),
        request(1, 5, 1, (0, 6)),
    ]


def sessions_of(scale: int, turns: int | None = None) -> Workload:
    return workload.sessions(requests(), scale=scale, turns=turns, concurrency=2, vocabulary=1000)


def test_shortened_texts_share_what_they_shared() -> None:
    for scale in (1, 3, 5, 64):
        work = sessions_of(scale)
        one, two, _ = work.phases[0]
        first, last = one[0], one[1]
        assert [turn.prompt for turn in one] == [-(-n // scale) for n in (30, 45, 5)]
        assert all(turn.output >= 1 for turn in work.turns)
        shared = -(-40 // scale)
        assert first.ids.tolist() == last.ids[:shared].tolist()
        agree = first.ids[: len(two[0].ids)] == two[0].ids[: len(first.ids)]
        assert agree.sum() == -(-20 // scale)
        assert agree[: agree.sum()].all()
    assert sessions_of(1).distinct == 20 + 20 + 5 + 8 + 9 + 1
    assert sessions_of(1).longest == 48
    assert [len(session) for session in sessions_of(1, turns=1).phases[0]] == [1, 1, 1]


def test_ids_are_folded_into_the_vocabulary() -> None:
    tokens = fold(np.arange(10**5), 500)
    assert tokens.min() >= FIRST_TOKEN
    assert tokens.max() < 500
    counts = np.bincount(tokens, minlength=500)[FIRST_TOKEN:]
    assert counts.min() > 0.9 * counts.mean()
    assert (tokens[1:] != tokens[:-1]).all()
    assert (fold(np.arange(10**5), 500) == tokens).all()


def test_a_prompt_has_what_was_written_instead_of_the_traces_outputs() -> None:
    one = sessions_of(1).phases[0][0]
    text = Text(1000)
    plain = fold(one[1].ids, 1000).tolist()
    assert text.prompt(one[1]) == plain[:45]
    text.generated(one[0], range(900, 910))
    assert text.prompt(one[1]) == [*plain[:30], *range(900, 910), *plain[40:45]]
    text.generated(one[0], range(800, 810))
    text.generated(one[1], [7, 8, 9])
    assert text.prompt(one[1]) == [*plain[:30], *range(900, 910), *plain[40:45]]
    assert text.prompt(one[2]) == plain[:5]


def test_a_few_shot_tree() -> None:
    work = few_shot(header=50, problems=3, problem=7, samples=4, output=6, vocabulary=2000)
    asked, samples = work.phases
    assert (len(asked), len(samples), work.concurrency) == (3, 12, 12)
    prompts = [Text(2000).prompt(turn) for (turn,) in samples]
    assert {len(prompt) for prompt in prompts} == {58}
    assert len({tuple(prompt[:50]) for prompt in prompts}) == 1
    assert len({tuple(prompt[:57]) for prompt in prompts}) == 3
    assert len({tuple(prompt) for prompt in prompts}) == 12
    for number, prompt in enumerate(prompts):
        assert prompt[:57] == Text(2000).prompt(asked[number // 4][0])
    assert work.longest == 64
    assert work.distinct == 50 + 3 * 7 + 3 * 2 + 12 * (1 + 6)


class Echo:
    """Answers with the last tokens of the prompt, the oldest request first, a token at a time."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[list[int], int, int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.most = 0
        self.short = False

    def submit(self, request: str, prompt: list[int], output: int) -> None:
        self.asked[request] = (prompt, output, 0)
        self.prompts[request] = prompt
        self.most = max(self.most, len(self.asked))

    def receive(self) -> list[Reply]:
        name, (prompt, output, sent) = next(iter(self.asked.items()))
        sent += 1
        self.asked[name] = (prompt, output, sent)
        done = sent == output or self.short
        if done:
            del self.asked[name]
        return [Reply(name, [5] * sent, done, 3)]

    def close(self) -> None: ...


def test_sessions_take_turns_and_each_waits_for_its_own() -> None:
    engine, work = Echo(), sessions_of(1)
    answers = list(play(engine, work))
    # The oldest request goes first, with two at a time.
    order = [answer.request for answer in answers]
    assert order == ["0.0.0", "0.1.0", "0.2.0", "0.0.1", "0.0.2"]
    assert engine.most == 2
    assert engine.prompts["0.0.1"][30:40] == [5] * 10
    assert [answer.prompt for answer in answers] == [30, 25, 8, 45, 5]
    assert all(0 <= answer.first_s <= answer.last_s for answer in answers)
    assert answers[0].first_s < answers[0].last_s
    assert answers[0].tokens == [5] * 10
    assert answers[0].cached == 3


def test_phases_do_not_overlap() -> None:
    work = few_shot(header=5, problems=2, problem=2, samples=2, output=3, vocabulary=100)
    engine = Echo()
    answers = [answer.request for answer in play(engine, work)]
    assert answers[:2] == ["0.0.0", "0.1.0"]
    assert answers[2:] == [f"1.{number}.0" for number in range(4)]
    assert engine.most == 4


def test_an_answer_that_is_too_short_is_an_error() -> None:
    engine = Echo()
    engine.short = True
    with pytest.raises(RuntimeError, match=r"request 0\.0\.0 has 1 tokens, expected 10"):
        list(play(engine, sessions_of(1)))


class Clocked:
    """Functions that take a known time on a clock that only they move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        self.now = 0
        monkeypatch.setitem(watch.CLOCKS, "wall", lambda: self.now)
        watch.create(file)
        self.watch = Watch(file, "wall")
        self.watch.time("scheduler", self, "schedule", idle=lambda result: result is None)
        self.watch.time("attention", self, "attend", "mask")

    def schedule(self, busy: bool) -> int | None:
        self.now += 100
        self.mask()
        self.now += 10
        return 1 if busy else None

    def attend(self) -> None:
        self.now += 7
        self.mask()

    def mask(self) -> None:
        self.now += 1000


def test_each_part_of_a_step_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Clocked(monkeypatch, tmp_path / "steps")
    engine.schedule(True)
    engine.attend()
    engine.now += 50_000
    engine.watch.step(decoding=False, sequences=3)
    engine.schedule(False)
    engine.attend()
    engine.watch.step(decoding=True, sequences=2)
    rows = [Step(*row) for row in watch.read(tmp_path / "steps").tolist()]
    assert rows == [Step(110, 2007, 0, 3), Step(0, 1007, 1, 2)]


def test_what_raises_is_timed_and_ends_its_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Clocked(monkeypatch, tmp_path / "steps")

    def fail() -> None:
        engine.now += 5
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        engine.watch.timed("attention", fail)()
    engine.now += 100
    engine.schedule(True)
    engine.watch.step(decoding=True, sequences=1)
    assert watch.read(tmp_path / "steps").tolist() == [[110, 1005, 1, 1]]


def run_of(*tokens: list[int], steps: list[Step], seconds: float = 2.0) -> Run:
    answers = [
        Answer(f"{number}", 10, number, own, 0.001 * (number + 1), 1.0)
        for number, own in enumerate(tokens)
    ]
    return Run(answers, np.array(steps, np.int64), seconds)


def test_figures_of_a_run() -> None:
    steps = [Step(1000, 10**9, 0, 1), Step(3000, 2 * 10**6, 1, 1), Step(8000, 4 * 10**6, 1, 1)]
    result = figures_of(run_of([1], [2], [3], steps=steps))
    assert list(result) == list(figures.UNITS)
    assert result == pytest.approx(
        {
            "prefix-hit tokens": 3,
            "prompt tokens computed": 27,
            "TTFT, median": 2,
            "TTFT, 90th percentile": 2.8,
            "scheduler, mean a step": 4,
            "scheduler, median a step": 3,
            "decode attention, median a step": 3,
            "decode attention, mean a step": 3,
            "steps": 3,
            "all requests": 2,
        }
    )


def test_ratios_are_those_of_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    def runs(*values: float) -> list[dict[str, float]]:
        return [dict.fromkeys(figures.UNITS, value) for value in values]

    result = compared(runs(10, 20, 40), runs(5, 20, 10))["steps"]
    assert result == Compared(20, 10, [0.5, 1.0, 0.25])
    assert result.ratio == 0.5
    assert compared(runs(0), runs(1))["steps"].ratio is None
    table = report.table(compared(runs(10, 20, 40), runs(5, 20, 10))).splitlines()
    assert table[1].split()[-5:] == ["20", "10", "0.500", "0.250", "1.000"]
    assert report.table(compared(runs(0), runs(1))).splitlines()[1].split()[-3:] == ["-"] * 3


def test_tokens_that_differ_are_named() -> None:
    steps = [Step(1, 1, 1, 1)]
    stock = run_of([1], [2], [3], steps=steps)
    assert differing(stock, run_of([1], [2], [3], steps=steps)) == []
    assert differing(stock, run_of([1], [9], [3], steps=steps)) == ["1"]
    assert "TOKENS DIFFER in 2 of 6 requests: 1, 2" in report.agreement([["1"], ["2"]], 3)


def test_tokens_that_differ_are_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = chain([[1], [2]], [[3], [3]])

    def run(options: Any, *_: Any) -> Run:
        return run_of(next(outcomes), steps=[Step(1, 1, 1, 1)])

    monkeypatch.setattr(compare, "_run", run)
    assert bench("transformers") == 1
    assert "TOKENS DIFFER in 1 of 8 requests: 0" in capsys.readouterr().out
    assert bench("transformers") == 0


def test_a_turn_without_a_name_for_its_output_counts_as_distinct() -> None:
    work = Workload([[[Turn(np.arange(4), 4, 3)]]], 1, 100)
    assert (work.longest, work.distinct) == (7, 7)
