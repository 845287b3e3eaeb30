"""The command `adamss`, which works on adapters and weights in files.

No model is built, and most commands need no framework.

Results go to standard output, and messages to standard error. The exit status is 0 on success, 1 if a check fails or
a file is missing or cannot be read, and 2 if the arguments are wrong.
"""

from adamss.cli.app import main

__all__ = ["main"]
