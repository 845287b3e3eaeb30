"""Test what the laws mean for PyTorch: state dicts, requires_grad, hooks, shared weights, the default compiler.

`adamss_conformance` tests the laws themselves.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from torch_support import assert_agree, assert_same_state, required, state

import adamss
from adamss_conformance.cases import THOROUGH, VARIANTS
from adamss_conformance.tolerances import assert_agrees


class TestLaw2BaseUntouched:
    def test_detach_restores_a_partly_frozen_model(self, net, config):
        model = net()
        model.layers[0].requires_grad_(False)
        before = required(model)
        adamss.detach(adamss.attach(model, config(modules_to_save=["classifier"])))
        assert required(model) == before

    def test_a_reference_forward_leaves_the_backward_of_another_alone(self, net, config, inputs, train):
        """Preference optimisation needs the outputs of the base between forward and backward."""
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
        with adamss.disabled(model) as base:
            assert base is model
            with adamss.disabled(model):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
            for verb in (adamss.merge, adamss.detach, lambda m: adamss.save(m, tmp_path / "a.safetensors")):
                with pytest.raises(adamss.errors.StateError, match=r"switched off by adamss\.disabled"):
                    verb(model)
        assert torch.equal(model(x), adapted)


class TestLaw5Merge:
    @pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
    def test_merged_outputs_and_exact_unmerge(self, net, config, variant, inputs, train):
        model, x = net(), inputs(6, 16)
        before = state(model)
        train(adamss.attach(model, config(**variant)))
        adapted, whole = model(x), state(model)
        assert adamss.merge(model) is model
        assert_agrees(model(x).detach(), adapted.detach(), dtype="float32", what="merged outputs")
        with adamss.disabled(model) as base:
            assert_same_state({n: t for n, t in base.state_dict().items() if "adamss" not in n}, before)
        assert adamss.unmerge(model) is model
        assert_same_state(model, whole)
        assert torch.equal(model(x), adapted)

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
        model.head.adamss.default.C.data.fill_(0.1)
        x = inputs(2, 16)
        adapted = model.head(x)
        with pytest.warns(adamss.AdamssWarning, match=r"head\.weight is one tensor with embed\.weight"):
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
        model.layers[1].value.adamss.default.C.data[0, 0] = float("nan")
        before = state(model)
        with pytest.raises(adamss.errors.ArrayValueError, match=r"layers\.1\.value"):
            adamss.merge(model)
        assert_same_state(model, before)
        assert model(torch.ones(1, 16)).shape == (1, 5)


class TestLaw9Travel:
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
        A, U = whole.layers[0].query.adamss.default.A[0], model.layers[0].query.adamss.default.A[0]
        assert_agrees(A.T @ A, torch.eye(6), dtype="float32", what="orthonormality")
        assert_agrees(A @ (A.T @ U), U, dtype="float32", what="the span of U, as M lies in it")
        assert torch.equal(train(whole).state_dict()["layers.0.query.weight"], net().layers[0].query.weight)


class TestLaw11Compilation:
    @pytest.mark.parametrize("options", [{}, {"basis": "per_subspace", "include_bias": True}], ids=str)
    def test_fullgraph_gives_the_eager_results(self, net, config, inputs, train, options):
        model = train(adamss.attach(net(), config(subspaces=12, subspace_rank=3, **options)))
        x = inputs(4, 16)
        leaves = adamss.trainable_parameters(model)
        eager = model(x)
        expected = torch.autograd.grad(eager.square().sum(), leaves)
        torch._dynamo.reset()
        # The default backend takes 25 s to generate code; the other one captures and differentiates as it does.
        backend = "inductor" if THOROUGH or not options else "aot_eager"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own imports warn
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            y = compiled(x)
            gradients = torch.autograd.grad(y.square().sum(), leaves)
        assert_agrees(y.detach(), eager.detach(), dtype="float32", what="outputs")
        assert_agree(gradients, expected, "float32", "gradient")

    def test_a_compiled_model_is_saved_like_its_own(self, net, config, train, tmp_path):
        model = train(adamss.attach(net(), config()))
        compiled = torch.compile(model, backend="eager")
        adamss.save(compiled, tmp_path / "a.safetensors")
        assert [r.path for r in adamss.summary(compiled).rows] == [r.path for r in adamss.summary(model).rows]
        adamss.load(net(), tmp_path / "a.safetensors")


class TestLaw12Determinism:
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
        assert_same_state(actual, expected)


def test_attach_under_inference_mode_can_be_trained(net, config, train):
    model = net()
    with torch.inference_mode():
        adamss.attach(model, config())
    train(model)
    assert torch.count_nonzero(model.layers[0].query.adamss.default.C) > 0


def test_attach_after_the_newer_precision_interface():
    """After this interface has been used, PyTorch's older one raises. The setting is global, hence a new process."""
    code = (
        "import torch, adamss\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "adamss.attach(model, adamss.AdamssConfig(targets=['0']))\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
