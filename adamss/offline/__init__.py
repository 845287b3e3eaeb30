"""What the command line does, in Python: verbs on files, for which no model is built and no framework is needed."""

from adamss.offline.compare import Difference, LayerCheck, LayerDifference, diff, verify
from adamss.offline.convert import convert
from adamss.offline.inspect import MatrixReport, inspect
from adamss.offline.merge import merge
from adamss.offline.plan import Plan, plan

__all__ = [
    "Difference",
    "LayerCheck",
    "LayerDifference",
    "MatrixReport",
    "Plan",
    "convert",
    "diff",
    "inspect",
    "merge",
    "plan",
    "verify",
]
