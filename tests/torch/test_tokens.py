"""Test the training of single rows of an embedding: `AdamssConfig(trained_tokens=...)`."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_support import assert_same_state, required, state

import adamss
from adamss import errors
from adamss.backend import NumpyLinear, NumpyModel
from adamss.backend.tensors import StoredTensor
from adamss.cli import main
from adamss.io import checkpoint as files
from adamss_torch import BudgetController
from adamss_torch import bank as bank_module
from adamss_torch.backend import adapters_of

V, E = 11, 12
IDS = (3, 7, 10)
X = torch.tensor([[0, 3, 7, 3], [10, 1, 2, 8]])


class Scaled(nn.Embedding):
    """An embedding with its own forward, as in Gemma."""

    embed_scale = 8.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Projection(nn.Linear):
    """A head with its own forward."""

    def forward(self, x):
        return 2 * super().forward(x)


class Words(nn.Module):
    """A language model, whose head is related to the embedding in different ways."""

    def __init__(self, embed, head="none"):
        super().__init__()
        self.embed, self.query = embed, nn.Linear(E, E)
        heads = {"untied": nn.Linear, "tied": nn.Linear, "tied, a bias": nn.Linear, "tied, own": Projection}
        self.out = heads[head](E, V, bias=head == "tied, a bias") if head in heads else None
        if head.startswith("tied"):
            self.out.weight = embed.weight
        self.reads = head == "reads"

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        h = torch.tanh(self.query(self.embed(ids)))
        if self.out is not None:
            return self.out(h)
        return nn.functional.linear(h, self.embed.weight) if self.reads else h


class Fused(Words):
    """A model that reads the weight of its head without calling the head, as fused losses do."""

    def forward(self, ids):
        return nn.functional.linear(torch.tanh(self.query(self.embed(ids))), self.out.weight)


MODELS = {
    "alone": lambda: Words(nn.Embedding(V, E)),
    "padded": lambda: Words(nn.Embedding(V, E, padding_idx=7)),
    "of its own": lambda: Words(Scaled(V, E)),
    "of its own, padded": lambda: Words(Scaled(V, E, padding_idx=7)),
    "untied": lambda: Words(nn.Embedding(V, E), "untied"),
    "tied": lambda: Words(nn.Embedding(V, E), "tied"),
    "tied, a bias": lambda: Words(nn.Embedding(V, E), "tied, a bias"),
    "tied, own": lambda: Words(nn.Embedding(V, E), "tied, own"),
    "tied, of its own": lambda: Words(Scaled(V, E), "tied"),
    "reads": lambda: Words(nn.Embedding(V, E), "reads"),
    "of its own, reads": lambda: Words(Scaled(V, E), "reads"),
    "reads the head": lambda: Fused(nn.Embedding(V, E), "tied"),
    "half": lambda: Words(nn.Embedding(V, E), "tied").bfloat16(),
}
every_model = pytest.mark.parametrize("name", MODELS)


def config(**changes):
    settings = {"targets": ["query"], "rank": 6, "subspaces": 3, "trained_tokens": IDS}
    return adamss.AdamssConfig(**(settings | changes))


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


def rows_of(model):
    return model.embed.adamss.default.rows


def trained(name, **changes):
    """Return an adapted model after some training steps, and the base with the trained rows in its weight."""
    model = adamss.attach(made(name), config(**changes))
    optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X).float() - 1).square().mean().backward()
        optimizer.step()
    base = made(name)
    with torch.no_grad():
        base.embed.weight[list(IDS)] = rows_of(model).detach().to(base.embed.weight)
    factors = {name: tensor for name, tensor in model.state_dict().items() if ".adamss." in name}
    adamss.attach(base, config(**(changes | {"trained_tokens": None})))
    base.load_state_dict({n: t for n, t in factors.items() if not n.startswith("embed")}, strict=False)
    return model, base


def close(actual, expected):
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if expected.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected, **tolerance)


# ---- what it computes --------------------------------------------------------------------------------------


@every_model
def test_starts_equal_and_gives_the_base_back(name):
    model = made(name)
    model.query.requires_grad_(False)
    before, grads, expected = state(model), required(model), model(X)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    adamss.attach(model, config())
    rows = rows_of(model)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, before["embed.weight"][list(IDS)].float())
    assert sum(rows is p for p in adamss.trainable_parameters(model)) == 1
    assert [n for n, p in model.named_parameters() if p.requires_grad and "embed" in n] == [
        "embed.adamss.default.rows"
    ]
    for _ in range(2):
        assert torch.equal(model(X), expected)
    assert before.keys() < state(model).keys()
    assert {*state(model)} - {*before} >= {"embed.adamss.default.rows", "embed.adamss.default.ids"}
    with torch.no_grad():
        rows.add_(1)
    assert not torch.equal(model(X), expected)
    with adamss.disabled(model):
        assert torch.equal(model(X), expected)
    assert not torch.equal(model(X), expected)
    adamss.detach(model)
    assert torch.equal(model(X), expected)
    assert_same_state(model, before)
    assert required(model) == grads
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@every_model
def test_computes_what_the_base_does_with_the_rows_in_its_weight(name):
    model, expected = trained(name)
    assert torch.equal(state(model)["embed.weight"], made(name).embed.weight)
    for _ in range(2):
        close(model(X), expected(X))
    ids = X.to(torch.int32).t()
    close(model(ids), expected(ids))


@every_model
def test_gradients_are_those_of_the_rows_of_the_weight(name):
    model, expected = trained(name)
    model.zero_grad()
    expected.embed.weight.requires_grad_()
    for each in (model, expected):
        each(X).square().sum().backward()
    close(rows_of(model).grad.to(expected.embed.weight), expected.embed.weight.grad[list(IDS)])
    if name == "padded":
        assert not rows_of(model).grad[1].any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_factors_of_another_dtype_leave_the_rows_as_they_are(dtype):
    model = adamss.attach(made("tied"), config(factor_dtype=dtype))
    assert rows_of(model).dtype == torch.float32
    assert torch.equal(model(X), made("tied")(X))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_others_see_the_trained_rows(when):
    def turn(module, args, output):
        return -output

    model, expected = trained("tied")
    y = model(X)
    for each in (model, expected):
        state_of = state(each)
        each.embed.register_forward_hook(turn)
        if when == "before" and each is model:
            adamss.detach(each)
            adamss.attach(each, config()).load_state_dict(state_of)
    torch.testing.assert_close(model(X), expected(X))
    assert not torch.allclose(model(X), y)


@pytest.mark.parametrize("name", ["tied", "of its own", "tied, of its own"])
def test_within_the_forwards_of_accelerate(name):
    hooks = pytest.importorskip("accelerate.hooks")
    model, _ = trained(name)
    y, wrapped = model(X), made(name)
    for module in [*wrapped.modules()]:
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    adamss.attach(wrapped, config())
    assert torch.equal(wrapped(X), made(name)(X))
    # The other models compute with a copy of the weight.
    assert (bank_module.ROWS in vars(wrapped.embed)) == (name == "tied")
    wrapped.load_state_dict(state(model))
    torch.testing.assert_close(wrapped(X), y)


def test_a_weight_that_is_offloaded_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = made("tied")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(
        errors.LayerError, match=r"the weight of embed is a Parameter that is computed, quantised, off"
    ):
        adamss.attach(model, config())


@pytest.mark.parametrize("other", ["embed_2", "tied to it"])
def test_two_embeddings_by_name(other):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(V, E), "embed_2": nn.Embedding(V, E), "query": nn.Linear(E, E)}
    )
    if other == "tied to it":
        model["embed_2"].weight = model["embed"].weight
        with pytest.raises(errors.TargetError, match=r"embed_2 shares its weight with embed, whose rows"):
            adamss.attach(model, config(trained_tokens={"embed": [1], "embed_2": [2]}))
        adamss.attach(model, config(trained_tokens={"embed": [4, 1]}))
    else:
        adamss.attach(model, config(trained_tokens={"embed": [4, 1], "embed_2": [2]}))
        assert model["embed_2"].adamss.default.rows.shape == (1, E)
    with torch.no_grad():
        model["embed"].adamss.default.rows.copy_(torch.ones(2, E) * torch.tensor([[1.0], [4.0]]))
    assert torch.equal(model["embed"](torch.tensor([4, 1]))[:, 0].detach(), torch.tensor([4.0, 1.0]))
    seen = model["embed_2"](torch.tensor([4, 1]))[:, 0].detach()
    assert torch.equal(seen, torch.tensor([4.0, 1.0])) == (other == "tied to it")


# ---- copies, states, compilers -----------------------------------------------------------------------------


@every_model
def test_copies_pickles_and_states(name):
    model, _ = trained(name)
    y, other = model(X), adamss.attach(made(name), config())
    other.load_state_dict(state(model))
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(each(X), y)
        with torch.no_grad():
            rows_of(each).mul_(2)
        assert not torch.equal(each(X), y)
        adamss.detach(each)
    assert torch.equal(model(X), y)


def test_a_state_of_other_tokens_is_refused():
    model, _ = trained("tied")
    other = adamss.attach(made("tied"), config(trained_tokens=[1, 7, 10]))
    before = rows_of(other).clone()
    with pytest.raises(
        RuntimeError, match=r"embed\.adamss\.default\.ids: the rows in the state are those of other"
    ):
        other.load_state_dict(state(model))
    assert torch.equal(rows_of(other), before)
    without = {n: t for n, t in state(model).items() if not n.endswith(".ids")}
    with pytest.raises(RuntimeError, match=r"Missing key.*embed\.adamss\.default\.ids"):
        adamss.attach(made("tied"), config()).load_state_dict(without)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    # If the first forward pass is compiled, nothing shows which module reads a weight without calling its layer.
    ("name", "first"),
    [("tied", True), ("padded", True), ("tied, of its own", True), ("tied", False), ("reads", False)],
)
def test_compiles(name, first):
    torch.compiler.reset()
    model, _ = trained(name)
    fresh = adamss.attach(made(name), config())
    fresh.load_state_dict(state(model))
    model.zero_grad()
    y = model(X)
    y.sum().backward()
    expected = [parameter.grad.clone() for parameter in adamss.trainable_parameters(model)]
    if not first:
        fresh(X)
    compiled = torch.compile(fresh, backend="aot_eager", fullgraph=not first)
    for _ in range(2):
        fresh.zero_grad()
        compiled(X).sum().backward()
        torch.testing.assert_close(compiled(X), y)
        for parameter, gradient in zip(adamss.trainable_parameters(fresh), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["tied", "tied, own", "of its own", "reads"])
def test_under_activation_checkpointing(name, reentrant):
    model, _ = trained(name)
    model.zero_grad()
    model(X).sum().backward()
    expected = rows_of(model).grad.clone()
    model.zero_grad()
    scale = torch.ones((), requires_grad=True)
    checkpoint(lambda ids, scale: model(ids) * scale, X, scale, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(rows_of(model).grad, expected)


# ---- verbs -------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("keep_base", [True, False])
def test_merges(name, keep_base):
    model, _ = trained(name)
    y, before = model(X), state(model)
    W = before["embed.weight"].clone()
    W[list(IDS)] = rows_of(model).detach().to(W)
    adamss.merge(model, keep_base=keep_base)
    close(model(X), y)
    assert torch.equal(model.embed.weight, W)
    assert model.out is None or (model.out.weight is model.embed.weight) == (name != "untied")
    if keep_base:
        with adamss.disabled(model):
            assert torch.equal(model(X), made(name)(X))
        other = adamss.unmerge(copy.deepcopy(model))
        assert torch.equal(other(X), y)
        assert_same_state(other, before)
        adamss.detach(model)
        assert_same_state(model, made(name))
        assert torch.equal(model(X), made(name)(X))
    else:
        with pytest.raises(errors.StateError, match="base weights were dropped"):
            adamss.detach(model)
        assert model.state_dict().keys() == before.keys() | {"query.adamss.default.in_weight"}
        adamss.merge_and_unload(model)
        close(model(X), y)
        assert model.state_dict().keys() == made(name).state_dict().keys()


def test_merging_tells_what_rounding_has_lost_and_refuses_what_overflows():
    model, _ = trained("half")
    with torch.no_grad():
        rows_of(model).copy_(model.embed.weight[list(IDS)].float() * (1 + 2**-9))
        model.query.adamss.default.C.zero_()
    with pytest.warns(errors.AdamssWarning, match=r"rounding to bfloat16 lost \d+% of the update of embed"):
        adamss.merge(model)
    adamss.unmerge(model)
    before = state(model.half())
    with torch.no_grad():
        rows_of(model)[0] = 1e5
    rows_of(model).data = rows_of(model).data.float().fill_(1e5)
    with pytest.raises(
        errors.ArrayValueError, match=r"embed: rows of trained_tokens are not finite as float16"
    ):
        adamss.merge(model)
    assert torch.equal(state(model)["query.weight"], before["query.weight"])
    assert torch.equal(model.embed.weight, before["embed.weight"])


def test_consolidating_leaves_them_alone():
    model, _ = trained("tied")
    adapter = adapters_of(model)["query"]
    adapter.active[1] = False
    y = model(X)
    adamss.consolidate(model)
    torch.testing.assert_close(model(X), y)
    assert torch.equal(model.embed.weight, made("tied").embed.weight)
    adapter.active[:] = False
    with pytest.raises(
        errors.StateError, match="no subspace is trained any more, but the rows of trained_tokens"
    ):
        adamss.consolidate(model)
    assert_same_state(adamss.detach(model), made("tied"))


def test_the_summary_counts_them_and_a_budget_does_not(tmp_path, capsys):
    budget = adamss.BudgetConfig(target=1, end_step=2)
    model = adamss.attach(made("tied"), config(budget=budget))
    summary = adamss.summary(model)
    assert summary.tokens == 3 * E
    assert "\ntrained_tokens: 36 parameters" in str(summary)
    without = adamss.attach(made("tied"), config(trained_tokens=None))
    assert summary.total.trained == adamss.summary(without).total.trained
    optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.5)
    with_budget = BudgetController(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        before = rows_of(model).detach().clone()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        assert not torch.equal(rows_of(model), before)
    assert with_budget.step == 3
    assert int(adapters_of(model)["query"].active.sum()) == 1
    adamss.save(model, tmp_path / "a.safetensors")
    main(["show", str(tmp_path / "a.safetensors")])
    assert "trained_tokens: 36 parameters" in capsys.readouterr().out


# ---- files -------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_goes_into_a_file_and_back(name, training, tmp_path):
    model, _ = trained(name)
    for at in ("a", "b"):
        adamss.save(model, tmp_path / f"{at}.safetensors", training=training)
        adamss.merge(model) if at == "a" else None
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    adamss.unmerge(model)
    other = adamss.load(made(name), tmp_path / "a.safetensors")
    assert torch.equal(rows_of(other), rows_of(model))
    close(other(X), model(X))
    stored = files.read(tmp_path / "a.safetensors")
    assert stored.config.trained_tokens == {"embed": IDS}
    assert stored.tokens["embed"].shape == (3, E)
    inference = adamss.load(made(name), tmp_path / "a.safetensors", trainable=False)
    assert not any(parameter.requires_grad for parameter in inference.parameters())
    assert adamss.trainable_parameters(inference) == []


def test_a_file_is_loaded_before_the_weights_come(tmp_path):
    model, _ = trained("of its own")
    adamss.save(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = made("of its own")
    adamss.load(empty, tmp_path / "a.safetensors", check_base=False, trainable=False)
    empty.load_state_dict(state(made("of its own")), strict=False, assign=True)
    torch.testing.assert_close(empty(X), model(X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "tied"}, r"trained_tokens: 'embed\.weight' and 'out\.weight' are one tensor in this model"),
        ({"base": "alone"}, None),
        ({"V": 9}, r"trained_tokens: embed has 9 rows, and none of the id 10"),
        ({"E": 6}, r"trained_tokens: the rows of embed have 6 numbers, the file's 12"),
        ({"embed": nn.Linear(E, V)}, r"trained_tokens: embed is a Linear, and no embedding"),
        ({"embed": nn.Identity()}, r"embed is a Identity, which has no weight"),
        (
            {"rows": np.ones((2, E), np.float32)},
            r"the rows of 3 trained_tokens of 'embed' are float32 \(2, 12\)",
        ),
        ({"rows": np.ones((3,), np.float32)}, r"the rows of 3 trained_tokens of 'embed' are float32 \(3,\)"),
        ({"rows": np.ones((3, E), np.int64)}, r"the rows of 3 trained_tokens of 'embed' are int64"),
        ({"rows": np.full((3, E), np.nan, np.float32)}, r"the trained_tokens of 'embed' hold NaN"),
        ({"rows": np.full((3, E), 1e300)}, r"the rows of embed are too large for float32"),
        ({"path": "elsewhere"}, r"the model has no layer 'elsewhere'"),
        ({"path": "query"}, r"'query' is an adapted layer, and has trained_tokens too"),
        ({"saved": {"embed": {}}}, r"'embed' is or lies within 'embed', which the file also stores"),
        ({"ids": [3, 7, 7]}, "trained_tokens must be distinct ids from 0 on"),
        ({"ids": [-1, 7, 10]}, "trained_tokens must be distinct ids from 0 on"),
        ({"ids": [3, 7, "10"]}, "trained_tokens must be a list of integers"),
        ({"ids": [3, 7, True]}, "trained_tokens must be a list of integers"),
        ({"ids": [3, 7, 1 << 80]}, f"embed has 11 rows, and none of the id {1 << 80}"),
        ({"ids": [3, 7]}, "the rows of 2 trained_tokens of 'embed' are float32"),
        ({"asked": [3, 7, 10]}, "its trained_tokens do not name their embeddings"),
        ({"asked": None}, r"it holds tensors that belong to no layer: 'embed\.rows'"),
        ({"asked": {"embed": [3, 7, 10], "other": [1]}}, r"other\.rows"),
    ],
)
def test_a_file_that_does_not_fit_or_lies_is_refused(change, message, tmp_path, monkeypatch):
    adamss.save(trained("untied")[0], tmp_path / "a.safetensors")
    stored = files.read(tmp_path / "a.safetensors")
    path, ids = change.get("path", "embed"), change.get("ids", list(IDS))
    asked = change.get("asked", {path: ids})
    to_dict = adamss.AdamssConfig.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(adamss.AdamssConfig, "to_dict", lambda self: to_dict(self) | {"trained_tokens": asked})
        rows = StoredTensor.of(change["rows"]) if "rows" in change else stored.tokens["embed"]
        new = {
            "tokens": {path: rows},
            "shared": {f"{path}.weight": frozenset()},
            "saved": change.get("saved", {}),
        }
        files.write(tmp_path / "a.safetensors", dataclasses.replace(stored, **new))
    torch.manual_seed(0)
    model = made(change.get("base", "untied"))
    if "V" in change or "E" in change:
        model.embed = nn.Embedding(change.get("V", V), change.get("E", E))
    model.embed = change.get("embed", model.embed)
    before = state(model)
    if message is None:
        adamss.load(model, tmp_path / "a.safetensors")
        return
    with pytest.raises((errors.CheckpointError, errors.LayerTypeError), match=message):
        adamss.load(model, tmp_path / "a.safetensors")
    assert_same_state(model, before)


def test_a_file_of_a_tied_model_is_for_no_untied_one(tmp_path):
    adamss.save(trained("tied")[0], tmp_path / "a.safetensors")
    with pytest.raises(
        errors.CheckpointError, match=r"'embed\.weight' and 'out\.weight' are two tensors in this"
    ):
        adamss.load(made("untied"), tmp_path / "a.safetensors")


def test_saves_what_is_left_when_the_embedding_was_replaced(tmp_path):
    model, _ = trained("untied")
    with torch.no_grad():  # as in resize_token_embeddings
        model.embed.weight.data = torch.cat([model.embed.weight.data, torch.ones(2, E)])
    assert model.embed(torch.tensor([12]))[0, 0] == 1
    adamss.save(model, tmp_path / "a.safetensors")
    model.embed.weight.data = model.embed.weight.data[:5]
    with pytest.warns(errors.AdamssWarning, match=r"embed has a weight of shape \(5, 12\) now"):
        adamss.save(model, tmp_path / "b.safetensors")
    assert files.read(tmp_path / "b.safetensors").config.trained_tokens is None
    model.embed = nn.Embedding(V, E)
    with pytest.raises(errors.StateError, match="embed has been replaced by another module"):
        adamss.merge(model)


# ---- PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_them_as_trainable_token_indices(causal_lm, tied, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = causal_lm(tied=tied), torch.tensor([[1, 5, 199, 7], [5, 3, 198, 2]])
    model.resize_token_embeddings(202, mean_resizing=False)
    base = copy.deepcopy(model)
    adamss.attach(model, config(targets=None, trained_tokens=[201, 5, 199]))
    assert model.get_input_embeddings().adamss.default.rows.shape == (3, 64)
    with torch.no_grad():
        for parameter in adamss.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    adamss.to_lora(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"] == {"model.embed_tokens": [5, 199, 201]}
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    y = model(ids).logits
    torch.testing.assert_close(loaded(ids).logits, y)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, y)
    torch.testing.assert_close(adamss.merge_and_unload(model)(ids).logits, y)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(errors.StateError, match=r"to_peft: model\.embed_tokens has trained_tokens"):
        adamss.to_peft(adamss.attach(causal_lm(), config(targets=None)), tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tied", "the weight is shared by 1 other modules"),
        ("tied, a bias", "the weight is shared by 1 other modules"),
        ("twin", r"PEFT would also train rows of other\.embed"),
        ("own", "PEFT does not know Other, and treats it as a torch"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(name, why, tmp_path):
    class Other(nn.Embedding):
        def forward(self, ids):
            return -super().forward(ids)

    model = made(name) if name in MODELS else Words(Other(V, E) if name == "own" else nn.Embedding(V, E))
    if name == "twin":
        model.other = nn.ModuleDict({"embed": nn.Embedding(V, E)})
    adamss.attach(model, config())
    with pytest.raises(errors.LayerError, match=rf"to_lora: embed has trained_tokens.*{why}"):
        adamss.to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], errors.ConfigError, "trained_tokens is empty"),
        ([1, 1], errors.ConfigError, "must be distinct ids from 0 on"),
        ([-1], errors.ConfigError, "must be distinct ids from 0 on"),
        ([1.0], errors.ConfigTypeError, "must be a list of integers"),
        ([True], errors.ConfigTypeError, "must be a list of integers"),
        ("12", errors.ConfigTypeError, "must be a list of integers"),
        (b"12", errors.ConfigTypeError, "must be a list of integers"),
        (3, errors.ConfigTypeError, "must be a list of integers"),
        ({}, errors.ConfigError, "must have the names of embeddings"),
        ({"": [1]}, errors.ConfigError, "must have the names of embeddings"),
        ({1: [1]}, errors.ConfigError, "must have the names of embeddings"),
        ({"embed": []}, errors.ConfigError, "trained_tokens is empty"),
        ({"embed": None}, errors.ConfigTypeError, "must have ids for each name"),
        ({"embed": {"a": [1]}}, errors.ConfigTypeError, "must have ids for each name"),
    ],
)
def test_settings_that_cannot_be_used(tokens, error, message):
    with pytest.raises(error, match=message):
        config(trained_tokens=tokens)


def test_settings_are_ascending_and_go_through_json():
    for tokens in ([10, 3, 7], np.array([7, 3, 10]), torch.tensor([3, 10, 7]), range(3), {"embed": [10, 3]}):
        made_of = config(trained_tokens=tokens)
        again = adamss.AdamssConfig.from_dict(json.loads(json.dumps(made_of.to_dict())))
        assert again == made_of
        assert hash(again) == hash(made_of)
    assert made_of.trained_tokens == {"embed": (3, 10)}
    assert config(trained_tokens=[10, 3, 7]).trained_tokens == IDS


REFUSED = {
    "out of range": (
        "tied",
        {"trained_tokens": [V]},
        errors.TargetError,
        r"embed has 11 rows, and none of the id 11",
    ),
    "unknown": ("tied", {"trained_tokens": {"embedd": [1]}}, errors.TargetError, r"trained_tokens.*embed"),
    "no embedding": (
        "tied",
        {"trained_tokens": {"query": [1]}},
        errors.LayerTypeError,
        r"query is a Linear, and no",
    ),
    "twice": (
        "tied",
        {"trained_tokens": {"embed": [1], "x.embed": [2]}},
        errors.TargetError,
        r"names 'x\.embed' twice",
    ),
    "adapted": (
        "untied",
        {"targets": ["query", "embed"]},
        errors.TargetError,
        r"'embed' is adapted by targets, and",
    ),
    "head adapted": (
        "tied",
        {"targets": ["query", "out"]},
        errors.TargetError,
        r"embed shares its weight with a layer",
    ),
    "saved": (
        "untied",
        {"modules_to_save": ["embed"]},
        errors.TargetError,
        r"trained_tokens trains rows of 'embed', which lies within 'embed' that modules_to_save trains whole",
    ),
    "head saved": (
        "tied",
        {"modules_to_save": ["out"]},
        errors.TargetError,
        r"embed shares its weight with one of mod",
    ),
    "NaN": ("tied", {}, errors.ArrayValueError, r"embed: the rows of trained_tokens"),
    "meta": ("tied", {}, errors.LayerError, r"on the meta device"),
    "renorm": ("tied", {}, errors.LayerError, r"embed is an Embedding with max_norm"),
    "computed": ("tied", {}, errors.LayerError, r"the weight of embed is a .* that is computed"),
    "unnamed": ("tied", {}, errors.TargetError, r"the input embedding of this Sequential is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_changes(case):
    name, changes, error, message = REFUSED[case]
    model = made(name)
    if case == "twice":
        model = nn.ModuleDict({"x": model})
    if case == "NaN":
        model.embed.weight.data[3, 0] = float("nan")
    if case == "meta":
        model.embed.to("meta")
    if case == "renorm":
        model.embed.max_norm = 1.0
    if case == "computed":
        nn.utils.parametrizations.weight_norm(model.embed)
    if case == "unnamed":
        model = nn.Sequential(model)
    before, grads = state(model), required(model)
    with pytest.raises(error, match=message):
        adamss.attach(model, config(**changes))
    assert_same_state(model, before) if case != "meta" else None
    assert required(model) == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_untied_head_is_saved_or_adapted_beside_them():
    for changes in ({"modules_to_save": ["out"]}, {"targets": ["query", "out"]}):
        model = adamss.attach(made("untied"), config(**changes))
        assert torch.equal(model(X), made("untied")(X))


@pytest.mark.parametrize("framework", ["numpy", "flax", "equinox"])
def test_a_backend_that_cannot_train_rows_says_so(framework, tmp_path):
    adamss.save(trained("alone")[0], tmp_path / "a.safetensors")
    model = _model_of(framework)
    with pytest.raises(
        errors.ConfigError, match=f"the backend {framework} cannot train rows of an embedding"
    ):
        adamss.attach(model, config())
    with pytest.raises(
        errors.ConfigError, match=f"the backend {framework} cannot train rows of an embedding"
    ):
        adamss.load(model, tmp_path / "a.safetensors")
    adamss.attach(model, config(trained_tokens=None))


def _model_of(framework):
    if framework == "flax":
        nnx = pytest.importorskip("flax.nnx")

        class Model(nnx.Module):
            def __init__(self):
                self.embed = nnx.Embed(V, E, rngs=nnx.Rngs(0))
                self.query = nnx.Linear(E, E, rngs=nnx.Rngs(0))

        return Model()
    if framework == "equinox":
        eqx = pytest.importorskip("equinox")
        from jax.random import key

        class Net(eqx.Module):
            embed: eqx.nn.Embedding
            query: eqx.nn.Linear

        return Net(eqx.nn.Embedding(V, E, key=key(0)), eqx.nn.Linear(E, E, key=key(0)))
    return NumpyModel({"embed": NumpyLinear(np.ones((V, E))), "query": NumpyLinear(np.eye(E))})
