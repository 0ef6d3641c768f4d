"""What the options of the commands accept: types for `argparse`."""

import argparse
import math


def count(text: str) -> int:
    """A whole number from 1 to 2**31 - 1."""
    return _whole_number(text, 1, 2**31)


def seed(text: str) -> int:
    """A whole number from 0 to 2**63 - 1."""
    return _whole_number(text, 0, 2**63)


def non_negative(text: str) -> float:
    """A finite number >= 0: seconds, a temperature."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, not {text!r}")
    return value


def rate(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number 0..1, not {text!r}")
    return value


def counts(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [count(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole_number(text: str, low: int, end: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value < end:
        raise argparse.ArgumentTypeError(f"expected a whole number >= {low}, not {text!r}")
    return value
