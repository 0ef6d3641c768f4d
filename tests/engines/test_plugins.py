"""What can be said of the serving engines' plugins without the engines."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from prefixtree.engines import versions
from prefixtree.engines.versions import UntestedVersion, warn_if_untested


def test_entry_points_name_functions() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    groups = tomllib.loads(pyproject.read_text())["project"]["entry-points"]
    for entry_points in groups.values():
        for value in entry_points.values():
            module, _, name = value.partition(":")
            assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_plugins_are_light(engine: str) -> None:
    code = (
        f"import sys, prefixtree.engines.{engine}.plugin\n"
        f"assert not {{'torch', '{engine}', 'attention'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("installed", ["0.5.23", "0.5.23.post1"])
def test_tested_versions_and_their_patches_pass(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, installed: str
) -> None:
    monkeypatch.setattr(versions, "version", lambda _: installed)
    warn_if_untested("sglang", ("0.5.22", "0.5.23"))
    assert not recwarn


@pytest.mark.parametrize("installed", ["0.5.2", "0.5.230", "0.6.0"])
def test_other_versions_are_warned_of(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "version", lambda _: installed)
    with pytest.warns(UntestedVersion, match=rf"sglang is {installed}; .* 0\.5\.22, 0\.5\.23 "):
        warn_if_untested("sglang", ("0.5.22", "0.5.23"))
