"""Test hostile files and processes: damaged files, writers that are killed, and writers that collide."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from campaign import campaign, last_line
from mutations import DAMAGES, MUTATIONS

from adamss import core
from adamss.errors import CheckpointError
from adamss.io import checkpoint, reader, writer
from adamss.verbs import files as loading
from adamss_conformance.cases import THOROUGH

posix = pytest.mark.skipif(os.name != "posix", reason="signals, fork and limits of POSIX")


@posix
def test_spoiled_files(tmp_path):
    files = 5_000 if THOROUGH else 2_000
    outcomes = campaign(files, 0, keep=tmp_path)
    assert [outcome for outcome in outcomes if outcome.failure] == []
    assert last_line(outcomes, 0).startswith(f"{files:,} files (seed 0): loaded ")
    # The campaign must cover every kind of file, and many files must pass the checksum or load.
    assert {outcome.kind for outcome in outcomes} >= {*MUTATIONS, *DAMAGES}
    results = [outcome.result for outcome in outcomes]
    assert results.count("loaded") > files / 10
    assert results.count("content") > files * 0.3
    assert results.count("model") > files / 50
    stopped = [outcome.result == "checksum" for outcome in outcomes if outcome.kind in MUTATIONS]
    assert sum(stopped) < len(stopped) / 10


@posix
@pytest.mark.parametrize(
    ("framework", "needs", "files"), [("torch", "torch", 300), ("equinox", "equinox", 40)]
)
def test_spoiled_files_for_a_framework(tmp_path, framework, needs, files):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"loads into models of {needs}")
    outcomes = campaign(files, 1, frameworks=[framework], shares={framework: 1.0}, keep=tmp_path)
    assert [outcome for outcome in outcomes if outcome.failure] == []
    assert all(framework in outcome.targets for outcome in outcomes)


def slightly_wrong(M, C, *others, U=None):
    return core.Factors(1.001 * M[None], np.eye(M.shape[1], dtype=M.dtype), C, *others)


@posix
@pytest.mark.parametrize(
    ("module", "name", "broken", "kind"),
    [
        (checkpoint, "_check_layer", lambda *_: None, "a layer of very many directions"),
        (checkpoint, "check_factors", lambda *_, **__: None, "labels: other numbers"),
        (checkpoint, "_check_places", lambda *_: None, "paths: layers and saved modules that clash"),
        (reader, "_check_room", lambda *_: None, "header: deep, wide or long JSON"),
        (loading, "require_modules", lambda *_: None, "paths: a layer renamed with its tensors"),
        (core, "factors_from_directions", slightly_wrong, "nothing at all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_campaign_sees_a_check_that_is_missing(monkeypatch, module, name, broken, kind):
    assert not any(outcome.failure for outcome in campaign(100, 0, kinds=[kind]))
    monkeypatch.setattr(module, name, broken)
    assert any(outcome.failure for outcome in campaign(100, 0, kinds=[kind]))


@posix
def test_a_file_depends_on_seed_and_number_alone():
    many = campaign(20, 5)
    (one,) = campaign(0, 5, only=13)
    assert (one.kind, one.size, one.result) == (many[13].kind, many[13].size, many[13].result)


def savers(mode, folder, *arguments):
    """Run savers.py in a process without threads, which can fork safely, and return its result."""
    script = Path(__file__).with_name("savers.py")
    command = [sys.executable, *map(str, (script, mode, folder, *arguments))]
    # BLAS gets one thread, because a fork copies only the calling thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@posix
def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    found = savers("kill", tmp_path, 200)
    assert found["neither"] == 0
    assert found["first"] + found["second"] == 200
    assert min(found["first"], found["second"]) > 10
    # Some kills interrupted a write, and the next write removed what they left behind.
    assert found["interrupted"] > 10
    assert found["most_temporaries"] <= 1
    assert found["left"] == ["adapter.safetensors"]


@posix
def test_two_processes_and_a_reader_on_one_path(tmp_path):
    found = savers("collide", tmp_path, 60)
    assert found == {
        "rounds": 60,
        "neither": 0,
        "failed": 0,
        "left": ["adapter.safetensors"],
        "both_won": True,
    }


@posix
def test_temporaries_of_the_living_stay_and_those_of_the_dead_go(tmp_path):
    path = tmp_path / "a.txt"
    dead = tmp_path / ".a.txt.999-0123abcd.tmp"
    others = [tmp_path / name for name in (".b.txt.999-0123abcd.tmp", ".a.txt.tmp", ".a.txt.x-0123abcd.tmp")]
    for file in (dead, *others):
        file.write_text("half")
    with writer._temporary(path) as (living, _):
        writer.write_text(path, "whole")
        assert living.exists()
    living.unlink()
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
    assert path.read_text() == "whole"


@posix
def test_a_writer_whose_temporary_was_taken_away_makes_another(tmp_path, monkeypatch):
    lock, taken = writer._lock, []

    def lock_late(descriptor):
        # Simulate another writer between opening and locking.
        if not taken:
            (temporary,) = tmp_path.iterdir()
            taken.append(temporary)
            temporary.unlink()
        return lock(descriptor)

    monkeypatch.setattr(writer, "_lock", lock_late)
    writer.replace(tmp_path / "a", b"whole")
    assert len(taken) == 1
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"whole")]


@posix
def test_without_locks_no_temporary_is_removed(tmp_path, monkeypatch):
    dead = tmp_path / ".a.999-0123abcd.tmp"
    dead.write_text("half")
    monkeypatch.setattr(writer, "_lock", lambda descriptor: None)
    writer.write_text(tmp_path / "a", "whole")
    assert dead.exists()
    assert (tmp_path / "a").read_text() == "whole"


def test_a_truncated_copy_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.read(path)
