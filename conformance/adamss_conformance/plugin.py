"""The pytest plugin, which selects the backends to test and reports the outcome of each law.

::

    pytest -p adamss_conformance.plugin --pyargs adamss_conformance --adamss-backend torch --adamss-backend jax
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator, Mapping
from typing import Any

import pytest
import tabulate

from adamss_conformance.driver import NOT_APPLICABLE, Driver, find_drivers, reasons
from adamss_conformance.laws import LAWS, law_of

__all__ = ["requested_drivers"]

_DRIVERS = pytest.StashKey[list[Driver]]()
_PROPERTY = "adamss law"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--adamss-backend``."""
    group = parser.getgroup("adamss", "conformance of backends of adamss")
    group.addoption(
        "--adamss-backend",
        action="append",
        default=[],
        metavar="NAME_or_module:Class",
        help="test this backend against the laws (repeat the option for more backends): a registered name (numpy, "
        "torch, jax, ...), 'strict' for the core on array-api-strict, or module:Class of a Backend or an "
        "adamss_conformance.Driver",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Find the drivers; a requested backend that is not available is an error, not a skip."""
    drivers: list[Driver] = []
    for target in config.getoption("adamss_backend"):
        try:
            drivers += find_drivers(target)
        except Exception as error:  # importing a third-party module may raise anything
            raise pytest.UsageError(f"--adamss-backend {target}: {type(error).__name__}: {error}") from error
    config.stash[_DRIVERS] = drivers
    absent = {
        type(driver).name: [d for d in driver.capabilities.devices if d not in driver.devices()]
        for driver in drivers
    }
    config.pluginmanager.register(_Outcomes(absent), "adamss-laws")


def requested_drivers(config: pytest.Config) -> list[Driver]:
    """Return the drivers of ``--adamss-backend``.

    Raises
    ------
    pytest.UsageError
        If none was asked for.
    """
    drivers = config.stash.get(_DRIVERS, [])
    if not drivers:
        raise pytest.UsageError(
            "name a backend: -p adamss_conformance.plugin --adamss-backend NAME_or_module:Class; "
            "or subclass BackendSuite and override its fixture `driver`"
        )
    return drivers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add law and driver to each report, and fail cases skipped for a reason that is not in the table."""
    report = yield
    law = law_of(item.name)
    if law is None:
        return report
    driver = getattr(item, "funcargs", {}).get("driver")
    report.user_properties.append((_PROPERTY, f"{driver or item.nodeid}/{law}"))
    if report.skipped:
        # Pytest reports an expected failure as skipped too, but its longrepr is not a tuple with the reason.
        found = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        reason = found.removeprefix("Skipped: ")
        if not isinstance(driver, Driver) or reason not in reasons(driver):
            report.outcome = "failed"
            report.longrepr = f"left out for a reason that the capability table does not give: {reason}"
    return report


class _Outcomes:
    """Collects the outcomes of all cases, and prints them by driver and law."""

    def __init__(self, absent: Mapping[str, list[str]]) -> None:
        self.absent = absent
        self.by_driver: dict[str, list[tuple[int, str, str]]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a case."""
        if report.when != "call" and not (report.when == "setup" and not report.passed):
            return
        reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        for name, value in report.user_properties:
            if name == _PROPERTY:
                driver, law = str(value).rsplit("/", 1)
                self.by_driver[driver].append((int(law), report.outcome, reason.partition(NOT_APPLICABLE)[2]))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print, for each driver, how many cases of each law held, and why other cases do not apply."""
        for driver, outcomes in sorted(self.by_driver.items()):
            counts = Counter((law, outcome) for law, outcome, _ in outcomes)
            rows = [
                (law, title, counts[law, "passed"], counts[law, "failed"], counts[law, "skipped"])
                for law, title in LAWS.items()
            ]
            terminalreporter.section(f"laws of adamss: {driver}")
            headers = ["law", "", "held", "failed", "not applicable"]
            terminalreporter.write_line(tabulate.tabulate(rows, headers))
            reasons = Counter(reason for _, outcome, reason in outcomes if outcome == "skipped")
            for reason, count in sorted(reasons.items()):
                terminalreporter.write_line(f"not applicable, {count} cases: {reason}")
        for driver, devices in self.absent.items():
            if devices:
                terminalreporter.write_line(
                    f"{driver}: not run on {', '.join(devices)}, because this machine has no such device"
                )
