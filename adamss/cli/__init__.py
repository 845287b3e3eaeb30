"""The command `adamss`: adapters and weights in files, without a model, and without a framework where NumPy suffices.

Results go to standard output, everything else to standard error. The exit status is 0; 1 if something was found
wrong, is missing or cannot be read; 2 if the call was wrong.
"""

from adamss.cli.app import main

__all__ = ["main"]
