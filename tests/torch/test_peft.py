"""Test the exchange of adapters with PEFT's AdaMSS, in both directions, against the installed PEFT."""

import copy
import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_support import assert_same_state, required, state

import adamss
import adamss_torch
from adamss import errors
from adamss.backend import BaseWeight, NumpyLinear, NumpyModel
from adamss.io import peft as ours
from adamss.verbs.exchange import _why_uncertain

peft = pytest.importorskip("peft")
pytest.importorskip("sklearn")

TARGETS = ["query", "value"]


@pytest.fixture(autouse=True)
def _peft_reads_what_transformers_has_deprecated():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.|transformers\.")
        yield


def trained_by_peft(base, folder, x, *, read=lambda y: y, **options):
    """Train an adapter with PEFT for a few steps, save it, and return PEFT's model."""
    settings = {"r": 24, "num_subspaces": 4, "subspace_rank": 1, "target_modules": TARGETS} | options
    model = peft.get_peft_model(base, peft.AdamssConfig(**settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(4):
        optimizer.zero_grad()
        read(model(x)).float().square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


def _arrays(layer):
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()


def loaded_by_peft(base, folder):
    return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture
def x(inputs):
    return inputs(6, 16)


CASES = {
    "rank 1": {},
    "rank 3": {"subspace_rank": 3},
    "more subspaces than columns allow": {"num_subspaces": 40, "subspace_rank": 3},
    "one subspace": {"num_subspaces": 1, "subspace_rank": 3},
    "rank above the width": {"r": 100, "subspace_rank": 2},
    "another seed": {"random_seed": 5},
    "dynamic ranks": {"use_dynamic_rank": True, "subspace_rank": 3, "svd_threshold": 0.5},
    "a head": {"modules_to_save": ["classifier"]},
}


class TestFromPeft:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_are_those_of_peft(self, net, x, tmp_path, name, bias):
        theirs = trained_by_peft(net(bias=bias), tmp_path, x, **CASES[name])
        expected = theirs(x)
        assert (expected - net(bias=bias)(x)).abs().max() > 1e-2
        model = adamss.from_peft(net(bias=bias), tmp_path)
        assert_close(model(x), expected)
        row = adamss.summary(model).rows[0]
        lists = theirs.base_model.model.layers[0].query
        assert len(lists.adamss_A["default"]) == row.K
        assert row.q == sum(A.shape[0] for A in lists.adamss_A["default"])

    @pytest.mark.parametrize("subspace_rank", [1, 3])
    def test_minilm(self, minilm, tmp_path, subspace_rank):
        tokens = torch.randint(5, 3000, (3, 12), generator=torch.Generator().manual_seed(0))
        read = lambda y: y.last_hidden_state  # noqa: E731
        options = {"r": 100, "num_subspaces": 10, "subspace_rank": subspace_rank}
        expected = read(trained_by_peft(minilm(), tmp_path, tokens, read=read, **options)(tokens))
        model = adamss.from_peft(minilm(), tmp_path)
        assert_close(read(model(tokens)), expected)
        # In another dtype the columns keep their subspaces, which PEFT cannot guarantee.
        adamss.save(model, tmp_path / "ours.safetensors")
        half = adamss.load(minilm(torch.bfloat16), tmp_path / "ours.safetensors")
        adamss.merge(adamss.load(minilm(), tmp_path / "ours.safetensors"))
        rounded = read(minilm(torch.bfloat16)(tokens)).float() - read(minilm()(tokens))
        moved = read(half(tokens)).float() - expected
        assert moved.norm() < 2 * rounded.norm()

    def test_half_precision_and_float64_bases(self, net, inputs, tmp_path):
        for dtype, atol in ((torch.bfloat16, 0.05), (torch.float64, 1e-9)):
            x, folder = inputs(6, 16, dtype=dtype), tmp_path / str(dtype)
            theirs = trained_by_peft(net(dtype=dtype), folder, x)
            expected = theirs(x)
            model = adamss.from_peft(net(dtype=dtype), folder)
            assert_close(model(x), expected, atol=atol)

    def test_it_trains_on_and_goes_back(self, net, x, train, tmp_path):
        trained_by_peft(net(), tmp_path / "theirs", x, subspace_rank=2, modules_to_save=["classifier"])
        model = train(adamss.from_peft(net(), tmp_path / "theirs"))
        expected = model(x)
        written = adamss.to_peft(model, tmp_path / "ours")
        assert str(written) == f"AdaMSS of PEFT on 4 layers in {str(tmp_path / 'ours')!r}, with classifier"
        theirs = loaded_by_peft(net(), tmp_path / "ours")
        assert_close(theirs(x), expected)
        again = adamss.from_peft(net(), tmp_path / "ours")
        assert_close(again(x), expected, atol=1e-6)

    def test_the_random_state_is_left_alone(self, net, x, tmp_path):
        trained_by_peft(net(), tmp_path, x)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        adamss.from_peft(net(), tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002

    def test_numbering_is_by_the_lowest_column(self, net, x, tmp_path):
        trained_by_peft(net(), tmp_path, x)
        labels = adamss.from_peft(net(), tmp_path).layers[0].query.adamss.default.labels
        _, first = np.unique(labels.numpy(), return_index=True)
        assert (np.diff(first) > 0).all()

    def test_a_model_of_another_framework(self, net, x, tmp_path):
        theirs = trained_by_peft(net(), tmp_path, x, subspace_rank=2)
        weight, bias = _arrays(net().layers[1].query)
        names = [f"layers.{i}.{name}" for i in (0, 1) for name in TARGETS]
        layers = {name: NumpyLinear(*_arrays(net().get_submodule(name))) for name in names}
        model = adamss.from_peft(NumpyModel(layers), tmp_path)
        expected = theirs.base_model.model.layers[1].query(x).detach().numpy()
        assert np.abs(expected - (x.numpy() @ weight + bias)).max() > 1e-2
        np.testing.assert_allclose(model["layers.1.query"](x.numpy()), expected, rtol=0, atol=1e-5)
        adamss.to_peft(model, tmp_path / "back")
        assert_close(loaded_by_peft(net(), tmp_path / "back")(x), theirs(x))


class TestRefusals:
    @pytest.fixture
    def folder(self, net, x, tmp_path):
        trained_by_peft(net(), tmp_path / "theirs", x, r=12, modules_to_save=["classifier"])
        return tmp_path / "theirs"

    def refused(self, model, folder, match, kind=errors.CheckpointError):
        before = state(model)
        with pytest.raises(kind, match=match) as caught:
            adamss.from_peft(model, folder)
        assert isinstance(caught.value, errors.AdamssError)
        assert_same_state(model, before)
        assert all(required(model).values())

    def test_another_base(self, net, folder):
        self.refused(net(seed=1), folder, r"layers\.0\.query: the adapter was trained on another base")

    @pytest.mark.parametrize("r", [12, 100])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_base_in_another_dtype(self, net, x, tmp_path, dtype, r):
        trained_by_peft(net(), tmp_path, x, r=r)
        rounded = net().to(dtype).float()
        self.refused(rounded, tmp_path, r"in another dtype.*adamss\.save it from there")

    def test_a_base_with_other_names(self, net, folder):
        outer = torch.nn.ModuleDict({"body": net()})
        self.refused(outer, folder, r"no layer 'layers\.0\.query'.*near matches: body\.layers\.0\.query")

    @pytest.mark.parametrize("method", ["LORA", "IA3"])
    def test_another_method(self, net, config, folder, method):
        if method == "LORA":
            adamss.to_lora(adamss.attach(net(), config()), folder)
        else:
            target = peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
            peft.get_peft_model(net(), target).save_pretrained(folder)
        self.refused(net(), folder, f"of the method {method}, and from_peft reads ADAMSS")

    def test_missing_files(self, net, folder, tmp_path):
        missing = errors.CheckpointNotFoundError
        self.refused(net(), tmp_path / "none", "no folder", missing)
        self.refused(net(), "", "empty name", missing)
        shutil.copytree(folder, tmp_path / "named" / "default")
        self.refused(net(), tmp_path / "named", "its folder 'default' has one", missing)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.refused(net(), folder, "pickled")
        (folder / "adapter_model.bin").unlink()
        self.refused(net(), folder, "no adapter_model.safetensors", missing)
        (folder / "adapter_config.json").unlink()
        self.refused(net(), folder, "no adapter_config.json", missing)

    def test_a_file_of_adamss(self, net, config, tmp_path):
        adamss.save(adamss.attach(net(), config()), tmp_path / "a.safetensors")
        self.refused(net(), tmp_path / "a.safetensors", "adamss.load reads files")

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"peft_type": None}, "does not name a method"),
            ({"r": "8"}, "r = '8', and an integer"),
            ({"num_subspaces": 0}, "num_subspaces = 0"),
            ({"subspace_rank": True}, "subspace_rank = True"),
            ({"random_seed": -1}, "random_seed = -1"),
            ({"r": 10**30}, "an integer is expected"),
            ({"r": 7}, "a basis of shape"),
            ({"num_subspaces": 3}, "subspaces of"),
            ({"random_seed": 9}, "another base"),
            ({"modules_to_save": "classifier"}, "a list of names"),
            ({"modules_to_save": None}, "belongs to no adapted layer and no module to save"),
        ],
    )
    def test_settings(self, net, folder, settings, match):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        self.refused(net(), folder, match)

    @pytest.mark.parametrize(
        "text", ["", "{", "[" * 100_000, "[]", '{"peft_type": 3}', "\ud800".encode("utf-8", "surrogatepass")]
    )
    def test_no_json(self, net, folder, text):
        (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        self.refused(net(), folder, r"damaged or no JSON|does not name a method")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"layers.0.query.adamss_newB": None}, "lacks adamss_newB"),
            ({"layers.0.query.adamss_A.1": None}, "other subspaces in adamss_A"),
            ({"layers.0.query.adamss_B.1": torch.zeros(3)}, "a matrix is expected"),
            ({"layers.0.query.adamss_B.1": torch.zeros(3, 0)}, "a matrix is expected"),
            ({"layers.0.query.adamss_B.1": torch.zeros(3, 2)}, "does not fit"),
            ({"layers.0.query.adamss_B.1": torch.zeros(1, 1, dtype=torch.int64)}, "has dtype int64"),
            ({"layers.0.query.adamss_A.7": torch.zeros(1, 12)}, "other subspaces"),
            ({"layers.0.query.adamss_newB": torch.full((12, 17), torch.nan)}, "NaN or infinity"),
            ({"layers.0.query.adamss_C.0": torch.zeros(2)}, "none that PEFT's AdaMSS"),
            ({"layers.0.query.adamss_newB": torch.eye(12, 17)}, "its basis is in bfloat16"),
            ({"layers.0.query.adamss_newB": torch.eye(12, 17) / 3}, "its basis lies outside"),
            ({"layers.0.query.adamss_B.1": torch.zeros(2, 1)}, "it has subspaces of"),
            ({"layers.0.query.adamss_A.00": torch.zeros(1, 12)}, "none that PEFT's AdaMSS"),
            ({"classifier.weight": torch.zeros(2, 2)}, "classifier"),
            ({"query.weight": torch.zeros(2)}, "not named as PEFT does"),
            ({".".join("a" * 60_000): torch.zeros(2)}, "a name longer than that of any module"),
        ],
    )
    def test_tensors(self, net, folder, changes, match):
        path = folder / "adapter_model.safetensors"
        prefix = "" if "query.weight" in changes else "base_model.model."
        tensors = load_file(path) | {f"{prefix}{name}": tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        self.refused(net(), folder, match)

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_spoiled_files_are_refused_or_fit(self, net, folder, name):
        rng, content = np.random.default_rng(0), (folder / name).read_bytes()
        refused = 0
        for _ in range(200):
            spoiled = bytearray(content)
            for _ in range(rng.integers(1, 4)):
                spoiled[rng.integers(len(spoiled) if rng.random() < 0.5 else 200)] = rng.integers(256)
            (folder / name).write_bytes(spoiled)
            model, before = net(), state(net())
            try:
                adamss.from_peft(model, folder)
            except errors.AdamssError:
                refused += 1
                assert_same_state(model, before)
        assert 50 < refused < 200

    def test_what_a_file_says_is_shown_short_and_without_commands(self, net, folder):
        path = folder / "adapter_config.json"
        for method in ("\x1b[31mX\n", "A" * 100_000):
            path.write_text(json.dumps({"peft_type": method}))
            with pytest.raises(errors.CheckpointError) as caught:
                adamss.from_peft(net(), folder)
            assert len(str(caught.value)) < 800
            assert str(caught.value).isprintable()

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_sparse_files_are_not_read(self, net, folder, name):
        with open(folder / name, "ab") as file:
            file.truncate(1 << 34)
        self.refused(net(), folder, "its length is not what its header says|longer than")

    def test_the_meta_device(self, net, folder):
        with pytest.raises(errors.LayerError, match="meta device"):
            adamss.from_peft(net().to("meta"), folder)

    def test_a_grouping_that_rounding_decides(self, net, folder, monkeypatch):
        """If the basis is not bit for bit that of the file, the grouping must be stable under other roundings."""
        path = folder / "adapter_model.safetensors"
        name = "base_model.model.layers.0.query.adamss_newB"
        tensors = load_file(path)
        save_file(tensors | {name: tensors[name] * (1 + 1e-7)}, path)
        adamss.from_peft(net(), folder)
        real = ours.grouping_of

        def wavering(rows, *args, **kwargs):
            found = real(rows, *args, **kwargs)
            weight = net().layers[0].query.weight.detach().numpy()
            same = rows.shape[1] == 17 and np.array_equal(rows[:, :16], weight)
            return found if same else found._replace(labels=np.roll(found.labels, 1))

        monkeypatch.setattr(ours, "grouping_of", wavering)
        self.refused(net(), folder, "rounding decides")

    def test_truncated(self, net, folder):
        path = folder / "adapter_model.safetensors"
        content = path.read_bytes()
        for length in (0, 7, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            self.refused(net(), folder, "truncated|damaged")

    def test_a_model_with_adapters(self, net, config, folder):
        model = adamss.attach(net(), config())
        with pytest.raises(
            errors.StateError, match="from_peft: an adapter called 'default' is attached already"
        ):
            adamss.from_peft(model, folder)

    def test_without_scikit_learn(self, net, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
        monkeypatch.delitem(sys.modules, "adamss_torch.peft", raising=False)
        self.refused(net(), folder, r"adamss\[peft\]", errors.MissingBackendError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_other_grouping_gets_through(dtype):
    """Random layers, whose grouping changes with tiny perturbations, load with their own grouping or are refused."""
    changes = {
        "nothing": lambda W, noise: W,
        "rounding": lambda W, noise: W * (1 + 1e-7 * noise),
        "half": lambda W, noise: W.bfloat16().float(),
        "noise": lambda W, noise: (W * (1 + 1e-2 * noise)).to(dtype).float(),
    }
    through = dict.fromkeys(changes, 0)
    for trial in range(40):
        rng, generator = np.random.default_rng(trial), torch.Generator().manual_seed(trial)
        n, d, K = int(rng.integers(8, 60)), int(rng.integers(8, 60)), int(rng.integers(2, 8))
        R = (4, 8, 100)[trial % 3]
        W = torch.randn(n, d, generator=generator).to(dtype).float()
        before = ours.grouping_of(W.numpy(), R, K, 0)
        basis = torch.from_numpy(before.basis).to(dtype).float().numpy()
        sizes = np.bincount(before.labels)
        layer = ours.PeftLayer(basis, (), tuple(np.zeros((size, 1), np.float32) for size in sizes))
        adapter = ours.PeftAdapter(R, K, 1, 0, {})
        for name, change in changes.items():
            moved = change(W, torch.randn(n, d, generator=generator)).numpy()
            found = ours.grouping_of(moved, R, K, 0)
            refused = ours.why_not_the_same(layer, found) is not None or (
                not ours.is_the_same_basis(layer, found)
                and _why_uncertain(adapter, found, BaseWeight(moved.T, None)) is not None
            )
            assert refused or np.array_equal(found.labels, before.labels), (trial, name)
            through[name] += not refused
    assert through["nothing"] == 40
    assert through["noise"] < 5


WORDS = torch.arange(9)


class Tied(torch.nn.Module):
    """Embeddings and a head that share one tensor, or have two equal ones."""

    def __init__(self, *, tied=True):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 16)
        self.query = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 9, bias=False)
        weight = self.embed.weight
        self.head.weight = weight if tied else torch.nn.Parameter(weight.detach().clone())

    def forward(self, tokens):
        return self.head(self.query(self.embed(tokens)))


class TestTiedWeights:
    """PEFT trains a copy of a saved module; in `adamss` the weights stay tied. Neither can replace the other."""

    @pytest.fixture
    def tied(self):
        def make(**options):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return Tied(**options)

        return make

    def config(self, *saved):
        saved = saved or ("head",)
        return adamss.AdamssConfig(targets=["query"], rank=8, subspaces=1, modules_to_save=saved)

    @pytest.mark.parametrize("saved", [["head"], ["embed"], ["embed", "head"]], ids=str)
    def test_from_peft(self, tied, tmp_path, saved):
        """PEFT trains a copy of each module, but one tied tensor could hold only the last of them."""
        options = {"target_modules": ["query"], "modules_to_save": saved, "r": 8}
        theirs = trained_by_peft(tied(), tmp_path, WORDS, **options)
        with pytest.raises(errors.CheckpointError, match="are one tensor in this model, and were two"):
            adamss.from_peft(tied(), tmp_path)
        model = adamss.from_peft(tied(tied=False), tmp_path)
        assert_close(model(WORDS), theirs(WORDS))
        adamss.save(model, tmp_path / "a.safetensors")
        with pytest.raises(errors.CheckpointError, match="are one tensor in this model, and were two"):
            adamss.load(tied(), tmp_path / "a.safetensors")

    def test_both_saved(self, tied, tmp_path):
        model = adamss.attach(tied(), self.config("embed", "head"))
        with pytest.raises(errors.StateError, match="is tied to"):
            adamss.to_peft(model, tmp_path / "out")
        with torch.no_grad():
            model.embed.weight.add_(1)
        adamss.save(model, tmp_path / "b.safetensors")
        assert_close(adamss.load(tied(), tmp_path / "b.safetensors")(WORDS), model(WORDS))

    def test_a_file_that_does_not_say(self, tied, tmp_path, monkeypatch):
        """A JAX model may tie weights by its computation, which no backend can see."""
        monkeypatch.setattr(adamss_torch.TorchBackend, "shared", lambda *_: {})
        model = adamss.attach(tied(), self.config())
        with torch.no_grad():
            model.head.weight.add_(1)
        adamss.save(model, tmp_path / "one.safetensors")
        both = self.config("embed", "head")
        adamss.save(adamss.attach(tied(), both), tmp_path / "alike.safetensors")
        untied = tied(tied=False)
        untied.head.weight.data.add_(1)
        adamss.save(adamss.attach(untied, both), tmp_path / "two.safetensors")
        monkeypatch.undo()
        with pytest.warns(adamss.AdamssWarning, match="the file does not say") as warned:
            loaded = adamss.load(tied(), tmp_path / "one.safetensors")
        assert warned[0].filename == __file__
        assert_close(loaded(WORDS), model(WORDS))
        adamss.load(tied(), tmp_path / "alike.safetensors")
        with pytest.raises(errors.CheckpointError, match="have different values in the file"):
            adamss.load(tied(), tmp_path / "two.safetensors")

    def test_to_peft(self, tied, tmp_path):
        model = adamss.attach(tied(), self.config())
        match = r"head\.weight of modules_to_save is tied to embed\.weight"
        with pytest.raises(errors.StateError, match=match):
            adamss.to_peft(model, tmp_path / "out")
        adamss.to_peft(adamss.attach(tied(tied=False), self.config()), tmp_path / "out")

    def test_files(self, tied, tmp_path):
        for there, here, what in ((True, False, "two tensors"), (False, True, "one tensor")):
            adamss.save(adamss.attach(tied(tied=there), self.config()), tmp_path / "a.safetensors")
            adamss.load(tied(tied=there), tmp_path / "a.safetensors")
            with pytest.raises(errors.CheckpointError, match=f"head.weight' and 'embed.weight' are {what}"):
                adamss.load(tied(tied=here), tmp_path / "a.safetensors")


def test_a_head_that_peft_writes_whole_besides(causal_lm, tmp_path):
    tokens = WORDS[None]
    options = {"target_modules": ["q_proj", "lm_head"], "r": 8}
    theirs = trained_by_peft(causal_lm(), tmp_path, tokens, read=lambda y: y.logits, **options)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model = adamss.from_peft(causal_lm(), tmp_path)
    assert_close(model(tokens).logits, theirs(tokens).logits)
    other = causal_lm()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(errors.CheckpointError, match=r"'lm_head\.weight'.*differs from that of this model"):
        adamss.from_peft(other, tmp_path)


def test_a_layer_that_appears_twice(tmp_path):
    """PEFT adapts the layer only at its first path, so the adapters of the two libraries are not equivalent."""

    def make(*, twice):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
        return torch.nn.ModuleDict({"a": layer, "b": layer if twice else torch.nn.Linear(8, 8)})

    config = adamss.AdamssConfig(targets=["a"], rank=4, subspaces=1)
    model = adamss.attach(make(twice=True), config)
    for write in (adamss.to_peft, adamss.to_lora):
        with pytest.raises(errors.LayerError, match=r"'a' and 'b' are one layer"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adamss.to_peft(adamss.attach(make(twice=False), config), tmp_path / "out")
    with pytest.raises(errors.LayerError, match=r"'a' and 'b' are one layer"):
        adamss.from_peft(make(twice=True), tmp_path / "out")


class TestToPeft:
    def test_a_layer_whose_path_is_the_end_of_another(self, tmp_path):
        torch.manual_seed(0)
        linear = torch.nn.Linear
        model = torch.nn.ModuleDict({"a": linear(8, 8), "x": torch.nn.ModuleDict({"a": linear(8, 8)})})
        base = copy.deepcopy(model)
        config = adamss.AdamssConfig(targets="a", rank=4, subspaces=1)
        adamss.attach(model, config)
        for write in (adamss.to_peft, adamss.to_lora):
            write(model, tmp_path)
            theirs = loaded_by_peft(copy.deepcopy(base), tmp_path)
            adapted = [name for name, module in theirs.named_modules() if hasattr(module, "base_layer")]
            assert adapted == ["base_model.model.a"]

    def test_what_an_earlier_export_left_beside_it(self, net, config, tmp_path):
        with pytest.warns(adamss.AdamssWarning):
            adamss.to_lora(adamss.attach(net(), config(modules_to_save=["classifier"])), tmp_path)
        assert (tmp_path / "modules_to_save.safetensors").exists()
        adamss.to_peft(adamss.attach(net(), config(subspaces=1)), tmp_path)
        assert not (tmp_path / "modules_to_save.safetensors").exists()

    def test_one_subspace_has_a_form_whatever_it_comes_from(self, net, config, x, train, tmp_path):
        for options in ({}, {"include_bias": True}, {"rank": 3}):
            model = train(adamss.attach(net(), config(subspaces=1, subspace_rank=3, **options)))
            adamss.to_peft(model, tmp_path)
            assert_close(loaded_by_peft(net(), tmp_path)(x), model(x))
            assert_close(adamss.from_peft(net(), tmp_path)(x), model(x))

    def test_a_portable_file_in_between(self, net, x, tmp_path):
        theirs = trained_by_peft(net(), tmp_path / "theirs", x, subspace_rank=2)
        adamss.save(adamss.from_peft(net(), tmp_path / "theirs"), tmp_path / "a.safetensors")
        for trainable in (True, False):
            model = adamss.load(net(), tmp_path / "a.safetensors", trainable=trainable)
            adamss.to_peft(model, tmp_path / "back")
            assert_close(loaded_by_peft(net(), tmp_path / "back")(x), theirs(x))

    def test_a_merged_model(self, net, x, tmp_path):
        theirs = trained_by_peft(net(), tmp_path / "theirs", x)
        adamss.to_peft(adamss.merge(adamss.from_peft(net(), tmp_path / "theirs")), tmp_path / "ours")
        assert_close(loaded_by_peft(net(), tmp_path / "ours")(x), theirs(x))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"segmentation": "contiguous"}, "group its columns in another way"),
            ({"overrides": {r"layers\.0": {"subspaces": 2}}}, "group its columns in another way"),
            ({"basis": "per_subspace"}, "a basis for each subspace"),
        ],
    )
    def test_what_has_no_form(self, net, config, train, tmp_path, changes, match):
        model = train(adamss.attach(net(), config(**changes)))
        with pytest.raises(errors.StateError, match=rf"layers\.0\.query.*{match}.*adamss\.to_lora"):
            adamss.to_peft(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_frozen_subspaces_are_told_of(self, net, x, tmp_path):
        trained_by_peft(net(), tmp_path, x)
        model = adamss.from_peft(net(), tmp_path)
        model.layers[0].query.adamss.default.active[1] = False
        with pytest.warns(adamss.AdamssWarning, match="no mask; 1 frozen"):
            adamss.to_peft(model, tmp_path / "out")
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()

    def test_factors_that_are_not_finite(self, net, x, tmp_path):
        trained_by_peft(net(), tmp_path, x)
        model = adamss.from_peft(net(), tmp_path)
        model.layers[0].query.adamss.default.C.data[0, 0] = torch.inf
        with pytest.raises(errors.ArrayValueError, match=r"layers\.0\.query"):
            adamss.to_peft(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("verb", [adamss.to_peft, adamss.to_lora])
    def test_a_model_that_is_one_layer(self, tmp_path, verb):
        model = adamss.attach(torch.nn.Linear(8, 8), adamss.AdamssConfig(targets=".*", rank=4, subspaces=1))
        with pytest.raises(errors.StateError, match="which has no name"):
            verb(model, tmp_path / "out")
