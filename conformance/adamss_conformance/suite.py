"""`BackendSuite`: the laws of the design as tests for any backend."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from adamss.backend.registry import using
from adamss_conformance.driver import Driver
from adamss_conformance.laws.agreement import AgreementLaws
from adamss_conformance.laws.budget import BudgetLaws
from adamss_conformance.laws.compilation import CompilationLaws
from adamss_conformance.laws.files import FileLaws
from adamss_conformance.laws.linear import LinearLaws
from adamss_conformance.laws.merge import MergeLaws
from adamss_conformance.laws.names import NameLaws
from adamss_conformance.laws.routing import RoutingLaws
from adamss_conformance.laws.start import StartLaws
from adamss_conformance.laws.walks import WalkLaws

__all__ = ["BackendSuite"]


class BackendSuite(
    StartLaws,
    LinearLaws,
    MergeLaws,
    BudgetLaws,
    FileLaws,
    CompilationLaws,
    AgreementLaws,
    NameLaws,
    RoutingLaws,
    WalkLaws,
):
    """The laws as tests; the name of each test contains the number of its law.

    Run the suite from the command line with the plugin::

        pytest -p adamss_conformance.plugin --pyargs adamss_conformance --adamss-backend NAME_or_module:Class

    or subclass it and override the fixture ``driver``::

        class TestMine(BackendSuite):
            @pytest.fixture
            def driver(self):
                return MyDriver()
    """

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test on each driver of ``--adamss-backend``, unless a subclass overrides the fixture."""
        overridden = inspect.getattr_static(type(self), "driver") is not BackendSuite.__dict__["driver"]
        if not overridden and "driver" in metafunc.fixturenames:
            from adamss_conformance.plugin import requested_drivers

            drivers = requested_drivers(metafunc.config)
            metafunc.parametrize("driver", drivers, indirect=True, ids=str)

    @pytest.fixture
    def driver(self, request: pytest.FixtureRequest) -> Driver:
        """Return the driver under test; override it in a subclass."""
        found: Driver = request.param
        return found

    @pytest.fixture(autouse=True)
    def _registered(self, driver: Driver) -> Iterator[None]:
        # The verbs must find the instance under test, not the registered backend of the same name.
        with using(driver.backend):
            yield
