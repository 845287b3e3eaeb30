"""The demo: its data, and a short run on a tiny model with random weights."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "demo.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny products gain nothing from more, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("adamss_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def corpus(demo):
    return demo.scipy_sentences()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word.lower() for text in corpus.texts[::10] for word in text.split()})
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "[PAD]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]"
    )


@pytest.fixture(scope="module", params=["roberta", "distilbert", "llama"])
def model_folder(request, tokenizer, tmp_path_factory):
    """Return a folder with a tiny random encoder; its tokenizer has no padding token, as many decoders'."""
    words = len(tokenizer)
    sizes = {
        "vocab_size": words,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if request.param == "roberta":
        config = transformers.RobertaConfig(**sizes, max_position_embeddings=80)
    elif request.param == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=words, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_corpus_has_about_a_thousand_sentences_of_many_classes(corpus):
    counts = np.bincount(corpus.labels, minlength=len(corpus.classes))
    assert len(corpus.classes) >= 8
    assert 800 <= len(corpus) <= 1300
    assert counts.min() >= 20
    assert counts.max() <= 150


def test_no_sentence_occurs_twice(corpus):
    assert len(set(corpus.texts)) == len(corpus)


def test_no_sentence_names_a_submodule(corpus):
    words = {word.lower() for text in corpus.texts for word in text.split()}
    assert words.isdisjoint({*corpus.classes, "scipy"})


def test_data_and_split_are_the_same_every_time(demo, corpus):
    again = demo.scipy_sentences()
    assert again.texts == corpus.texts
    np.testing.assert_array_equal(again.labels, corpus.labels)
    for first, second in zip(demo.split(corpus), demo.split(again), strict=True):
        assert first.texts == second.texts


def test_split_is_disjoint_and_stratified(demo, corpus):
    rest, part = demo.split(corpus, fraction=0.25, seed=3)
    assert set(rest.texts).isdisjoint(part.texts)
    assert sorted((*rest.texts, *part.texts)) == sorted(corpus.texts)
    expected = [round(0.25 * count) for count in np.bincount(corpus.labels)]
    assert np.bincount(part.labels).tolist() == expected
    label_of = dict(zip(corpus.texts, corpus.labels, strict=True))
    assert [label_of[text] for text in part.texts] == part.labels.tolist()


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One line.", "One line."),
        ("\n    Two lines\n    of one sentence. Another one.\n\n    More.", "Two lines of one sentence."),
        ("f(x, out=None) -> y\n\nAfter the signature.\n", "After the signature."),
        ("Expit (a.k.a. logistic sigmoid) function.", "Expit (a.k.a. logistic sigmoid) function."),
        (".. deprecated:: 1.0\n\nStill here", "Still here"),
        ("f(x)", ""),
    ],
)
def test_first_sentence(demo, docstring, sentence):
    assert demo.first_sentence(docstring) == sentence


def test_clean_takes_the_label_out(demo):
    sentence = "Multiply `scipy.sparse` matrices and sparse arrays with an integral."
    assert demo.clean(sentence) == "Multiply matrices and arrays with an integral"


def test_batches_pass_over_all_rows_before_any_comes_again(demo):
    batches = list(demo.batch_order(rows=12, steps=6, size=4, seed=0))
    assert [len(batch) for batch in batches] == [4] * 6
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(12))
    assert np.concatenate(batches[:3]).tolist() != np.concatenate(batches[3:]).tolist()


def test_copies_share_the_base_and_not_the_head(demo):
    encoder = transformers.AutoModel.from_config(
        transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    model = demo.SentenceClassifier(encoder, classes=3)
    copied = demo.copy_on_shared_base(model)
    pairs = zip(model.encoder.parameters(), copied.encoder.parameters(), strict=True)
    assert all(first is second for first, second in pairs)
    assert copied.classifier.weight is not model.classifier.weight
    assert torch.equal(copied.classifier.weight, model.classifier.weight)


def test_demo_runs_and_the_reloaded_adapter_agrees(demo, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    output = tmp_path / "results"
    status = demo.main(
        ["--model", str(model_folder), "--steps", "3", "--output", str(output), "--device", "cpu"]
    )
    printed = capsys.readouterr().out

    assert status == 0
    lines = printed.splitlines()
    for name in demo.METHODS:
        assert sum(line.strip().startswith(name) for line in lines) == 1, printed
    tested = len(demo.split(demo.scipy_sentences())[1])
    assert f"same prediction for {tested} of {tested}" in printed
    assert (output / "demo.png").stat().st_size > 10_000
    assert "HF_HUB_OFFLINE" not in demo.os.environ


def test_demo_notices_an_adapter_that_answers_otherwise(demo, tmp_path):
    encoder = transformers.AutoModel.from_config(
        transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    model = demo.prepare_adamss(demo.SentenceClassifier(encoder, classes=3), ["query", "value"]).eval()
    path = demo.save_adamss(model, tmp_path)
    ids = torch.arange(8)[None]

    def predictor(model):
        with torch.no_grad():
            return model.eval()(ids, torch.ones_like(ids))

    def fresh():
        return demo.SentenceClassifier(demo.copy.deepcopy(encoder_before), classes=3)

    encoder_before = demo.adamss.detach(demo.copy.deepcopy(model)).encoder
    logits = predictor(model)
    assert demo.reload_agrees(fresh(), path, predictor, logits)
    assert not demo.reload_agrees(fresh(), path, predictor, logits.roll(1, dims=1))
    assert not demo.reload_agrees(fresh(), path, predictor, logits * 1.1)
