"""Stands in for torchvision, which the engines import and the tests' text models never use.

The real one for a CPU build of torch cannot be had beside these engines: as a dependency it brings
a CUDA build of torch. Any submodule can be imported, and any name in it is a class that can be made
and called.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.0.0"


class _Anything:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


# Asked for by name when the libraries are imported.
_INTERPOLATIONS = ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "NEAREST_EXACT")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            members = {member: number for number, member in enumerate(_INTERPOLATIONS)}
            return type(name, (_Anything,), members)
        return _Anything()


class _Submodules(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        inside = name.startswith(f"{__name__}.")
        return ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


sys.meta_path.insert(0, _Submodules())
