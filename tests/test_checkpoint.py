"""The file format: what is in it, its size, and every way in which a file can be wrong."""

import json
import os
import threading

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import adamss
from adamss import checkpoint, cli, core
from adamss.backend import NumpyLinear, NumpyModel
from adamss.errors import AdamssError, CheckpointError, CheckpointNotFoundError, ConfigError


def base(seed=0, d=12, n=10):
    rng = np.random.default_rng(seed)
    return NumpyModel(
        {f"layer.{i}.query": NumpyLinear(rng.standard_normal((d, n)), np.zeros(n)) for i in range(2)}
    )


def adapted(seed=1, **changes):
    settings = {"targets": ["query"], "rank": 5, "subspaces": 3, "subspace_rank": 2} | changes
    model = adamss.attach(base(), adamss.AdamssConfig(**settings))
    rng = np.random.default_rng(seed)
    for layer in model.layers.values():
        _, _, C, labels, ranks, _ = layer.factors
        within = np.arange(C.shape[0])[:, None] < ranks[labels]
        C[...] = np.where(within, rng.standard_normal(C.shape), 0.0)
    return model


@pytest.fixture
def path(tmp_path):
    adamss.save(adapted(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def rewrite(path, *, metadata=None, tensors=None, rename=None):
    """Change a file as someone without this library would; the checksum is left as it was."""
    with safe_open(path, framework="numpy") as file:
        old = file.metadata()
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = {(rename or {}).get(name, name): tensor for name, tensor in content.items()}
    content = {name: tensor for name, tensor in (content | (tensors or {})).items() if tensor is not None}
    merged = {k: v for k, v in (old | (metadata or {})).items() if v is not None}
    safetensors.numpy.save_file(content, path, metadata=merged)


def rewrite_with_checksum(path, **changes):
    rewrite(path, **changes)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = dict(checkpoint._stored_tensors(checkpoint._deserialize(path.read_bytes())))
    rewrite(path, metadata={"checksum": checkpoint._checksum(tensors, metadata)})


class TestContent:
    @pytest.mark.parametrize("training", [False, True])
    def test_tensors_and_metadata_are_those_of_the_design(self, tmp_path, training):
        model = adapted()
        adamss.save(model, tmp_path / "a.safetensors", training=training)
        with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
            metadata, names = file.metadata(), set(file.keys())
            labels, C = file.get_tensor("layer.0.query.labels"), file.get_tensor("layer.0.query.C")
        kinds = ["A", "B"] if training else ["M"]
        kinds += ["C", "labels", "ranks", "active"]
        assert names == {f"layer.{i}.query.{kind}" for i in range(2) for kind in kinds}
        assert metadata["format"] == "adamss"
        assert metadata["format_version"] == "1"
        assert json.loads(metadata["config"])["rank"] == 5
        assert json.loads(metadata["writer"])["numpy"] == np.__version__
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, model["layer.0.query"].factors.labels)
        assert np.array_equal(C, model["layer.0.query"].factors.C)

    @pytest.mark.parametrize(("K", "dtype"), [(256, "uint8"), (257, "uint16")])
    def test_labels_take_the_smallest_integer_that_fits(self, tmp_path, K, dtype):
        model = NumpyModel({"q": NumpyLinear(np.random.default_rng(0).standard_normal((4, 300)))})
        config = adamss.AdamssConfig(targets=["q"], subspaces=K, segmentation="contiguous")
        adamss.save(adamss.attach(model, config), tmp_path / "a.safetensors")
        stored = checkpoint.read(tmp_path / "a.safetensors").layers["q"]
        assert (stored.labels.dtype, stored.ranks.dtype) == (dtype, "uint8")
        assert stored.labels.numpy().max() == K - 1

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("options", [{}, {"basis": "per_subspace"}, {"include_bias": True}], ids=str)
    def test_the_update_comes_back(self, tmp_path, training, options):
        model = adapted(**options)
        adamss.save(model, tmp_path / "a.safetensors", training=training)
        for layer_path, stored in checkpoint.read(tmp_path / "a.safetensors").layers.items():
            expected = core.delta(model[layer_path].factors)
            np.testing.assert_allclose(core.delta(stored.factors()), expected, atol=1e-12)
            np.testing.assert_allclose(
                stored.directions(), core.contract(model[layer_path].factors), atol=1e-12
            )

    def test_bfloat16_is_widened_without_loss(self):
        values = np.asarray([1.0, -2.5, 3.140625], dtype=np.float32)
        bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        assert np.array_equal(checkpoint.StoredTensor("bfloat16", (3,), bits).numpy(), values)

    def test_a_saved_module_travels(self, tmp_path):
        config = adamss.AdamssConfig(targets=["query"], modules_to_save=["head"], rank=3)
        layers = {"query": NumpyLinear(np.eye(4)), "head": NumpyLinear(np.ones((4, 2)), np.ones(2))}
        model = adamss.attach(NumpyModel(layers), config)
        model["head"].W[...] = 7.0
        adamss.save(model, tmp_path / "a.safetensors")
        fresh = NumpyModel(
            {"query": NumpyLinear(np.eye(4)), "head": NumpyLinear(np.zeros((4, 2)), np.zeros(2))}
        )
        loaded = adamss.load(fresh, tmp_path / "a.safetensors")
        assert np.array_equal(loaded["head"].W, np.full((4, 2), 7.0))
        assert np.array_equal(adamss.detach(loaded)["head"].W, np.zeros((4, 2)))


class TestFingerprint:
    def test_survives_rounding_and_tells_weights_apart(self):
        W = np.random.default_rng(0).standard_normal((200, 300))
        mark = checkpoint.fingerprint(W)
        assert mark.norm == pytest.approx(np.linalg.norm(W))
        rounded = (W.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert mark.difference(checkpoint.fingerprint(rounded)) < checkpoint.FINGERPRINT_TOLERANCE
        assert mark.difference(checkpoint.fingerprint(W.astype(np.float16))) < 1e-3
        assert mark.difference(checkpoint.fingerprint(W[::-1])) > 0.1
        assert mark.difference(checkpoint.fingerprint(W.T)) == float("inf")
        zero = checkpoint.fingerprint(np.zeros((2, 2)))
        assert zero.difference(zero) == 0.0


class TestBadFiles:
    def refused(self, path, match, kind=CheckpointError):
        model = base()
        with pytest.raises(kind, match=match) as caught:
            adamss.load(model, path)
        assert isinstance(caught.value, AdamssError)
        assert model.config is None

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "no adapter file.*none", CheckpointNotFoundError)
        assert issubclass(CheckpointNotFoundError, FileNotFoundError)

    def test_truncated_anywhere(self, path):
        content = path.read_bytes()
        for length in [0, 1, 7, 8, 9, 50, *range(100, len(content), 97), len(content) - 1]:
            path.write_bytes(content[:length])
            self.refused(path, "truncated|damaged|no safetensors file")

    def test_every_flipped_bit_of_the_tensors_is_noticed(self, path):
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        for position in range(start, len(content), 61):
            content[position] ^= 16
            path.write_bytes(content)
            self.refused(path, "checksum")
            content[position] ^= 16

    def test_other_peoples_files(self, path, tmp_path):
        safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
        self.refused(tmp_path / "other.safetensors", "not written by adamss")
        (tmp_path / "text").write_text("hello, this is no adapter at all")
        self.refused(tmp_path / "text", "no safetensors file")
        self.refused(tmp_path, "no adapter file", CheckpointNotFoundError)

    def test_newer_version(self, path):
        rewrite(path, metadata={"format_version": "2"})
        self.refused(path, "version '2'; this adamss reads 1: install a newer adamss")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"metadata": {"config": "{"}}, "not a valid adapter file"),
            ({"metadata": {"config": None}}, "not a valid adapter file"),
            ({"metadata": {"config": "[]"}}, "config is no dictionary"),
            ({"metadata": {"config": '{"targets": ["query"], "evil": 1}'}}, "no setting evil"),
            ({"metadata": {"layers": "[" * 100_000}}, "its header is longer than"),
            ({"metadata": {"layers": "[" * 2_000}}, "not a valid adapter file"),
            ({"metadata": {"layers": "{}"}}, "belong to no layer"),
            ({"metadata": {"layers": "[]"}}, "layers is no dictionary"),
            ({"metadata": {"modules_to_save": "null"}}, "modules_to_save is no dictionary"),
            ({"metadata": {"writer": "[]"}}, "writer is no dictionary"),
            (
                {"metadata": {"layers": '{"layer.0.query": {"shape": [Infinity, 1]}}'}},
                "not a valid adapter file",
            ),
            (
                {"tensors": {"layer.0.query.M": np.zeros((1, 2_000_000), np.float32)}},
                "not a valid adapter file",
            ),
            ({"tensors": {"layer.0.query.C": None}}, "'layer.0.query' lacks tensors"),
            ({"tensors": {"layer.0.query.M": None}}, "'layer.0.query' lacks tensors"),
            ({"tensors": {"layer.0.query.labels": np.full(10, 3, np.uint8)}}, r"labels must lie in 0 \.\. 2"),
            ({"tensors": {"layer.0.query.labels": np.full(10, 0, np.int64)}}, "labels has dtype int64"),
            ({"tensors": {"layer.0.query.labels": np.full(9, 0, np.uint8)}}, "C must have n = 9"),
            ({"tensors": {"layer.0.query.ranks": np.full(3, 255, np.uint8)}}, "ranks must sum to"),
            ({"tensors": {"layer.0.query.active": np.full(2, True)}}, "active must have K = 3"),
            ({"tensors": {"layer.0.query.C": np.zeros((2, 10), np.int32)}}, "C has dtype int32"),
            ({"tensors": {"layer.0.query.C": np.zeros((1, 2, 10))}}, "2 axes"),
            ({"tensors": {"layer.0.query.M": np.zeros((9, 5))}}, "A must have d = 12 rows"),
            ({"tensors": {"extra": np.zeros(2)}}, "belong to no layer: 'extra'"),
            ({"rename": {"layer.0.query.C": "layer.0.query.c"}}, "lacks tensors"),
        ],
    )
    def test_well_formed_lies(self, path, changes, match):
        rewrite_with_checksum(path, **changes)
        self.refused(path, match)

    def test_layers_that_the_model_lacks(self, path):
        with pytest.raises(
            CheckpointError, match=r"no layer 'layer\.1\.query'.*near matches: layer\.0\.query"
        ):
            adamss.load(NumpyModel({"layer.0.query": base()["layer.0.query"]}), path)

    def test_another_base(self, path):
        with pytest.raises(CheckpointError, match=r"layer\.0\.query: the base weight is not the one"):
            adamss.load(base(seed=9), path)


class TestWriting:
    def test_a_failed_write_leaves_the_old_file_and_no_other(self, path, monkeypatch):
        before = path.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            adamss.save(adapted(seed=5), path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_two_writers_leave_one_whole_file(self, tmp_path):
        path, models = tmp_path / "a.safetensors", [adapted(seed=seed) for seed in range(4)]
        threads = [threading.Thread(target=adamss.save, args=(model, path)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loaded = core.delta(checkpoint.read(path).layers["layer.0.query"].factors())
        assert any(np.allclose(loaded, core.delta(model["layer.0.query"].factors)) for model in models)
        assert os.listdir(tmp_path) == ["a.safetensors"]

    def test_a_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            adamss.save(adapted(), tmp_path / "nowhere" / "a.safetensors")

    def test_the_umask_is_respected(self, path):
        (path.parent / "plain").write_bytes(b"")
        assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_numpy_has_no_bfloat16():
    with pytest.raises(ConfigError, match="numpy has no such dtype"):
        adamss.attach(base(), adamss.AdamssConfig(targets=["query"], factor_dtype="bfloat16"))


def test_show_prints_what_a_file_holds(path, capsys):
    assert cli.main(["show", str(path)]) == 0
    text = capsys.readouterr().out
    assert "layer.1.query" in text
    assert "form: portable (M)" in text
    assert f"numpy {np.__version__}" in text
    assert cli.main(["show", str(path.parent / "none")]) == 1
    assert "there is no adapter file" in capsys.readouterr().err
