"""Output of the commands: a JSON document or text on standard output, messages and progress on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import tabulate
from tqdm import tqdm

__all__ = ["Result", "emit", "printable", "progress", "say", "table"]

LONGEST_NAME = 200
"""Largest number of characters of a name that is printed."""


class Result:
    """Result of a command.

    Parameters
    ----------
    document
        Result for ``--json``, of dictionaries, lists, strings and numbers.
    text
        Result for people.
    right
        Whether all checks have passed. If not, the exit status is 1.
    """

    def __init__(self, document: Mapping[str, Any], text: str, *, right: bool = True) -> None:
        self.document, self.text, self.right = document, text, right


def emit(result: Result, *, as_json: bool) -> None:
    """Write a result to standard output and flush it, so that a full disk or a closed pipe raises an error here."""
    if as_json:
        # The default is ASCII, which is valid in every encoding of the terminal. JSON has neither NaN nor infinity.
        text = json.dumps(_finite(result.document), indent=2, allow_nan=False)
    else:
        # Names may contain characters that the encoding of the terminal lacks.
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = result.text.encode(encoding, "backslashreplace").decode(encoding)
    if sys.stdout is None:
        raise OSError("standard output is closed")
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        # Python flushes the rest of the buffer on exit, which would fail again, so redirect it to the null device.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output takes no more: {error.strerror}") from error


def _finite(value: Any) -> Any:
    """Return a copy of a document for JSON: numbers that are not finite become None, and tuples become lists."""
    if isinstance(value, Mapping):
        return {str(name): _finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def say(text: str) -> None:
    """Write a message to standard error, in one line."""
    if sys.stderr is None:
        return
    encoding = sys.stderr.encoding or "utf-8"
    line = " ".join(text.split())
    sys.stderr.write(
        f"adamss: {printable(line, 2000).encode(encoding, 'backslashreplace').decode(encoding)}\n"
    )
    sys.stderr.flush()


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return a table, whose width does not depend on the terminal. The first column is aligned left if it is text."""
    shown = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    align = (
        ["left" if isinstance(cell, str) and i == 0 else "right" for i, cell in enumerate(shown[0])]
        if shown
        else None
    )
    return str(tabulate.tabulate(shown, headers, colalign=align, disable_numparse=True))


def printable(text: str, longest: int = LONGEST_NAME) -> str:
    """Shorten a text and escape characters that are not printable.

    A hostile file may have names with control sequences, which a terminal would execute.
    """
    if len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], object]]:
    """Yield a function that advances a progress bar on standard error by one.

    The bar appears only on a terminal, and only after a second.
    """
    with tqdm(total=total, unit=unit, delay=1.0, leave=False, disable=None, file=sys.stderr) as bar:
        yield bar.update
