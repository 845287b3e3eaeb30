"""`adamss.offline`, and the command line on top of it: files are the model, NumPy is the oracle."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import adamss
from adamss import cli, core, offline
from adamss.backend import NumpyLinear, NumpyModel
from adamss.backend.tensors import StoredTensor
from adamss.core import analysis
from adamss.errors import AdamssError, CheckpointError, ConfigError, LayerError
from adamss.io import checkpoint, writer
from adamss.io.weights import WeightFiles, match_names
from adamss.offline.plan import suggested
from adamss_conformance.cases import random_C

D, N = 24, 20
LAYERS = ("encoder.0.query", "encoder.0.value", "encoder.1.query")


def weights(dtype="float32", prefix=""):
    """Return the tensors of a small model, named as PyTorch does."""
    rng = np.random.default_rng(0)
    tensors = {f"{prefix}{path}.weight": rng.standard_normal((N, D)) for path in LAYERS}
    tensors |= {f"{prefix}{path}.bias": rng.standard_normal(N) for path in LAYERS}
    tensors[f"{prefix}embeddings.weight"] = rng.standard_normal((30, D))
    return {name: StoredTensor.of(array.astype(np.float32), dtype) for name, array in tensors.items()}


def write_model(folder, tensors, shards=1):
    """Write a folder of weights as transformers does, and return it as a string."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    names = list(tensors)
    if shards == 1:
        writer.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return str(folder)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: tensors[name] for name in names[i::shards]}
        writer.write_tensors(folder / file, own, {"format": "pt"})
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return str(folder)


def model_of(tensors, prefix=""):
    """Return the same model in NumPy, whose paths begin with a prefix."""
    return NumpyModel(
        {
            f"{prefix}{path}": NumpyLinear(
                tensors[f"{path}.weight"].numpy().T.copy(), tensors[f"{path}.bias"].numpy().copy()
            )
            for path in LAYERS
        }
    )


def adapted(tensors, prefix="", seed=1, **settings):
    settings = {"targets": ["query", "value"], "rank": 6, "subspaces": 3, "subspace_rank": 2} | settings
    model = adamss.attach(model_of(tensors, prefix), adamss.AdamssConfig(**settings))
    rng = np.random.default_rng(seed)
    for factors in model.bank.only().layers.values():
        factors.C[...] = 0.1 * random_C(factors, rng)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), weights())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    adamss.save(adapted(weights()), path)
    return str(path)


def run(*arguments):
    return cli.main([*map(str, arguments)])


# ---- weights in files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_as_they_were_written(tmp_path, dtype, shards):
    tensors = weights(dtype)
    files = WeightFiles(write_model(tmp_path, tensors, shards))
    assert {name: files.read(name) for name in files} == tensors
    assert len(files.files) == shards


@example([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # halfway between two neighbours: the even one
@given(st.lists(st.floats(width=32), max_size=20))
def test_bfloat16_is_rounded_to_the_nearest(numbers):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="it comes with JAX")
    array = np.asarray(numbers, np.float32)
    with np.errstate(all="ignore"):
        expected = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(StoredTensor.of(array, "bfloat16").numpy(), expected)


@pytest.mark.parametrize(
    ("paths", "names", "expected"),
    [
        (["a.q"], ["a.q.weight"], ("", "")),
        (["bert.a.q", "bert.b.q"], ["a.q.weight", "b.q.weight"], ("bert.", "")),
        (["a.q", "b.q"], ["m.a.q.weight", "m.b.q.weight"], ("", "m.")),
        (["a.experts.up"], ["a.experts.up"], ("", "")),
        (["a.q", "b.q"], ["a.q.weight"], "no weight 'b.q'"),
        (["q"], ["l.q.weight", "m.q.weight"], r"several places of the base model \(l\. and m\.\)"),
    ],
)
def test_names_of_an_adapter_in_files(paths, names, expected):
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=expected):
            match_names(paths, dict.fromkeys(names))
    else:
        spelling = match_names(paths, dict.fromkeys(names))
        assert spelling[:2] == expected
        assert all(spelling.in_model(spelling.in_files(path)) == path for path in paths)


# ---- merging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"basis": "per_subspace"}, {"include_bias": True}], ids=str)
def test_merged_files_are_the_merged_model(tmp_path, dtype, shards, settings):
    tensors = weights(dtype)
    model = adapted(tensors, prefix="bert.", **settings)
    adamss.save(model, tmp_path / "a.safetensors")
    folder = write_model(tmp_path / "base", tensors, shards)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"pickle")
    merged = offline.merge(
        checkpoint.read(tmp_path / "a.safetensors"), WeightFiles(folder), str(tmp_path / "merged")
    )
    files = WeightFiles(tmp_path / "merged")
    assert files.keys() == tensors.keys()
    expected = adamss.merge(model) if dtype == "float32" else model
    for path in LAYERS:
        if dtype == "float32":
            W = expected.layers[f"bert.{path}"].W
        else:
            W = model.layers[f"bert.{path}"].W + core.delta(model.bank.only().layers[f"bert.{path}"])[:D]
        weight = StoredTensor.of(np.ascontiguousarray(W.T, np.float32), dtype).numpy()
        # The file has M = A B, rounded once, in the place of A and B.
        step = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        np.testing.assert_allclose(files.read(f"{path}.weight").numpy(), weight, atol=step, rtol=step)
        moved = not np.array_equal(files.read(f"{path}.bias").numpy(), tensors[f"{path}.bias"].numpy())
        assert moved == settings.get("include_bias", False)
    assert files.read("embeddings.weight") == tensors["embeddings.weight"]
    assert {each.name for each in (tmp_path / "merged").iterdir()} == {
        *merged.files,
        "README.md",
        "config.json",
        "tokenizer.json",
        *(["model.safetensors.index.json"] if shards > 1 else []),
    }
    assert max(merged.lost.values()) < {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}[dtype]


def test_a_new_head_is_part_of_the_merged_files(tmp_path):
    tensors = weights()
    model = model_of(tensors, "bert.")
    head = NumpyLinear(np.zeros((N, 2)), np.zeros(2))
    model = replace(model, layers={**model.layers, "classifier": head})
    model = adamss.attach(
        model, adamss.AdamssConfig(targets=["query"], modules_to_save=["classifier"], rank=4, subspaces=2)
    )
    model.layers["classifier"].W[...] = 3.0
    adamss.save(model, tmp_path / "a.safetensors")
    merged = offline.merge(
        checkpoint.read(tmp_path / "a.safetensors"),
        WeightFiles(write_model(tmp_path / "base", tensors)),
        str(tmp_path / "merged"),
    )
    files = WeightFiles(tmp_path / "merged")
    assert {*merged.added} == {"classifier.weight", "classifier.bias"}
    assert {*files} == {*tensors, *merged.added}
    np.testing.assert_array_equal(files.read("classifier.weight").numpy(), np.full((2, N), 3.0))
    assert len(files.files) == 2
    # A head that the base has is replaced, in its dtype.
    files = WeightFiles(
        write_model(
            tmp_path / "with",
            tensors
            | {
                f"classifier.{k}": StoredTensor.of(np.zeros(s), "float16")
                for k, s in (("weight", (2, N)), ("bias", 2))
            }
            | {f"bert.{name}": tensor for name, tensor in tensors.items()},
        )
    )
    again = offline.merge(checkpoint.read(tmp_path / "a.safetensors"), files, str(tmp_path / "again"))
    stored = WeightFiles(tmp_path / "again").read("classifier.weight")
    assert again.added == () and stored.dtype == "float16" and (stored.numpy() == 3).all()


def test_a_shared_embedding_is_not_merged(tmp_path):
    tensors = weights()
    table = tensors["embeddings.weight"].numpy()
    model = adamss.attach(
        NumpyModel({"embeddings": NumpyLinear(table.T.copy())}),
        adamss.AdamssConfig(targets=["embeddings"], rank=4, subspaces=2),
    )
    adamss.save(model, tmp_path / "a.safetensors")
    files = WeightFiles(write_model(tmp_path / "base", tensors))
    with pytest.raises(LayerError, match="may share its weight with the output head"):
        offline.merge(checkpoint.read(tmp_path / "a.safetensors"), files, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- verify, diff, convert -------------------------------------------------------------------------------


def test_verify_tells_the_base_from_others(adapter, base, tmp_path, capsys):
    assert run("verify", adapter, "--base", base, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and [each["path"] for each in found["layers"]] == list(LAYERS)
    assert run("verify", adapter, "--base", write_model(tmp_path / "half", weights("bfloat16"))) == 0
    other = weights()
    other["encoder.1.query.weight"] = StoredTensor.of(np.ones((N, D), np.float32))
    assert run("verify", adapter, "--base", write_model(tmp_path / "other", other), "--json") == 1
    found = json.loads(capsys.readouterr().out.partition("rounding\n")[2])
    assert [each["fits"] for each in found["layers"]] == [True, True, False]


def test_weights_of_few_bits_are_judged_together(adapter, tmp_path):
    """The rounding error of two bits hides another weight in each layer, but not in all of them."""
    stored = checkpoint.read(adapter)
    layers = {p: replace(each, base=replace(each.base, noise=0.4)) for p, each in stored.layers.items()}
    few_bits = replace(stored, layers=layers)
    rng = np.random.default_rng(5)
    others = {
        f"{path}.weight": StoredTensor.of(rng.standard_normal((N, D)).astype(np.float32)) for path in layers
    }
    shapes = others | {f"{LAYERS[0]}.weight": StoredTensor.of(np.ones((N, D, 1), np.float32))}
    for tensors, fits in ((weights(), True), (others, False), (shapes, False)):
        files = WeightFiles(write_model(tmp_path / str(len(list(tmp_path.iterdir()))), tensors))
        assert all(check.fits for check in offline.verify(few_bits, files)) == fits


def test_diff_measures_the_updates(tmp_path, capsys):
    tensors = weights()
    first, second = adapted(tensors, seed=1), adapted(tensors, seed=2, segmentation="random")
    for name, model in (("a", first), ("b", second)):
        adamss.save(model, tmp_path / f"{name}.safetensors")
    a, b = (checkpoint.read(tmp_path / f"{name}.safetensors") for name in "ab")
    found = offline.diff(a, b)
    assert found.settings == {"segmentation": ("kmeans", "random")} and not found.same
    for each in found.layers:
        x, y = (np.asarray(core.delta(m.bank.only().layers[each.path])) for m in (first, second))
        norms = np.linalg.norm(x), np.linalg.norm(y)
        assert each.distance == pytest.approx(np.linalg.norm(x - y) / max(norms), rel=1e-4)
        assert each.cosine == pytest.approx((x * y).sum() / (norms[0] * norms[1]), abs=1e-5)
        assert 0 < each.regrouped < 1
    assert offline.diff(a, a).same and all(each.regrouped == 0 for each in offline.diff(a, a).layers)
    assert run("diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors") == 0
    assert "in the same way" in capsys.readouterr().out
    assert run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 1


def test_convert_to_lora_writes_the_update(adapter, base, tmp_path, capsys):
    assert run("convert", adapter, "--to", "lora", "--base", base, "--out", tmp_path / "lora") == 0
    assert "LoRA of rank 6 on 3 layers" in capsys.readouterr().out
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layers = adapted(weights()).bank.only().layers
    for path, factors in layers.items():
        A, B = (tensors[f"base_model.model.{path}.lora_{each}.weight"] for each in "AB")
        np.testing.assert_allclose((B @ A).T, core.delta(factors), atol=1e-5)
    whole = model_of(weights())
    whole = replace(whole, layers={**whole.layers, "head": NumpyLinear(np.ones((3, 2)))})
    config = adamss.AdamssConfig(targets=["query"], modules_to_save=["head"], rank=4, subspaces=2)
    adamss.save(adamss.attach(whole, config), tmp_path / "head.safetensors")
    out = tmp_path / "with-head"
    assert run("convert", tmp_path / "head.safetensors", "--to", "lora", "--base", base, "--out", out) == 0
    assert (
        f"modules_to_save, no part of it, in '{out}/modules_to_save.safetensors'" in capsys.readouterr().err
    )
    card = (tmp_path / "lora" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n") and "encoder.0.query" in card
    assert run("convert", adapter, "--to", "adamss", "--base", base, "--out", tmp_path / "again") == 1
    assert "an adapter of adamss already" in capsys.readouterr().err


# ---- inspect and plan ------------------------------------------------------------------------------------


def test_inspect_measures_what_the_core_does(base):
    files = WeightFiles(base)
    (report,) = offline.inspect(files, [LAYERS[0]], rank=6, subspaces=3)
    W = files.read(f"{LAYERS[0]}.weight").numpy().T
    decomposition = core.decompose(W, 6)
    labels = core.segment(decomposition, 3)
    Z = analysis.lowest_rank_representation(decomposition)
    assert report.sizes == tuple(core.subspace_sizes(labels, 3))
    assert report.energy == pytest.approx(float((decomposition.S**2).sum() / (W**2).sum()), rel=1e-5)
    assert report.inside == pytest.approx(float(analysis.block_diagonality(Z, labels)), rel=1e-4)
    rng = np.random.default_rng(0)
    dealt = [float(analysis.block_diagonality(Z, rng.permutation(labels))) for _ in range(2000)]
    assert report.inside_by_chance == pytest.approx(np.mean(dealt), abs=4 * np.std(dealt) / 2000**0.5)
    assert report.gain == pytest.approx(report.inside / report.inside_by_chance)


@given(
    st.integers(40, 20_000),
    st.sampled_from([None, 1, 4, 10]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 5, 30]),
)
def test_plans_keep_to_the_budget_and_count_right(params, subspaces, subspace_rank, rank):
    rng = np.random.default_rng(0)
    shapes = {"a": (12, 40), "b": (30, 16)}
    fixed = {"rank": rank, "subspaces": subspaces, "subspace_rank": subspace_rank}
    try:
        plans = offline.plan(shapes, params, **fixed)
    except ConfigError:
        with pytest.raises(ConfigError, match="the smallest number is"):
            offline.plan(shapes, params, **fixed)
        return
    for plan in plans[:: max(1, len(plans) // 4)]:
        assert plan.trained <= params
        assert rank is None or plan.rank == min(rank, 16)
        config = adamss.AdamssConfig(
            targets=["a", "b"], rank=plan.rank, subspaces=plan.subspaces, subspace_rank=plan.subspace_rank
        )
        model = adamss.attach(
            NumpyModel({path: NumpyLinear(rng.standard_normal(shape)) for path, shape in shapes.items()}),
            config,
        )
        total = adamss.summary(model).total
        smallest = min(np.bincount(f.labels).min() for f in model.bank.only().layers.values())
        assert total.trained <= plan.trained
        if smallest >= plan.subspace_rank:
            assert total.trained == plan.trained
        assert plan.lora_rank * sum(map(sum, shapes.values())) <= plan.trained


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": [1]}', '{"model_type": "gpt2"}'])
def test_any_config_beside_weights(text, base, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert run("plan", folder, "--params", "2k") in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (16_608, (10, 1, 100)),  # the whole R with K = 10
        (40_000, (16, 1, 100)),  # the largest K up to 32 with the whole R
        (10**9, (32, 1, 100)),
        (12_000, (10, 1, 61)),  # K = 10 is kept, and R is not
        (4_700, (1, 1, 7)),  # too little for K = 10
    ],
)
def test_the_plan_to_begin_with(params, expected):
    """It follows docs/concepts/choosing.md; the layers are query and value of MiniLM-L6."""
    layers = {f"{i}.{name}": (384, 384) for i in range(6) for name in ("query", "value")}
    best = suggested(offline.plan(layers, params))
    assert (best.subspaces, best.subspace_rank, best.rank) == expected


def test_shards_outside_of_the_folder_are_refused(base, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    shutil.copy(os.path.join(base, "model.safetensors"), tmp_path / "outside.safetensors")
    index = {"weight_map": {"a.weight": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("inspect", tmp_path / "model") == 1
    assert "no index of shards" in capsys.readouterr().err


def test_plan_of_a_config_alone(tmp_path, capsys):
    pytest.importorskip("transformers", reason="it builds the model")
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert run("plan", tmp_path / "config.json", "--subspaces", 4) == 0  # without a budget
    assert "any number of trained parameters" in capsys.readouterr().out
    assert run("plan", tmp_path / "config.json", "--params", "2k", "--subspaces", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 4 and {tuple(shape) for shape in found["layers"].values()} == {(32, 32)}
    assert found["suggested"]["trained"] <= 2000


# ---- the command line ------------------------------------------------------------------------------------


COMMANDS = {
    "show": "show {adapter}",
    "inspect": "inspect {base}",
    "plan": "plan {base} --params 2k",
    "verify": "verify {adapter} --base {base}",
    "diff": "diff {adapter} {adapter}",
    "convert": "convert {adapter} --to lora --base {base} --out {out}",
    "merge": "merge {adapter} --base {base} --out {out}",
    "plot": "plot ordering {adapter} --base {base} --out {out}.png",
}


def words(command, **paths):
    if command == "plot":
        pytest.importorskip("matplotlib", reason="it draws")
    return COMMANDS[command].format(**paths).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_document_and_text_has_no_long_error(command, adapter, base, tmp_path, capsys):
    paths = {"adapter": adapter, "base": base}
    assert run(*words(command, out=tmp_path / "json", **paths), "--json") == 0
    captured = capsys.readouterr()
    assert isinstance(json.loads(captured.out), dict) and captured.err == ""
    assert run(*words(command, out=tmp_path / "text", **paths)) == 0
    assert capsys.readouterr().out.strip()
    assert run(command, "--help") == 0
    assert f"adamss {command} " in capsys.readouterr().out.partition("Examples:")[2]


def spoiled(kind, tmp_path):
    """Return a path at which something is wrong."""
    path = tmp_path / "spoiled.safetensors"
    if kind == "foreign":
        path.write_bytes(b"this is a text and not a file of tensors")
    elif kind == "pickle":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "pytorch_model.bin").write_bytes(b"")
        return tmp_path / "folder"
    elif kind == "damaged":
        save_file({"a.weight": np.ones((3, 3), np.float32)}, path)
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "header":
        header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        path.write_bytes((1 << 40).to_bytes(8, "little"))
        os.truncate(path, 1 << 42)
    elif kind == "empty folder":
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"
    elif kind == "index":
        (tmp_path / "index").mkdir()
        (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc"}}')
        return tmp_path / "index"
    elif kind == "shard":
        shutil.copytree(write_model(tmp_path / "shards", weights(), 2), tmp_path / "shard")
        next((tmp_path / "shard").glob("*.safetensors")).unlink()
        return tmp_path / "shard"
    return path


KINDS = [
    "missing",
    "foreign",
    "pipe",
    "pickle",
    "damaged",
    "header",
    "huge",
    "empty folder",
    "index",
    "shard",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("which", ["adapter", "base"])
def test_what_cannot_be_read_is_told_in_a_line(which, command, kind, adapter, base, tmp_path, capsys):
    if f"{{{which}}}" not in COMMANDS[command]:
        pytest.skip("the command does not take it")
    paths = {"adapter": adapter, "base": base} | {which: spoiled(kind, tmp_path)}
    before = {*tmp_path.iterdir()}
    assert run(*words(command, out=tmp_path / "out", **paths)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("adamss: ") and captured.err.count("\n") == 1, captured.err
    assert {*tmp_path.iterdir()} == before


def test_plot_leaves_no_figure_open(adapter, base, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="it draws")
    before = pyplot.get_fignums()
    assert run(*words("plot", adapter=adapter, base=base, out=tmp_path / "out")) == 0
    assert pyplot.get_fignums() == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_be_read(command, adapter, base, tmp_path, capsys):
    path = shutil.copy(adapter, tmp_path / "secret.safetensors")
    os.chmod(path, 0)
    assert run(*words(command, adapter=path, base=path, out=tmp_path / "out")) == 1
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show"], "Missing argument 'FILE'; see adamss show --help"),
        (["shew"], "No such command 'shew'"),
        (["plan", ".", "--params", "many"], "not a number of parameters, such as 50k"),
        (["plan", "{base}", "--params", "3"], "the smallest number is"),
        (["inspect", "{base}", "--targets", "qurey"], "near matches: query"),
        (["inspect", "{base}", "--targets", "["], "is not a regular expression"),
        (["inspect", "{base}", "--rank", "0"], "0 is not in the range"),
        (["merge", "{adapter}", "--base", "{base}", "--out", "{base}"], "name a new folder"),
    ],
)
def test_a_wrong_call_has_status_2(arguments, message, adapter, base, capsys):
    assert run(*(word.format(adapter=adapter, base=base) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def in_process(arguments, shell="", **options):
    """Run a command in a process of its own, after some words of a shell."""
    program = "import sys; from adamss.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["sh", "-c", f'{shell}\nexec "$@"', "sh", sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=False, text=True, **options)


@pytest.mark.skipif(os.name != "posix", reason="needs limits of processes")
@pytest.mark.parametrize("command", ["convert", "merge", "plot"])
def test_a_full_disk_leaves_nothing_behind(command, adapter, base, tmp_path):
    done = in_process(
        words(command, adapter=adapter, base=base, out=tmp_path / "out"),
        shell="ulimit -f 2",
        capture_output=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("adamss: ") and done.stderr.count("\n") == 1, done.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_standard_output_that_takes_no_more(options, adapter):
    with open("/dev/full", "w") as full:
        done = in_process(["show", adapter, *options], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr
    done = in_process(["show", adapter, *options], shell="exec >&-", stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "adamss: standard output is closed\n")
    reader, pipe = os.pipe()
    os.close(reader)
    done = in_process(["show", adapter, *options], stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Broken pipe" in done.stderr


def test_commands_import_no_framework(adapter, base, tmp_path):
    code = "import sys; from adamss.cli import main; status = main(sys.argv[1:]); "
    code += "sys.exit(status or sorted({'torch', 'jax', 'matplotlib', 'transformers'} & {*sys.modules}) or 0)"
    for command in COMMANDS.keys() - {"plot"}:
        arguments = words(command, adapter=adapter, base=base, out=tmp_path / command)
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], check=False, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr


def test_names_in_files_are_escaped(tmp_path, capsys):
    name = "evil\x1b[2J\n.query"
    rng = np.random.default_rng(0)
    model = NumpyModel({name: NumpyLinear(rng.standard_normal((D, N)))})
    model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=2, subspaces=2))
    adamss.save(model, tmp_path / "a.safetensors")
    base = write_model(tmp_path / "base", {f"{name}.weight": StoredTensor.of(model.layers[name].W.T)})
    for command in COMMANDS:
        if command == "convert":
            continue
        run(*words(command, adapter=tmp_path / "a.safetensors", base=base, out=tmp_path / command))
        captured = capsys.readouterr()
        assert all(c.isprintable() or c == "\n" for c in captured.out + captured.err), command


def test_every_error_of_ours_is_a_line(adapter, base, monkeypatch, capsys):
    for error, status in ((AdamssError("a\nb"), 1), (MemoryError(), 1), (KeyboardInterrupt(), 130)):

        def failing(*_, error=error, **__):
            raise error

        monkeypatch.setattr(offline, "verify", failing)
        assert run("verify", adapter, "--base", base) == status
        assert capsys.readouterr().err.count("\n") == 1
