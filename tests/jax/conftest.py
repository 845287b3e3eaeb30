"""What the tests of JAX share."""

import pytest

pytest.importorskip("jax", reason="the jax session has JAX; the core and torch sessions have not")
pytest.importorskip("flax", reason="the jax session has Flax; the core and torch sessions have not")
