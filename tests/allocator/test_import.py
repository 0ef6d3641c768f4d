"""What `import allocator` brings along, and what it does not."""

import subprocess
import sys
from pathlib import Path

import pytest

import allocator


def run_python(code: str) -> None:
    root = Path(allocator.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_torch_is_imported_only_when_tensors_are_asked_for() -> None:
    run_python(
        "import sys, allocator\n"
        "assert 'torch' not in sys.modules\n"
        "from allocator import KVStorage\n"
        "assert 'torch' in sys.modules\n"
    )


def test_no_other_package_of_the_project_is_imported() -> None:
    run_python(
        "import sys, allocator, allocator.storage\n"
        "assert not {'prefixtree', 'attention'} & set(sys.modules)\n"
    )


def test_every_public_name_is_there() -> None:
    for name in allocator.__all__:
        assert getattr(getattr(allocator, name), "__name__", name) == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'allocator' has no attribute 'KVStorages'"):
        allocator.KVStorages  # noqa: B018
