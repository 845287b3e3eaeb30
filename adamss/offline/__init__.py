"""The functions behind the command line, which work on files without building a model.

Most of them need no framework.
"""

from adamss.io.checkpoint import Checkpoint
from adamss.io.weights import WeightFiles
from adamss.offline.compare import Difference, LayerCheck, LayerDifference, diff, verify
from adamss.offline.convert import convert
from adamss.offline.inspect import MatrixReport, inspect
from adamss.offline.merge import MergedFiles, merge
from adamss.offline.plan import Plan, plan
from adamss.offline.read import read_adapter

__all__ = [
    "Checkpoint",
    "Difference",
    "LayerCheck",
    "LayerDifference",
    "MatrixReport",
    "MergedFiles",
    "Plan",
    "WeightFiles",
    "convert",
    "diff",
    "inspect",
    "merge",
    "plan",
    "read_adapter",
    "verify",
]
