"""Test the demo in JAX: a short run on a tiny BERT with random weights, and adapters between frameworks."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the adapters travel to PyTorch and back")
transformers = pytest.importorskip("transformers", reason="the demo extra brings the encoder")
pytest.importorskip("optax", reason="the demo trains with optax")


@pytest.fixture(scope="module")
def demo_jax(script):
    return script("demo.in_jax")


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """Return a folder with a tiny BERT and its tokenizer."""
    config = transformers.BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def session(demo_jax, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    arguments = ["--model", str(folder), "--steps", "3", "--output", str(output)]
    return demo_jax.Session.open(demo_jax.parse(arguments))


@pytest.fixture(scope="module")
def trained(demo_jax, session):
    """Return the result of `compare`, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = demo_jax.compare(session)
    return found, printed.getvalue()


def test_table_has_the_three_methods(demo_jax, trained):
    cells = [re.split(r"\s{2,}", line.strip()) for line in trained[1].splitlines()]
    rows = {row[0]: row[1:] for row in cells if row[0] in demo_jax.METHODS}
    assert list(rows) == list(demo_jax.METHODS)
    # Two layers of (32, 32) are adapted: AdaMSS has B (32, 10) and C (1, 32), LoRA has A (32, 8) and B (8, 32). The
    # head is (32, 12) with a bias.
    assert [row[1:3] for row in rows.values()] == [["0", "396"], ["704", "396"], ["1,024", "396"]]
    assert all(0 <= float(row[0]) <= 1 for row in rows.values())


def test_answers_are_the_same_in_the_other_framework(demo_jax, session, trained, capsys):
    tested = len(session.test)
    assert demo_jax.travel(session, trained[0])
    lines = capsys.readouterr().out.splitlines()
    for direction in ("trained in JAX, loaded into PyTorch", "trained in PyTorch, loaded into JAX"):
        (line,) = (line for line in lines if direction in line)
        assert line.endswith(f"same prediction for {tested} of {tested}")


def test_other_answers_end_with_status_1(demo_jax, session, trained, monkeypatch):
    logits, path = trained[0]
    monkeypatch.setattr(demo_jax, "compare", lambda session: (np.roll(logits, 1, axis=1), path))
    arguments = ["--model", session.source.name, "--steps", "1", "--output", str(session.output)]
    assert demo_jax.main(arguments) == 1
    monkeypatch.setattr(demo_jax, "compare", lambda session: (logits, path))
    assert demo_jax.main(arguments) == 0


def test_base_and_head_are_those_of_the_pytorch_demo(demo_jax, session):
    ours, theirs = (
        load(7) for load in (session.classifier, lambda seed: session.source.classifier(12, seed))
    )
    np.testing.assert_array_equal(ours.classifier.kernel[...], theirs.classifier.weight.detach().numpy().T)
    np.testing.assert_array_equal(ours.classifier.bias[...], theirs.classifier.bias.detach().numpy())
    np.testing.assert_allclose(session.in_jax(ours), session.in_torch(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["head only", "AdaMSS K=10 r=1", "LoRA r=8 (Flax)"])
def test_only_what_is_trained_changes(demo_jax, session, name):
    method = demo_jax.METHODS[name]
    run = session.start(method)

    def values():
        state = nnx.to_flat_state(nnx.state(run.model, nnx.Not(nnx.RngState)))
        return {path: np.array(variable[...]) for path, variable in state}

    before, trained = values(), {path for path, _ in nnx.to_flat_state(nnx.state(run.model, method.trained))}
    inputs = demo_jax.tokenize(session.tokenizer, session.train.texts[:16])
    for _ in range(2):  # in the first step the gradient of one factor is zero, because the other factor is
        run.step(inputs, session.train.labels[:16])
    changed = {path for path, array in values().items() if not np.array_equal(array, before[path])}
    assert changed == trained
    assert {("classifier", "kernel"), ("classifier", "bias")} <= trained


def test_few_lengths(demo_jax, session):
    batches = [demo_jax.tokenize(session.tokenizer, [text]) for text in ("a", "a " * 17, "a " * 200)]
    assert [batch["input_ids"].shape for batch in batches] == [(1, 16), (1, 32), (1, 64)]
    assert [int(batch["attention_mask"].sum()) for batch in batches] == [1, 17, 64]


def test_every_station_of_the_journey_has_the_same_embeddings(script, folder, tmp_path, capsys):
    pytest.importorskip("peft", reason="the journey goes by PEFT")
    pytest.importorskip("sklearn", reason="PEFT's AdaMSS needs it")
    figures = tmp_path / "travel.json"
    assert script("travel").main(["--model", str(folder), "--steps", "20", "--json", str(figures)]) == 0
    results = json.loads(figures.read_text())["results"]
    assert [len(rows) for rows in results.values()] == [7, 4]
    for rows in results.values():
        assert all(row["from_base"] > 1e-3 > 1e-5 > row["from_start"] for row in rows)
    printed = capsys.readouterr().out
    assert all(row["station"] in printed for rows in results.values() for row in rows)
