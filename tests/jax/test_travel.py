"""Test adapters with heads that are trained in JAX or PyTorch and used in the other framework."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_helpers import train

import adamss
from adamss_conformance.tolerances import assert_agrees

torch = pytest.importorskip("torch", reason="the jax session may have no PyTorch to travel to")

SAVED = ["norm", "classifier", "embed", "conv"]


class TorchNet(torch.nn.Module):
    """Two layers to adapt, and saved modules of several kinds."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 8)
        self.conv = torch.nn.Conv2d(1, 1, (3, 3), padding=1)
        self.query, self.value = torch.nn.Linear(8, 9), torch.nn.Linear(8, 9, bias=False)
        self.norm = torch.nn.LayerNorm(9)
        self.classifier = torch.nn.Linear(9, 3)

    def forward(self, tokens):
        x = self.embed(tokens)  # (2, 4, 8)
        x = self.conv(x[:, None])[:, 0]
        x = self.norm(torch.tanh(self.query(x)) * self.value(x))
        return self.classifier(x)


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.conv = nnx.Conv(1, 1, (3, 3), padding=1, rngs=rngs)
        self.query = nnx.Linear(8, 9, rngs=rngs)
        self.value = nnx.Linear(8, 9, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(9, epsilon=1e-5, rngs=rngs)
        self.classifier = nnx.Linear(9, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = self.conv(x[..., None])[..., 0]
        x = self.norm(jnp.tanh(self.query(x)) * self.value(x))
        return self.classifier(x)


class EquinoxNet(eqx.Module):
    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv2d
    query: eqx.nn.Linear
    value: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    classifier: eqx.nn.Linear

    def __init__(self):
        key = jax.random.key(0)
        self.embed = eqx.nn.Embedding(5, 8, key=key)
        self.conv = eqx.nn.Conv2d(1, 1, 3, padding=1, key=key)
        self.query, self.value = eqx.nn.Linear(8, 9, key=key), eqx.nn.Linear(8, 9, use_bias=False, key=key)
        self.norm, self.classifier = eqx.nn.LayerNorm(9), eqx.nn.Linear(9, 3, key=key)

    def __call__(self, tokens):
        def one(tokens):
            x = jax.vmap(self.embed)(tokens)
            x = self.conv(x[None])[0]
            x = jnp.tanh(jax.vmap(self.query)(x)) * jax.vmap(self.value)(x)
            return jax.vmap(self.classifier)(jax.vmap(self.norm)(x))

        return jax.vmap(one)(tokens)


TOKENS = np.asarray([[0, 1, 2, 3], [4, 3, 3, 1]])


def parameters():
    """Return random base weights by their names in PyTorch."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
        for name, tensor in TorchNet().state_dict().items()
    }


def torch_net(dtype="float32"):
    model = TorchNet()
    model.load_state_dict({name: torch.tensor(array) for name, array in parameters().items()})
    return model.to(getattr(torch, dtype)).eval()


def nnx_net(dtype="float32"):
    model, p = NnxNet(), {name: jnp.asarray(array, dtype) for name, array in parameters().items()}
    model.embed.embedding.set_value(p["embed.weight"])
    model.conv.kernel.set_value(jnp.transpose(p["conv.weight"], (2, 3, 1, 0)))
    model.norm.scale.set_value(p["norm.weight"])
    for name in ("query", "value", "classifier"):
        getattr(model, name).kernel.set_value(p[f"{name}.weight"].T)
    for name in ("conv", "norm", "query", "classifier"):
        getattr(model, name).bias.set_value(p[f"{name}.bias"])
    return model


def equinox_net(dtype="float32"):
    model = EquinoxNet()
    for name, array in parameters().items():
        module, _, field = name.partition(".")
        value = jnp.asarray(array, dtype)
        if name == "conv.bias":
            value = value[:, None, None]
        model = eqx.tree_at(lambda m, a=module, b=field: getattr(getattr(m, a), b), model, value)
    return model


def train_torch(model):
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.05, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor(TOKENS)).square().sum().backward()
        optimizer.step()
    return model


def train_jax(model):
    loss = lambda model: jnp.square(model(TOKENS)).sum()  # noqa: E731
    return train(model, loss, tx=optax.adamw(0.05, weight_decay=0.01)).model


def run_torch(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).double().numpy()


def run_jax(model):
    return np.asarray(model(TOKENS).astype("float32"))


FRAMEWORKS = {
    "torch": (torch_net, train_torch, run_torch),
    "nnx": (nnx_net, train_jax, run_jax),
    "equinox": (equinox_net, train_jax, run_jax),
}
PAIRS = [("nnx", "torch"), ("torch", "nnx"), ("equinox", "torch"), ("torch", "equinox"), ("nnx", "equinox")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function from a framework to the outputs of a trained model and the folder with its two files."""

    @functools.cache
    def make(framework):
        make_net, train, run = FRAMEWORKS[framework]
        model = make_net()
        base = run(model)
        config = adamss.AdamssConfig(
            targets=["query", "value"], rank=6, subspaces=3, subspace_rank=2, modules_to_save=SAVED
        )
        model = train(adamss.attach(model, config))
        y = run(model)
        assert np.abs(y - base).max() > 0.1
        folder = tmp_path_factory.mktemp(framework)
        for training in (False, True):
            adamss.save(model, folder / f"{training}.safetensors", training=training)
        return y, folder

    return make


def agrees(actual, expected, dtype="float32"):
    assert_agrees(actual, expected, dtype=dtype, what="outputs", scale=float(np.abs(expected).max()) * 4)


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
@pytest.mark.parametrize("training", [False, True], ids=["portable", "training"])
def test_an_adapter_with_heads(pair, training, trained):
    source, target = pair
    y, folder = trained(source)
    make_net, _, run = FRAMEWORKS[target]
    model = make_net()
    base = run(model)
    model = adamss.load(model, folder / f"{training}.safetensors")
    agrees(run(model), y)
    merged = adamss.merge(model)
    agrees(run(merged), y)
    model = adamss.detach(merged)
    assert np.array_equal(run(model), base)


@pytest.mark.parametrize("pair", [("torch", "nnx"), ("equinox", "torch")], ids=" to ".join)
def test_what_arrives_can_be_trained_further(pair, trained):
    """Three more steps in either framework give the same, so basis, mask and heads must all have arrived."""
    source, target = pair
    _, folder = trained(source)
    outputs = []
    for framework in (source, target):
        make_net, train, run = FRAMEWORKS[framework]
        outputs.append(run(train(adamss.load(make_net(), folder / "True.safetensors"))))
    # The optimiser divides by root mean squares near zero, which magnifies rounding errors.
    assert_agrees(outputs[1], outputs[0], dtype="float16", what="outputs after further training")


@pytest.mark.parametrize("target", FRAMEWORKS)
@pytest.mark.parametrize("source", ["torch", "nnx"])
@pytest.mark.parametrize("training", [False, True], ids=["portable", "training"])
def test_a_float32_file_on_a_bfloat16_base(source, target, training, trained):
    """Segmentation and factors come from the file in float32, so only the bfloat16 base differs."""
    y, folder = trained(source)
    make_net, _, run = FRAMEWORKS[target]
    model = adamss.load(make_net("bfloat16"), folder / f"{training}.safetensors")
    backend = adamss.backend.backend_for(model)
    factors = backend.bank(model).only().layers["query"]
    assert {backend.dtype_name(factors.B), backend.dtype_name(factors.C)} == {"float32"}
    agrees(run(model), y, dtype="bfloat16")


def test_batch_norm_travels_without_pytorchs_counter(tmp_path):
    """PyTorch stores a counter of batches with the running mean and variance; Flax does not."""
    path = tmp_path / "a.safetensors"
    weight = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32)
    config = adamss.AdamssConfig(targets=["query"], modules_to_save=["norm"], rank=4, subspaces=2)

    def in_torch():
        model = torch.nn.ModuleDict(
            {"query": torch.nn.Linear(8, 9, bias=False), "norm": torch.nn.BatchNorm1d(9)}
        )
        model["query"].weight.data = torch.tensor(weight)
        return model

    def in_jax():
        rngs = nnx.Rngs(0)
        norm = nnx.BatchNorm(9, rngs=rngs)
        model = nnx.Dict(query=nnx.Linear(8, 9, use_bias=False, rngs=rngs), norm=norm)
        model.query.kernel.set_value(jnp.asarray(weight.T))
        return model

    there = adamss.attach(in_torch(), config)
    there["norm"].running_mean.fill_(3.0)
    there["norm"].weight.data.fill_(2.0)
    adamss.save(there, path)
    here = adamss.load(in_jax(), path)
    assert here.norm.mean[...].tolist() == [3.0] * 9
    assert here.norm.scale[...].tolist() == [2.0] * 9
    here.norm.mean.set_value(jnp.full(9, 4.0))
    adamss.save(here, path)
    back = adamss.load(in_torch(), path)
    assert back["norm"].running_mean.tolist() == [4.0] * 9
    assert int(back["norm"].num_batches_tracked) == 0


_ROOT = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
WEIGHT = _ROOT + _ROOT.T
"""A symmetric matrix, so that the orientation does not matter."""


class TorchPair(torch.nn.Module):
    """A layer to adapt, and two layers that share one weight or have equal ones."""

    def __init__(self, *, tied):
        super().__init__()
        self.query, self.a, self.b = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
        for layer in (self.query, self.a, self.b):
            layer.weight.data.copy_(torch.tensor(WEIGHT))
        if tied:
            self.b.weight = self.a.weight


class NnxPair(nnx.Module):
    def __init__(self, *, tied):
        self.query, self.a, self.b = (
            nnx.Linear(8, 8, use_bias=False, kernel_init=lambda *_: jnp.asarray(WEIGHT), rngs=nnx.Rngs(0))
            for _ in range(3)
        )
        if tied:
            self.b.kernel = self.a.kernel


class EquinoxPair(eqx.Module):
    """The same layers in Equinox, where an array cannot have two names."""

    query: eqx.nn.Linear
    a: eqx.nn.Linear
    b: eqx.nn.Linear

    def __init__(self):
        layer = eqx.nn.Linear(8, 8, use_bias=False, key=jax.random.key(0))
        layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.asarray(WEIGHT))
        self.query = self.a = self.b = layer


PAIRS = {
    "torch, tied": lambda: TorchPair(tied=True),
    "torch, untied": lambda: TorchPair(tied=False),
    "nnx, tied": lambda: NnxPair(tied=True),
    "nnx, untied": lambda: NnxPair(tied=False),
    "equinox": EquinoxPair,
}


def pair(name, saved):
    config = adamss.AdamssConfig(targets=["query"], rank=4, subspaces=1, modules_to_save=saved)
    return adamss.attach(PAIRS[name](), config)


@pytest.mark.parametrize("to", PAIRS)
@pytest.mark.parametrize("origin", PAIRS)
def test_a_file_says_what_was_one_tensor(origin, to, tmp_path):
    adamss.save(pair(origin, ["a"]), tmp_path / "a.safetensors")
    load = lambda: adamss.load(PAIRS[to](), tmp_path / "a.safetensors")  # noqa: E731
    here, there = (", tied" in name for name in (to, origin))
    if there and not here:
        with pytest.raises(
            adamss.errors.CheckpointError, match="are two tensors in this model, and were one"
        ):
            load()
    elif here and not there and "torch" in origin:
        with pytest.raises(adamss.errors.CheckpointError, match="are one tensor in this model, and were two"):
            load()
    elif here and not there:
        # The model that was trained may have tied the weights by its computation, which the file cannot show.
        with pytest.warns(adamss.AdamssWarning, match="the file does not say"):
            load()
    else:
        load()


@pytest.mark.parametrize("to", ["torch, tied", "nnx, tied"])
@pytest.mark.parametrize("origin", ["torch, untied", "nnx, untied", "equinox"])
def test_two_tensors_do_not_become_one(origin, to, tmp_path):
    model = pair(origin, ["a", "b"])
    if origin == "equinox":
        model = eqx.tree_at(lambda model: model.b.weight, model, jnp.zeros((8, 8)))
    elif origin == "nnx, untied":
        model.b.kernel.set_value(jnp.zeros((8, 8)))
    else:
        torch.nn.init.zeros_(model.b.weight)
    adamss.save(model, tmp_path / "a.safetensors")
    with pytest.raises(adamss.errors.CheckpointError, match="are one tensor in this model"):
        adamss.load(PAIRS[to](), tmp_path / "a.safetensors")


def test_names_are_those_from_the_module_that_was_adapted(tmp_path):
    model = nnx.Module()
    model.inner = pair("nnx, tied", ["a"])
    adamss.save(model, tmp_path / "a.safetensors")
    adamss.load(PAIRS["torch, tied"](), tmp_path / "a.safetensors")


def test_peft_saves_copies_of_what_is_tied_in_jax(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(adamss.errors.StateError, match=r"a\.weight of modules_to_save is tied to b\.weight"):
        adamss.to_peft(pair("nnx, tied", ["a"]), tmp_path / "out")
    adamss.to_peft(pair("nnx, untied", ["a"]), tmp_path / "out")
    with pytest.raises(adamss.errors.CheckpointError, match="are one tensor in this model, and were two"):
        adamss.from_peft(PAIRS["nnx, tied"](), tmp_path / "out")
