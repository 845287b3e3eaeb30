"""Sessions that build the wheel, install it into an environment of their own, and try it.

Every session uses `venv` and `pip`, with versions from constraints.txt.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = ("adamss", "backends/adamss_torch", "backends/adamss_jax", "conformance/adamss_conformance")
TEST_TOOLS = ("scikit-learn", "jax", "ruff", "mypy", "types-tabulate")


def install(session: nox.Session, *extras: str, tools: tuple[str, ...] = ()) -> None:
    """Build the wheel and install it with these extras: what is tested is what users get."""
    folder = Path(session.create_tmp()).resolve()
    for old in folder.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    wanted = f"adamss[{','.join(extras)}] @ {wheel.as_uri()}" if extras else str(wheel)
    session.install("-q", "-c", str(CONSTRAINTS), wanted, *tools)
    # pip keeps an installed version 0.1.0; after a change of the source it must be this build.
    session.install("-q", "--no-deps", "--force-reinstall", str(wheel))


def pytest(session: nox.Session, *arguments: str) -> None:
    session.run("python", "-m", "pytest", *arguments, *session.posargs)


def doctests(session: nox.Session) -> None:
    """Run the examples in the docstrings of the installed packages, and those of the README."""
    modules = ["adamss", "adamss_torch", "adamss_conformance"]
    session.run("python", "-m", "pytest", "-q", "--doctest-modules", "--pyargs", *modules)
    session.run("python", "-m", "pytest", "-q", "tests/test_readme.py")


def lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def types(session: nox.Session) -> None:
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All that CI runs: lint, types, tests with every framework, doctests, and the core without any."""
    install(session, "demo", "conformance", tools=TEST_TOOLS)
    lint(session)
    types(session)
    doctests(session)
    pytest(session)
    session.notify("core")


@nox.session
def core(session: nox.Session) -> None:
    """The core, the NumPy backend and the file format, with no framework installed."""
    install(session, "conformance")
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'jax')))"
    session.run("python", "-c", absent)
    session.run("python", "-m", "pytest", "--ignore=tests/torch", *session.posargs)


@nox.session
def torch(session: nox.Session) -> None:
    """The PyTorch backend."""
    install(session, "demo", "conformance")
    pytest(session, "tests/torch")


@nox.session(name="lint")
def lint_session(session: nox.Session) -> None:
    """Style."""
    session.install("-q", "-c", str(CONSTRAINTS), "ruff")
    lint(session)


@nox.session(name="types")
def types_session(session: nox.Session) -> None:
    """Types of all four packages."""
    install(session, "demo", "conformance", tools=TEST_TOOLS)
    types(session)


@nox.session
def docs(session: nox.Session) -> None:
    """Examples of docstrings and README."""
    install(session, "demo", "conformance", tools=("jax",))
    doctests(session)


@nox.session
def demo(session: nox.Session) -> None:
    """Fine-tune MiniLM-L6 with AdaMSS, LoRA, and the head alone; arguments go to benchmarks/demo.py."""
    install(session, "demo")
    session.run("python", "benchmarks/demo.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Print the tables of benchmarks/; arguments go to each of them (--quick)."""
    install(session, "demo", tools=("scikit-learn",))
    for script in ("parameters", "decomposition", "step_time"):
        session.run("python", f"benchmarks/{script}.py", *session.posargs)
