"""Prompts from the Python that runs this: functions of its standard library.

A prompt is a header of worked examples, each a whole function, and behind it a problem: the
signature and docstring of one more function, whose body is what a model would write. All prompts
share the header, as the few-shot prompts of code benchmarks do. Nothing is downloaded, and the
same interpreter always gives the same prompts.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

MODULES = (
    "statistics",
    "textwrap",
    "heapq",
    "difflib",
    "calendar",
    "bisect",
    "shlex",
    "string",
    "fnmatch",
    "glob",
    "base64",
    "html",
    "ast",
    "copy",
    "pprint",
    "functools",
    "ipaddress",
    "urllib.parse",
    "email.utils",
    "linecache",
    "shutil",
    "inspect",
)
HEADER_BYTES = 2000
EXAMPLE_BYTES = range(150, 500)
PROBLEM_BYTES = range(200, 700)
INSTRUCTION = "# Write the body of the last function. These are complete:\n\n"


class NotEnoughProblems(ValueError):
    """More problems were asked for than the standard library holds."""

    def __init__(self, asked: int, available: int) -> None:
        super().__init__(
            f"{asked} problems asked for, but the standard library of this Python gives {available}"
        )


@dataclass(frozen=True)
class Prompt:
    """One prompt: a name to report it under, and its text (never empty)."""

    name: str
    text: str


class _Function(NamedTuple):
    name: str
    stem: str  # signature and docstring
    source: str  # signature, docstring and body


def stdlib_prompts(count: int) -> list[Prompt]:
    """The first `count` (>= 1) problems, each behind the header that all of them share.

    The header is valid Python and at most `HEADER_BYTES` long. Raises NotEnoughProblems.
    """
    functions = list(_functions())
    header, examples = INSTRUCTION, set()
    for function in functions:
        grown = f"{header}{function.source}\n\n"
        if len(function.source.encode()) in EXAMPLE_BYTES and len(grown.encode()) <= HEADER_BYTES:
            header = grown
            examples.add(function.name)
    problems = [
        function
        for function in functions
        if function.name not in examples and len(function.stem.encode()) in PROBLEM_BYTES
    ]
    if count > len(problems):
        raise NotEnoughProblems(count, len(problems))
    return [Prompt(problem.name, header + problem.stem) for problem in problems[:count]]


def _functions() -> Iterator[_Function]:
    """Every usable function: one of each module in turn, so that the prompts differ in kind."""
    turns = zip_longest(*map(_module_functions, MODULES))
    return (function for function in chain.from_iterable(turns) if function is not None)


def _module_functions(module_name: str) -> Iterator[_Function]:
    try:
        source = inspect.getsource(importlib.import_module(module_name))
    except (ImportError, OSError, TypeError):
        return  # not in this Python, or it came without its source
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        # A docstring alone leaves no body to write; a decorator would be lost with the lines above.
        if ast.get_docstring(node) is None or len(node.body) < 2 or node.decorator_list:
            continue
        docstring_end, end = node.body[0].end_lineno, node.end_lineno
        stem = "".join(lines[node.lineno - 1 : docstring_end])
        yield _Function(f"{module_name}.{node.name}", stem, "".join(lines[node.lineno - 1 : end]))
