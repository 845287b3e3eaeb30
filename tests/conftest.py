"""Settings that all tests share."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# NumPy and PyTorch read these variables when they are imported. The products in the tests are too small to gain from
# threads, and two workers with two threads each take three times as long as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from adamss_conformance.cases import THOROUGH

# Derandomised, because a failure must be the same on every machine. ADAMSS_THOROUGH=1 tries all examples, as in the
# conformance suite.
settings.register_profile(
    "adamss",
    max_examples=100 if THOROUGH else 30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("adamss")

# The tests of JAX spend most of their time compiling. Workers, processes that tests start, and later runs share this
# cache. JAX reads the variables when it is imported.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

SLOW = (
    "tests/conformance/test_suite.py",
    "tests/conformance/test_third_party.py",
    "tests/hostile/",
    "tests/test_docs.py::test_examples_run[docs/guides",
    "tests/test_benchmarks.py",
    "tests/core/test_array_libraries.py",
    "tests/jax/test_bad_input.py",
    "tests/jax/test_budget.py",
    "tests/jax/test_demo_jax.py",
    "tests/jax/test_flax.py",
    "tests/jax/test_functional.py",
    "tests/jax/test_imports.py",
    "tests/jax/test_lifecycle.py",
    "tests/jax/test_minilm_nnx.py",
    "tests/jax/test_public_reports.py",
    "tests/jax/test_stacks.py",
    "tests/jax/test_travel.py",
    "tests/torch/test_demo.py",
    "tests/torch/test_distributed.py",
    "tests/torch/test_evidence.py",
    "tests/torch/test_paper_tables.py",
    "tests/torch/test_trainer.py",
    "test_a_block_that_is_wrapped",
    "test_exported_for_any_number_of_rows",
    "[jax.numpy",
    "in_a_new_process",
    "compiles_without_a_graph_break",
    "test_fullgraph",
)
"""Parts of the names of slow tests, which start processes or compile. ``-m "not slow"`` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports a script of benchmarks/ by its plain name, as the scripts import each other."""
    folder, before = Path(__file__).parents[1] / "benchmarks", set(sys.modules)
    names = {path.stem for path in folder.iterdir()}
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in names:
            del sys.modules[name]


@pytest.fixture(scope="session")
def tiny_tokenizer(script: Callable[[str], ModuleType]) -> Any:
    """Return a tokenizer for words of the demo's sentences. Like many decoders' it has no padding token."""
    transformers = pytest.importorskip("transformers", reason="the demo extra brings transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = script("demo.sentences").scipy_sentences().texts[::10]
    words = sorted({word.lower() for text in texts for word in text.split()})
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "[PAD]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]"
    )
