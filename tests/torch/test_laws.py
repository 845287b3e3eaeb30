"""The laws of the design on PyTorch models: start, base, update, merge, count, travel, compilation, determinism."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adamss
from adamss import core
from adamss.backend import NumpyLinear, NumpyModel
from adamss_conformance.tolerances import RELATIVE_TOLERANCE, assert_agrees

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "default": {},
    "per_subspace": {"basis": "per_subspace"},
    "weighted": {"initial_B": "weighted"},
    "weighted per_subspace": {"initial_B": "weighted", "basis": "per_subspace"},
    "bias": {"include_bias": True},
    "bias per_subspace": {"include_bias": True, "basis": "per_subspace"},
    "spectral": {"segmentation": "spectral"},
    "ksubspaces": {"segmentation": "ksubspaces", "segmentation_dimension": 2},
    "contiguous": {"segmentation": "contiguous"},
    "random": {"segmentation": "random"},
    "clamped": {"rank": 1000, "subspaces": 1000, "subspace_rank": 1000},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request, config):
    return config(**request.param)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, expected):
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class TestLaw1Start:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16), (2, 0, 16)])
    def test_outputs_equal_those_of_the_base(self, net, config, inputs, dtype, shape):
        base, x = net(dtype=dtype), inputs(*shape, dtype=dtype)
        expected = base(x)
        assert torch.equal(adamss.attach(base, config())(x), expected)

    def test_in_every_variant(self, net, variant, inputs):
        base, x = net(), inputs(7, 16)
        expected = base(x)
        assert torch.equal(adamss.attach(base, variant)(x), expected)

    @pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30])
    def test_for_extreme_inputs(self, config, inputs, scale):
        layer = torch.nn.Sequential(torch.nn.Linear(16, 8))
        x = inputs(5, 16) * scale
        expected = layer(x)
        assert torch.equal(adamss.attach(layer, config(targets=["0"]))(x), expected)

    def test_in_half_precision_near_the_largest_number(self, config):
        layer = torch.nn.Sequential(torch.nn.Linear(64, 8)).to(torch.float16)
        x = torch.full((2, 64), 6e4, dtype=torch.float16)
        layer[0].weight.data.mul_(1e-3)
        expected = layer(x)
        assert torch.isfinite(expected).all()
        assert torch.equal(adamss.attach(layer, config(targets=["0"]))(x), expected)


class TestLaw2BaseUntouched:
    def test_attach_and_training_leave_the_base_and_detach_gives_it_back(self, net, variant, train):
        model = net()
        before = state(model)
        required = {name: p.requires_grad for name, p in model.named_parameters()}
        train(adamss.attach(model, variant))
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert adamss.detach(model) is model
        assert_same_state(model, before)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == required
        assert not any(layer._forward_hooks for layer in model.modules())

    def test_detach_gives_modules_to_save_back(self, net, config, train):
        model = net()
        before = state(model)
        train(adamss.attach(model, config(modules_to_save=["classifier"])))
        assert not torch.equal(model.classifier.weight, before["classifier.weight"])
        assert_same_state(adamss.detach(model), before)

    def test_detach_restores_a_partly_frozen_model(self, net, config):
        model = net()
        model.layers[0].requires_grad_(False)
        required = {name: p.requires_grad for name, p in model.named_parameters()}
        adamss.detach(adamss.attach(model, config(modules_to_save=["classifier"])))
        assert {name: p.requires_grad for name, p in model.named_parameters()} == required

    def test_only_the_factors_and_saved_modules_are_trained(self, net, config, train):
        model = adamss.attach(net(), config(modules_to_save=["classifier"]))
        before = state(model)
        train(model)
        changed = {
            name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
        }
        layers = [
            f"layers.{i}.{name}.adamss.{f}" for i in (0, 1) for name in ("query", "value") for f in "BC"
        ]
        assert changed == {*layers, "classifier.weight", "classifier.bias"}

    def test_disabled_is_the_base_model(self, net, config, inputs, train):
        model, x = net(), inputs(4, 16)
        expected = model(x)
        train(adamss.attach(model, config(modules_to_save=["classifier"])))
        adapted = model(x)
        assert not torch.equal(adapted, expected)
        with adamss.disabled(model) as base:
            assert base is model
            assert torch.equal(base(x), expected)
        assert torch.equal(model(x), adapted)

    def test_a_reference_forward_leaves_the_backward_of_another_alone(self, net, config, inputs, train):
        """As preference optimisation does: the base's outputs are needed between forward and backward."""
        model, x = train(adamss.attach(net(), config(modules_to_save=["classifier"]))), inputs(4, 16)
        with adamss.disabled(model), torch.no_grad():
            reference = model(x)
        leaves = adamss.trainable_parameters(model)
        expected = torch.autograd.grad((model(x) - reference).square().sum(), leaves)
        y = model(x)
        with adamss.disabled(model), torch.no_grad():
            assert torch.equal(model(x), reference)
        actual = torch.autograd.grad((y - reference).square().sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_disabled_can_be_nested_and_refuses_what_would_confuse_it(
        self, net, config, inputs, train, tmp_path
    ):
        model, x = net(), inputs(4, 16)
        expected = model(x)
        train(adamss.attach(model, config(modules_to_save=["classifier"])))
        adapted = model(x)
        with adamss.disabled(model):
            with adamss.disabled(model):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
            for verb in (adamss.merge, adamss.detach, lambda m: adamss.save(m, tmp_path / "a.safetensors")):
                with pytest.raises(adamss.errors.StateError, match=r"switched off by adamss\.disabled"):
                    verb(model)
        assert torch.equal(model(x), adapted)


class TestLaw3And4Update:
    def test_each_layer_computes_its_merged_weight(self, net, variant, inputs, train):
        model = train(adamss.attach(net(dtype=torch.float64), variant))
        factors = adamss.backend.get_backend("torch").adaptation(model).layers
        x = inputs(5, 16, dtype=torch.float64)
        for path, f in factors.items():
            layer = model.get_submodule(path)
            update = core.delta(f)
            W = layer.weight.t() + update[:16]
            b = layer.bias + (update[16] if variant.include_bias else 0)
            assert_agrees(layer(x).detach(), (x @ W + b).detach(), dtype="float64", what=path)

    def test_padding_stays_zero_and_gets_no_gradient(self, net, config, train):
        model = train(adamss.attach(net(), config(subspaces=12, subspace_rank=3)))
        factors = adamss.backend.get_backend("torch").adaptation(model).layers
        padded = 0
        for path, f in factors.items():
            padding = torch.arange(f.C.shape[0])[:, None] >= f.ranks[f.labels][None, :]
            padded += int(padding.sum())
            assert torch.equal(f.C[padding], torch.zeros(int(padding.sum())))
            gradient = model.get_submodule(path).adamss.C.grad
            assert torch.equal(gradient[padding], torch.zeros(int(padding.sum())))
        assert padded > 0, "the case holds no padding and tests nothing"


class TestLaw5Merge:
    def test_merged_outputs_and_exact_unmerge(self, net, variant, inputs, train):
        model, x = net(), inputs(6, 16)
        before = state(model)
        train(adamss.attach(model, variant))
        adapted, whole = model(x), state(model)
        assert adamss.merge(model) is model
        assert_agrees(model(x).detach(), adapted.detach(), dtype="float32", what="merged outputs")
        with adamss.disabled(model) as base:
            plain = {name: tensor for name, tensor in base.state_dict().items() if "adamss" not in name}
            assert all(torch.equal(tensor, before[name]) for name, tensor in plain.items())
        assert adamss.unmerge(model) is model
        assert_same_state(model, whole)
        assert torch.equal(model(x), adapted)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_rounded_sum(self, net, config, train, dtype):
        model = train(adamss.attach(net(dtype=dtype), config()), lr=0.5)
        layer = model.layers[0].query
        W0, f = (
            layer.weight.t().clone(),
            adamss.backend.get_backend("torch").adaptation(model).layers["layers.0.query"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", adamss.AdamssWarning)
            adamss.merge(model)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight.t(), (W0.to(wide) + core.delta(f)).to(dtype))

    @pytest.mark.parametrize(("relative", "lost"), [(1e-2, 0.17), (1e-3, 0.79)])
    def test_warns_of_what_bfloat16_loses(self, relative, lost):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(torch.bfloat16)
        layer[0].weight.data = torch.randn(256, 256).to(torch.bfloat16)
        model = adamss.attach(layer, adamss.AdamssConfig(targets=["0"], rank=256, subspace_rank=24))
        adapter = model[0].adamss
        adapter.C.data = torch.randn(adapter.C.shape)
        size = core.delta(adapter.factors()).norm()
        adapter.C.data *= relative * layer[0].weight.float().norm() / size
        with pytest.warns(adamss.AdamssWarning, match=r"lost (\d+)% of the update of 0") as caught:
            adamss.merge(model)
        share = int(str(caught[0].message).split("lost ")[1].split("%")[0]) / 100
        assert share == pytest.approx(lost, abs=0.03)

    def test_without_base_the_way_back_is_refused(self, net, config, inputs, train, tmp_path):
        model, x = train(adamss.attach(net(), config())), inputs(3, 16)
        adapted = model(x)
        adamss.merge(model, keep_base=False)
        assert_agrees(model(x).detach(), adapted.detach(), dtype="float32", what="merged outputs")
        for verb in (adamss.unmerge, adamss.detach, lambda m: adamss.save(m, tmp_path / "a.safetensors")):
            with pytest.raises(adamss.errors.StateError, match="keep_base=False"):
                verb(model)
        with pytest.raises(adamss.errors.StateError, match="keep_base=False"), adamss.disabled(model):
            pass

    def test_detach_of_a_merged_model_is_exact(self, net, config, train):
        model = net()
        before = state(model)
        assert_same_state(adamss.detach(adamss.merge(train(adamss.attach(model, config())))), before)

    def test_a_shared_weight_is_merged_for_one_module_only(self, inputs, config):
        class Tied(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Linear(16, 16, bias=False)
                self.head = torch.nn.Linear(16, 16, bias=False)
                self.head.weight = self.embed.weight

        model = Tied()
        W0 = model.embed.weight.clone()
        adamss.attach(model, config(targets=["head"]))
        model.head.adamss.C.data.fill_(0.1)
        x = inputs(2, 16)
        adapted = model.head(x)
        adamss.merge(model)
        assert torch.equal(model.embed.weight, W0)
        assert_agrees(model.head(x).detach(), adapted.detach(), dtype="float32", what="head")
        with adamss.disabled(model):
            assert torch.equal(model.head.weight, W0)
            assert torch.equal(model.embed.weight, W0)
        assert_agrees(model.head(x).detach(), adapted.detach(), dtype="float32", what="head")
        adamss.detach(model)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, W0)

    def test_nan_is_not_merged(self, net, config):
        model = adamss.attach(net(), config())
        model.layers[1].value.adamss.C.data[0, 0] = float("nan")
        before = state(model)
        with pytest.raises(adamss.errors.ArrayValueError, match=r"layers\.1\.value"):
            adamss.merge(model)
        after = model.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items() if "layers.1.value.adamss.C" not in n)
        assert model(torch.ones(1, 16)).shape == (1, 5)


class TestLaw6Count:
    @given(
        st.integers(1, 12),
        st.integers(1, 12),
        st.integers(1, 15),
        st.integers(1, 15),
        st.integers(1, 4),
        st.booleans(),
    )
    def test_equals_the_formula_and_what_the_optimiser_sees(self, d, n, R, K, r, per_subspace):
        model = torch.nn.Sequential(torch.nn.Linear(d, n))
        basis = "per_subspace" if per_subspace else "shared"
        adamss.attach(
            model, adamss.AdamssConfig(targets=["0"], rank=R, subspaces=K, subspace_rank=r, basis=basis)
        )
        total, row = adamss.summary(model).total, adamss.summary(model).rows[0]
        factors = model[0].adamss.factors()
        sizes = np.bincount(factors.labels.numpy(), minlength=min(K, n))
        bases = np.minimum(min(R, d, n), sizes) if per_subspace else np.full_like(sizes, min(R, d, n))
        ranks = np.minimum(np.minimum(r, sizes), bases)
        assert sizes.min() >= 1
        assert row.shape == (d, n)
        assert (row.K, row.R, row.q) == (min(K, n), bases.max(), ranks.sum())
        assert total.trained == (ranks * (sizes + bases)).sum()
        seen = sum(p.numel() for p in adamss.trainable_parameters(model))
        padding = ((ranks.max() - ranks) * sizes).sum() + (ranks * (bases.max() - bases)).sum()
        assert seen == total.trained + padding

    def test_modules_to_save_are_handed_out_and_shown(self, net, config):
        model = adamss.attach(net(), config(modules_to_save=["classifier"]))
        assert adamss.summary(model).saved == 16 * 5 + 5
        parameters = adamss.trainable_parameters(model)
        assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
        assert len(parameters) == 2 * 4 + 2


class TestLaw9Travel:
    @pytest.mark.parametrize("training", [False, True])
    def test_to_numpy_and_back(self, net, variant, inputs, train, tmp_path, training):
        model, x = train(adamss.attach(net(), variant)), inputs(5, 16)
        layer = model.layers[0].query
        first, second = tmp_path / "torch.safetensors", tmp_path / "numpy.safetensors"
        adamss.save(model, first, training=training)

        def in_numpy(module):
            return NumpyLinear(module.weight.detach().numpy().T, module.bias.detach().numpy())

        linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        reference = adamss.load(NumpyModel({name: in_numpy(m) for name, m in linears.items()}), first)
        y = reference["layers.0.query"](x.numpy())
        assert_agrees(y, layer(x).detach(), dtype="float32", what="the layer in NumPy")

        adamss.save(reference, second, training=training)
        again = adamss.load(net(), second)
        assert_agrees(again(x).detach(), model(x).detach(), dtype="float32", what="the model, back in torch")
        for path, row in {row.path: row for row in adamss.summary(model).rows}.items():
            back = again.get_submodule(path).adamss
            assert torch.equal(back.labels, model.get_submodule(path).adamss.labels)
            assert (row.K, row.q) == (back.ranks.numel(), back.B.shape[0])
        if training:
            for name, tensor in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], tensor), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_to_another_dtype(self, net, config, inputs, train, tmp_path, dtype):
        """The network rounds its own weights and inputs; the adapter must add no more than that does."""
        model, x = train(adamss.attach(net(), config())), inputs(5, 16)
        adamss.save(model, tmp_path / "a.safetensors")
        other = adamss.load(net(dtype=dtype), tmp_path / "a.safetensors")
        name = str(dtype).removeprefix("torch.")
        coarsest = max(name, "float32", key=RELATIVE_TOLERANCE.__getitem__)
        y = other(x.to(dtype)).detach()
        assert y.dtype == dtype
        assert_agrees(y.double(), model(x).detach(), dtype=coarsest, what="outputs")
        for path in ("layers.0.query", "layers.1.value"):
            ours, theirs = (core.delta(m.get_submodule(path).adamss.factors()) for m in (model, other))
            assert theirs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_agrees(theirs, ours, dtype="float32", what=f"update of {path}")

    def test_the_mask_travels_and_frozen_subspaces_stay_frozen(self, net, config, train, tmp_path):
        model = train(adamss.attach(net(), config()))
        model.layers[0].query.adamss.active[1] = False
        adamss.save(model, tmp_path / "a.safetensors")
        other = adamss.load(net(), tmp_path / "a.safetensors")
        assert other.layers[0].query.adamss.active.tolist() == [True, False, True]
        assert adamss.summary(other).total.active == 11
        other(torch.ones(3, 16)).sum().backward()
        adapter = other.layers[0].query.adamss
        frozen = adapter.labels == 1
        assert torch.count_nonzero(adapter.C.grad[:, frozen]) == 0
        assert torch.count_nonzero(adapter.C.grad[:, ~frozen]) > 0
        groups = torch.repeat_interleave(torch.arange(3), adapter.ranks)
        assert torch.count_nonzero(adapter.B.grad[groups == 1]) == 0
        assert torch.count_nonzero(adapter.B.grad[groups != 1]) > 0

    def test_a_portable_file_can_be_trained_on_in_the_whole_subspace(
        self, net, config, train, tmp_path, inputs
    ):
        model = train(adamss.attach(net(), config()))
        adamss.save(model, tmp_path / "a.safetensors")
        whole = adamss.load(net(), tmp_path / "a.safetensors")
        small = adamss.load(net(), tmp_path / "a.safetensors", trainable=False)
        assert {row.R for row in adamss.summary(whole).rows} == {6}
        x = inputs(5, 16)
        assert_agrees(small(x).detach(), model(x).detach(), dtype="float32", what="without U")
        A, U = whole.layers[0].query.adamss.A[0], model.layers[0].query.adamss.A[0]
        assert_agrees(A.T @ A, torch.eye(6), dtype="float32", what="orthonormality")
        assert_agrees(A @ (A.T @ U), U, dtype="float32", what="the span of U, as M lies in it")
        assert torch.equal(train(whole).state_dict()["layers.0.query.weight"], net().layers[0].query.weight)

    def test_modules_to_save_travel_whole(self, net, config, train, tmp_path, inputs):
        model = train(adamss.attach(net(), config(modules_to_save=["classifier"])))
        adamss.save(model, tmp_path / "a.safetensors")
        other = adamss.load(net(seed=0), tmp_path / "a.safetensors")
        assert torch.equal(other.classifier.weight, model.classifier.weight)
        assert torch.equal(other.classifier.bias, model.classifier.bias)
        assert {id(p) for p in other.classifier.parameters()} <= {
            id(p) for p in adamss.trainable_parameters(other)
        }


class TestLaw11Compilation:
    @pytest.mark.parametrize("options", [{}, {"basis": "per_subspace"}, {"include_bias": True}], ids=str)
    def test_fullgraph_gives_the_eager_results(self, net, config, inputs, train, options):
        model = train(adamss.attach(net(), config(subspaces=12, subspace_rank=3, **options)))
        x = inputs(4, 16)
        leaves = adamss.trainable_parameters(model)
        eager = model(x)
        expected = torch.autograd.grad(eager.square().sum(), leaves)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compiler's own imports
            compiled = torch.compile(model, fullgraph=True)
            y = compiled(x)
            gradients = torch.autograd.grad(y.square().sum(), leaves)
        assert_agrees(y.detach(), eager.detach(), dtype="float32", what="outputs")
        for actual, reference in zip(gradients, expected, strict=True):
            assert_agrees(actual, reference, dtype="float32", what="gradient")

    def test_a_compiled_model_is_saved_like_its_own(self, net, config, train, tmp_path):
        model = train(adamss.attach(net(), config()))
        compiled = torch.compile(model, backend="eager")
        adamss.save(compiled, tmp_path / "a.safetensors")
        assert [r.path for r in adamss.summary(compiled).rows] == [r.path for r in adamss.summary(model).rows]
        adamss.load(net(), tmp_path / "a.safetensors")


class TestLaw12Determinism:
    def test_one_seed_one_result_and_global_states_untouched(self, net, variant):
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002 (the legacy global state is what is watched)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        first = state(adamss.attach(net(), variant))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        second = state(adamss.attach(net(), variant))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    def test_another_seed_another_segmentation(self, net, config):
        labels = [
            adamss.attach(net(), config(segmentation="random", seed=seed)).layers[0].query.adamss.labels
            for seed in (0, 1)
        ]
        assert not torch.equal(*labels)

    def test_attach_ignores_the_users_numeric_settings(self, net, config):
        first, second = net(), net()
        expected = state(adamss.attach(first, config()))
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                actual = state(adamss.attach(second, config()))
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_attach_under_inference_mode_can_be_trained(net, config, train):
    model = net()
    with torch.inference_mode():
        adamss.attach(model, config())
    train(model)
    assert torch.count_nonzero(model.layers[0].query.adamss.C) > 0


def test_attach_after_the_newer_precision_interface():
    """Once it has been used, PyTorch's older one raises: in a process of its own."""
    code = (
        "import torch, adamss\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "adamss.attach(model, adamss.AdamssConfig(targets=['0']))\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_copies_are_independent(net, config, train, inputs):
    model, x = train(adamss.attach(net(), config())), inputs(3, 16)
    expected = model(x)
    twin = copy.deepcopy(model)
    train(twin)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)
    adamss.detach(twin)
    assert torch.equal(model(x), expected)
