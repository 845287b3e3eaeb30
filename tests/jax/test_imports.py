"""Test what is imported, and the errors if a library is missing; each test runs a separate process."""

import subprocess
import sys
import textwrap

import pytest

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(script, *, absent=()):
    """Run a script in an interpreter without some libraries, and return what it prints."""
    script = ABSENT.format(absent=absent) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIBRARIES = (
    "sorted({'flax', 'equinox', 'optax', 'torch', 'jax'} & {name.partition('.')[0] for name in sys.modules})"
)


def test_the_functions_need_no_model_library():
    script = f"""
        import sys
        import jax
        import adamss_jax
        from adamss import core
        from adamss_jax.arrays import JaxArrays
        kernel = jax.random.normal(jax.random.key(0), (6, 8))
        decomposition = core.decompose(kernel, 4)
        factors = core.initial_factors(decomposition, core.segment(decomposition, 3), 1)
        y = adamss_jax.linear(kernel.T, kernel, None, factors)
        assert (y == kernel.T @ kernel).all()
        JaxArrays().linear(kernel.T, kernel, None, factors)
        print({LIBRARIES})
    """
    assert run(script) == "['jax']"


def test_adamss_itself_needs_no_framework():
    assert run(f"import sys, adamss, adamss.core, adamss.cli; print({LIBRARIES})") == "[]"


@pytest.mark.parametrize(
    ("imports", "model", "absent"),
    [
        # Optax is not absent here, because Flax imports it.
        ("from flax import nnx", "nnx.Linear(6, 8, rngs=nnx.Rngs(0))", ("equinox", "torch")),
        ("import equinox, jax", "equinox.nn.Linear(6, 8, key=jax.random.key(0))", ("flax", "optax", "torch")),
    ],
    ids=["flax", "equinox"],
)
def test_models_of_one_library_need_not_the_other(imports, model, absent):
    script = f"""
        {imports}
        import adamss
        model = {model}
        model = adamss.attach(model, adamss.AdamssConfig(targets='.*', rank=4, subspaces=2))
        print(adamss.summary(model).total.trained)
        adamss.detach(adamss.merge(model))
    """
    assert run(script, absent=absent) == "16"  # B has 2 subspaces of 4 directions, C has 8 columns


@pytest.mark.parametrize(
    ("library", "statement", "extra"),
    [
        ("jax", "import adamss_jax", "adamss[jax]"),
        ("flax", "import adamss_jax.flax", "adamss[flax]"),
        ("flax", "import adamss_jax; adamss_jax.flax", "adamss[flax]"),
        ("equinox", "import adamss_jax.equinox", "adamss[equinox]"),
        ("equinox", "import adamss_jax; adamss_jax.equinox", "adamss[equinox]"),
        ("optax", "import adamss_jax.optax", "adamss[flax]"),
        ("optax", "import adamss_jax.budget", "adamss[flax]"),
    ],
)
def test_a_library_that_is_not_installed(library, statement, extra):
    script = f"""
        from adamss.errors import AdamssError, MissingBackendError
        try:
            {statement}
        except MissingBackendError as error:
            assert isinstance(error, ImportError) and isinstance(error, AdamssError)
            assert isinstance(error.__cause__, ImportError)
            print(error)
    """
    message = run(script, absent=(library,))
    assert f"pip install '{extra}'" in message
    assert message.startswith(statement.split()[-1])


def test_without_jax_the_backend_says_so_and_other_backends_work():
    script = """
        import numpy as np
        import adamss
        from adamss.backend import NumpyLinear, NumpyModel, get_backend
        model = NumpyModel({'query': NumpyLinear(np.eye(4), None)})
        adamss.attach(model, adamss.AdamssConfig(targets=['query'], rank=2, subspaces=2))
        try:
            get_backend('flax')
        except adamss.errors.MissingBackendError as error:
            print(error)
    """
    assert "pip install 'adamss[jax]'" in run(script, absent=("jax",))


def test_an_unknown_name_is_an_attribute_error():
    import adamss_jax

    with pytest.raises(AttributeError, match="no attribute 'linera'"):
        _ = adamss_jax.linera
