"""Test bad input on PyTorch models: type and message of each error, and that nothing is left half attached."""

import pytest
import torch
from torch import nn
from torch_support import assert_same_state, required, state

import adamss
from adamss import errors

BUILTINS = {
    errors.ArrayTypeError: TypeError,
    errors.ArrayValueError: ValueError,
    errors.CheckpointError: ValueError,
    errors.ConfigError: ValueError,
    errors.LayerError: ValueError,
    errors.LayerTypeError: TypeError,
    errors.StateError: RuntimeError,
    errors.TargetError: ValueError,
}


def unchanged(model, call, kind, match):
    """Check that a call raises this error with a matching message, and leaves the model unchanged."""
    before, trainable = state(model), required(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(kind, match=match) as caught:
        call(model)
    assert isinstance(caught.value, errors.AdamssError)
    assert isinstance(caught.value, BUILTINS[kind])
    assert_same_state(model, before)
    assert required(model) == trainable
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numbers_that_are_not_finite(net, config, name, value):
    model = net()
    # This is the last target, so the others are adapted before the error.
    model.layers[1].value.get_parameter(name).data[2] = value
    attach = lambda m: adamss.attach(m, config(include_bias=name == "bias"))  # noqa: E731
    unchanged(model, attach, errors.ArrayValueError, rf"layers\.1\.value: {name}.*NaN")


def test_an_attribute_where_the_adapter_goes(net, config):
    model = net()
    model.layers[0].query.adamss = 3
    unchanged(model, lambda m: adamss.attach(m, config()), errors.LayerError, "attribute 'adamss'")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"targets": ["quary"]}, r"targets = \['quary'\].*near matches: query"),
        ({"targets": ["uery"]}, "near matches: query"),
        ({"targets": r".*\.quary"}, "targets = .*matches no module"),
        ({"targets": ["zzz"]}, "the model has modules called .*query"),
        ({"modules_to_save": ["clasifier"]}, "modules_to_save.*near matches: classifier"),
        ({"modules_to_save": ["query"]}, r"layers\.0\.query.*modules_to_save"),
        ({"modules_to_save": ["layers"]}, r"layers\.0\.query.*modules_to_save"),
    ],
)
def test_names_that_match_nothing_or_each_other(net, config, settings, match):
    unchanged(net(), lambda m: adamss.attach(m, config(**settings)), errors.TargetError, match)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("layer", "dtype", "kind", "match"),
    [
        (lambda: nn.Linear(8, 8), torch.complex64, errors.ArrayTypeError, "weight.*dtype"),
        (lambda: nn.Linear(8, 8), torch.int8, errors.ArrayTypeError, "weight.*dtype"),
        (lambda: nn.Linear(0, 4), torch.float32, errors.ArrayValueError, "weight.*empty"),
        (lambda: nn.Linear(4, 0), torch.float32, errors.ArrayValueError, "weight.*empty"),
        (lambda: nn.LayerNorm(4), torch.float32, errors.LayerTypeError, "is a LayerNorm"),
        (lambda: nn.EmbeddingBag(3, 4), torch.float32, errors.LayerTypeError, "is an? EmbeddingBag"),
        (lambda: nn.ModuleList([nn.Linear(4, 4)]), torch.float32, errors.LayerTypeError, "is a ModuleList"),
    ],
)
def test_layers_without_a_matrix_to_adapt(config, layer, dtype, kind, match):
    model = nn.ModuleDict({"query": layer()})
    for parameter in model.parameters():
        parameter.requires_grad_(False).data = parameter.data.to(dtype)
    unchanged(model, lambda m: adamss.attach(m, config(targets=["query"])), kind, rf"query.*{match}")


def test_a_target_that_shares_its_weight_with_a_saved_module(config):
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["query"].weight
    attach = lambda m: adamss.attach(m, config(targets=["query"], modules_to_save=["head"]))  # noqa: E731
    unchanged(model, attach, errors.TargetError, "head shares its weight")


def test_meta_device(config):
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    with pytest.raises(errors.LayerError, match=r"0 is on the meta device"):
        adamss.attach(model, config(targets=["0"]))
    assert not model[0]._forward_hooks


def test_a_name_that_matches_nothing_beside_one_that_does_warns(net, config):
    with pytest.warns(adamss.AdamssWarning, match="valu match no module; near matches: value"):
        model = adamss.attach(net(), config(targets=["query", "valu"]))
    assert len(adamss.summary(model).rows) == 2


def test_verbs_out_of_order(net, config, tmp_path):
    model = net()
    for verb in (
        adamss.detach,
        adamss.merge,
        adamss.merge_and_unload,
        adamss.unmerge,
        adamss.consolidate,
        adamss.summary,
        adamss.trainable_parameters,
        lambda m: adamss.save(m, tmp_path / "a.safetensors"),
        lambda m: adamss.to_lora(m, tmp_path / "lora"),
        lambda m: adamss.to_peft(m, tmp_path / "peft"),
        lambda m: adamss.disabled(m).__enter__(),
    ):
        unchanged(model, verb, errors.StateError, "no adapters.*attach")
    assert not list(tmp_path.iterdir())
    adamss.attach(model, config())
    unchanged(model, lambda m: adamss.attach(m, config()), errors.StateError, "already.*detach")
    unchanged(model, adamss.unmerge, errors.StateError, "not merged")
    adamss.merge(model)
    unchanged(model, adamss.merge, errors.StateError, "merged already.*unmerge")


def test_a_part_of_an_adapted_model(net, config):
    model = adamss.attach(net(), config())
    for verb in (lambda m: adamss.attach(m, config()), adamss.summary, adamss.detach):
        unchanged(model, lambda m, v=verb: v(m.layers[0]), errors.StateError, "adapters are attached already")


def test_a_lazy_layer_elsewhere_and_as_target(config):
    for targets in (["query"], ["lazy"]):
        model = nn.ModuleDict({"query": nn.Linear(4, 4), "lazy": nn.LazyLinear(3)})
        with pytest.raises(errors.LayerError, match=r"lazy.*run the model once"):
            adamss.attach(model, config(targets=targets))
        assert model["query"].weight.requires_grad
        assert not model["query"]._forward_hooks


@pytest.mark.parametrize("unit", ["subspaces", "parameters"])
def test_budget_over_the_total(net, config, unit):
    model, budget = net(), adamss.BudgetConfig(target=10**6, end_step=5, unit=unit)
    match = rf"target = 1000000 is more than the \d+ {unit}"
    unchanged(model, lambda m: adamss.attach(m, config(budget=budget)), errors.ConfigError, match)
    adamss.attach(model, config(budget=adamss.BudgetConfig(target=12, end_step=5)))
    assert adamss.summary(model).total.active == 12


def test_merge_of_a_parametrized_bias(net, config):
    model = net()
    nn.utils.parametrize.register_parametrization(model.layers[0].query, "bias", nn.Identity())
    adamss.attach(model, config(include_bias=True))
    unchanged(model, adamss.merge, errors.LayerError, r"layers\.0\.query.*parametrization")


def test_tied_modules_in_another_order(tmp_path, config):
    def tied(*names):
        layer = nn.Linear(8, 8)
        nn.init.eye_(layer.weight)
        return nn.ModuleDict(dict.fromkeys(names, layer))

    model = adamss.attach(tied("p", "q"), config(targets=["p"]))
    adamss.save(model, tmp_path / "a.safetensors")
    assert adamss.summary(adamss.load(tied("q", "p"), tmp_path / "a.safetensors")).total.K == 3
    apart = nn.ModuleDict({name: nn.Linear(8, 8) for name in "pq"})
    adamss.save(adamss.attach(apart, config(targets=["p", "q"])), tmp_path / "b.safetensors")
    with pytest.raises(errors.CheckpointError, match="'p' and 'q' are one module"):
        adamss.load(tied("p", "q"), tmp_path / "b.safetensors", check_base=False)


@pytest.mark.parametrize("path", [None, 123, 1.5])
def test_paths_of_the_wrong_kind(net, config, path):
    for call in (lambda: adamss.save(adamss.attach(net(), config()), path), lambda: adamss.load(net(), path)):
        with pytest.raises(errors.ConfigTypeError, match="path must be a string"):
            call()


def test_models_and_configs_of_the_wrong_kind(net, config):
    with pytest.raises(errors.BackendError, match=r"builtins\.dict"):
        adamss.attach({"a": 1}, config())
    with pytest.raises(errors.ConfigTypeError, match=r"AdamssConfig, found dict"):
        adamss.attach(net(), {"targets": ["query"]})


def test_files_that_do_not_fit_the_model(net, config, train, tmp_path):
    path = tmp_path / "a.safetensors"
    adamss.save(train(adamss.attach(net(), config(modules_to_save=["classifier"]))), path)

    def refused(model, match, kind=errors.CheckpointError):
        unchanged(model, lambda m: adamss.load(m, path), kind, match)

    refused(net(seed=1), r"layers\.0\.query: the base weight is not the one")
    other = net()
    other.layers[1].value = nn.Linear(16, 20)
    refused(other, r"layers\.1\.value: the weight has shape \(16, 20\).*\(16, 19\)")
    other = net()
    del other.layers[1]
    refused(other, r"no layer 'layers\.1\.query'")
    other = net()
    other.classifier = nn.Linear(16, 7)
    refused(other, r"classifier\.bias: the file has shape \(5,\), the model \(7,\)")
    other = net()
    other.classifier = nn.Linear(16, 5, bias=False)
    refused(other, r"classifier: the file holds bias, weight, the model has weight")
    refused(adamss.attach(net(), config()), "already", errors.StateError)


def test_bias_update_on_a_layer_without_bias(net, config, tmp_path):
    model, other = adamss.attach(net(), config(include_bias=True)), net(bias=False)
    adamss.save(model, tmp_path / "a.safetensors")
    other.load_state_dict({n: model.state_dict()[n] for n in other.state_dict()})
    load = lambda m: adamss.load(m, tmp_path / "a.safetensors")  # noqa: E731
    unchanged(other, load, errors.CheckpointError, "bias too, but the layer has none")


def test_another_base_on_purpose(net, config, train, tmp_path):
    adamss.save(train(adamss.attach(net(), config())), tmp_path / "a.safetensors")
    model = adamss.load(net(seed=1), tmp_path / "a.safetensors", check_base=False)
    assert adamss.summary(model).total.active == 12


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


WEIGHTS = {
    "zero": torch.zeros(6, 8),
    "rank one": torch.ones(6, 8),
    "duplicate rows": numbers(6, 2).repeat(1, 4),
    "tiny": torch.eye(6, 8) * 1e-30,
    "huge": torch.eye(6, 8) * 1e30,
    "one input": numbers(6, 1),
    "one output": numbers(1, 8),
    "one number": numbers(1, 1),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
@pytest.mark.parametrize("segmentation", ["kmeans", "spectral", "ksubspaces", "contiguous", "random"])
def test_degenerate_weights_work(weight, basis, segmentation):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight
    x = torch.ones(2, weight.shape[1])
    expected = model(x)
    dimension = 2 if segmentation == "ksubspaces" else None
    settings = {"basis": basis, "segmentation": segmentation, "segmentation_dimension": dimension}
    adamss.attach(model, adamss.AdamssConfig(targets=["0"], subspaces=3, subspace_rank=2, **settings))
    f = model[0].adamss.default.factors()
    assert all(torch.isfinite(array).all() for array in (f.A, f.B, f.C))
    for A, columns in zip(f.A, adamss.core.basis_ranks(f), strict=False):
        torch.testing.assert_close(
            A.T @ A, torch.diag((torch.arange(A.shape[1]) < columns).float()), atol=1e-5, rtol=0
        )
    assert torch.bincount(f.labels, minlength=f.ranks.numel()).min() >= 1
    assert torch.equal(model(x), expected)
