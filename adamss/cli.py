"""The command `adamss`: look into adapter files without a framework or a model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from adamss._version import __version__
from adamss.errors import AdamssError
from adamss.io import checkpoint
from adamss.verbs.table import Summary, summarise, total

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Words after the program's name; None for those of the process.

    Returns
    -------
    int
        Exit status: 0, or 1 with a message on standard error.
    """
    parser = argparse.ArgumentParser(prog="adamss", description="AdaMSS adapter files.")
    parser.add_argument("--version", action="version", version=f"adamss {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print what an adapter file holds, after checking it")
    show.add_argument("file", help="a file that adamss.save wrote")
    options = parser.parse_args(arguments)
    try:
        text = describe(checkpoint.read(options.file))
    except (AdamssError, OSError) as error:
        print(f"adamss: {error}", file=sys.stderr)
        return 1
    # Names may hold what the terminal's encoding has not.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def describe(stored: checkpoint.Checkpoint) -> str:
    """Return what a file holds: the table of its layers, its config and what wrote it.

    Parameters
    ----------
    stored
        A file that was read.

    Returns
    -------
    str
        Several lines. What a file calls its layers is shown as printable characters, and not at any length.
    """
    rows = tuple(
        summarise(_printable(path), layer.base.shape, layer.outline())
        for path, layer in stored.layers.items()
    )
    sizes = [math.prod(tensor.shape) for module in stored.saved.values() for tensor in module.values()]
    tokens = sum(math.prod(tensor.shape) for tensor in stored.tokens.values())
    training = any(layer.A is not None for layer in stored.layers.values())
    return "\n".join(
        (
            str(Summary(rows, total(rows), sum(sizes), tokens=tokens)),
            f"form: {'training (A and B)' if training else 'portable (M)'}",
            f"config: {_printable(str(stored.config), longest=10_000)}",
            "written by: "
            + ", ".join(_printable(f"{name} {version}") for name, version in stored.writer.items()),
        )
    )


def _printable(text: str, longest: int = 200) -> str:
    """Escape what a terminal would take for a command, and what is no character: a file may come from anyone."""
    if len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
