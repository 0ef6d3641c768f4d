"""Who may import whom, and what an import may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("allocator", "attention", "prefixtree")

# Where the packages come together: the only places that may import attention from prefixtree.
MEETING_PLACES = (
    "prefixtree/bench/",
    "prefixtree/demo/",
    "prefixtree/engines/",
    "prefixtree/__main__.py",
)


def imported(source: str, package: str) -> Iterator[str]:
    """The full names of the modules that a module of `package` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, level=0):
                yield module or ""
            case ast.ImportFrom(module=module, level=level):
                parts = package.split(".")
                base = parts[: len(parts) - level + 1]
                yield ".".join([*base, module] if module else base)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                called = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
                if called in ("import_module", "__import__"):
                    yield name


def forbidden(path: Path) -> set[str]:
    place = path.relative_to(ROOT).as_posix()
    package = place.split("/")[0]
    others = set(PACKAGES) - {package}
    if package == "prefixtree":
        others.discard("allocator")
        if place.startswith(MEETING_PLACES):
            others.discard("attention")
    return others


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert modules(package)
    for path in modules(package):
        parent = ".".join(path.relative_to(ROOT).parts[:-1])
        names = {name.split(".")[0] for name in imported(path.read_text(), parent)}
        assert not names & forbidden(path), path


def test_every_kind_of_import_is_seen() -> None:
    source = """
import a.b
from c import d
from . import e
from .f import g
from .. import h
def late():
    import i
    importlib.import_module("j.k")
    __import__("l")
"""
    found = set(imported(source, "top.sub"))
    assert found == {"a.b", "c", "top.sub", "top.sub.f", "top", "i", "j.k", "l"}


def test_the_meeting_places_may_import_attention_and_no_other_module_of_prefixtree() -> None:
    assert forbidden(ROOT / "prefixtree" / "cache.py") == {"attention"}
    assert forbidden(ROOT / "prefixtree" / "engines" / "any.py") == set()
    assert forbidden(ROOT / "prefixtree" / "demo" / "any.py") == set()
    assert forbidden(ROOT / "prefixtree" / "__main__.py") == set()
    assert forbidden(ROOT / "allocator" / "pool.py") == {"attention", "prefixtree"}
    assert forbidden(ROOT / "attention" / "plan.py") == {"allocator", "prefixtree"}


@pytest.mark.parametrize("package", ["prefixtree", "allocator"])
def test_the_import_does_not_load_torch_or_attention(package: str) -> None:
    script = (
        f"import sys, {package}; "
        "print(*[name for name in ('torch', 'attention', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_attention_loads_triton_for_kernels_only() -> None:
    script = """
import sys
import numpy
import torch
import attention
forest = attention.Forest(4, *map(numpy.array, ([-1], [0], [3], [0], [0, 1], [0], [0], [1])))
plan = attention.plan(forest, num_q_heads=1, num_kv_heads=1, head_dim=8, dtype=torch.float32)
kv = torch.ones(1, 4, 1, 8)
attention.write(torch.ones(3, 1, 8), torch.ones(3, 1, 8), kv, kv, torch.arange(3))
attention.run(plan, torch.ones(1, 1, 8), kv, kv)
print('triton' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_cache_works_without_loading_torch() -> None:
    script = """
import sys
import prefixtree
cache = prefixtree.PrefixCache(16, 4)
sequence = cache.open([1, 2, 3])
cache.commit([sequence])
cache.append([sequence], [4])
cache.forest([sequence])
sequence.close()
cache.clear()
print('torch' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
