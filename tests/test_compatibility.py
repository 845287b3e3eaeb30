"""Test that files of every released format version can be read and have the content that they were written with."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import adamss
from adamss import cli
from adamss.io import checkpoint

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("v*.safetensors"))


@pytest.fixture(scope="module")
def make():
    specification = importlib.util.spec_from_file_location("adamss_test_data", DATA / "make.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def expected(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_there_are_files_of_every_version_that_is_read():
    forms = {(int(path.stem[1:].split("-")[0]), path.stem.split("-")[1]) for path in FILES}
    assert forms == {(n, form) for n in checkpoint.READABLE_VERSIONS for form in ("portable", "training")}
    assert checkpoint.FORMAT_VERSION in checkpoint.READABLE_VERSIONS
    # The files must cover different ranks within a layer, and frozen subspaces.
    layers = [layer for path in FILES for layer in expected(path)["layers"].values()]
    assert any(len(set(layer["ranks"])) > 1 for layer in layers)
    assert all(False in layer["active"] and True in layer["active"] for layer in layers)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("trainable", [True, False])
def test_a_file_loads_and_holds_what_it_held(make, path, trainable):
    wanted = expected(path)
    base = make.base_model(wanted["dtype"])
    model = adamss.load(base, path, trainable=trainable)
    assert model.bank.only().config.to_dict() == adamss.AdamssConfig.from_dict(wanted["config"]).to_dict()
    # All settings in the file keep their values; settings that did not exist yet have their defaults.
    assert wanted["config"].items() <= model.bank.only().config.to_dict().items()
    layers = model.bank.only().layers
    assert layers.keys() == wanted["layers"].keys()
    tolerance = {"float32": 1e-6, "float64": 1e-13}[wanted["dtype"]]
    for name, factors in layers.items():
        held = wanted["layers"][name]
        np.testing.assert_allclose(make.update_of(factors), held["update"], rtol=0, atol=tolerance)
        for part in ("labels", "ranks", "active"):
            assert getattr(factors, part).tolist() == held[part]
        W, b, update = base[name].W, base[name].b, np.asarray(held["update"])
        d = len(W)
        x = make.numbers((3, d), 2).astype(W.dtype)
        bias = b + (update[d] if len(update) > d else 0)
        np.testing.assert_allclose(model[name](x), x @ (W + update[:d]) + bias, atol=1e-5)
    assert model.bank.only().saved == tuple(wanted["modules_to_save"])
    head = wanted["modules_to_save"]["head"]
    assert model["head"].W.T.tolist() == head["weight"]
    assert model["head"].b.tolist() == head["bias"]
    assert np.array_equal(adamss.detach(model)["head"].W, base["head"].W)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_saved_again_is_the_same(make, path, tmp_path):
    wanted, old = expected(path), checkpoint.read(path)
    model = adamss.load(make.base_model(wanted["dtype"]), path)
    adamss.save(model, tmp_path / "again.safetensors", training="training" in path.stem)
    new = checkpoint.read(tmp_path / "again.safetensors")
    assert (new.config, new.saved) == (old.config, old.saved)
    for name, layer in new.layers.items():
        np.testing.assert_allclose(layer.directions(), old.layers[name].directions(), atol=1e-6)
        assert layer.C == old.layers[name].C


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_show(path, capsys):
    assert cli.main(["show", str(path)]) == 0
    assert "encoder.1.query" in capsys.readouterr().out
