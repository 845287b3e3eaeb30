"""Test which layers a config selects: "all-linear", default targets, exclude, overrides."""

import copy
import warnings

import pytest
import torch
from torch import nn

import adamss
from adamss import core, errors
from adamss.backend import backend_for
from adamss.backend.targets import DEFAULT_TARGETS
from adamss_torch.backend import adapters_of

SMALL = {"rank": 6, "subspaces": 3}


def paths(model):
    return [row.path for row in adamss.summary(model).rows]


def chosen(model, **settings):
    return paths(adamss.attach(model, adamss.AdamssConfig(**SMALL, **settings)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3)
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 16)


class Net(nn.Module):
    """A model with layers of every kind."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Block(), Block()])
        self.conv, self.depthwise = nn.Conv1d(6, 8, 3), nn.Conv1d(6, 12, 3, groups=6)
        self.again = nn.Conv1d(6, 12, 3, groups=6)
        self.embed, self.table = nn.Embedding(9, 10), nn.Parameter(torch.randn(7, 8))
        self.lstm, self.head = nn.LSTM(6, 6), nn.Linear(12, 5)
        self.player = nn.ModuleList([nn.Linear(6, 6)])

    def get_output_embeddings(self):
        return self.head


ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LINEAR = [f"layer.{i}.{name}" for i in (0, 1) for name in (*(f"attn.{p}" for p in ATTENTION), "fc")]


def test_all_linear_takes_every_linear_layer_but_the_head():
    assert sorted(chosen(Net(), targets="all-linear")) == sorted([*LINEAR, "player.0"])
    assert sorted(chosen(Net(), targets="All-Linear", modules_to_save=["player"])) == sorted(LINEAR)


def test_an_attention_means_all_four_of_its_projections_or_those_that_are_named():
    assert chosen(Net(), targets=["layer.0.attn"]) == [f"layer.0.attn.{name}" for name in ATTENTION]
    assert sorted(chosen(Net(), targets=["q_proj", "1.attn"], exclude=["1.attn.k_proj"])) == sorted(
        ["layer.0.attn.q_proj", *(f"layer.1.attn.{name}" for name in ATTENTION if name != "k_proj")]
    )


@pytest.mark.parametrize("exclude", [["attn", "player"], r"layer\..*\.attn.*|player.*"])
def test_exclude(exclude):
    assert chosen(Net(), targets="all-linear", exclude=exclude) == ["layer.0.fc", "layer.1.fc"]
    with pytest.raises(errors.TargetError, match=r"exclude = .* leaves nothing of targets"):
        adamss.attach(Net(), adamss.AdamssConfig(targets=["q_proj"], exclude=exclude))


def test_exclude_that_matches_nothing_is_told():
    with pytest.warns(errors.AdamssWarning, match=r"exclude: atn match no module; near matches: attn"):
        assert len(chosen(Net(), targets="all-linear", exclude=["atn"])) == 11
    with pytest.warns(errors.AdamssWarning, match=r"exclude = 'atn' matches no module"):
        chosen(Net(), targets="all-linear", exclude="atn")


def test_an_expression_takes_what_can_be_adapted_and_tells_what_it_leaves_out_once_for_each_kind():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = chosen(Net(), targets=".*")
    assert sorted(found) == sorted([*LINEAR, "player.0", "head", "conv", "embed", "table"])
    messages = sorted(str(warning.message) for warning in told)
    assert len(messages) == 2
    assert "left out: depthwise is a Conv1d that is depthwise" in messages[0]
    assert "(and 1 more of Conv1d)" in messages[0]
    assert "left out: lstm is a LSTM" in messages[1]


def test_an_expression_of_which_nothing_can_be_adapted_is_an_error():
    with pytest.raises(errors.LayerTypeError, match=r"layer\.0\.norm is a LayerNorm"):
        adamss.attach(Net(), adamss.AdamssConfig(targets=".*norm"))


def test_a_parameter_of_a_module_of_a_known_kind_is_none_to_name():
    reasons = {"fc.weight": "match no module", "in_proj_weight": "name the projections, q_proj"}
    for name, reason in {**reasons, "norm.weight": "match no module"}.items():
        with pytest.raises(errors.TargetError, match=reason):
            adamss.attach(Net(), adamss.AdamssConfig(targets=[name]))


# ---- overrides ---------------------------------------------------------------------------------------------


def test_overrides_match_a_run_of_whole_components_and_later_ones_win():
    overrides = {
        "layer.0": {"subspaces": 2, "rank": 4},
        "fc": {"subspace_rank": 2, "basis": "per_subspace"},
        r"layer\.\d\.fc": {"subspaces": 1, "include_bias": True},
    }
    model = Net()
    chosen(model, targets="all-linear", overrides=overrides)
    rows = {row.path: row for row in adamss.summary(model).rows}
    forms = {path: (row.K, row.R, row.q) for path, row in rows.items()}
    assert forms["layer.0.attn.k_proj"] == (2, 4, 2)
    assert forms["layer.1.attn.k_proj"] == (3, 6, 3)
    assert forms["layer.0.fc"] == (1, 4, 2)
    assert forms["layer.1.fc"] == (1, 6, 2)
    assert forms["player.0"] == (3, 6, 3)
    biases = [path for path, adapter in adapters_of(model).items() if adapter.A.shape[1] > adapter.d]
    assert biases == ["layer.0.fc", "layer.1.fc"]


def planted(*numbers, d=24, n=40):
    """Return stacked matrices (n, d); the rows of each fall into the given number of independent groups."""
    blocks = [[torch.randn(n // K, 1) @ torch.randn(1, d // K) for _ in range(K)] for K in numbers]
    return torch.stack(
        [
            nn.functional.pad(b, (0, d - b.shape[1], 0, n - b.shape[0]))
            for b in (torch.block_diag(*own) for own in blocks)
        ]
    )


def test_each_layer_finds_its_own_number_of_subspaces(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(24, 40), "b": nn.Linear(24, 40), "c": nn.Linear(24, 40)})
    for layer, weight in zip(model.values(), planted(3, 6, 3), strict=True):
        layer.weight.data.copy_(weight)
    estimate = adamss.SubspaceEstimate(minimum=2)
    settings = {"subspaces": estimate, "segmentation": "ncut", "overrides": {"c": {"subspaces": 5}}}
    base = copy.deepcopy(model)
    adamss.attach(model, adamss.AdamssConfig(targets=["a", "b", "c"], rank=12, **settings))
    assert [(row.path, row.K) for row in adamss.summary(model).rows] == [("a", 3), ("b", 6), ("c", 5)]
    adamss.save(model, tmp_path / "a.safetensors")
    loaded = adamss.load(base, tmp_path / "a.safetensors")
    assert adamss.summary(loaded).rows == adamss.summary(model).rows
    assert adamss.adapters(loaded)["default"].config.subspaces == estimate


def test_matrices_of_a_stack_have_the_highest_number_that_one_of_them_finds():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            # The last matrix has no groups, so its labels depend on the exponent.
            self.up = nn.Parameter(torch.cat([planted(3, 6), torch.randn(1, 40, 24)]).mT.contiguous())

        def forward(self, x):
            return x @ self.up

    settings = {
        "subspaces": adamss.SubspaceEstimate(minimum=2, exponent=4),
        "segmentation": "ncut",
        "subspace_rank": 2,
    }
    overrides = {"up": settings, ".*": {"basis": "per_subspace"}}
    model = Experts()
    adamss.attach(model, adamss.AdamssConfig(targets=["up"], rank=12, overrides=overrides))
    assert adamss.summary(model).total.K == 3 * 6
    factors = core.split(backend_for(model).bank(model).only().layers["up"], 3)
    for W, own in zip(model.up.detach(), factors, strict=True):
        decomposition = core.decompose(W.T, 12)
        expected = core.initial_factors(
            decomposition, core.segment(decomposition, 6, "ncut", exponent=4), 2, basis="per_subspace"
        )
        assert torch.equal(own.labels, expected.labels)
        assert torch.equal(own.ranks, expected.ranks)
    model(torch.randn(3, 5, 24)).sum().backward()


def test_overrides_that_change_nothing_are_told():
    with pytest.warns(
        errors.AdamssWarning, match=r"overrides: 'layer\.01' changes nothing of any adapted layer"
    ):
        chosen(Net(), targets="all-linear", overrides={"layer.01": {"rank": 2}})


@pytest.mark.parametrize("training", [True, False])
def test_a_file_has_the_ranks_of_its_layers_and_no_pattern_of_it_is_compiled(tmp_path, training):
    hostile = "(a+)+" * 20 + r"|layer\.0|player"
    settings = {"targets": ["fc", "player.0"], "overrides": {hostile: {"rank": 4}}}
    model = Net()
    chosen(model, **settings)
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
    adamss.save(model, tmp_path / "a.safetensors", training=training)
    torch.manual_seed(0)
    other = Net()
    other.load_state_dict({n: t for n, t in model.state_dict().items() if ".adamss." not in n})
    adamss.load(other, tmp_path / "a.safetensors")
    assert [row.R for row in adamss.summary(other).rows] == [4, 6, 4]
    adamss.save(other, tmp_path / "b.safetensors", training=training)
    third = adamss.load(adamss.detach(other), tmp_path / "b.safetensors")
    assert [row.R for row in adamss.summary(third).rows] == [4, 6, 4]


def test_the_rank_of_a_layer_is_not_that_of_another_whose_path_ends_like_it(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"enc": nn.ModuleDict({"q": nn.Linear(16, 16)}), "q": nn.Linear(16, 16)})

    model = net()
    adamss.attach(
        model, adamss.AdamssConfig(targets=["q"], rank=4, subspaces=3, overrides={r"(?<!\.)q": {"rank": 12}})
    )
    for name in "ab":
        assert [row.R for row in adamss.summary(model).rows] == [4, 12]
        adamss.save(model, tmp_path / name)
        model = adamss.load(net(), tmp_path / name)
    assert [row.R for row in adamss.summary(model).rows] == [4, 12]


def test_overrides_that_do_not_go_together_name_the_layer():
    overrides = {
        ".*": {"segmentation": "ksubspaces", "segmentation_dimension": 2},
        "player": {"segmentation": "kmeans"},
    }
    with pytest.raises(errors.ConfigError, match=r"^overrides: player\.0: segmentation_dimension is for"):
        adamss.attach(Net(), adamss.AdamssConfig(targets=["player.0"], overrides=overrides))


def test_flags_within_an_override_are_refused():
    with pytest.raises(errors.ConfigError, match=r"overrides is not a regular expression.*global flags"):
        adamss.AdamssConfig(overrides={"(?i)fc": {"rank": 2}})


# ---- beside PEFT -------------------------------------------------------------------------------------------


def tiny(name, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name[0]}Config")(**sizes)
    return getattr(transformers, "".join(name))(config)


BASE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
LM = {**BASE, "vocab_size": 64, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": (("Llama", "ForCausalLM"), LM),
    "qwen2": (("Qwen2", "ForCausalLM"), LM),
    "gemma2": (("Gemma2", "ForCausalLM"), {**LM, "head_dim": 16}),
    "gpt_oss": (("GptOss", "ForCausalLM"), {**LM, "num_local_experts": 2, "head_dim": 16}),
    "bert": (("Bert", "ForMaskedLM"), {**BASE, "vocab_size": 64}),
    "electra": (("Electra", "ForMaskedLM"), {**BASE, "vocab_size": 64, "embedding_size": 32}),
    "vit": (("ViT", "Model"), {**BASE, "image_size": 16, "patch_size": 8}),
    "gpt2": (("GPT2", "LMHeadModel"), {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}),
    "gpt_neox": (("GPTNeoX", "ForCausalLM"), {**BASE, "vocab_size": 64}),
    "t5": (("T5", "ForConditionalGeneration"), {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1}),
    "opt": (
        ("OPT", "ForCausalLM"),
        {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_takes_what_peft_takes(name, targets):
    peft = pytest.importorskip("peft")
    model = tiny(ARCHITECTURES[name][0], **ARCHITECTURES[name][1])
    kind = model.config.model_type
    if targets is None and kind not in DEFAULT_TARGETS:
        with pytest.raises(errors.TargetError, match=f"no default targets for a model of type '{kind}'"):
            adamss.attach(model, adamss.AdamssConfig())
        return
    ours = chosen(model, targets=targets)
    if targets is None:
        names = adamss.summary(model).targets
        assert set(names) <= set(DEFAULT_TARGETS[kind])
        assert f"targets: {', '.join(names)}" in str(adamss.summary(model))
    adamss.detach(model)
    if targets is None and kind == "vit":
        targets = list(names)  # PEFT's defaults have the names of transformers 4
    with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5 has deprecated
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets)).targeted_module_names
    assert sorted(ours) == sorted(theirs)


def test_default_targets_are_those_of_peft():
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING
    as_ours = {kind: names if isinstance(names, str) else tuple(names) for kind, names in theirs.items()}
    assert {**as_ours, "vit": DEFAULT_TARGETS["vit"]} == DEFAULT_TARGETS


def test_parameters_that_cannot_be_adapted_say_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.row = nn.Parameter(torch.randn(2, 3, 4, 5)), nn.Parameter(torch.randn(1, 8))
            self.fc, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8)
            self.some = nn.ParameterList([torch.randn(8, 8)])
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    reasons = {
        "kernel": "4 axes",
        "row": r"of shape \(1, 8\)",
        "weight_ih_l0": "recurrent",
        "some.0": "of a ParameterList",
        "parametrizations.weight.original1": "within a parametrization",
    }
    for target, reason in reasons.items():
        with pytest.raises(errors.TargetError, match=rf"{target} is .*{reason}"):
            chosen(Odd(), targets=[target])
    with pytest.warns(errors.AdamssWarning, match=r"left out: kernel is .*4 axes"):
        assert chosen(Odd(), targets="kernel|fc") == ["fc"]
    with pytest.raises(errors.TargetError, match=r"a list of names is \['fc'\]"):
        chosen(nn.Sequential(Odd()), targets="fc")


def test_biases_that_are_not_adapted_are_told():
    with pytest.warns(errors.AdamssWarning, match=r"include_bias: conv is a Conv1d"):
        adamss.attach(Net(), adamss.AdamssConfig(targets=["conv", "fc", "embed"], include_bias=True, **SMALL))


def test_what_lies_in_another_layer_is_a_part_of_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].original = nn.Linear(8, 8)
    assert chosen(model, targets="all-linear") == ["0", "1"]
