"""Law 11: compilation changes no result, and an allocation compiles nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import adamss
from adamss_conformance.cases import INPUTS, LAYERS, TARGETS, VARIANTS
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import (
    COMPILED,
    assert_budget_kept,
    assert_outputs_agree,
    case,
    each_dtype,
    each_schedule,
    outputs_of,
    partly_frozen,
    trained_model,
)
from adamss_conformance.tolerances import assert_agrees

__all__ = ["CompilationLaws"]


class CompilationLaws:
    """Tests that compiled models and training steps give the eager results, and are compiled once."""

    @each_schedule
    def test_law_11_compilation_of_a_training_under_a_budget(self, driver: Driver, schedule: str) -> None:
        """A compiled step keeps the budget (law 7) and is compiled only once during the whole schedule."""
        with case(driver, "float32", "models", "budget", "compiles"):
            compiled = assert_budget_kept(driver, schedule, COMPILED).compilations()
            assert compiled == 1, f"compiled {compiled} times for one schedule"

    @each_dtype
    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_11_compilation(self, driver: Driver, dtype: str, variant: str) -> None:
        """A compiled model gives the eager results, and an allocation does not compile it again."""
        with case(driver, dtype, "models", "compiles"):
            model = trained_model(driver, dtype, VARIANTS[variant])
            path = TARGETS[0]
            x = driver.array(INPUTS[path], dtype)
            compiled = driver.compile(lambda model, x: driver.call(model, path, x))
            eager = driver.numpy(driver.call(model, path, x))
            assert_agrees(driver.numpy(compiled(model, x)), eager, dtype=dtype, what="compiled")
            before = driver.compilations(compiled)
            assert before == 1, f"compiled {before} times for one call"
            model, _ = partly_frozen(driver, model)
            assert_agrees(driver.numpy(compiled(model, x)), eager, dtype=dtype, what="after an allocation")
            assert driver.compilations(compiled) == before, "an allocation made it compile again"

    def test_law_11_compilation_leaves_a_model_that_the_verbs_know(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        """A model that was passed to a compiled function is still adapted: it can be saved, merged and detached."""
        with case(driver, "float32", "models", "compiles"):
            outputs = outputs_of(driver, driver.model(LAYERS, "float32"))
            model = trained_model(driver, "float32", {})
            adapted = outputs_of(driver, model, mode=COMPILED)
            assert {row.path for row in adamss.summary(model).rows} == set(TARGETS)
            adamss.save(model, tmp_path / "adapter.safetensors")
            loaded = adamss.load(driver.model(LAYERS, "float32"), tmp_path / "adapter.safetensors")
            assert_outputs_agree(outputs_of(driver, loaded), adapted, "saved after compilation")
            model = adamss.detach(adamss.merge(model))
            assert_outputs_agree(outputs_of(driver, model, mode=COMPILED), outputs, "after detach")
