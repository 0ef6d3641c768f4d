"""Traces in the small, in all forms."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records as JSON Lines, or one object as JSON; gzip-compressed where the name says."""

    def to_file(name: str, records: list[Any] | dict[str, Any]) -> Path:
        rows = [records] if isinstance(records, dict) else records
        data = "".join(
            (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
        ).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return to_file


def mooncake(ms: float, length: int, output: int, ids: list[int]) -> dict[str, Any]:
    return {"timestamp": ms, "input_length": length, "output_length": output, "hash_ids": ids}


def bailian(
    chat: int, parent: int, time_s: float, length: int, output: int, ids: list[int]
) -> dict[str, Any]:
    return {
        "chat_id": chat,
        "parent_chat_id": parent,
        "timestamp": time_s,
        "input_length": length,
        "output_length": output,
        "type": "text",
        "turn": 1,
        "hash_ids": ids,
    }


def agent_turn(time_s: float, length: int, output: int, ids: list[int], model: str = "a") -> Any:
    return {"t": time_s, "type": "n", "model": model, "in": length, "out": output, "hash_ids": ids}


def agent(requests: list[Any], block_size: int = 4) -> dict[str, Any]:
    return {
        "id": "trace",
        "block_size": block_size,
        "hash_id_scope": "local",
        "requests": requests,
    }
