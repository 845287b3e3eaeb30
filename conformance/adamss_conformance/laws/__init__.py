"""The laws by number; the name of every test of the suite contains the number of its law."""

from __future__ import annotations

import re

__all__ = ["LAWS", "law_of"]

LAWS = {
    1: "Start: the adapted model's outputs equal the base's",
    2: "Base untouched by attach and training; detach gives it back",
    3: "Update equals the reference's",
    4: "Gradients equal the closed form and finite differences",
    5: "Merge is the rounded sum, and can be undone",
    6: "Count equals the formula and what the optimiser sees",
    7: "Allocation keeps exactly the budget",
    8: "Frozen elements stay, whatever the optimiser",
    9: "Travel: a file gives the same update anywhere",
    10: "Resume: 2n steps equal n, save, new process, load, n",
    11: "Compilation changes nothing, an allocation compiles nothing",
    12: "Determinism, and no global random state touched",
    13: "Agreement of backends on labels and energy",
    14: "Names: adapters do not disturb each other",
    15: "Routing: a mixed batch equals separate runs",
}


def law_of(test: str) -> int | None:
    """Return the number of the law that a test of this name checks; None for a test of no law.

    Examples
    --------
    >>> law_of("test_law_03_update_compiled[torch-float32]")
    3
    """
    found = re.search(r"test_law_(\d\d)_", test)
    return int(found.group(1)) if found else None
