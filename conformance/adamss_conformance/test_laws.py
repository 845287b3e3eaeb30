"""The tests that ``--pyargs adamss_conformance`` collects: the laws, on every requested backend."""

from adamss_conformance.suite import BackendSuite


class TestLaws(BackendSuite):
    """The laws on every driver of ``--adamss-backend``."""
