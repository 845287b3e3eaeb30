"""The tests of JAX need all of its libraries, and import their shared module `jax_helpers` by its plain name."""

import sys
from pathlib import Path

import pytest

for library in ("jax", "flax", "equinox", "optax"):
    pytest.importorskip(library, reason="the jax session has JAX and its libraries; core and torch have not")

sys.path.insert(0, str(Path(__file__).parent))
