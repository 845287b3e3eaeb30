"""Laws 9 and 10: a file transfers the update to any copy of the base model, and training resumes from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adamss
from adamss import core
from adamss.backend.tensors import StoredTensor
from adamss.core import Factors
from adamss.core.fingerprint import fingerprint
from adamss.io import checkpoint as files
from adamss_conformance import cases
from adamss_conformance.cases import INPUTS, LAYERS, SCHEDULES, TARGETS, THOROUGH, VARIANTS, config
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import (
    EAGER,
    FLOATS,
    assert_outputs_agree,
    assert_same,
    attached_with,
    case,
    each_dtype,
    each_schedule,
    everything_of,
    factors_of,
    outputs_of,
    partly_frozen,
    single_steps,
    start_training,
    trained_model,
)
from adamss_conformance.tolerances import assert_agrees

__all__ = ["FileLaws"]


class FileLaws:
    """Tests that files transfer the update between models and dtypes, and that training resumes bit for bit."""

    @each_dtype
    @pytest.mark.parametrize("training", [False, True], ids=["portable", "training"])
    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_09_travel(
        self, driver: Driver, dtype: str, training: bool, variant: str, tmp_path: Path
    ) -> None:
        """A file holds the update; a model of any dtype that loads it has that update, segmentation and mask."""
        with case(driver, dtype, "models"):
            path = tmp_path / "adapter.safetensors"
            model, masks = partly_frozen(driver, trained_model(driver, dtype, VARIANTS[variant]))
            adamss.save(model, path, training=training)
            mine, stored = factors_of(driver, model), files.read(path)
            working = "float64" if dtype == "float64" else "float32"
            assert list(stored.layers) == list(mine)
            for layer, f in mine.items():
                there = stored.layers[layer].factors()
                assert_same(there.labels, f.labels.astype(np.int64), f"labels of {layer} in the file")
                assert_same(there.active, masks[layer], f"mask of {layer} in the file")
                assert_agrees(core.delta(there), core.delta(f), dtype=working, what=f"{layer} in the file")
            for target in driver.capabilities.dtypes:
                with driver.settings(target):
                    loaded = adamss.load(driver.model(LAYERS, target), path)
                    _assert_travelled(driver, loaded, mine, masks, working)

    def test_law_09_travel_from_the_reference(self, driver: Driver, tmp_path: Path) -> None:
        """A file written from NumPy arrays, with the head in PyTorch's orientation, can be loaded and saved again."""
        with case(driver, "float32", "models"):
            mine = _reference_factors()
            path = tmp_path / "adapter.safetensors"
            head = np.random.default_rng(5).standard_normal((5, 16)).astype(np.float32)
            _write(path, mine, head)
            masks = {layer: f.active for layer, f in mine.items()}
            model = adamss.load(driver.model(LAYERS, "float32"), path)
            _assert_travelled(driver, model, mine, masks, "float32")
            y = driver.call(model, "head", driver.array(INPUTS["head"], "float32"))
            expected = INPUTS["head"] @ head.T + 1.0
            assert_agrees(driver.numpy(y), expected, dtype="float32", what="head")
            again = tmp_path / "again.safetensors"
            adamss.save(model, again)
            assert_same(files.read(again).saved["head"]["weight"].numpy(), head, "head written again")

    def test_law_09_travel_to_a_model_in_another_order(self, driver: Driver, tmp_path: Path) -> None:
        """A load finds layers by their paths, in whatever order the model has them."""
        with case(driver, "float32", "models"):
            model = trained_model(driver, "float32", {})
            adamss.save(model, tmp_path / "adapter.safetensors")
            turned = dict(reversed(LAYERS.items()))
            loaded = adamss.load(driver.model(turned, "float32"), tmp_path / "adapter.safetensors")
            assert {row.path for row in adamss.summary(loaded).rows} == set(TARGETS)
            assert_outputs_agree(outputs_of(driver, loaded), outputs_of(driver, model), "loaded")
            assert not driver.backend.bank(adamss.detach(loaded))

    def test_law_09_travel_refuses_another_base(self, driver: Driver, tmp_path: Path) -> None:
        """Loading into another base model is an error that names the layer and leaves the model unchanged."""
        with case(driver, "float32", "models"):
            path = tmp_path / "adapter.safetensors"
            _write(path, _reference_factors(), np.zeros((5, 16), np.float32))
            other = driver.model({name: (W[::-1].copy(), b) for name, (W, b) in LAYERS.items()}, "float32")
            before = everything_of(driver, other)
            with pytest.raises(adamss.errors.CheckpointError, match=r"encoder\.0\.value"):
                adamss.load(other, path)
            assert not driver.backend.bank(other)
            assert_same(everything_of(driver, other), before, "after a refused load")

    def test_law_10_resume(self, driver: Driver, tmp_path: Path) -> None:
        """With some subspaces frozen and a new optimiser for every step, training resumes bit for bit on the CPU."""
        with case(driver, "float32", "models", "sgd"):
            half, whole, resumed = (tmp_path / f"{name}.safetensors" for name in ("half", "whole", "resumed"))
            model = adamss.attach(driver.model(LAYERS, "float32"), config(**VARIANTS["bias per subspace"]))
            model, _ = partly_frozen(driver, model)
            model = single_steps(driver, model, 3)
            adamss.save(model, half, training=True)
            adamss.save(single_steps(driver, model, 3), whole, training=True)
            kind = type(driver)
            source = sys.modules[kind.__module__].__file__
            backend = type(driver.backend)
            command = [
                *(sys.executable, "-m", "adamss_conformance.resume"),
                *(kind.__module__, str(source), kind.__qualname__, driver.device),
                *(backend.__module__, str(sys.modules[backend.__module__].__file__), backend.__qualname__),
                *(str(half), "3", str(resumed)),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            one, other = (
                {path: layer.factors() for path, layer in files.read(file).layers.items()}
                for file in (whole, resumed)
            )
            _assert_resumed(driver, other, one, "after resuming")

    @pytest.mark.parametrize("variant", ["default", "bias per subspace"])
    def test_law_10_resume_from_the_very_factors(self, driver: Driver, variant: str, tmp_path: Path) -> None:
        """A training file restores A, B, C, segmentation and mask bit for bit."""
        with case(driver, "float32", "models"):
            path = tmp_path / "adapter.safetensors"
            model, _ = partly_frozen(driver, trained_model(driver, "float32", VARIANTS[variant]))
            adamss.save(model, path, training=True)
            loaded = factors_of(driver, adamss.load(driver.model(LAYERS, "float32"), path))
            assert_same(loaded, factors_of(driver, model), "loaded")

    @pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
    @each_schedule
    def test_law_10_resume_of_a_budget(
        self, driver: Driver, optimiser: str, schedule: str, tmp_path: Path
    ) -> None:
        """Training under a budget resumes with new objects from every third step, also between two allocations.

        Model, optimiser, importance averages, masks and step count must be those of an uninterrupted training.
        """
        with case(driver, "float32", "models", "budget", optimiser):
            training = start_training(driver, attached_with(driver, schedule), schedule, EAGER, optimiser)
            steps = SCHEDULES[schedule].end_step + 1
            resumed = range(0, steps, 1 if THOROUGH else 3)
            for step in range(steps):
                if step in resumed:
                    folder = tmp_path / str(step)
                    folder.mkdir()
                    adamss.save(training.model, folder / "model.safetensors", training=True)
                    training.save(folder)
                training.step()
            expected, memory = factors_of(driver, training.model), training.memory()
            for step in resumed:
                folder = tmp_path / str(step)
                model = adamss.load(driver.model(LAYERS, "float32"), folder / "model.safetensors")
                training = start_training(driver, model, schedule, EAGER, optimiser)
                training.load(folder)
                for _ in range(step, steps):
                    training.step()
                what = f"resumed at step {step}"
                _assert_resumed(driver, factors_of(driver, training.model), expected, what)
                remembered = training.memory()
                assert len(remembered) == len(memory)
                if driver.device == "cpu":
                    assert_same(remembered, memory, f"optimiser or controller, {what}")


def _assert_resumed(
    driver: Driver, actual: dict[str, Factors], expected: dict[str, Factors], what: str
) -> None:
    """Compare factors bit for bit on the CPU; elsewhere, compare their floating-point numbers up to rounding."""
    if driver.device == "cpu":
        assert_same(actual, expected, what)
        return
    for path, f in expected.items():
        for name, wanted in f._asdict().items():
            found = getattr(actual[path], name)
            if name in FLOATS:
                assert_agrees(found, wanted, dtype="float32", what=f"{name} of {path}, {what}")
            else:
                assert_same(found, wanted, f"{name} of {path}, {what}")


def _reference_factors() -> dict[str, Factors]:
    rng = np.random.default_rng(3)
    made = {}
    for path in TARGETS:
        decomposition = core.decompose(LAYERS[path][0].astype(np.float32), 6)
        f = core.initial_factors(decomposition, core.segment(decomposition, 3), 2)
        C = cases.random_C(f, rng).astype(np.float32)
        made[path] = f._replace(C=C, active=np.asarray([True, False, True]))
    return made


def _write(path: Path, layers: dict[str, Factors], head: np.ndarray) -> None:
    stored = {}
    for name, f in layers.items():
        integers = {key: getattr(f, key).astype(np.uint8) for key in ("labels", "ranks")}
        small: dict[str, Any] = {key: StoredTensor.of(array) for key, array in integers.items()}
        stored[name] = files.StoredLayer(
            C=StoredTensor.of(f.C),
            active=StoredTensor.of(f.active),
            M=StoredTensor.of(core.contract(f)),
            base=fingerprint(LAYERS[name][0]),
            **small,
        )
    saved = {"head": {"weight": StoredTensor.of(head), "bias": StoredTensor.of(np.ones(5, np.float32))}}
    files.write(path, files.Checkpoint(config(), stored, saved, {"adamss": adamss.__version__}))


def _assert_travelled(
    driver: Driver, model: Any, sent: dict[str, Factors], masks: dict[str, np.ndarray], dtype: str
) -> None:
    arrived = factors_of(driver, model)
    assert list(arrived) == list(sent)
    for layer, f in arrived.items():
        assert_same(f.labels.astype(np.int64), sent[layer].labels.astype(np.int64), f"labels of {layer}")
        assert_same(f.active, masks[layer], f"mask of {layer}")
        assert_agrees(
            core.delta(f),
            core.delta(sent[layer]),
            dtype="float32" if dtype == "float64" else dtype,
            what=f"update of {layer}, loaded",
        )
