"""Adapters in folders and on the Hugging Face Hub: `save`, `load` and `push_to_hub`."""

import errno
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import adamss
from adamss import core
from adamss.backend import NumpyLinear, NumpyModel
from adamss.errors import CheckpointError, CheckpointNotFoundError, ConfigError, MissingBackendError
from adamss.io import folder, writer
from adamss_conformance.cases import random_C


def base():
    rng = np.random.default_rng(0)
    return NumpyModel({path: NumpyLinear(rng.standard_normal((9, 8))) for path in ("a.query", "b.query")})


@pytest.fixture
def model():
    model = adamss.attach(base(), adamss.AdamssConfig(targets=["query"], rank=4, subspaces=3))
    for factors in model.bank.only().layers.values():
        factors.C[...] = random_C(factors, np.random.default_rng(1))
    return model


def same_updates(a, b):
    for path, factors in a.bank.only().layers.items():
        update = core.delta(factors)
        np.testing.assert_allclose(core.delta(b.bank.only().layers[path]), update, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("run", True),
        ("run/", True),
        ("v1.0/", True),
        ("existing.d", True),
        ("a.safetensors", False),
        ("a.b", False),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_save_and_load(model, tmp_path, name, is_folder, training):
    (tmp_path / "existing.d").mkdir()
    path = f"{tmp_path}/{name}"
    adamss.save(model, path, training=training)
    assert Path(path).is_dir() == is_folder
    if is_folder:
        names = {"adapter.safetensors", "adamss_config.json", "README.md"}
        assert {each.name for each in Path(path).iterdir()} == names
        settings = json.loads((Path(path) / "adamss_config.json").read_text())
        own = {name: value for name, value in settings.items() if name in model.bank.only().config.to_dict()}
        assert adamss.AdamssConfig.from_dict(own) == model.bank.only().config
    same_updates(model, adamss.load(base(), path))


def test_an_existing_file_is_replaced_whatever_its_name(model, tmp_path):
    (tmp_path / "adapter").write_bytes(b"an old one")
    adamss.save(model, tmp_path / "adapter")
    same_updates(model, adamss.load(base(), tmp_path / "adapter"))


def test_the_card_says_what_was_trained_and_stays_when_edited(model, tmp_path):
    adamss.save(model, tmp_path / "run")
    card = tmp_path / "run" / "README.md"
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: adamss\n")
    assert f"{adamss.summary(model).total.trained:,} trained parameters in 2 layers" in text
    assert "`a.query`" in text and "adamss.load(base_model" in text
    card.write_text("mine")
    adamss.save(model, tmp_path / "run")
    assert card.read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter.safetensors", "adamss_config.json", "README.md"])
def test_a_full_disk_leaves_no_new_folder(model, tmp_path, monkeypatch, name):
    def full(path, content):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(writer, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        adamss.save(model, tmp_path / "run")
    assert [*tmp_path.iterdir()] == []


def test_folders_without_an_adapter_say_so(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"it has no adapter\.safetensors"):
        adamss.load(base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match=r"adamss\.from_peft loads"):
        adamss.load(base(), tmp_path)


# ---- the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return huggingface_hub, offline, with an empty cache."""
    hub = pytest.importorskip("huggingface_hub", reason="it is the extra hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub


def cached(model, tmp_path, repository="user/adapter", revision="main"):
    """Put an adapter into the cache as a download does."""
    root = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
    commit = "0123456789" * 4
    (root / "refs").mkdir(parents=True)
    (root / "refs" / revision).write_text(commit)
    adamss.save(model, root / "snapshots" / commit)


def test_load_from_the_cache_of_the_hub(hub, model, tmp_path, monkeypatch):
    cached(model, tmp_path, revision="v1")
    same_updates(model, adamss.load(base(), "user/adapter@v1"))
    with pytest.raises(CheckpointNotFoundError, match="'user/other', and the Hugging Face Hub gives no"):
        adamss.load(base(), "user/other")
    # What is here comes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "adapter@v1").mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError, match=r"no adapter\.safetensors"):
        adamss.load(base(), "user/adapter@v1")


@pytest.mark.parametrize(
    "name", ["a/b/c", "/abs/path", "file.safetensors", "runs/a.safetensors", "./a", "../a"]
)
def test_other_names_never_reach_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointNotFoundError, match="no adapter file"):
        adamss.load(base(), name)


def test_push_to_hub_sends_a_folder(hub, model, tmp_path, monkeypatch):
    seen = {}
    signatures = {name: inspect.signature(getattr(hub, name)) for name in ("create_repo", "upload_folder")}

    def recorded(name):
        def call(*args, **kwargs):
            seen[name] = signatures[name].bind(*args, **kwargs).arguments
            if name == "upload_folder":
                seen["files"] = {each.name for each in Path(kwargs["folder_path"]).iterdir()}
            return "https://example.invalid/commit"

        return call

    for name in signatures:
        monkeypatch.setattr(hub, name, recorded(name))
    adamss.save(model, tmp_path / "run")
    for what in (model, tmp_path / "run"):
        url = adamss.push_to_hub(what, "user/adapter", private=True, commit_message="first")
        assert url == "https://example.invalid/commit"
        assert seen["create_repo"]["repo_id"] == seen["upload_folder"]["repo_id"] == "user/adapter"
        assert (seen["create_repo"]["private"], seen["create_repo"]["exist_ok"]) == (True, True)
        assert seen["upload_folder"]["commit_message"] == "first"
        assert seen["files"] == {"adapter.safetensors", "adamss_config.json", "README.md"}


def test_push_to_hub_refuses(hub, model, tmp_path):
    with pytest.raises(ConfigError, match="'user/name'"):
        adamss.push_to_hub(model, "adapter")
    with pytest.raises(CheckpointNotFoundError, match="there is no folder"):
        adamss.push_to_hub(tmp_path / "none", "user/adapter")
    (tmp_path / "adapter.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        adamss.push_to_hub(tmp_path, "user/adapter")
    with pytest.raises(CheckpointError, match="was not uploaded"):
        adamss.push_to_hub(model, "user/adapter", token="none")


def test_without_huggingface_hub(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: adamss.load(base(), "user/adapter"),
        lambda: adamss.push_to_hub(model, "user/adapter"),
    ):
        with pytest.raises(MissingBackendError, match=r"pip install 'adamss\[hub\]'"):
            call()


def test_nothing_imports_huggingface_hub_before_it_is_needed(model, tmp_path):
    adamss.save(model, tmp_path / "run")
    code = "import sys, adamss; from adamss.cli import main; main(['show', sys.argv[1]]); "
    code += "sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False).returncode == 0
