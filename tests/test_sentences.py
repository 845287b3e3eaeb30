"""Test the data of the demos, and what the demos print about it."""

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("scipy", reason="the demo extra brings SciPy, whose docstrings are the data")


@pytest.fixture(scope="module")
def sentences(script):
    return script("demo.sentences")


@pytest.fixture(scope="module")
def corpus(sentences):
    return sentences.scipy_sentences()


def test_corpus_has_about_a_thousand_sentences_of_many_classes(corpus):
    counts = np.bincount(corpus.labels, minlength=len(corpus.classes))
    assert len(corpus.classes) >= 8
    assert 800 <= len(corpus) <= 1300
    assert counts.min() >= 20
    assert counts.max() <= 150


def test_sentences_are_all_different_and_name_no_submodule(corpus):
    assert len(set(corpus.texts)) == len(corpus)
    words = {word.lower() for text in corpus.texts for word in text.split()}
    assert words.isdisjoint({*corpus.classes, "scipy"})


def test_data_and_split_are_the_same_every_time(sentences, corpus):
    again = sentences.scipy_sentences()
    assert again.texts == corpus.texts
    np.testing.assert_array_equal(again.labels, corpus.labels)
    for first, second in zip(sentences.split(corpus), sentences.split(again), strict=True):
        assert first.texts == second.texts


def test_split_is_disjoint_and_stratified(sentences, corpus):
    rest, part = sentences.split(corpus, fraction=0.25, seed=3)
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
def test_first_sentence(sentences, docstring, sentence):
    assert sentences.first_sentence(docstring) == sentence


def test_clean_takes_the_label_out(sentences):
    sentence = "Multiply `scipy.sparse` matrices and sparse arrays with an integral."
    assert sentences.clean(sentence) == "Multiply matrices and arrays with an integral"


def test_batches_pass_over_all_rows_before_any_comes_again(sentences):
    batches = list(sentences.batch_order(rows=12, steps=6, size=4, seed=0))
    assert [len(batch) for batch in batches] == [4] * 6
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(12))
    assert np.concatenate(batches[:3]).tolist() != np.concatenate(batches[3:]).tolist()


def test_row_tells_the_bytes_of_the_head_apart(sentences, tmp_path):
    path = tmp_path / "adapter.safetensors"
    tensors = {"layer.B": np.zeros((3, 5), np.float32), "classifier.weight": np.zeros((7, 100), np.float32)}
    save_file(tensors, path)
    whole, without_head = sentences.file_sizes(path)
    assert whole == path.stat().st_size
    assert whole - without_head == 4 * 700
    row = sentences.report_row("one", 0.5, adapter=15, head=700, seconds=[1, 0.002, 0.001], path=path)
    expected = ["one", "0.500", "15", "700", "2.0", f"{without_head / 1e3:.1f}", f"{whole / 1e3:.1f}"]
    assert row == expected


def test_same_answers_wants_predictions_and_logits(sentences, capsys):
    before = np.asarray([[0.0, 2.0], [1.0, 0.0]])
    assert sentences.same_answers("twice", before, before + 1e-6)
    assert "twice: max |difference of logits| 1.0e-06, same prediction for 2 of 2" in capsys.readouterr().out
    assert not sentences.same_answers("a logit off", before, before + np.asarray([[0.0, 0.01]]))
    assert "same prediction for 2 of 2" in capsys.readouterr().out
    assert not sentences.same_answers("swapped", before, before[:, ::-1])
    assert "same prediction for 0 of 2" in capsys.readouterr().out


def test_a_tie_within_rounding_is_the_same_answer_and_said(sentences, capsys):
    before, after = np.asarray([[1.0, 1.00001], [1.0, 0.0]]), np.asarray([[1.00002, 1.00001], [1.0, 0.0]])
    assert sentences.same_answers("tie", before, after)
    assert capsys.readouterr().out.endswith("same prediction for 2 of 2 (1 tied)\n")
    assert not sentences.same_answers("no tie", before, before + np.asarray([[0.0, 0.0], [0.0, 1.001]]))
    assert capsys.readouterr().out.endswith("same prediction for 1 of 2\n")
