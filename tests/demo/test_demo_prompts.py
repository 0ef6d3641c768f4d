"""The prompts: functions of the standard library, and a user's own file."""

import ast
import gzip
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixtree.demo.problems import HEADER_BYTES, NotEnoughProblems, stdlib_prompts
from prefixtree.demo.prompts_file import PromptsFileError, load_prompts


def header_of(text: str, name: str) -> str:
    header, found, _ = text.rpartition(f"def {name.rpartition('.')[2]}(")
    assert found
    return header


def test_every_prompt_is_the_same_header_and_the_beginning_of_one_real_function() -> None:
    prompts = stdlib_prompts(24)
    assert len({prompt.name for prompt in prompts}) == 24
    headers = set()
    for prompt in prompts:
        header = header_of(prompt.text, prompt.name)
        headers.add(header)
        stem = prompt.text.removeprefix(header)
        module = importlib.import_module(prompt.name.rpartition(".")[0])
        source = inspect.getsource(module)
        assert stem in source
        (function,) = ast.parse(stem).body
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        assert len(function.body) == 1
    assert len(headers) == 1


def test_the_header_is_whole_functions_none_of_which_is_asked_for() -> None:
    prompts = stdlib_prompts(24)
    header = header_of(prompts[0].text, prompts[0].name)
    assert HEADER_BYTES * 0.6 < len(header.encode()) <= HEADER_BYTES
    examples = ast.parse(header).body
    assert len(examples) >= 3
    for example in examples:
        assert isinstance(example, ast.FunctionDef)
        assert ast.get_docstring(example)
        assert len(example.body) > 1
    stems = [prompt.text.removeprefix(header) for prompt in prompts]
    assert not [stem for stem in stems if stem in header]


def test_prompts_are_the_same_in_another_process_and_fewer_are_a_prefix_of_more() -> None:
    script = (
        "import json; from prefixtree.demo.problems import stdlib_prompts;"
        "print(json.dumps([[p.name, p.text] for p in stdlib_prompts(12)]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    prompts = [[prompt.name, prompt.text] for prompt in stdlib_prompts(12)]
    assert json.loads(output.stdout) == prompts
    assert [[prompt.name, prompt.text] for prompt in stdlib_prompts(5)] == prompts[:5]


def test_more_problems_than_the_library_has_are_refused_with_both_numbers() -> None:
    with pytest.raises(NotEnoughProblems, match=r"^100000 problems asked .* gives \d+$"):
        stdlib_prompts(100_000)


def test_modules_that_are_missing_or_without_source_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = stdlib_prompts(3)
    for absent in ("statistics", "textwrap"):
        monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delattr(importlib.import_module("difflib"), "__file__")
    rest = stdlib_prompts(3)
    assert rest != whole
    assert {"statistics", "textwrap", "difflib"}.isdisjoint(p.name.split(".")[0] for p in rest)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz"])
def test_a_prompts_file_is_read_in_order(tmp_path: Path, name: str) -> None:
    lines = [
        json.dumps({"task_id": "T/0", "prompt": "def f():\n", "other": [1]}),
        "",
        '{"prompt": "größer \\u2028 ✓"}\r',
        json.dumps({"task_id": 7, "prompt": " "}),
    ]
    path = write(tmp_path / name, "\n".join(lines).encode())
    assert [(prompt.name, prompt.text) for prompt in load_prompts(path)] == [
        ("T/0", "def f():\n"),
        ("line 3", "größer \u2028 ✓"),
        ("line 4", " "),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"prompt": "x"} {}', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b"9" * 10_000, "digits"),
        (b"[1]", "expected a JSON object, not an array"),
        (b'"text"', "expected a JSON object, not a string"),
        (b"null", "expected a JSON object, not null"),
        (b'{"text": "x"}', "no field 'prompt'"),
        (b'{"prompt": 3}', "must be a string, not a number"),
        (b'{"prompt": ["x"]}', "must be a string, not an array"),
        (b'{"prompt": ""}', "is empty"),
        (b'{"prompt": "a\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "own.jsonl", b'{"prompt": "good"}\n\n' + line + b'\n{"prompt": "x"}\n')
    with pytest.raises(PromptsFileError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert reason in str(caught.value)


def test_a_file_that_gives_nothing_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\n \n"):
        with pytest.raises(PromptsFileError, match="no prompts in this file"):
            load_prompts(write(tmp_path / "empty.jsonl", content))
    with pytest.raises(PromptsFileError, match=r"absent\.jsonl: No such file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(PromptsFileError, match="directory"):
        load_prompts(tmp_path)
    whole = gzip.compress(b'{"prompt": "x"}\n' * 100)
    for damaged in (whole[:-12], b'{"prompt": "x"}\n', whole[:20] + b"\0" * 9 + whole[29:]):
        path = tmp_path / "damaged.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(PromptsFileError, match=r"damaged\.jsonl\.gz: "):
            load_prompts(path)
