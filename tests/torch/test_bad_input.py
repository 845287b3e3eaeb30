"""Section 8 of the design on PyTorch models: type and message of each error, and nothing left half attached."""

import warnings

import pytest
import torch
from torch import nn

import adamss
from adamss import errors


@pytest.fixture
def unchanged():
    """Return a check that a call raises, names what it should, and leaves the model as it was."""

    def check(model, call, kind, builtin, match):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        required = [p.requires_grad for p in model.parameters()]
        hooks = [len(m._forward_hooks) for m in model.modules()]
        with pytest.raises(kind, match=match) as caught:
            call()
        assert isinstance(caught.value, errors.AdamssError)
        assert isinstance(caught.value, builtin)
        after = model.state_dict()
        assert list(after) == list(before)
        for name, tensor in before.items():
            assert torch.equal(after[name].nan_to_num(), tensor.nan_to_num()), name
        assert [p.requires_grad for p in model.parameters()] == required
        assert [len(m._forward_hooks) for m in model.modules()] == hooks

    return check


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite(net, config, unchanged, value):
    model = net()
    model.layers[1].value.weight.data[2, 3] = value  # the last target: the others come first
    unchanged(
        model,
        lambda: adamss.attach(model, config()),
        errors.ArrayValueError,
        ValueError,
        r"layers\.1\.value.*NaN",
    )


def test_bias_that_is_not_finite(net, config, unchanged):
    model = net()
    model.layers[1].value.bias.data[2] = float("nan")
    attach = lambda: adamss.attach(model, config(include_bias=True))  # noqa: E731
    unchanged(model, attach, errors.ArrayValueError, ValueError, r"layers\.1\.value: bias.*NaN")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_weight_of_another_kind(dtype, config, unchanged):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    attach = lambda: adamss.attach(model, config(targets=["0"]))  # noqa: E731
    unchanged(model, attach, errors.ArrayTypeError, TypeError, r"0: weight.*dtype")


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0)])
def test_empty_axis(inputs, outputs, config, unchanged):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of initialising nothing
        model = nn.Sequential(nn.Linear(inputs, outputs))
    attach = lambda: adamss.attach(model, config(targets=["0"]))  # noqa: E731
    unchanged(model, attach, errors.ArrayValueError, ValueError, r"0: weight.*empty")


def test_meta_device(config, unchanged):
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    with pytest.raises(errors.LayerError, match=r"0 is on the meta device"):
        adamss.attach(model, config(targets=["0"]))
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["quary"], r"targets = \['quary'\].*near matches: query"),
        (["uery"], r"near matches: query"),
        (r".*\.quary", r"targets = .*matches no module"),
        (["zzz"], r"the model has modules called .*query"),
    ],
)
def test_no_module_matches(net, config, unchanged, targets, match):
    model = net()
    attach = lambda: adamss.attach(model, config(targets=targets))  # noqa: E731
    unchanged(model, attach, errors.TargetError, ValueError, match)


def test_no_module_to_save_matches(net, config, unchanged):
    model = net()
    attach = lambda: adamss.attach(model, config(modules_to_save=["clasifier"]))  # noqa: E731
    unchanged(model, attach, errors.TargetError, ValueError, "modules_to_save.*near matches: classifier")


def test_a_name_that_matches_nothing_beside_one_that_does_warns(net, config):
    with pytest.warns(adamss.AdamssWarning, match="valu match no module; near matches: value"):
        model = adamss.attach(net(), config(targets=["query", "valu"]))
    assert len(adamss.summary(model).rows) == 2


@pytest.mark.parametrize(
    ("target", "kind"), [("layers", "ModuleList"), ("1", "LayerNorm"), ("0", "Embedding")]
)
def test_matched_module_has_no_weight_to_adapt(config, unchanged, target, kind):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Embedding(3, 4), nn.LayerNorm(4)])})
    attach = lambda: adamss.attach(model, config(targets=[target]))  # noqa: E731
    unchanged(model, attach, errors.LayerTypeError, TypeError, rf"{target} is a {kind}")


@pytest.mark.parametrize("saved", ["query", "layers"])
def test_a_target_within_a_saved_module(net, config, unchanged, saved):
    model = net()
    attach = lambda: adamss.attach(model, config(modules_to_save=[saved]))  # noqa: E731
    unchanged(model, attach, errors.TargetError, ValueError, r"layers\.0\.query.*modules_to_save")


def test_verbs_out_of_order(net, config, unchanged, tmp_path):
    model = net()
    for verb in (
        adamss.detach,
        adamss.merge,
        adamss.unmerge,
        adamss.summary,
        adamss.trainable_parameters,
        lambda m: adamss.save(m, tmp_path / "a.safetensors"),
        lambda m: adamss.disabled(m).__enter__(),
    ):
        unchanged(
            model, lambda verb=verb: verb(model), errors.StateError, RuntimeError, "no adapters.*attach"
        )
    assert not list(tmp_path.iterdir())
    adamss.attach(model, config())
    unchanged(
        model, lambda: adamss.attach(model, config()), errors.StateError, RuntimeError, "already.*detach"
    )
    unchanged(model, lambda: adamss.unmerge(model), errors.StateError, RuntimeError, "not merged")
    adamss.merge(model)
    unchanged(model, lambda: adamss.merge(model), errors.StateError, RuntimeError, "merged already.*unmerge")


def test_a_part_of_an_adapted_model(net, config, unchanged):
    model = adamss.attach(net(), config())
    for verb in (lambda m: adamss.attach(m, config()), adamss.summary, adamss.detach):
        call = lambda verb=verb: verb(model.layers[0])  # noqa: E731
        unchanged(model, call, errors.StateError, RuntimeError, "adapters are attached already")


def test_a_lazy_layer_elsewhere_and_as_target(config):
    for targets in (["query"], ["lazy"]):
        model = nn.ModuleDict({"query": nn.Linear(4, 4), "lazy": nn.LazyLinear(3)})
        with pytest.raises(errors.LayerError, match=r"lazy.*run the model once"):
            adamss.attach(model, config(targets=targets))
        assert model["query"].weight.requires_grad
        assert not model["query"]._forward_hooks


def test_a_target_that_shares_its_weight_with_a_saved_module(config, unchanged):
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["query"].weight
    attach = lambda: adamss.attach(model, config(targets=["query"], modules_to_save=["head"]))  # noqa: E731
    unchanged(model, attach, errors.TargetError, ValueError, "head shares its weight")


def test_an_attribute_where_the_adapter_goes(net, config, unchanged):
    model = net()
    model.layers[0].query.adamss = 3
    unchanged(
        model, lambda: adamss.attach(model, config()), errors.LayerError, ValueError, "attribute 'adamss'"
    )


@pytest.mark.parametrize("unit", ["subspaces", "parameters"])
def test_budget_over_the_total(net, config, unchanged, unit):
    model = net()
    budget = adamss.BudgetConfig(target=10**6, end_step=5, unit=unit)
    attach = lambda: adamss.attach(model, config(budget=budget))  # noqa: E731
    unchanged(model, attach, errors.ConfigError, ValueError, rf"target = 1000000 is more than the \d+ {unit}")
    adamss.attach(model, config(budget=adamss.BudgetConfig(target=12, end_step=5)))
    assert adamss.summary(model).total.active == 12


def test_merge_of_a_parametrized_bias(net, config, unchanged):
    model = net()
    nn.utils.parametrize.register_parametrization(model.layers[0].query, "bias", nn.Identity())
    adamss.attach(model, config(include_bias=True))
    unchanged(
        model,
        lambda: adamss.merge(model),
        errors.LayerError,
        ValueError,
        r"layers\.0\.query.*parametrization",
    )


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


def test_files_that_do_not_fit_the_model(net, config, train, unchanged, tmp_path):
    path = tmp_path / "a.safetensors"
    adamss.save(train(adamss.attach(net(), config(modules_to_save=["classifier"]))), path)

    def refused(model, match):
        unchanged(model, lambda: adamss.load(model, path), errors.CheckpointError, ValueError, match)

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
    adapted = adamss.attach(net(), config())
    unchanged(adapted, lambda: adamss.load(adapted, path), errors.StateError, RuntimeError, "already")


def test_bias_update_on_a_layer_without_bias(net, config, unchanged, tmp_path):
    model = adamss.attach(net(), config(include_bias=True))
    adamss.save(model, tmp_path / "a.safetensors")
    other = net(bias=False)
    for name in ("query", "value"):
        for i in (0, 1):
            getattr(other.layers[i], name).weight.data.copy_(getattr(model.layers[i], name).weight)
    load = lambda: adamss.load(other, tmp_path / "a.safetensors")  # noqa: E731
    unchanged(other, load, errors.CheckpointError, ValueError, "bias too, but the layer has none")


def test_another_base_on_purpose(net, config, train, tmp_path):
    adamss.save(train(adamss.attach(net(), config())), tmp_path / "a.safetensors")
    model = adamss.load(net(seed=1), tmp_path / "a.safetensors", check_base=False)
    assert adamss.summary(model).total.active == 12


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(6, 8),
        torch.ones(6, 8),
        torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 4),
        torch.eye(6, 8) * 1e-30,
        torch.eye(6, 8) * 1e30,
        torch.randn(6, 1, generator=torch.Generator().manual_seed(0)),
        torch.randn(1, 8, generator=torch.Generator().manual_seed(0)),
        torch.randn(1, 1, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["zero", "rank one", "duplicate rows", "tiny", "huge", "one input", "one output", "one number"],
)
@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
@pytest.mark.parametrize("segmentation", ["kmeans", "spectral", "ksubspaces", "contiguous", "random"])
def test_degenerate_weights_work(weight, basis, segmentation):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight
    x = torch.ones(2, weight.shape[1])
    expected = model(x)
    config = adamss.AdamssConfig(
        targets=["0"],
        subspaces=3,
        subspace_rank=2,
        basis=basis,
        segmentation=segmentation,
        segmentation_dimension=2 if segmentation == "ksubspaces" else None,
    )
    adamss.attach(model, config)
    f = model[0].adamss.default.factors()
    assert all(torch.isfinite(array).all() for array in (f.A, f.B, f.C))
    for A, columns in zip(f.A, adamss.core.basis_ranks(f), strict=False):
        torch.testing.assert_close(
            A.T @ A, torch.diag((torch.arange(A.shape[1]) < columns).float()), atol=1e-5, rtol=0
        )
    assert torch.bincount(f.labels, minlength=f.ranks.numel()).min() >= 1
    assert torch.equal(model(x), expected)
