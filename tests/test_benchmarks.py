"""Test that the benchmarks behind the published figures run. Only `agreement` judges what it measures."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("flax")

DRY_RUNS = {
    "agreement": ["--quick"],
    "experts": ["--quick"],
    "file_size": ["--quick"],
    "inference": ["--quick"],
    "scaling": ["--quick"],
    "segmentation": ["--quick", "--widths", "384"],
    "step_time": ["--quick", "--no-model", "--widths", "384"],
    "step_time_jax": ["--quick"],
    "stores": ["--quick"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "experts")) for name in DRY_RUNS]
)
def test_it_runs(name, script):
    assert script(name).main(DRY_RUNS[name]) == 0
