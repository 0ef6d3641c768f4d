"""Readers for traces of LLM requests: Mooncake, Qwen-Bailian and coding-agent sessions.

| form | file | tokens of a block | a session |
|---|---|---|---|
| Mooncake (FAST 2025) | JSON Lines: timestamp in ms | 512 | not said: a request each |
| Qwen-Bailian | JSON Lines: chat_id, parent_chat_id, timestamp in s | 16 | a chat |
| agent (kv-cache-tester) | one object: block_size, requests, some of subagents | said | a list |

In all of them `hash_ids` names the blocks of a prompt, and equal ids within a file are equal
tokens. What no id covers, a rest shorter than a block and the outputs, is in no other request;
unless the next turn of the session starts with all blocks of this one and is long enough to contain
prompt and output: then they are what it has there.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefixtree.replay.request import MAX_TOKENS, Request

FORMS = "a JSON object a line, or one with 'block_size' and 'requests'"
GZIP_MAGIC = b"\x1f\x8b"
LENGTHS = "input_length", "output_length"
MOONCAKE_BLOCK = 512
BAILIAN_BLOCK = 16
LATEST = 1e15
"""The latest time, in the unit of the file."""


class TraceError(ValueError):
    """A trace that cannot be read: the message names the file, the place in it and the reason."""


@dataclass(eq=False)
class _Turn:
    """A request as a file has it, with ids made unique over all files."""

    time_s: float
    session: int
    block_size: int
    input_length: int
    output_length: int
    firsts: list[int]  # first token of each block that has an id
    next_turn: _Turn | None = None

    @property
    def covered(self) -> int:
        """Prompt tokens that have an id."""
        return min(self.input_length, len(self.firsts) * self.block_size)


@dataclass
class _Ids:
    """Hands out token ids and sessions, and remembers which blocks have got theirs."""

    tokens: int = 0
    sessions: int = 0
    _first: dict[tuple[object, int], int] = field(default_factory=dict)

    def fresh(self, count: int) -> int:
        """The first of `count` token ids that nothing else has."""
        first = self.tokens
        if first + count > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} distinct tokens, expected fewer")
        self.tokens += count
        return first

    def block(self, scope: object, hash_id: int, size: int) -> int:
        """The first token id of a block; ids of different scopes are different blocks."""
        key = scope, hash_id
        first = self._first.get(key)
        if first is None:
            first = self._first[key] = self.fresh(size)
        return first

    def session(self) -> int:
        self.sessions += 1
        return self.sessions


def load_traces(paths: Iterable[Path]) -> list[Request]:
    """The requests of all files in order of arrival; those of different files share nothing.

    Each file is plain or gzip-compressed, in any of the forms; which one shows in its content.
    Files start at the same time. Raises `TraceError`. O(hash ids).
    """
    ids = _Ids()
    turns: list[_Turn] = []
    for scope, path in enumerate(paths):
        try:
            turns += _read_turns(path, scope, ids)
        except _AtLine as error:
            raise TraceError(f"{path}, line {error.line}: {error}") from None
        except ValueError as error:
            raise TraceError(f"{path}: {error}") from None
    turns.sort(key=lambda turn: turn.time_s)
    try:
        return [_request(turn, ids) for turn in turns]
    except ValueError as error:
        raise TraceError(f"all traces together: {error}") from None


class _AtLine(ValueError):
    """What is wrong in a line of a file."""

    def __init__(self, line: int, problem: object) -> None:
        super().__init__(problem)
        self.line = line


def _read_turns(path: Path, scope: int, ids: _Ids) -> list[_Turn]:
    lines = _text(path).split("\n")
    first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        record = None  # the first line of an object that has several, or no JSON: said below
    if isinstance(record, dict) and "requests" not in record:
        turns = list(_jsonl(lines, "chat_id" in record, scope, ids))
    else:
        turns = list(_agent("\n".join(lines), scope, ids))
    if not turns:
        raise ValueError("no requests in this file, expected at least one")
    return turns


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
        return data.decode()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (EOFError, zlib.error) as error:
        raise ValueError(f"not a whole gzip file ({error})") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _AtLine(line, f"not UTF-8: {error.reason}, expected JSON") from None


def _jsonl(lines: Iterable[str], bailian: bool, scope: int, ids: _Ids) -> Iterator[_Turn]:
    chats: dict[int, _Turn] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = _parse(line)
                if bailian:
                    yield _bailian(record, chats, scope, ids)
                else:
                    yield _mooncake(record, scope, ids)
            except ValueError as error:
                raise _AtLine(number, error) from None


def _mooncake(record: object, scope: int, ids: _Ids) -> _Turn:
    time_s = _number(record, "timestamp") / 1000
    return _turn(record, LENGTHS, time_s, ids.session(), MOONCAKE_BLOCK, scope, ids)


def _bailian(record: object, chats: dict[int, _Turn], scope: int, ids: _Ids) -> _Turn:
    chat = _whole(record, "chat_id", least=0)
    parent = chats.get(_whole(record, "parent_chat_id", least=-1))
    if chat in chats:
        raise ValueError(f"field 'chat_id' is {chat} as in a line before, expected a new one")
    session = parent.session if parent else ids.session()
    time_s = _number(record, "timestamp")
    turn = chats[chat] = _turn(record, LENGTHS, time_s, session, BAILIAN_BLOCK, scope, ids)
    if parent and parent.next_turn is None:
        parent.next_turn = turn
    return turn


def _agent(text: str, scope: int, ids: _Ids) -> Iterator[_Turn]:
    try:
        record = _parse(text)
    except json.JSONDecodeError as error:
        raise _AtLine(error.lineno, f"{error.msg}, expected {FORMS}") from None
    block_size = _whole(record, "block_size", least=1)
    yield from _agent_turns(record, 0.0, block_size, scope, ids)


def _agent_turns(
    record: object, start_s: float, block_size: int, scope: int, ids: _Ids
) -> Iterator[_Turn]:
    """The requests of a session and of its subagents, whose times count from their own start."""
    session = ids.session()
    last: dict[str, _Turn] = {}  # of each model
    for place, inner in enumerate(_list(record, "requests")):
        try:
            time_s = start_s + _number(inner, "t")
            if "requests" in inner:
                yield from _agent_turns(inner, time_s, block_size, scope, ids)
                continue
            # No model can use another one's KV, even of the same tokens.
            model = str(inner.get("model"))
            lengths = "in", "out"
            turn = _turn(inner, lengths, time_s, session, block_size, (scope, model), ids)
        except ValueError as error:
            inside = "" if str(error).startswith("requests[") else ": "
            raise ValueError(f"requests[{place}]{inside or '.'}{error}") from None
        if model in last:
            last[model].next_turn = turn
        last[model] = turn
        yield turn


def _turn(
    record: object,
    lengths: tuple[str, str],
    time_s: float,
    session: int,
    block_size: int,
    scope: object,
    ids: _Ids,
) -> _Turn:
    input_length = _whole(record, lengths[0], least=1)
    output_length = _whole(record, lengths[1], least=0)
    hash_ids = _list(record, "hash_ids")
    whole, most = input_length // block_size, -(-input_length // block_size)
    if not whole <= len(hash_ids) <= most:
        raise ValueError(
            f"field 'hash_ids' has {len(hash_ids)} ids for {input_length} tokens in blocks of"
            f" {block_size}, expected {whole} or {most}"
        )
    for hash_id in hash_ids:
        if type(hash_id) is not int:
            raise ValueError(f"field 'hash_ids' has {hash_id!r:.40}, expected whole numbers")
    firsts = [ids.block(scope, hash_id, block_size) for hash_id in hash_ids]
    return _Turn(time_s, session, block_size, input_length, output_length, firsts)


def _request(turn: _Turn, ids: _Ids) -> Request:
    total = turn.input_length + turn.output_length
    size, firsts, covered = turn.block_size, turn.firsts, turn.covered
    follower = turn.next_turn
    if (
        follower is not None
        and covered == len(firsts) * size
        and follower.covered >= total
        and follower.firsts[: len(firsts)] == firsts
    ):
        firsts, covered = follower.firsts[: -(-total // size)], total
    lengths = [size] * len(firsts)
    if firsts:
        lengths[-1] -= len(firsts) * size - covered
    if total > covered:
        firsts = [*firsts, ids.fresh(total - covered)]
        lengths.append(total - covered)
    return Request(
        turn.time_s,
        turn.session,
        turn.input_length,
        turn.output_length,
        np.array(firsts, np.int64),
        np.array(lengths, np.int64),
    )


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep, expected requests") from None


def _field(record: object, name: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{record!r:.40} where a JSON object was expected")
    if name not in record:
        raise ValueError(f"the object has no field {name!r}")
    return record[name]


def _list(record: object, name: str) -> list[Any]:
    value = _field(record, name)
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is {value!r:.40}, expected a list")
    return value


def _whole(record: object, name: str, least: int) -> int:
    value = _field(record, name)
    if type(value) is not int or value < least:
        raise ValueError(f"field {name!r} is {value!r:.40}, expected a whole number >= {least}")
    return value


def _number(record: object, name: str) -> float:
    value = _field(record, name)
    if type(value) not in (int, float) or not 0 <= value <= LATEST:
        raise ValueError(f"field {name!r} is {value!r:.40}, expected a number 0..{LATEST:g}")
    return float(value)
