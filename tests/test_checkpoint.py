"""Test the file format: its content, its size, and the errors for files that are wrong in any way."""

import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import adamss
from adamss import cli, core
from adamss.backend import NumpyLinear, NumpyModel
from adamss.backend.tensors import StoredTensor
from adamss.core.fingerprint import FINGERPRINT_TOLERANCE, Fingerprint, fingerprint, unlikely
from adamss.errors import AdamssError, CheckpointError, CheckpointNotFoundError, ConfigError
from adamss.io import checkpoint, reader, writer
from adamss_conformance.cases import random_C


def base(seed=0, d=12, n=10):
    rng = np.random.default_rng(seed)
    return NumpyModel(
        {f"layer.{i}.query": NumpyLinear(rng.standard_normal((d, n)), np.zeros(n)) for i in range(2)}
    )


def adapted(seed=1, **changes):
    settings = {"targets": ["query"], "rank": 5, "subspaces": 3, "subspace_rank": 2} | changes
    model = adamss.attach(base(), adamss.AdamssConfig(**settings))
    rng = np.random.default_rng(seed)
    for factors in model.bank.only().layers.values():
        factors.C[...] = random_C(factors, rng)
    return model


@pytest.fixture
def path(tmp_path):
    adamss.save(adapted(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def metadata_of(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def tensor_of(path, name):
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name).copy()


def rewrite(path, *, metadata=None, tensors=None, rename=None):
    """Change a file without this library's writer, so that the checksum in it stays the old one."""
    content = safetensors.numpy.load_file(path)
    merged = {k: v for k, v in (metadata_of(path) | (metadata or {})).items() if v is not None}
    content = {(rename or {}).get(name, name): tensor for name, tensor in content.items()}
    content = {name: tensor for name, tensor in (content | (tensors or {})).items() if tensor is not None}
    safetensors.numpy.save_file(content, path, metadata=merged)


def rewrite_with_checksum(path, **changes):
    rewrite(path, **changes)
    tensors = dict(reader.stored_tensors(reader.deserialize(path.read_bytes())))
    rewrite(path, metadata={"checksum": checkpoint._checksum(tensors, metadata_of(path))})


def rewrite_first_layer(path, tensors):
    rewrite_with_checksum(path, tensors={f"layer.0.query.{name}": tensor for name, tensor in tensors.items()})


@contextmanager
def memory_below(limit):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


class TestContent:
    @pytest.mark.parametrize("training", [False, True])
    def test_tensors_and_metadata_are_those_of_the_design(self, tmp_path, training):
        model = adapted()
        path = tmp_path / "a.safetensors"
        adamss.save(model, path, training=training)
        content, metadata = safetensors.numpy.load_file(path), metadata_of(path)
        kinds = ["A", "B"] if training else ["M"]
        kinds += ["C", "labels", "ranks", "active"]
        assert set(content) == {f"layer.{i}.query.{kind}" for i in range(2) for kind in kinds}
        assert metadata["format"] == "adamss"
        assert metadata["format_version"] == "1"
        assert json.loads(metadata["config"])["rank"] == 5
        assert json.loads(metadata["writer"])["numpy"] == np.__version__
        assert content["layer.0.query.labels"].dtype == np.uint8
        factors = model.bank.only().layers["layer.0.query"]
        assert np.array_equal(content["layer.0.query.labels"], factors.labels)
        assert np.array_equal(content["layer.0.query.C"], factors.C)

    @pytest.mark.parametrize(("K", "dtype"), [(256, "uint8"), (257, "uint16")])
    def test_labels_take_the_smallest_integer_that_fits(self, tmp_path, K, dtype):
        model = NumpyModel({"q": NumpyLinear(np.random.default_rng(0).standard_normal((4, 300)))})
        config = adamss.AdamssConfig(targets=["q"], subspaces=K, segmentation="contiguous")
        adamss.save(adamss.attach(model, config), tmp_path / "a.safetensors")
        stored = checkpoint.read(tmp_path / "a.safetensors").layers["q"]
        assert (stored.labels.dtype, stored.ranks.dtype) == (dtype, "uint8")
        assert stored.labels.numpy().max() == K - 1

    def test_bfloat16_is_widened_without_loss(self):
        values = np.asarray([1.0, -2.5, 3.140625], dtype=np.float32)
        bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        assert np.array_equal(StoredTensor("bfloat16", (3,), bits).numpy(), values)


class TestFingerprint:
    def test_survives_rounding_and_tells_weights_apart(self):
        W = np.random.default_rng(0).standard_normal((200, 300))
        mark = fingerprint(W)
        assert mark.norm == pytest.approx(np.linalg.norm(W))
        rounded = (W.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert mark.difference(fingerprint(rounded)) < FINGERPRINT_TOLERANCE
        assert mark.difference(fingerprint(W.astype(np.float16))) < 1e-3
        assert mark.difference(fingerprint(W[::-1])) > 0.1
        assert mark.difference(fingerprint(W.T)) == float("inf")
        zero = fingerprint(np.zeros((2, 2)))
        assert zero.difference(zero) == 0.0

    @pytest.mark.parametrize(("bits", "layers"), [(8, 1), (4, 2), (3, 4), (2, 12)])
    def test_quantised_weights_are_told_apart_by_what_their_bits_explain(self, bits, layers):
        """With fewer bits, more layers are needed to tell bases apart, because the quantisation noise is larger."""
        noise, rng, refused = 2.0 ** (1 - bits), np.random.default_rng(0), {"same": 0, "other": 0}
        for _ in range(50):
            marks = {"same": [], "other": []}
            for _ in range(layers):
                W, other = rng.standard_normal((2, 64, 48))
                quantised = fingerprint(W + noise * rng.standard_normal(W.shape), noise)
                marks["same"].append((fingerprint(W), quantised))
                marks["other"].append((fingerprint(other), quantised))
            for name, pairs in marks.items():
                alone = any(a.difference(b) > a.tolerance(b) for a, b in pairs)
                refused[name] += alone or unlikely(pairs)
        assert refused == {"same": 0, "other": 50}

    @pytest.mark.parametrize(
        "changes",
        [{"projections": numbers} for numbers in ((1.0, np.nan, 3.0), (1.0, 2.0, np.inf), ())]
        + [{"norm": number} for number in (np.nan, np.inf, -10.0, 0.0)],
        ids=str,
    )
    def test_numbers_that_compare_with_nothing_are_no_match(self, changes):
        true = {"shape": (2, 3), "norm": 10.0, "projections": (1.0, 2.0, 3.0)}
        mark, lie = Fingerprint(**true), Fingerprint(**(true | changes))
        assert mark.difference(lie) > FINGERPRINT_TOLERANCE
        assert lie.difference(mark) > FINGERPRINT_TOLERANCE


def small(*numbers):
    return np.asarray(numbers, np.uint8)


class TestBadFiles:
    def refused(self, path, match, kind=CheckpointError):
        model = base()
        with pytest.raises(kind, match=match) as caught:
            adamss.load(model, path)
        assert isinstance(caught.value, AdamssError)
        assert not model.bank

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

    @pytest.mark.skipif(os.name != "posix", reason="needs sparse files")
    def test_sparse_files_are_not_read(self, path):
        content = path.read_bytes()
        for start in (content, content[:8], (1 << 33).to_bytes(8, "little"), b""):
            path.write_bytes(start)
            os.truncate(path, 1 << 34)
            with memory_below(1 << 22):
                self.refused(path, "its length is not|longer than|no safetensors file")

    @pytest.mark.skipif(os.name != "posix", reason="needs sparse files")
    def test_sparse_files_whose_header_accounts_for_their_length(self, path):
        size = 1 << 42
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)
        self.refused(path, "not written by adamss")

    def test_no_memory_for_it(self, path, monkeypatch):
        class Large(io.FileIO):
            def read(self, size=-1):
                if size == path.stat().st_size:
                    raise MemoryError
                return super().read(size)

        monkeypatch.setattr(reader, "open", lambda path, mode: Large(path, mode), raising=False)
        self.refused(path, "there is no memory for its")

    def test_missing_and_other_peoples_files(self, tmp_path):
        self.refused(tmp_path / "none.safetensors", "no adapter file.*none", CheckpointNotFoundError)
        assert issubclass(CheckpointNotFoundError, FileNotFoundError)
        safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
        self.refused(tmp_path / "other.safetensors", "not written by adamss")
        (tmp_path / "text").write_text("hello, this is no adapter at all")
        self.refused(tmp_path / "text", "no safetensors file")
        self.refused(tmp_path, "has no adapter of adamss", CheckpointNotFoundError)

    def test_newer_version(self, path):
        rewrite(path, metadata={"format_version": "2"})
        self.refused(path, "version '2'; this adamss reads 1: install a newer adamss")

    @pytest.mark.parametrize(
        ("entry", "text", "match"),
        [
            ("config", "{", "not a valid adapter file"),
            ("config", None, "not a valid adapter file"),
            ("config", "[]", "config is no dictionary"),
            ("config", '{"targets": ["query"], "evil": 1}', "no setting evil"),
            ("layers", "[" * 100_000, "its header is longer than"),
            ("layers", "[" * 2_000, "not a valid adapter file"),
            ("layers", "{}", "belong to no layer"),
            ("layers", "[]", "layers is no dictionary"),
            ("layers", '{"layer.0.query": {"shape": [Infinity, 1]}}', "not a valid adapter file"),
            ("modules_to_save", "null", "modules_to_save is no dictionary"),
            ("writer", "[]", "writer is no dictionary"),
        ],
    )
    def test_metadata_that_lie(self, path, entry, text, match):
        rewrite_with_checksum(path, metadata={entry: text})
        self.refused(path, match)

    @pytest.mark.parametrize(
        ("tensors", "match"),
        [
            ({"M": np.zeros((1, 2_000_000), np.float32)}, "not a valid adapter file"),
            ({"C": None}, "'layer.0.query' lacks tensors"),
            ({"M": None}, "'layer.0.query' lacks tensors"),
            ({"C": None, "c": np.zeros((2, 10))}, "lacks tensors"),
            ({"extra": np.zeros(2)}, "belong to no layer: 'layer.0.query.extra'"),
            ({"labels": np.full(10, 3, np.uint8)}, r"labels must lie in 0 \.\. 2"),
            ({"labels": np.full(10, 0, np.int64)}, "labels has dtype int64"),
            ({"labels": np.full(9, 0, np.uint8)}, "C must have n = 9"),
            ({"ranks": np.full(3, 255, np.uint8)}, "ranks must sum to"),
            ({"active": np.full(2, True)}, "active must have K = 3"),
            ({"C": np.zeros((2, 10), np.int32)}, "C has dtype int32"),
            ({"C": np.zeros((1, 2, 10))}, "2 axes"),
            ({"M": np.zeros((9, 5))}, "A must have d = 12 rows"),
            ({"M": np.zeros((12, 11)), "ranks": small(9, 1, 1), "C": np.zeros((9, 10))}, "q = 11"),
            ({"ranks": small(2, 2, 1, *[0] * 8), "active": np.ones(11, bool)}, "K = 11"),
            ({"C": np.zeros((11, 10))}, "r = 11"),
            ({"labels": np.full(10, 2**64 - 1, np.uint64)}, "labels must lie in"),
            ({"labels": np.full(10, 2**63, np.uint64)}, "labels must lie in"),
            ({"ranks": np.asarray([2**63, 2**63, 5], np.uint64)}, "ranks must not exceed"),
            ({"ranks": small(0, 0, 0)}, "ranks must sum to"),
            ({"C": np.zeros((0, 10))}, "no axis may be empty"),
        ],
    )
    def test_tensors_that_lie(self, path, tensors, match):
        rewrite_first_layer(path, tensors)
        self.refused(path, match)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        ("training", "kind"), [(False, "M"), (False, "C"), (True, "A"), (True, "B"), (True, "C")]
    )
    def test_a_training_that_diverged(self, tmp_path, training, kind, value):
        path, name = tmp_path / "a.safetensors", f"layer.1.query.{kind}"
        adamss.save(adapted(), path, training=training)
        tensor = tensor_of(path, name)
        tensor.reshape(-1)[3] = value
        rewrite_with_checksum(path, tensors={name: tensor})
        self.refused(path, rf"'layer\.1\.query': {kind} holds NaN or infinity: the training diverged")

    def test_save_keeps_what_diverged(self, tmp_path):
        model = adapted()
        model.bank.only().layers["layer.0.query"].C[0, 0] = np.nan
        adamss.save(model, tmp_path / "a.safetensors")
        assert np.isnan(tensor_of(tmp_path / "a.safetensors", "layer.0.query.C")[0, 0])
        self.refused(tmp_path / "a.safetensors", r"layer\.0\.query.*C holds NaN")

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
    def test_what_is_finite(self, dtype):
        size = {"float64": 8, "float32": 4}.get(dtype, 2)
        # The bit patterns of the largest finite numbers; adding one gives infinity. The number stands after 2^16
        # zeros, because `is_finite` reads a tensor in pieces.
        bits = {
            "float64": 0x7FEF << 48 | (1 << 48) - 1,
            "float32": 0x7F7FFFFF,
            "float16": 0x7BFF,
            "bfloat16": 0x7F7F,
        }
        entries = [0] * (1 << 16) + [bits[dtype]]
        tensor = lambda: StoredTensor(  # noqa: E731
            dtype, (len(entries),), b"".join(entry.to_bytes(size, "little") for entry in entries)
        )
        assert tensor().is_finite()
        entries[-1] += 1
        assert not tensor().is_finite()
        assert not np.isfinite(tensor().numpy()[-1])
        assert StoredTensor("uint8", (1,), b"\xff").is_finite()

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [("projections", numbers, "fingerprint holds") for numbers in ([np.nan] * 4, [0.0, 0.0, 0.0, np.inf])]
        + [("norm", number, "fingerprint holds") for number in (-1.0, True, "1")]
        + [("noise", number, "fingerprint holds") for number in (-0.1, 1.5, True, np.nan, "0", None)]
        + [("norm", 10**400, "not a valid adapter file")]
        + [("shape", s, r"no shape \(d, n\)") for s in ([12.0, 10], [True, 10], [12, 10, 1], "12")],
    )
    def test_fingerprints_that_lie(self, path, key, value, match):
        layers = json.loads(metadata_of(path)["layers"])
        layers["layer.0.query"][key] = value
        rewrite_with_checksum(path, metadata={"layers": json.dumps(layers)})
        self.refused(path, match)

    @pytest.mark.parametrize(
        ("saved", "tensors", "match"),
        [
            ({"head": [5]}, ["head.5"], r"modules_to_save\['head'\] is no list of names"),
            ({"head": "ab"}, ["head.a", "head.b"], "is no list of names"),
            ({"head": ["a", "a"]}, ["head.a"], "not a valid adapter file"),
            ({"layer.0.query": ["weight"]}, ["layer.0.query.weight"], "'layer.0.query' is or lies within"),
            ({"layer": ["x"]}, ["layer.x"], "'layer.0.query' is or lies within 'layer'"),
            ({"": ["x"]}, ["x"], "'layer.0.query' is or lies within ''"),
            ({"a": ["x"], "a.b": ["y"]}, ["a.x", "a.b.y"], "'a.b' is or lies within 'a'"),
            ({"../etc": ["passwd"]}, ["../etc.passwd"], r"the model has no layer '\.\./etc'"),
        ],
        ids=str,
    )
    def test_saved_modules_that_lie(self, path, saved, tensors, match):
        content = {name: np.ones((10, 12)) for name in tensors}
        rewrite_with_checksum(path, tensors=content, metadata={"modules_to_save": json.dumps(saved)})
        self.refused(path, match)

    def test_a_path_of_very_many_parts(self, path):
        long = "a." * 5_000
        kinds = ("M", "C", "labels", "ranks", "active")
        names = {f"layer.1.query.{kind}": f"{long}.{kind}" for kind in kinds}
        layers = json.loads(metadata_of(path)["layers"])
        layers[long] = layers.pop("layer.1.query")
        rewrite_with_checksum(path, rename=names, metadata={"layers": json.dumps(layers)})
        with memory_below(2 * path.stat().st_size + 500_000):
            self.refused(path, r"the model has no layer 'a\.a\.a\..*', which the file adapts")

    def test_booleans_that_are_none(self, path):
        tensors = dict(reader.stored_tensors(reader.deserialize(path.read_bytes())))
        metadata = metadata_of(path)
        tensors["layer.0.query.active"] = StoredTensor("bool", (3,), b"\x01\x02\x00")
        metadata["checksum"] = checkpoint._checksum(tensors, metadata)
        writer.write_tensors(path, tensors, metadata)
        self.refused(path, "'layer.0.query.active' holds booleans that are neither 0 nor 1")

    def test_a_bit_flipped_in_the_metadata_is_noticed(self, path):
        content = path.read_bytes()
        assert content.count(b'\\"rank\\": 5') == 1
        path.write_bytes(content.replace(b'\\"rank\\": 5', b'\\"rank\\": 4'))
        self.refused(path, "checksum")

    @pytest.mark.parametrize("pattern", [r"(?i)[" + "\x00-\uffff" * 1000 + "]", "(" * 5000, "(a+)+$", "[[a]"])
    def test_a_regular_expression_of_a_file_is_not_compiled(self, path, pattern):
        config = json.loads(metadata_of(path)["config"])
        rewrite_with_checksum(path, metadata={"config": json.dumps(config | {"targets": pattern})})
        assert adamss.load(base(), path).bank.only().config.targets == pattern
        rewrite_with_checksum(path, metadata={"config": json.dumps(config | {"targets": ""})})
        self.refused(path, "targets is an empty pattern")

    @pytest.mark.parametrize(
        "bomb",
        [
            "[" + "[]," * 10**5 + "[]]",
            "[" * 300_000,
            f'"{chr(0x1D518) * 75_000}"',
            "{" + '"a":{},' * 40_000 + "}",
        ],
        ids=["wide", "deep", "wide characters", "dictionaries"],
    )
    @pytest.mark.parametrize("entry", ["config", "layers", "extra"])
    def test_json_that_would_fill_the_memory(self, path, bomb, entry):
        rewrite_with_checksum(path, metadata={entry: bomb})
        with memory_below(2 * path.stat().st_size + 200_000):
            self.refused(path, "its header is longer than that of any file of this size")

    def test_a_file_takes_twice_its_size_while_it_is_read(self, path):
        n = 1 << 19
        tensors = {
            "ranks": np.zeros(n, np.uint8),
            "active": np.ones(n, bool),
            "C": np.zeros((1, n), np.float16),
        }
        rewrite_first_layer(path, tensors)
        with memory_below(2 * path.stat().st_size + 200_000):
            self.refused(path, "C must have n = 10 columns")

    def test_what_a_file_says_is_shortened_in_messages(self, path):
        text = json.dumps({"targets": ["q"], "basis": "x" * 50_000})
        rewrite_with_checksum(path, metadata={"config": text})
        match = "basis must be one of shared, per_subspace; found 'xxx"
        with pytest.raises(CheckpointError, match=match) as caught:
            adamss.load(base(), path)
        assert len(str(caught.value)) < 1000

    def test_a_model_of_very_many_small_layers_has_room(self, tmp_path):
        layers = {f"experts.{i}.query": NumpyLinear(np.eye(3) + i) for i in range(700)}
        config = adamss.AdamssConfig(targets=["query"], rank=2, subspaces=2)
        path = tmp_path / "a.safetensors"
        adamss.save(adamss.attach(NumpyModel(layers), config), path)
        # The header is most of the file. Decoded, it takes more memory than the limit of a model with few modules: an
        # eighth of the file plus 256 KiB.
        assert len(adamss.load(NumpyModel(layers), path).layers) == 700
        assert len(checkpoint.read(path).layers) == 700
        with pytest.raises(CheckpointError, match="its header is longer"):
            checkpoint.read(path, modules=3)

    def test_layers_that_the_model_lacks(self, path):
        match = r"no layer 'layer\.1\.query'.*near matches: layer\.0\.query"
        with pytest.raises(CheckpointError, match=match):
            adamss.load(NumpyModel({"layer.0.query": base()["layer.0.query"]}), path)

    def test_another_base(self, path):
        with pytest.raises(CheckpointError, match=r"layer\.0\.query: the base weight is not the one"):
            adamss.load(base(seed=9), path)


class TestDtypes:
    """A number that overflows in the model's dtype is an error and does not become infinity."""

    def saved(self, tmp_path, dtype, *, C=0.0, head=1.0, **settings):
        layers = {"query": NumpyLinear(np.eye(4, dtype=dtype)), "head": NumpyLinear(np.ones((4, 2), dtype))}
        config = adamss.AdamssConfig(
            targets=["query"], modules_to_save=["head"], rank=3, subspaces=2, **settings
        )
        model = adamss.attach(NumpyModel(layers), config)
        model.bank.only().layers["query"].C[0, 0] = C
        model["head"].W[0, 0] = head
        adamss.save(model, tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    def narrow(self, dtype="float32"):
        return NumpyModel(
            {"query": NumpyLinear(np.eye(4, dtype=dtype)), "head": NumpyLinear(np.zeros((4, 2), dtype))}
        )

    @pytest.mark.parametrize("trainable", [True, False])
    def test_factors(self, tmp_path, trainable):
        path = self.saved(tmp_path, "float64", C=1e300)
        with pytest.raises(CheckpointError, match="query: the file holds numbers too large for float32"):
            adamss.load(self.narrow(), path, trainable=trainable)
        wide = adamss.load(self.narrow("float64"), path, trainable=trainable)
        assert wide.bank.only().layers["query"].C[0, 0] == 1e300

    def test_factors_in_half_precision(self, tmp_path):
        path = self.saved(tmp_path, "float32", C=6e4, factor_dtype="float16")
        layers = adamss.load(self.narrow(), path).bank.only().layers
        assert layers["query"].C[0, 0] == np.float16(6e4)
        C = tensor_of(path, "query.C").astype(np.float32)
        C[0, 0] = 7e4
        rewrite_with_checksum(path, tensors={"query.C": C})
        with pytest.raises(CheckpointError, match="query: the file holds numbers too large for float16"):
            adamss.load(self.narrow(), path)

    def test_saved_modules(self, tmp_path):
        path = self.saved(tmp_path, "float64", head=1e300)
        with pytest.raises(
            CheckpointError, match=r"head\.weight: the file has float64, .*float32 cannot hold"
        ):
            adamss.load(self.narrow(), path)
        path = self.saved(tmp_path, "float64", head=1 / 3)
        assert adamss.load(self.narrow(), path)["head"].W[0, 0] == np.float32(1 / 3)

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_saved_modules_may_hold_any_number(self, tmp_path, value):
        path = self.saved(tmp_path, "float64", head=value)
        for dtype in ("float32", "float64"):
            found = adamss.load(self.narrow(dtype), path)["head"].W[0, 0]
            np.testing.assert_equal(found, np.dtype(dtype).type(value))

    @pytest.mark.parametrize(("dtype", "value"), [("int64", 3), ("uint64", 2**53 + 1), ("bool", True)])
    def test_integers_where_the_model_has_none(self, tmp_path, dtype, value):
        path = self.saved(tmp_path, "float64", head=1.0)
        rewrite_with_checksum(path, tensors={"head.weight": np.full((2, 4), value, dtype)})
        with pytest.raises(CheckpointError, match=f"file has {dtype}, of which the model's float32 cannot"):
            adamss.load(self.narrow(), path)

    def test_padding_of_C_is_never_read(self, tmp_path):
        # Ten columns in four subspaces of 3, 3, 2 and 2, so the last two have rank 2 instead of 3 and C is padded.
        model = adapted(subspaces=4, subspace_rank=3, segmentation="contiguous", rank=6)
        layers = model.bank.only().layers
        expected = {path: core.delta(factors) for path, factors in layers.items()}
        for _, _, C, labels, ranks, _ in layers.values():
            beyond = np.arange(C.shape[0])[:, None] >= ranks[labels]
            assert beyond.any()
            C[beyond] = 1e6
        adamss.save(model, tmp_path / "a.safetensors")
        loaded = adamss.load(base(), tmp_path / "a.safetensors")
        for path, update in expected.items():
            np.testing.assert_allclose(core.delta(loaded.bank.only().layers[path]), update, atol=1e-12)


class TestWriting:
    def test_the_same_adapter_makes_the_same_bytes(self, tmp_path):
        contents = set()
        for i in range(5):
            adamss.save(adapted(), tmp_path / f"{i}.safetensors")
            contents.add((tmp_path / f"{i}.safetensors").read_bytes())
        assert len(contents) == 1

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
        assert any(
            np.allclose(loaded, core.delta(model.bank.only().layers["layer.0.query"])) for model in models
        )
        assert os.listdir(tmp_path) == ["a.safetensors"]

    def test_what_load_would_refuse_is_not_written(self, path):
        old = path.read_bytes()
        model = NumpyModel(
            {f"{i:03}{chr(0x1D518) * 200}.query": NumpyLinear(np.eye(3) + i) for i in range(300)}
        )
        model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=2, subspaces=2))
        with pytest.raises(CheckpointError, match=r"its header is longer.*give the modules shorter names"):
            adamss.save(model, path)
        assert path.read_bytes() == old

    @pytest.mark.parametrize("name", ["", "a\0b"])
    def test_no_name_at_all(self, name):
        with pytest.raises(ConfigError, match="path must name a file"):
            adamss.save(adapted(), name)

    @pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
    def test_links_stay_and_pipes_are_refused(self, path, tmp_path):
        link, pipe = tmp_path / "link", tmp_path / "pipe"
        link.symlink_to(path.name)
        adamss.save(adapted(2), link)
        assert link.is_symlink()
        assert adamss.load(base(), path).bank.only().layers["layer.0.query"].C.any()
        assert path.read_bytes() == link.read_bytes()
        os.mkfifo(pipe)
        with pytest.raises(CheckpointError, match="is a device, pipe or socket"):
            adamss.save(adapted(), pipe)
        assert pipe.is_fifo()

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


def test_show_prints_no_commands_to_a_terminal(tmp_path, capsys, monkeypatch):
    name = "evil\x1b[2J\n\u202e.query"
    model = NumpyModel({name: NumpyLinear(np.eye(4)), f"{'x' * 3000}.query": NumpyLinear(np.eye(4))})
    path = tmp_path / "a.safetensors"
    adamss.save(adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=2, subspaces=2)), path)
    rewrite_with_checksum(path, metadata={"writer": json.dumps({"\x1b]0;title": "\ud800"})})
    assert cli.main(["show", str(path)]) == 0
    text = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in text)
    assert r"evil\x1b[2J\n\u202e.query" in text
    assert r"\x1b]0;title \ud800" in text
    assert max(map(len, text.splitlines())) < 1000


def test_show_prints_names_that_the_encoding_lacks(tmp_path):
    model = NumpyModel({"编码.query": NumpyLinear(np.eye(4))})
    adamss.save(
        adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=2)), tmp_path / "a.safetensors"
    )
    command = [sys.executable, "-c", "import sys; from adamss import cli; sys.exit(cli.main(sys.argv[1:]))"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "show", str(tmp_path / "a.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert r"\u7f16\u7801.query" in done.stdout


def test_show_counts_as_summary_does(tmp_path, capsys):
    for number, options in enumerate(
        ({}, {"basis": "per_subspace"}, {"basis": "per_subspace", "subspaces": 5})
    ):
        model = adapted(**options)
        adamss.save(model, tmp_path / f"{number}.safetensors", training=True)
        assert cli.main(["show", str(tmp_path / f"{number}.safetensors")]) == 0
        assert str(replace(adamss.summary(model), targets=None)) in capsys.readouterr().out
        for row, factors in zip(adamss.summary(model).rows, model.bank.only().layers.values(), strict=True):
            assert row.trained == core.count_factors(factors)
            assert max(core.basis_ranks(factors)) == row.R
