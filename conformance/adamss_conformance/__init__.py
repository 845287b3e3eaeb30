"""The conformance suite of `adamss`: fifteen laws that every backend keeps, yours too.

From the command line, for a backend by name or class::

    pytest -p adamss_conformance.plugin --pyargs adamss_conformance --adamss-backend NAME_or_module:Class

or as a test class of your own: subclass `BackendSuite` and override its fixture ``driver``. A `Driver` says how your
framework makes, runs and trains a small model, and its `Capabilities` what it cannot do, and why: the cases that
need it are then reported as not applicable, by law and with the reason.
"""

from adamss_conformance.capabilities import Capabilities
from adamss_conformance.driver import Driver, Training
from adamss_conformance.laws import LAWS
from adamss_conformance.suite import BackendSuite
from adamss_conformance.tolerances import RELATIVE_TOLERANCE, assert_agrees

__all__ = [
    "LAWS",
    "RELATIVE_TOLERANCE",
    "BackendSuite",
    "Capabilities",
    "Driver",
    "Training",
    "assert_agrees",
]
