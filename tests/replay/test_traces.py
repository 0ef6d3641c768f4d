"""The readers: what they take, what they make of it, and what they refuse."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixtree.replay.request import Request
from prefixtree.replay.traces import TraceError, load_traces
from tests.replay.conftest import Write, agent, agent_turn, bailian, mooncake


def prompt(request: Request) -> list[int]:
    tokens: list[int] = request.tokens()[: request.input_length].tolist()
    return tokens


def output(request: Request) -> list[int]:
    tokens: list[int] = request.tokens()[request.input_length :].tolist()
    return tokens


def common(left: Request, right: Request) -> int:
    """First tokens that two prompts have in common; nothing else may be."""
    a, b = prompt(left), prompt(right)
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    assert not set(a[count:]) & set(b[count:])
    return min(count, len(b))


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz", "trace"])
def test_mooncake(write: Write, name: str) -> None:
    rows = [
        mooncake(1500, 700, 20, [7, 8]),
        "",
        mooncake(0, 1024, 0, [7, 9]),
        mooncake(2000, 512, 3, [8]),
    ]
    early, middle, late = load_traces([write(name, rows)])
    assert [early.time_s, middle.time_s, late.time_s] == [0, 1.5, 2]
    assert (middle.input_length, middle.output_length) == (700, 20)
    assert common(early, middle) == 512
    assert prompt(middle)[512:] == prompt(late)[: 700 - 512]
    assert early.tokens().dtype == np.int32
    assert output(early) == []
    assert len(set(output(middle) + output(late))) == 23
    assert not set(output(middle)) & set(prompt(early) + prompt(middle) + prompt(late))
    assert len({early.session, middle.session, late.session}) == 3


def test_bailian_turns_of_a_chat_share_a_session_and_the_output_that_the_next_turn_has(
    write: Write,
) -> None:
    rows = [
        bailian(3, -1, 0.5, 32, 10, [1, 2]),
        bailian(4, 3, 1.5, 50, 5, [1, 2, 3, 4]),
        bailian(5, 3, 2.5, 64, 5, [1, 2, 5, 6]),
        bailian(9, 77, 2.0, 16, 1, [1]),
    ]
    first, second, other, third = load_traces([write("qwen.jsonl", rows)])
    assert first.session == second.session == third.session != other.session
    assert output(first) == prompt(second)[32:42]
    assert common(second, third) == 32
    assert common(other, third) == 16
    assert first.time_s == 0.5


def test_an_output_that_the_next_turn_cannot_contain_is_its_own(write: Write) -> None:
    for length, ids in ((41, [1, 2, 3]), (64, [1, 9, 3, 4])):  # too short, another prompt
        rows = [bailian(3, -1, 0, 32, 10, [1, 2]), bailian(4, 3, 1, length, 0, ids)]
        first, second = load_traces([write("qwen.jsonl", rows)])
        assert not set(output(first)) & set(prompt(second))


def test_a_partial_block_with_an_id_is_followed_by_nothing_known(write: Write) -> None:
    rows = [bailian(3, -1, 0, 30, 2, [1, 2]), bailian(4, 3, 1, 64, 0, [1, 2, 3, 4])]
    first, second = load_traces([write("qwen.jsonl", rows)])
    assert prompt(first) == prompt(second)[:30]
    assert not set(output(first)) & set(prompt(second))


def test_agent_sessions(write: Write) -> None:
    inner = [agent_turn(0, 6, 1, [5]), agent_turn(2, 8, 1, [5, 6])]
    subagent = {"t": 2.0, "type": "subagent", "agent_id": "x", "requests": inner}
    rows = [
        agent_turn(0.0, 10, 3, [1, 2]),
        subagent,
        agent_turn(3.0, 17, 2, [1, 2, 3, 4]),
        agent_turn(3.5, 4, 2, [1], model="b"),
        agent_turn(5.0, 20, 2, [1, 2, 3, 4, 7]),
    ]
    first, sub, second, model_b, sub_again, third = load_traces([write("a.json.gz", agent(rows))])
    assert [r.time_s for r in (sub, sub_again)] == [2, 4]
    assert first.session == second.session == third.session == model_b.session
    assert sub.session == sub_again.session != first.session
    # 10 tokens of which 8 have ids: the rest and the output are what the next turn has there.
    assert first.tokens().tolist() == prompt(second)[:13]
    # Of 17 tokens the last one has no id, and 20 are too few to hold 2 tokens of output, or not.
    assert second.tokens()[:19].tolist() == prompt(third)[:19]
    assert common(second, third) == 17
    assert not set(prompt(model_b)) & set(prompt(first))
    assert prompt(sub)[:4] == prompt(sub_again)[:4]


def test_an_object_over_several_lines_is_an_agent_session(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    path.write_text(
        '{\n"block_size": 2,\n"requests": [\n{"t": 0, "in": 1, "out": 1, "hash_ids":[]}]}'
    )
    (request,) = load_traces([path])
    assert len(set(request.tokens().tolist())) == 2


def test_files_share_nothing_and_start_together(write: Write) -> None:
    row = mooncake(1000, 512, 1, [0])
    one, two = write("1", [row, mooncake(3000, 512, 1, [0])]), write("2", [row])
    for paths in ([one, two], [one, one]):
        requests = load_traces(paths)
        assert [r.time_s for r in requests][:3] == [1, 1, 3]
        assert not set(prompt(requests[0])) & set(prompt(requests[1]))
        assert prompt(requests[0]) == prompt(requests[2])


GOOD = mooncake(0, 512, 1, [0])
TURN = bailian(1, -1, 0, 16, 1, [0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{"], "line 2: Expecting property name"),
        ([GOOD, "", "[1]"], "line 3: [1] where a JSON object was expected"),
        ([GOOD, TURN | {"input_length": 0}], "line 2: field 'input_length' is 0, expected a whole"),
        ([GOOD | {"input_length": 1.5}], "line 1: field 'input_length' is 1.5, expected a whole"),
        ([GOOD | {"input_length": True}], "field 'input_length' is True, expected a whole number"),
        ([GOOD | {"output_length": -1}], "'output_length' is -1, expected a whole number >= 0"),
        ([GOOD | {"timestamp": "0"}], "field 'timestamp' is '0', expected a number 0..1e+15"),
        ([GOOD | {"timestamp": float("nan")}], "field 'timestamp' is nan, expected a number"),
        ([GOOD | {"timestamp": 10**400}], "field 'timestamp' is 1000"),
        ([GOOD | {"hash_ids": 3}], "field 'hash_ids' is 3, expected a list"),
        ([GOOD | {"hash_ids": [0, 1]}], "has 2 ids for 512 tokens in blocks of 512, expected 1"),
        ([GOOD | {"hash_ids": ["x"]}], "field 'hash_ids' has 'x', expected whole numbers"),
        ([{"timestamp": 0}], "line 1: the object has no field 'input_length'"),
        ([GOOD | {"input_length": 2**40, "hash_ids": []}], "expected 2147483648"),
        ([GOOD | {"output_length": 2**31}], "more than 2147483648 distinct tokens"),
        ([TURN, GOOD], "line 2: the object has no field 'chat_id'"),
        ([TURN, TURN], "line 2: field 'chat_id' is 1 as in a line before, expected a new one"),
        ([TURN | {"parent_chat_id": None}], "field 'parent_chat_id' is None, expected a whole"),
        (["nonsense"], "line 1: Expecting value, expected a JSON object a line"),
        (["[" * 100_000], "JSON nested too deep"),
        (["", "  "], "line 3: Expecting value"),
        ([agent([])], "no requests in this file, expected at least one"),
        ([{"requests": [], "block_size": 0}], "field 'block_size' is 0, expected a whole"),
        ([{"requests": 1, "block_size": 1}], "field 'requests' is 1, expected a list"),
        ([agent([1])], "requests[0]: 1 where a JSON object was expected"),
        ([agent([agent_turn(-1, 4, 1, [1])])], "requests[0]: field 't' is -1, expected"),
        (
            [agent([{"t": 0, "requests": [agent_turn(0, 4, 1, [1]), agent_turn(0, 4, 1, [])]}])],
            "requests[0].requests[1]: field 'hash_ids' has 0 ids for 4 tokens in blocks of 4",
        ),
    ],
)
def test_what_is_wrong_is_named(write: Write, rows: list[object], message: str) -> None:
    path = write("bad.jsonl", rows)
    with pytest.raises(TraceError) as caught:
        load_traces([path])
    if "distinct" not in message:
        assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    cut, binary = tmp_path / "cut.gz", tmp_path / "binary"
    cut.write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    binary.write_bytes(b'{"timestamp": 0,\n "\xff": 1}')
    for path, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (cut, "not a whole gzip file"),
        (binary, "line 2: not UTF-8"),
    ):
        with pytest.raises(TraceError, match=message) as caught:
            load_traces([path])
        assert str(path) in str(caught.value)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 15)),
        min_size=2,
        max_size=6,
    )
)
def test_equal_ids_are_equal_tokens_and_no_others(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[tuple[list[int], int]]
) -> None:

    path = tmp_path_factory.mktemp("traces") / "trace.jsonl"
    rows = [
        bailian(number, -1, number, 16 * len(ids) - short, 2, ids)
        for number, (ids, short) in enumerate(prompts)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    block_of: dict[int, tuple[int, int]] = {}
    token_of: dict[tuple[int, int], int] = {}
    for (ids, _), request in zip(prompts, load_traces([path]), strict=True):
        for position, token in enumerate(prompt(request)):
            place = ids[position // 16], position % 16
            assert block_of.setdefault(token, place) == place
            assert token_of.setdefault(place, token) == token
        for token in output(request):
            assert token not in block_of
            block_of[token] = (-1 - request.session, token)
