"""The engines by name."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, cast

from prefixtree.bench.usable import UnusableInput

if TYPE_CHECKING:
    from prefixtree.bench.engines.serving import Driver


class Engine(NamedTuple):
    """What is known of an engine without importing it.

    Attributes:
        page: tokens of a block of its cache.
        parts: the sets of ours that it can have.
    """

    page: int
    parts: tuple[frozenset[str], ...]


BOTH = frozenset({"cache", "attention"})
EACH = (BOTH, frozenset({"cache"}), frozenset({"attention"}))

ENGINES = {
    "transformers": Engine(16, (BOTH,)),
    "sglang": Engine(1, EACH),
    "vllm": Engine(32, EACH),
}


def require(engine: str, parts: frozenset[str]) -> str:
    """The engine's version. Raises UnusableInput where it is missing or does not take the parts."""
    known = ENGINES[engine].parts
    if parts not in known:
        sets = "; ".join(",".join(sorted(each)) for each in known)
        raise UnusableInput(f"{engine} with {','.join(sorted(parts))}: expected one of {sets}")
    if find_spec(engine) is None:
        raise UnusableInput(f"{engine} is not installed here")
    return version(engine) if engine != "vllm" else _vllm_version()


def load(engine: str) -> Driver:
    """Its driver; imports the engine."""
    return cast("Driver", import_module(f"prefixtree.bench.engines.{engine}_driver"))


def _vllm_version() -> str:
    """Its builds have several names."""
    from importlib.metadata import packages_distributions

    return version(packages_distributions()["vllm"][0])
