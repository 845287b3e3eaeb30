"""Test that the backend of the guide keeps the laws when it is installed as a third party would install it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adamss_conformance import LAWS

pytest.importorskip("hatchling", reason="the project of a third party is built with it")

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "backend.md"
LONGEST = 120


@pytest.fixture(scope="module")
def blocks():
    text = GUIDE.read_text(encoding="utf-8")
    return re.findall(r"```(py|toml)\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def installed(blocks, tmp_path_factory):
    """Return a folder into which pip has installed the project whose files the guide contains."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    for language, block in blocks:
        if language == "toml":
            (project / "pyproject.toml").write_text(block)
        elif named := re.match(r"# (adamss_toy/\w+\.py)\n", block):
            path = project / named.group(1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", str(site), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_it_is_short(blocks):
    (backend,) = [block for _, block in blocks if block.startswith("# adamss_toy/__init__.py")]
    assert len(backend.splitlines()) < LONGEST


def test_the_verbs_find_it(installed):
    code = (
        "import adamss, array_api_strict as xp\n"
        "from adamss_toy import Dense, Net\n"
        "model = Net({'query': Dense(xp.eye(6, dtype=xp.float32))})\n"
        "config = adamss.AdamssConfig(targets=['query'], rank=4, subspaces=2)\n"
        "print(adamss.summary(adamss.attach(model, config)).total.trained)"
    )
    done = python(installed, "-c", code)
    assert done.stdout.strip() == "14", done.stderr  # C has 6 columns, B two subspaces of 4 directions


def test_it_holds_the_laws(installed):
    plugin = ("-p", "no:cacheprovider", "-p", "adamss_conformance.plugin")
    done = python(
        installed, "-m", "pytest", "-q", *plugin, "--pyargs", "adamss_conformance", "--adamss-backend", "toy"
    )
    assert done.returncode == 0, done.stdout
    assert "laws of adamss: toy" in done.stdout
    assert "sgd: the toy has no optimisers" in done.stdout
    held = re.findall(r"^ +(\d+)  .*?(\d+) +(\d+) +\d+$", done.stdout, flags=re.MULTILINE)
    assert {law: failed for law, _, failed in held} == {str(law): "0" for law in LAWS}
    assert [law for law, count, _ in held if count == "0"] == ["11"]
