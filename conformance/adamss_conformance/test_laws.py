"""What ``--pyargs adamss_conformance`` collects: the laws, on every backend asked for."""

from adamss_conformance.suite import BackendSuite


class TestLaws(BackendSuite):
    """On every driver of ``--adamss-backend``."""
