"""Test the demo by a short run on a tiny model with random weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: tiny products gain nothing from more, and threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(script):
    return script("demo.in_torch")


@pytest.fixture(scope="module", params=["roberta", "distilbert", "llama"])
def model_folder(request, tiny_tokenizer, tmp_path_factory):
    """Return a folder with a tiny random encoder, whose tokenizer has no padding token, as in many decoders."""
    words = len(tiny_tokenizer)
    sizes = {"vocab_size": words, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    if request.param == "roberta":
        config = transformers.RobertaConfig(**sizes, max_position_embeddings=80)
    elif request.param == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=words, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes))


def test_copies_share_the_base_and_not_the_head(demo):
    model = demo.SentenceClassifier(bert(), classes=3)
    copied = demo.copy_on_shared_base(model)
    pairs = zip(model.encoder.parameters(), copied.encoder.parameters(), strict=True)
    assert all(first is second for first, second in pairs)
    assert copied.classifier.weight is not model.classifier.weight
    assert torch.equal(copied.classifier.weight, model.classifier.weight)


def test_demo_runs_and_the_reloaded_adapter_agrees(demo, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    output = tmp_path / "results"
    arguments = ["--model", str(model_folder), "--steps", "3", "--output", str(output), "--device", "cpu"]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for name in demo.METHODS:
        assert sum(line.strip().startswith(name) for line in lines) == 1, printed
    tested = len(demo.split(demo.scipy_sentences())[1])
    assert f"same prediction for {tested} of {tested}" in printed
    assert (output / "demo.png").stat().st_size > 10_000
    assert "HF_HUB_OFFLINE" not in demo.os.environ


def test_demo_notices_an_adapter_that_answers_otherwise(demo, tmp_path):
    model = demo.prepare_adamss(demo.SentenceClassifier(bert(), classes=3), ["query", "value"]).eval()
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
