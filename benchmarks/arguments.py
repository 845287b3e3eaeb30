"""Arguments of the commands that are checked when they are read, not after hours."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")


def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return what reads an integer between two limits."""

    def read(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            limits = f"of at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not an integer {limits}")
        return int(text)

    return read


positive = integer(1)


def positive_number(text: str) -> float:
    """Read a number above zero, which may be a fraction."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return number


def pattern(text: str) -> str:
    """Read a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from error
    return text


def picture(text: str) -> Path:
    """Read the name of a picture to be drawn, in a folder that exists."""
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path
