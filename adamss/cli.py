"""The command `adamss`: look into adapter files without a framework or a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adamss import __version__, checkpoint
from adamss._summary import Summary, summarise, total
from adamss.errors import AdamssError

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
        print(describe(checkpoint.read(options.file)))
    except (AdamssError, OSError) as error:
        print(f"adamss: {error}", file=sys.stderr)
        return 1
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
        Several lines.
    """
    rows = tuple(summarise(path, layer.base.shape, layer.outline()) for path, layer in stored.layers.items())
    sizes = [tensor.numpy().size for module in stored.saved.values() for tensor in module.values()]
    training = any(layer.A is not None for layer in stored.layers.values())
    return "\n".join(
        (
            str(Summary(rows, total(rows), sum(sizes))),
            f"form: {'training (A and B)' if training else 'portable (M)'}",
            f"config: {stored.config}",
            "written by: " + ", ".join(f"{name} {version}" for name, version in stored.writer.items()),
        )
    )
