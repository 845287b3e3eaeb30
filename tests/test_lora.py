"""Test `adamss.to_lora` on the NumPy reference: the products of the LoRA factors are the updates, for any shape."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import adamss
from adamss import core
from adamss.backend import NumpyLinear, NumpyModel, get_backend
from adamss.errors import ConfigError, ConfigTypeError, StateError
from adamss_conformance.tolerances import assert_agrees


def adapted(shapes, *, seed=0, **settings):
    """Return an adapted model with one layer of each shape and an update in every subspace."""
    rng = np.random.default_rng(seed)
    base = NumpyModel(
        {
            f"block.{i}.query": NumpyLinear(rng.standard_normal(shape), rng.standard_normal(shape[1]))
            for i, shape in enumerate(shapes)
        }
    )
    model = adamss.attach(base, adamss.AdamssConfig(targets=["query"], **settings))
    for factors in get_backend("numpy").bank(model).only().layers.values():
        factors.C[...] = rng.standard_normal(factors.C.shape)
    return model


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3),
    rank=st.integers(1, 8),
    subspaces=st.integers(1, 6),
    subspace_rank=st.integers(1, 4),
    basis=st.sampled_from(["shared", "per_subspace"]),
)
def test_the_product_is_the_update(tmp_path_factory, shapes, rank, subspaces, subspace_rank, basis):
    model = adapted(shapes, rank=rank, subspaces=subspaces, subspace_rank=subspace_rank, basis=basis)
    folder = tmp_path_factory.mktemp("lora")
    written = adamss.to_lora(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = get_backend("numpy").bank(model).only().layers
    assert len(tensors) == 2 * len(layers) == 2 * written.layers
    for path, factors in layers.items():
        A = tensors[f"base_model.model.{path}.lora_A.weight"].astype(np.float64)
        B = tensors[f"base_model.model.{path}.lora_B.weight"].astype(np.float64)
        d, n = factors.A.shape[1], factors.C.shape[1]
        assert (A.shape, B.shape) == ((written.rank, d), (n, written.rank))
        scale = np.abs(core.contract(factors)) @ np.abs(core.expand(factors))
        assert_agrees(
            A.T @ B.T, core.delta(factors), dtype="float32", what=path, scale=4 * float(scale.max())
        )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written.rank


def test_a_failed_export_writes_nothing(tmp_path):
    model = adapted([(4, 5)], rank=3, subspaces=2)
    with pytest.raises(ConfigTypeError, match="folder"):
        adamss.to_lora(model, 3)
    with pytest.raises(ConfigError, match="folder must name"):
        adamss.to_lora(model, "")
    with pytest.raises(StateError, match="to_lora"):
        adamss.to_lora(adamss.detach(model), tmp_path / "lora")
    assert not list(tmp_path.iterdir())
