"""What commands print: one JSON document or text on standard output, faults and progress on standard error."""

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


class Result:
    """What a command has found.

    Parameters
    ----------
    document
        For ``--json``: dictionaries, lists, strings and numbers.
    text
        For people.
    right
        Whether all is as it should be; the exit status is 1 if not.
    """

    def __init__(self, document: Mapping[str, Any], text: str, *, right: bool = True) -> None:
        self.document, self.text, self.right = document, text, right


def emit(result: Result, *, as_json: bool) -> None:
    """Write a result to standard output, all of it: a full disk or a closed pipe raises here."""
    if as_json:
        # In ASCII, so that it is right in any encoding; JSON has neither NaN nor infinity.
        text = json.dumps(_finite(result.document), indent=2, allow_nan=False)
    else:
        # Names may hold what the encoding of the terminal has not.
        encoding = sys.stdout.encoding or "utf-8"
        text = result.text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would be written, and fail, once more when Python ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output takes no more: {error.strerror}") from error


def _finite(value: Any) -> Any:
    """Return a document in which what is not finite is null, and arrays and tuples are lists."""
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
    """Write a line to standard error."""
    encoding = sys.stderr.encoding or "utf-8"
    line = " ".join(text.split())
    sys.stderr.write(
        f"adamss: {printable(line, 2000).encode(encoding, 'backslashreplace').decode(encoding)}\n"
    )
    sys.stderr.flush()


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return a table of any width: it is never cut, in a pipe or elsewhere. Text is left, numbers right."""
    shown = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    align = (
        ["left" if isinstance(cell, str) and i == 0 else "right" for i, cell in enumerate(shown[0])]
        if shown
        else None
    )
    return str(tabulate.tabulate(shown, headers, colalign=align, disable_numparse=True))


def printable(text: str, longest: int = LONGEST_NAME) -> str:
    """Escape what a terminal would take for a command, and what is no character: a file may come from anyone."""
    if len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], object]]:
    """Give what moves a bar on standard error, which is drawn on a terminal, and after a second."""
    with tqdm(total=total, unit=unit, delay=1.0, leave=False, disable=None, file=sys.stderr) as bar:
        yield bar.update
