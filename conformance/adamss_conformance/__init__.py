"""The conformance suite of `adamss`: fifteen laws that every backend must obey, including third-party backends.

Run the suite from the command line, for a backend given by name or class::

    pytest -p adamss_conformance.plugin --pyargs adamss_conformance --adamss-backend NAME_or_module:Class

or as a test class of your own: subclass `BackendSuite` and override its fixture ``driver``. A `Driver` makes, runs
and trains a small model in your framework. Its `Capabilities` list what the driver cannot do, with a reason for each.
The suite reports the cases that need a missing capability as not applicable, by law and with the reason.
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
