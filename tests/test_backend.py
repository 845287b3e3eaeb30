"""Test the registry of backends, lazy imports, and the NumPy reference backend with its model."""

import subprocess
import sys

import numpy as np
import pytest

import adamss
from adamss.backend import (
    Backend,
    Bank,
    NumpyBackend,
    NumpyLinear,
    NumpyModel,
    available_backends,
    backend_for,
    get_backend,
    register_backend,
    registry,
)
from adamss.errors import (
    ArrayTypeError,
    BackendError,
    LayerTypeError,
    MissingBackendError,
    StateError,
    TargetError,
)
from adamss.verbs import common


def model(dtype=np.float64):
    rng = np.random.default_rng(0)
    names = ("encoder.query", "encoder.value", "head")
    return NumpyModel(
        {name: NumpyLinear(rng.standard_normal((6, 8)).astype(dtype), np.ones(8, dtype)) for name in names}
    )


CONFIG = adamss.AdamssConfig(targets=["query", "value"], rank=4, subspaces=3, modules_to_save=["head"])


IN_NUMPY = """
import numpy as np, adamss
from adamss.backend import NumpyLinear, NumpyModel
m = adamss.attach(NumpyModel({'q': NumpyLinear(np.eye(4))}), adamss.AdamssConfig(targets=['q']))
assert m['q'](np.ones(4)).tolist() == [1, 1, 1, 1]
"""


@pytest.mark.parametrize(
    "code", ["import adamss, adamss.core, adamss.backend, adamss.io.checkpoint, adamss.cli", IN_NUMPY]
)
def test_no_framework_is_imported(code):
    code += (
        "\nimport sys; "
        "found = {'torch', 'jax', 'flax', 'equinox', 'optax', 'transformers', 'peft', 'cupy'} & set(sys.modules); "
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestRegistry:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        monkeypatch.setattr(registry, "_registered", {})
        monkeypatch.setattr(registry, "_instances", {})

    def test_names(self):
        assert {"equinox", "flax", "numpy", "torch"} <= set(available_backends())

    def test_one_instance(self):
        assert get_backend("numpy") is get_backend("numpy")
        assert isinstance(backend_for(model()), NumpyBackend)

    def test_unknown_name(self):
        with pytest.raises(BackendError, match=r"no backend is called 'mlx'; there are .*numpy"):
            get_backend("mlx")

    def test_unknown_model(self):
        with pytest.raises(BackendError, match=r"models of type builtins\.list") as caught:
            adamss.summary([])
        assert isinstance(caught.value, TypeError)

    def test_missing_framework_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.delitem(sys.modules, "adamss_torch", raising=False)
        with pytest.raises(MissingBackendError, match=r"pip install 'adamss\[torch\]'") as caught:
            get_backend("torch")
        assert isinstance(caught.value, ImportError)

    @pytest.mark.parametrize("name", ["allocation", "budgeted", "synchronise"])
    def test_what_needs_optax_is_imported_when_it_is_asked_for(self, name):
        adamss_jax = pytest.importorskip("adamss_jax", exc_type=ImportError)
        pytest.importorskip("optax")
        assert callable(getattr(adamss_jax, name))

    def test_an_instance_is_used_for_a_while(self):
        class Mine(NumpyBackend):
            pass

        mine, before = Mine(), get_backend("numpy")
        with registry.using(mine):
            assert backend_for(model()) is mine
        assert backend_for(model()) is get_backend("numpy") is before

    def test_a_third_party_registers_a_class(self):
        @register_backend
        class Mine(NumpyBackend):
            name = "mine"

            def handles(self, model):
                return model == "mine"

            def bank(self, model):
                return Bank()

        assert "mine" in available_backends()
        assert isinstance(backend_for("mine"), Mine)
        with pytest.raises(StateError, match="no adapters"):
            adamss.summary("mine")

    def test_an_incomplete_backend_is_refused(self):
        class Half(Backend):
            name = "half"

        with pytest.raises(BackendError, match=r"it lacks activated, arrays, bank, .*with_masks"):
            register_backend(Half)
        with pytest.raises(BackendError, match="concrete subclass"):
            register_backend(dict)


class TestNumpyModel:
    def test_every_verb_leaves_the_model_it_was_given(self):
        base, x = model(), np.random.default_rng(1).standard_normal((3, 6))
        expected = {path: base[path](x) for path in base.layers}
        adapted = adamss.attach(base, CONFIG)
        assert not base.bank
        for path in CONFIG.targets:
            adamss.trainable_parameters(adapted)[f"encoder.{path}"]["C"][...] = 0.5
        y = adapted["encoder.query"](x)
        assert not np.allclose(y, expected["encoder.query"])
        merged = adamss.merge(adapted)
        for same in (adamss.unmerge(merged), adapted):
            assert np.array_equal(same["encoder.query"](x), y)
        for back in (adamss.detach(merged), adamss.detach(adapted), base):
            assert all(np.array_equal(back[path](x), expected[path]) for path in expected)
        with adamss.disabled(adapted) as plain:
            assert np.array_equal(plain["encoder.query"](x), expected["encoder.query"])

    def test_half_precision_gets_float32_factors(self):
        adapted = adamss.attach(model(np.float16), CONFIG)
        assert {array.dtype for array in adapted.bank.only().layers["encoder.query"][:3]} == {
            np.dtype(np.float32)
        }
        assert adapted["encoder.query"](np.ones((2, 6), np.float16)).dtype == np.float16

    def test_bad_layers(self):
        with pytest.raises(ArrayTypeError, match="q: W must be a NumPy array, found list"):
            adamss.attach(NumpyModel({"q": NumpyLinear([[1.0]])}), adamss.AdamssConfig(targets=["q"]))
        with pytest.raises(LayerTypeError, match="q is a str, which has no weight to adapt"):
            adamss.attach(NumpyModel({"q": "layer"}), adamss.AdamssConfig(targets=["q"]))
        with pytest.raises(TargetError, match=r"near matches: .*query"):
            adamss.attach(model(), adamss.AdamssConfig(targets=["querry"]))

    def test_summary_prints_a_table(self):
        text = str(adamss.summary(adamss.attach(model(), CONFIG)))
        lines = text.splitlines()
        assert lines[0].split() == ["layer", "shape", "K", "R", "q", "trained", "active"]
        assert lines[2].split() == ["encoder.query", "6", "x", "8", "3", "4", "3", "20", "3/3"]
        assert lines[4].split() == ["total", "6", "6", "40", "6/6"]
        assert lines[5:] == ["targets: query, value", "modules_to_save: 56 trained parameters"]


def test_attach_and_load_count_their_layers_on_a_bar_that_a_log_never_sees(monkeypatch, tmp_path, capfd):
    made = []

    class Bar(common.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.done = 0
            made.append((kwargs, self))

        def update(self, n=1):
            self.done += n
            return super().update(n)

    monkeypatch.setattr(common, "tqdm", Bar)
    adamss.save(adamss.attach(model(), CONFIG), tmp_path / "a.safetensors")
    adamss.load(model(), tmp_path / "a.safetensors")
    assert [(bar.total, bar.done) for _, bar in made] == [(2, 2), (2, 2)]
    # A bar appears only after a second, and not when the output goes to a file.
    assert all(kwargs["delay"] >= 1 and kwargs["disable"] is None for kwargs, _ in made)
    assert capfd.readouterr().err == ""
