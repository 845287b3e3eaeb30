"""Laws 12 and 13: the same seed gives the same result, and backends agree."""

from __future__ import annotations

import numpy as np
import pytest

import adamss
from adamss import core
from adamss_conformance import cases
from adamss_conformance.cases import LAYERS, TARGETS, VARIANTS, config
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import assert_same, case, each_variant, factors_of

__all__ = ["AgreementLaws"]


class AgreementLaws:
    """Tests that one seed gives one result, and that all backends find the same subspaces."""

    @each_variant
    def test_law_12_determinism(self, driver: Driver, variant: str) -> None:
        """The same seed gives the same factors; global random states of NumPy and the framework do not change."""
        with case(driver, "float32", "models"):
            first_model, second_model = (driver.model(LAYERS, "float32") for _ in range(2))
            numpy_state = _numpy_random_state()
            state = driver.random_state()
            first = factors_of(driver, adamss.attach(first_model, config(**VARIANTS[variant])))
            assert _numpy_random_state() == numpy_state, "NumPy's global random state"
            assert driver.random_state() == state, "the framework's global random state"
            second = factors_of(driver, adamss.attach(second_model, config(**VARIANTS[variant])))
            assert_same(second, first, "attached again")

    def test_law_12_determinism_follows_the_seed(self, driver: Driver) -> None:
        """Another seed gives another random segmentation."""
        with case(driver, "float32", "models"):
            changes = [config(segmentation="random", seed=seed) for seed in (0, 1)]
            models = [adamss.attach(driver.model(LAYERS, "float32"), each) for each in changes]
            labels = [factors_of(driver, model)[TARGETS[0]].labels for model in models]
            assert not np.array_equal(*labels), "the seed has no effect"

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("shape", [(48, 64), (64, 48), (560, 600)], ids=str)
    def test_law_13_agreement(self, driver: Driver, dtype: str, shape: tuple[int, int]) -> None:
        """Attached to one weight, a backend finds the labels and captures the energy of the float64 reference."""
        with case(driver, dtype, "models"):
            W = cases.planted(*shape, groups=6)
            reference = core.decompose(W, 6)
            model = driver.model({"query": (W, None)}, dtype)
            model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=6, subspaces=6))
            f = factors_of(driver, model)["query"]
            _assert_agreement(W, f.A[0], f.labels, reference, core.segment(reference, 6))

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_law_13_agreement_of_core_on_arrays(self, driver: Driver, dtype: str) -> None:
        """The functions of the core do so too on the framework's own arrays."""
        with case(driver, dtype, "arrays"):
            W = cases.planted(48, 64, groups=6)
            reference = core.decompose(W, 6)
            decomposition = core.decompose(driver.array(W, dtype), 6)
            assert driver.backend.dtype_name(decomposition.U) == dtype
            assert driver.device_of(decomposition.U) == driver.device
            labels = driver.numpy(core.segment(decomposition, 6))
            _assert_agreement(W, driver.numpy(decomposition.U), labels, reference, core.segment(reference, 6))


def _numpy_random_state() -> list[int]:
    state = np.random.get_state(legacy=False)  # noqa: NPY002 (the legacy generator is what is watched)
    assert isinstance(state, dict)
    return [int(state["state"]["pos"]), *state["state"]["key"].tolist()]


def _assert_agreement(
    W: np.ndarray, U: np.ndarray, labels: np.ndarray, reference: core.Decomposition, expected: np.ndarray
) -> None:
    agreement = cases.adjusted_rand_index(labels, expected)
    assert agreement >= 0.99, f"adjusted Rand index {agreement:.4f} with the reference's labels"
    captured, best = (float(np.sum((basis.T @ W) ** 2)) for basis in (U.astype(np.float64), reference.U))
    assert abs(captured / best - 1) <= 1e-5, f"captured energy {captured / best:.7f} of the reference's"
