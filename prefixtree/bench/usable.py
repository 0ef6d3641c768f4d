"""What a user gives a measurement that cannot be used, and the files that figures go to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class UnusableInput(ValueError):
    """Something that the user gave cannot be used; the message says what and why."""


def require_writable(*files: Path | None) -> None:
    """Says before anything is measured that a result could not be written: UnusableInput."""
    for file in files:
        if file is not None:
            try:
                file.open("a").close()
            except OSError as error:
                raise UnusableInput(f"cannot write {file}: {error.strerror or error}") from None


def write_figures(file: Path | None, figures: dict[str, Any]) -> None:
    """As JSON, where a file is wanted."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")
