"""Types of command-line arguments, which reject bad values at once instead of after hours of computation."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")


def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return an argument type that reads an integer between two limits, both included."""

    def read(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            limits = f"of at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not an integer {limits}")
        return int(text)

    return read


positive = integer(1)


def positive_number(text: str) -> float:
    """Read a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return number


def pattern(text: str) -> str:
    """Check that the text is a regular expression, and return it."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from error
    return text


def picture(text: str) -> Path:
    """Read the path of a picture to draw; its folder must exist."""
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path
