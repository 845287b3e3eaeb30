"""Backends with one mistake each. `test_suite.py` checks that the suite finds the mistake, and by which law."""

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest

from adamss import core
from adamss.backend import NumpyBackend
from adamss_conformance.drivers.numpy import NumpyDriver
from adamss_conformance.drivers.strict import HOST, StrictBackend, StrictDriver


class DeltaTransposed(NumpyBackend):
    """Transpose the update of a square weight."""

    def linear(self, x, weight, bias, factors):
        delta = core.delta(factors)[: weight.shape[0]]
        if delta.shape[0] == delta.shape[1]:
            delta = delta.T
        y = x @ weight if bias is None else x @ weight + bias
        return y + (x @ delta).astype(y.dtype)


class SegmentPermuted(NumpyBackend):
    """Swap the directions of subspaces 0 and 1."""

    def linear(self, x, weight, bias, factors):
        swapped = np.where(factors.labels == 0, 1, np.where(factors.labels == 1, 0, factors.labels))
        if len(factors.ranks) > 1 and factors.ranks[0] == factors.ranks[1]:
            factors = factors._replace(labels=swapped)
        return super().linear(x, weight, bias, factors)


class GradientOfBScaled(NumpyBackend):
    """Halve the gradient of B."""

    def linear_vjp(self, dy, x, weight, factors):
        gradients = super().linear_vjp(dy, x, weight, factors)
        return gradients._replace(B=gradients.B * 0.5)


class GradientOfFrozen(NumpyBackend):
    """Give frozen subspaces a gradient, which would count when a norm is clipped."""

    def linear_vjp(self, dy, x, weight, factors):
        return core.linear_vjp(dy, x, weight, factors, revive=True)


class BaseMutated(NumpyBackend):
    """Write into the frozen weight during training."""

    def linear_vjp(self, dy, x, weight, factors):
        weight[0, 0] += 1e-3
        return super().linear_vjp(dy, x, weight, factors)


class OriginalsLost(NumpyBackend):
    """Leave the trained head in place in `detach`."""

    def bank(self, model):
        bank = super().bank(model)
        return replace(bank, originals={path: self.arrays(model[path]) for path in bank.originals})


class StartsOff(NumpyBackend):
    """Fuse the base product with the update's, so that it is rounded differently."""

    def linear(self, x, weight, bias, *factors):
        y = x @ (weight + core.delta(factors[0])[: weight.shape[0]]).astype(weight.dtype)
        y = y.astype(np.float64) * (1 + 1e-7)
        y = y.astype(weight.dtype)
        return y if bias is None else y + bias


class MergedTwice(NumpyBackend):
    """Subtract the update in `unmerge` instead of restoring W0."""

    def exchange(self, model, arrays):
        (adaptation,) = model.bank.adapters.values()
        arrays = {path: dict(own) for path, own in arrays.items()}
        for path in adaptation.held:
            factors, W = adaptation.layers[path], model[path].W
            arrays[path]["weight"] = (W - core.delta(factors)[: W.shape[0]].astype(W.dtype)).T
        return super().exchange(model, arrays)


class PaddingTrained(NumpyBackend):
    """Give the padding of C a gradient, so that it does not stay zero."""

    def linear_vjp(self, dy, x, weight, factors):
        gradients = super().linear_vjp(dy, x, weight, factors)
        return gradients._replace(C=gradients.C + 0.1)


class GlobalSeedTouched(NumpyBackend):
    """Seed NumPy's global generator in `attach`."""

    def insert(self, model, adaptation, originals):
        np.random.seed(adaptation.config.seed)  # noqa: NPY002 (the mistake under test)
        return super().insert(model, adaptation, originals)


class SilentUpcast(NumpyBackend):
    """Return half-precision outputs as float32."""

    def linear(self, x, weight, bias, *factors):
        y = super().linear(x, weight, bias, *factors)
        return y.astype(np.float32) if y.dtype == np.float16 else y


class LabelsMadeAnew(NumpyBackend):
    """Sort the labels of a loaded adapter, instead of keeping those of the file."""

    def from_stored(self, stored, *, like=None, dtype=None):
        array = super().from_stored(stored, like=like, dtype=dtype)
        if stored.dtype == "uint8" and array.ndim == 1 and array.size == 19:
            array = np.sort(array)
        return array


class PrecisionLost(NumpyBackend):
    """Round values to half precision when a file is written."""

    def to_stored(self, array):
        narrow = array.astype(np.float16) if array.dtype == np.float32 else array
        return super().to_stored(narrow.astype(array.dtype))


class DecomposesRounded(NumpyBackend):
    """Round the weight before it is decomposed."""

    def decomposition_input(self, W):
        return np.round(W)


class WrongDevice(StrictBackend):
    """Move results to the host."""

    def linear(self, x, weight, bias, *factors):
        return super().linear(x, weight, bias, *factors).to_device(HOST)


class WrongDeviceDriver(StrictDriver):
    """Run `WrongDevice` on the second device, where its mistake shows."""

    name = "wrong-device"

    def __init__(self, backend=None, device=None):
        super().__init__(WrongDevice(array_api_strict.Device("device1")), "device1")


class MaskOffByOne(NumpyDriver):
    """Keep only subspaces strictly above the score at the budget, which is one too few."""

    name = "off-by-one"

    def allocate(self, scores, budget, costs=None):
        mask = core.allocate(scores, budget, costs)
        if costs is None and 0 < budget < len(scores):
            mask = scores > np.sort(scores)[::-1][budget - 1]
        return mask


class ReducesTooFar(NumpyDriver):
    """Freeze one subspace more than the budget asks for."""

    name = "too-far"

    def decide(self, state, plan, *step):
        new = super().decide(state, plan, *step)
        row = np.array(new.active)
        if not row.all():
            row[np.flatnonzero(row)[-1]] = False
        return new._replace(active=row)


class ChoosesTheWorst(NumpyDriver):
    """Keep the right number of subspaces, but the wrong ones."""

    name = "worst"

    def decide(self, state, plan, *step):
        new = super().decide(state, plan, *step)
        row = np.array(new.active)
        if not row.all():
            row = np.sort(row)
        return new._replace(active=row)


class ForgetsAverages(NumpyDriver):
    """Resume with the saved masks and step, but with averages of zero."""

    name = "forgets"

    def training(self, *args, **kwargs):
        training = super().training(*args, **kwargs)
        load = training.load

        def forgetful(folder):
            load(folder)
            state = training._state
            training._state = state._replace(
                sensitivity=np.zeros_like(state.sensitivity), uncertainty=np.zeros_like(state.uncertainty)
            )

        training.load = forgetful
        return training


class FoldedTwice(NumpyBackend):
    """Keep computing the update of subspaces that are folded into the weight."""

    def enter(self, model, ledger):
        model = super().enter(model, ledger)
        (adaptation,) = model.bank.adapters.values()
        layers = {p: replace(model[p], computed=(f,)) for p, f in adaptation.layers.items()}
        return replace(model, layers={**model.layers, **layers})


class FrozenDecayed(NumpyDriver):
    """Let weight decay change frozen values."""

    name = "decayed"

    def hold_frozen(self, before, after):
        return after


class CompilesMasks(NumpyDriver):
    """Simulate a compiler that treats the mask as a constant, and so compiles again after each allocation."""

    name = "compiler"
    capabilities = replace(
        NumpyDriver.capabilities,
        compiles=True,
        missing={k: v for k, v in NumpyDriver.capabilities.missing.items() if k != "compiles"},
    )

    def compile(self, function):
        seen = set()

        def call(model, x):
            seen.add(tuple(f.active.tobytes() for layer in model.layers.values() for f in layer.computed))
            return function(model, x)

        call.seen = seen
        return call

    def compilations(self, compiled):
        return len(compiled.seen)


class OnTheMoon(NumpyDriver):
    """A right driver with a device that is not present."""

    name = "moon"
    capabilities = replace(NumpyDriver.capabilities, devices=("cpu", "moon"))

    @classmethod
    def has_device(cls, device):
        return device == "cpu"


class Shy(NumpyDriver):
    """A driver that skips laws for its own reason, worded like one of the suite's reasons."""

    name = "shy"

    def model(self, layers, dtype):
        pytest.skip("not applicable: float32: not today")


class Resigned(NumpyDriver):
    """A driver that marks every case as an expected failure."""

    name = "resigned"

    def model(self, layers, dtype):
        pytest.xfail("not today")
