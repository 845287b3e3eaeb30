"""Test the ways in which real models use a linear layer."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch_support import assert_agree, assert_same_state, checkpointed, gradients, state

import adamss
from adamss_conformance.tolerances import assert_agrees
from adamss_torch.bank import without_weights


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(net, config, inputs, train, reentrant):
    model = train(adamss.attach(net(), config()))
    x = inputs(4, 16).requires_grad_()
    expected = gradients(model, model(x).square().sum())

    actual = gradients(model, checkpointed(model, x, reentrant=reentrant).square().sum())
    assert_agree(actual, expected, "float32", "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_trains_float32_factors(net, config, train, dtype):
    model = train(adamss.attach(net(dtype=dtype), config()))
    assert {p.dtype for p in adamss.trainable_parameters(model)} == {torch.float32}
    assert model(torch.ones(2, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_factor_dtype_is_the_users_choice(net, config, inputs, name):
    model = adamss.attach(net(), config(factor_dtype=name))
    assert {str(p.dtype) for p in adamss.trainable_parameters(model)} == {f"torch.{name}"}
    model(inputs(2, 16)).sum().backward()
    assert {str(p.grad.dtype) for p in adamss.trainable_parameters(model)} == {f"torch.{name}"}


def test_keyword_input(config, inputs):
    layer = adamss.attach(nn.Sequential(nn.Linear(8, 8)), config(targets=["0"]))[0]
    layer.adamss.default.C.data.fill_(0.3)
    x = inputs(3, 8)
    assert torch.equal(layer(input=x), layer(x))


def test_transposed_and_strided_inputs(config, inputs):
    model = adamss.attach(nn.Sequential(nn.Linear(8, 5)), config(targets=["0"]))
    model[0].adamss.default.C.data.fill_(0.3)
    x = inputs(8, 6, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_agrees(model(x).detach(), model(x.contiguous()).detach(), dtype="float32", what="outputs")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_transformer_paths_do_not_bypass_the_adapter(config, inputs, mode):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    model = adamss.attach(nn.TransformerEncoder(layer, 2).eval(), config(targets=["linear1", "linear2"]))
    x = inputs(2, 5, 16)
    with mode():
        before = model(x).clone()
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    expected = model(x).detach()
    with mode():
        fused = model(x).clone()
    assert_agrees(fused, expected, dtype="float32", what="outputs under no_grad")
    assert float((fused - before).abs().max()) > 0.01


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_on_fused_inference_paths(config, inputs, mode):
    """Without hooks, `torch.nn.TransformerEncoderLayer` reads the weights of its attention itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = adamss.attach(nn.TransformerEncoder(layer, 2).eval(), config(targets=["self_attn"]))
    x = inputs(2, 5, 16)
    with mode():
        before = model(x).clone()
    for parameter in adamss.trainable_parameters(model):
        parameter.data.add_(0.05)
    expected = model(x).detach()
    with mode():
        assert_agrees(model(x).clone(), expected, dtype="float32", what="outputs without gradients")
    assert float((expected - before).abs().max()) > 0.01
    assert_agrees(adamss.merge(model)(x).detach(), expected, dtype="float32", what="merged")


@pytest.mark.parametrize("targets", [["0", "2"], ["0"], ["2"], "[02]"], ids=str)
def test_a_module_that_appears_twice_is_adapted_once(config, targets):
    shared = nn.Linear(8, 8)
    model = adamss.attach(nn.Sequential(shared, nn.ReLU(), shared), config(targets=targets))
    assert [row.path for row in adamss.summary(model).rows] == ["0"]
    assert len(shared._forward_hooks) == 1
    assert len(adamss.trainable_parameters(model)) == 2
    adamss.merge(model)  # it is one layer and not two with one weight, so there is no warning about ties


def test_the_layer_keeps_class_weight_and_state_dict_keys(net, config):
    model = net()
    keys, weight = list(model.state_dict()), model.layers[0].query.weight
    adamss.attach(model, config())
    assert type(model.layers[0].query) is nn.Linear
    assert model.layers[0].query.weight is weight
    assert [key for key in model.state_dict() if ".adamss." not in key] == keys


def test_a_single_linear_layer_is_a_model(inputs, tmp_path):
    model = nn.Linear(8, 6)
    adamss.attach(model, adamss.AdamssConfig(targets=".*"))
    model.adamss.default.C.data.fill_(0.2)
    adamss.save(model, tmp_path / "a.safetensors")
    other = nn.Linear(8, 6)
    other.load_state_dict({"weight": model.weight, "bias": model.bias})
    x = inputs(3, 8)
    adamss.load(other, tmp_path / "a.safetensors")
    assert_agrees(other(x).detach(), model(x).detach(), dtype="float32", what="outputs")


def test_a_part_of_a_model_can_be_adapted_and_reached_through_the_whole(net, config, inputs, tmp_path):
    model = net()
    adamss.attach(model.layers, config())
    assert adamss.summary(model).rows[0].path == "0.query"
    with pytest.raises(adamss.errors.StateError, match="already"):
        adamss.attach(model, config())
    adamss.save(model, tmp_path / "a.safetensors")
    other = net()
    adamss.load(other.layers, tmp_path / "a.safetensors")
    x = inputs(2, 16)
    assert torch.equal(other(x), model(x))
    adamss.detach(model)
    assert "adamss" not in str(model)


def test_wrappers_are_seen_through(net, config, tmp_path):
    model = adamss.attach(net(), config())
    wrapped = nn.DataParallel(model)
    adamss.save(wrapped, tmp_path / "a.safetensors")
    assert str(adamss.summary(wrapped)) == str(adamss.summary(model))
    fresh = nn.DataParallel(net())
    assert adamss.load(fresh, tmp_path / "a.safetensors") is fresh
    assert adamss.summary(fresh).rows[0].path == "layers.0.query"


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved])
def test_copies_keep_adapters_merges_and_saved_modules(net, config, train, inputs, copy_of):
    model, x = train(adamss.attach(net(), config(modules_to_save=["classifier"]))), inputs(5, 16)
    base, adapted = net()(x), model(x)
    merged = adamss.merge(copy_of(model))
    twin = copy_of(merged)
    assert_agrees(twin(x).detach(), adapted.detach(), dtype="float32", what="merged copy")
    assert torch.equal(adamss.unmerge(twin)(x), adapted)
    assert not torch.equal(merged(x), adapted), "merged, it rounds otherwise"
    assert torch.equal(adamss.unmerge(merged)(x), adapted)
    assert not torch.equal(train(twin)(x), adapted)
    assert torch.equal(adamss.detach(twin)(x), base)
    assert torch.equal(model(x), adapted)


def test_state_dict_round_trip_rebuilds_what_it_does_not_hold(net, config, train, inputs):
    """The layout of C depends on the labels, so loading other labels must change it too."""
    model = train(adamss.attach(net(), config(segmentation="random", seed=3, subspace_rank=1)))
    other = adamss.attach(net(), config(segmentation="random", seed=4, subspace_rank=1))
    labels = [each.layers[0].query.adamss.default.labels for each in (model, other)]
    assert not torch.equal(*labels)
    other.load_state_dict(model.state_dict())
    x = inputs(3, 16)
    assert torch.equal(other(x), model(x))


def test_moving_and_casting_the_model_moves_the_adapter(net, config, train, inputs):
    model = train(adamss.attach(net(), config()))
    expected = model(inputs(3, 16))
    model.to(torch.float64)
    y = model(inputs(3, 16, dtype=torch.float64))
    assert y.dtype == torch.float64
    assert_agrees(y.detach(), expected.detach(), dtype="float32", what="outputs")


def test_gradients_flow_through_a_frozen_adapter(net, config, inputs, train):
    model = train(adamss.attach(net(), config()))
    x = inputs(3, 16).requires_grad_()
    model(x).square().sum().backward()
    expected = x.grad.clone()
    for parameter in adamss.trainable_parameters(model):
        parameter.requires_grad_(False)
    x.grad = None
    model(x).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_hooks_of_a_new_process_do_not_displace_the_adapter(net, config, train, inputs, monkeypatch):
    x = inputs(5, 16)
    model = pickle.loads(pickle.dumps(train(adamss.attach(net(), config()))))
    expected = model(x)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in a new process
    query = model.layers[0].query
    handles = [query.register_forward_hook(lambda *_: None, with_kwargs=kind) for kind in (False, True)]
    assert torch.equal(model(x), expected)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), expected)
    adamss.detach(model)
    assert not query._forward_hooks
    assert not query._forward_hooks_with_kwargs


@pytest.fixture
def default_compiler():
    """Use the default setting of PyTorch, in which the compiler does not guard hooks."""
    config = torch._dynamo.config
    before = config.skip_nnmodule_hook_guards
    config.skip_nnmodule_hook_guards = True
    torch.compiler.reset()
    yield
    config.skip_nnmodule_hook_guards = before
    torch.compiler.reset()


@pytest.mark.usefixtures("default_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
class TestCompiledBeforeAndAfter:
    """A graph compiled without the adapter must not be used for the model with it, nor vice versa."""

    def compiled(self, model):
        return torch.compile(model, backend="eager")

    def assert_follows(self, compiled, model, x, training):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)

    def test_compiled_before_it_was_attached_to(self, net, config, train, inputs, training):
        model, x = net().requires_grad_(False), inputs(40, 16)
        compiled = self.compiled(model)
        before = compiled(x)
        train(adamss.attach(model, config()))
        self.assert_follows(compiled, model, x, training)
        adamss.detach(model)
        self.assert_follows(compiled, model, x, training)
        torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)

    def test_another_model_of_the_same_structure(self, net, config, train, inputs, training):
        x = inputs(40, 16)
        adapted = train(adamss.attach(net(), config()))
        for base in (net().requires_grad_(False), adamss.merge(copy.deepcopy(adapted))):
            self.assert_follows(self.compiled(base), base, x, training)
            self.assert_follows(self.compiled(adapted), adapted, x, training)

    def test_an_unpickled_model(self, net, config, train, inputs, training):
        x, stored = inputs(40, 16), pickle.dumps(train(adamss.attach(net(), config())))
        torch._dynamo.config.skip_nnmodule_hook_guards = True  # the default in a new process
        torch.compiler.reset()
        model, base = pickle.loads(stored), net().requires_grad_(False)
        self.assert_follows(self.compiled(base), base, x, training)
        self.assert_follows(self.compiled(model), model, x, training)

    def test_compiled_once_through_all_verbs(self, net, config, train, inputs, training):
        x = inputs(40, 16)
        model = train(adamss.attach(net(), config()))
        compiled = self.compiled(model)
        for verb in ("merge", "unmerge", "merge", "unmerge"):
            self.assert_follows(compiled, model, x, training)
            getattr(adamss, verb)(model)
        with adamss.disabled(model):
            self.assert_follows(compiled, model, x, training)
        self.assert_follows(compiled, model, x, training)
        adamss.detach(model)
        self.assert_follows(compiled, model, x, training)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"subspace_rank": 2}, {"basis": "per_subspace"}], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_exported(net, config, train, inputs, options, strict):
    model, x = train(adamss.attach(net(), config(**options))), inputs(40, 16)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_the_layout_follows_where_other_libraries_move_buffers(net, config, train, inputs):
    """FSDP2 and accelerate move Parameters and buffers one by one, but do not know the layout."""
    model, x = train(adamss.attach(net(), config())), inputs(4, 16)
    expected, adapter = model(x), model.layers[0].query.adamss.default
    adapter.layout = adapter.layout._replace(rows=adapter.layout.rows.to("meta"))
    assert torch.equal(model(x), expected)


class TestStatesWhoseWeightsHoldTheUpdate:
    """A model that is not merged or consolidated would count the update of such a state twice."""

    @pytest.fixture
    def frozen(self, net, config, train):
        def make():
            model = train(adamss.attach(net(), config()))
            for layer in model.layers:
                layer.query.adamss.default.active[0] = False
            return model

        return make

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("verb", [adamss.merge, adamss.consolidate])
    def test_they_are_told_apart(self, net, config, frozen, inputs, verb, strict):
        x = inputs(4, 16)
        changed, plain = verb(frozen()), frozen()
        for target, source in ((adamss.attach(net(), config()), changed), (changed, plain)):
            adapter = target.layers[0].query.adamss.default
            before = state(adapter)
            with pytest.raises(RuntimeError, match="the weight of the layer holds other subspaces"):
                target.load_state_dict(source.state_dict(), strict=strict)
            # The adapter is unchanged, so a user who ignores the error does not count the update twice.
            assert_same_state(adapter, before)
        twin, source = verb(frozen()), verb(frozen())
        with torch.no_grad():
            source.classifier.bias.add_(1)
        assert not any(twin.load_state_dict(source.state_dict(), strict=strict))
        torch.testing.assert_close(twin(x), source(x), rtol=0, atol=0)

    def test_factors_alone(self, net, config, frozen):
        """A state without the weight, as in the Trainer's checkpoints, fits if the weight contains what it says."""
        model = adamss.consolidate(frozen())
        own = without_weights({name: tensor for name, tensor in state(model).items() if ".adamss." in name})
        trained, folded = (
            torch.isin(model.layers[0].query.adamss.default.labels, torch.tensor(k)) for k in ([1, 2], [0])
        )
        name = "layers.0.query.adamss.default.C"
        own[name][:, trained] += 1
        model.load_state_dict(own, strict=False)
        assert torch.equal(model.layers[0].query.adamss.default.C, own[name])
        own[name][:, folded] += 1
        with pytest.raises(RuntimeError, match="the weight of the layer holds other subspaces"):
            model.load_state_dict(own, strict=False)


class TestStatesThatDoNotFit:
    """A refused state leaves the whole adapter unchanged, although PyTorch itself loads the tensors that fit."""

    def adapter_state(self, model):
        return {name: tensor for name, tensor in state(model).items() if "adamss" in name}

    @pytest.mark.parametrize(
        "changes", [{"subspaces": 5}, {"subspaces": 2}, {"subspace_rank": 1}, {"rank": 4}]
    )
    @pytest.mark.parametrize("strict", [True, False])
    def test_other_settings(self, net, config, inputs, changes, strict):
        model, other = (adamss.attach(net(), config(**own)) for own in ({}, changes))
        before = self.adapter_state(model)
        x = inputs(4, 16)
        expected = model(x)
        whole = model.state_dict() | self.adapter_state(other)
        with pytest.raises(RuntimeError, match="size mismatch for layers"):
            model.load_state_dict(whole, strict=strict)
        assert_same_state(self.adapter_state(model), before)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize(
        ("name", "value"), [("labels", 99), ("labels", -1), ("ranks", 99), ("ranks", -1)]
    )
    def test_numbers_out_of_range(self, net, config, name, value):
        model = adamss.attach(net(), config())
        before, wrong = self.adapter_state(model), state(model)
        wrong[f"layers.0.query.adamss.default.{name}"][0] = value
        with pytest.raises(RuntimeError, match="do not describe subspaces of this layer"):
            model.load_state_dict(wrong)
        assert_same_state(self.adapter_state(model), before)

    @pytest.mark.parametrize("assign", [True, False])
    def test_into_a_model_without_values(self, net, config, inputs, train, assign):
        model, x = train(adamss.attach(net(), config(subspace_rank=2))), inputs(4, 16)
        empty = copy.deepcopy(model).to("meta")
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(empty(x), model(x))

    def test_trained_numbers_alone(self, net, config, inputs, train):
        """Such a state is an average of the trained parameters, or their best values so far."""
        model, x = train(adamss.attach(net(), config())), inputs(4, 16)
        best = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        expected = model(x)
        train(model)
        model.load_state_dict(best, strict=False)
        assert torch.equal(model(x), expected)
