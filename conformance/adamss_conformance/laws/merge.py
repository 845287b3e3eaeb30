"""Law 5: merging is the rounded sum and can be undone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adamss
from adamss import core
from adamss.errors import StateError
from adamss_conformance import cases
from adamss_conformance.cases import LAYERS, VARIANTS, config
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import (
    assert_outputs_agree,
    assert_same,
    case,
    each_dtype,
    each_mode,
    factors_of,
    layers_run,
    outputs_of,
    partly_frozen,
    trained_model,
    weights_of,
    with_random_C,
)
from adamss_conformance.tolerances import RELATIVE_TOLERANCE

__all__ = ["MergeLaws"]


class MergeLaws:
    """Tests of the rounding in a merge, of the base weight that it keeps, and of the verbs that undo it."""

    @each_dtype
    @each_mode
    def test_law_05_merge(self, driver: Driver, dtype: str, mode: str) -> None:
        """``merge`` gives the rounded sum; ``unmerge`` and ``detach`` are exact; merging twice is an error."""
        with case(driver, dtype, "models"), _unheard():
            layers = cases.layers_without_bias()
            model = trained_model(driver, dtype, {}, layers=layers)
            deltas = {path: core.delta(f) for path, f in factors_of(driver, model).items()}
            before, base = outputs_of(driver, model, dtype, mode), weights_of(driver, model)
            merged = adamss.merge(model)
            identity = dict.fromkeys(deltas, driver.array(np.eye(16), dtype))
            for path, seen in layers_run(driver, merged, identity, mode).items():
                W0, delta = base[path]["W"].astype(np.float64), deltas[path]
                assert driver.backend.dtype_name(seen) == dtype
                error = np.abs(driver.numpy(seen).astype(np.float64) - (W0 + delta))
                slack = RELATIVE_TOLERANCE["float64" if dtype == "float64" else "float32"]
                allowed = cases.EPSILON[dtype] / 2 * np.abs(W0 + delta) + slack * np.abs(delta).max()
                assert np.all(error <= 1.01 * allowed), (
                    f"{path}: {(error - allowed).max():.3g} over half a unit"
                )
            assert_same(weights_of(driver, merged), base, "base while merged")
            with pytest.raises(StateError, match="merged already"):
                adamss.merge(merged)
            model = adamss.unmerge(merged)
            assert_same(outputs_of(driver, model, dtype, mode), before, "after unmerge")
            with pytest.raises(StateError, match="not merged"):
                adamss.unmerge(model)
            model = adamss.detach(adamss.merge(model))
            assert_same(weights_of(driver, model), base, "after detach of the merged model")

    def test_law_05_merge_without_base(self, driver: Driver) -> None:
        """Every verb that needs W0 raises an error if the merge did not keep it."""
        with case(driver, "float32", "models"):
            model = trained_model(driver, "float32", {})
            before = outputs_of(driver, model)
            model = adamss.merge(model, keep_base=False)
            assert_outputs_agree(outputs_of(driver, model), before, "merged")

            def switched_off(model: Any) -> None:
                with adamss.disabled(model):
                    pass

            verbs: tuple[Callable[[Any], Any], ...] = adamss.unmerge, adamss.detach, switched_off
            for verb in verbs:
                with pytest.raises(StateError, match="keep_base=False"):
                    verb(model)

    @each_dtype
    def test_law_05_merge_and_unload(self, driver: Driver, dtype: str) -> None:
        """The result has the weights of ``merge``, bit for bit, and no adapter; it can be adapted again."""
        with case(driver, dtype, "models"), _unheard():
            merged = adamss.merge(trained_model(driver, dtype, {}))
            outputs = outputs_of(driver, merged, dtype)
            for model in (merged, trained_model(driver, dtype, {})):
                plain = adamss.merge_and_unload(model)
                assert not driver.backend.bank(plain)
                assert_same(outputs_of(driver, plain, dtype), outputs, "without adapters")
                with pytest.raises(StateError, match="no adapters"):
                    adamss.merge_and_unload(plain)
            again = adamss.attach(plain, config())
            assert_same(outputs_of(driver, again, dtype), outputs, "adapted anew")

    @pytest.mark.parametrize(("relative", "lost"), [(1e-2, 0.17), (1e-3, 0.79)])
    def test_law_05_merge_says_what_rounding_lost(self, driver: Driver, relative: float, lost: float) -> None:
        """A merge warns that a bfloat16 weight loses 17 % of an update of relative size 1e-2, or 79 % at 1e-3."""
        with case(driver, "bfloat16", "models"):
            layers = {"query": (np.random.default_rng(0).standard_normal((128, 128)), None)}
            model = driver.model(layers, "bfloat16")
            settings = adamss.AdamssConfig(targets=["query"], rank=128, subspace_rank=12)
            model = with_random_C(driver, model, settings, layers, "bfloat16", relative=relative)
            with pytest.warns(adamss.AdamssWarning, match=r"lost \d+% of the update of query") as caught:
                adamss.merge(model)
            share = int(str(caught[0].message).split("lost ")[1].split("%")[0]) / 100
            assert abs(share - lost) <= 0.03, f"lost {share}, expected {lost}"

    @each_mode
    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    @pytest.mark.parametrize("keep_base", [True, False])
    def test_law_05_merge_of_the_frozen_alone(
        self, driver: Driver, mode: str, variant: str, keep_base: bool, tmp_path: Path
    ) -> None:
        """``consolidate`` folds frozen subspaces into W; outputs, factors and file stay, and W0 can be restored."""
        with case(driver, "float32", "models", "consolidates"):
            model, _ = partly_frozen(driver, trained_model(driver, "float32", VARIANTS[variant]))
            base, before = weights_of(driver, model), outputs_of(driver, model, mode=mode)
            factors = factors_of(driver, model)
            model = adamss.consolidate(model, keep_base=keep_base)
            assert_outputs_agree(outputs_of(driver, model, mode=mode), before, "consolidated")
            assert_same(factors_of(driver, model), factors, "consolidated")
            adamss.save(model, tmp_path / "adapter.safetensors")
            loaded = adamss.load(driver.model(LAYERS, "float32"), tmp_path / "adapter.safetensors")
            assert_outputs_agree(outputs_of(driver, loaded), before, "loaded")
            with pytest.raises(StateError, match="no frozen subspace"):
                adamss.consolidate(trained_model(driver, "float32", VARIANTS[variant]))
            outputs = outputs_of(driver, model, mode=mode)
            model = adamss.consolidate(model)
            assert_same(outputs_of(driver, model, mode=mode), outputs, "consolidated twice")
            if not keep_base:
                with pytest.raises(StateError, match="keep_base=False"):
                    adamss.detach(model)
                return
            model = adamss.unmerge(adamss.merge(model))
            assert_outputs_agree(outputs_of(driver, model), before, "unmerged")
            model = adamss.detach(adamss.consolidate(model))
            assert_same(weights_of(driver, model), base, "after detach of the consolidated model")


@contextmanager
def _unheard() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adamss.AdamssWarning)
        yield
