"""Test that small layers are decomposed several at a time."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch_support import assert_same_state, required, state

import adamss
from adamss import AdamssConfig
from adamss.backend import BaseWeight
from adamss.backend.interface import Weights, batches
from adamss.core.decomposition import EXACT_SIDE
from adamss_torch import TorchBackend
from adamss_torch.division import TorchDivision

openmp = pytest.mark.skipif(
    "parallel backend: OpenMP" not in torch.__config__.parallel_info(), reason="needs OpenMP"
)


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


LARGE = EXACT_SIDE + 8
SIZES = {"q": (160, 160), "k": (160, 160), "v": (160, 144), "large": (LARGE, LARGE), "larger": (LARGE, LARGE)}


def layers(count, side=8):
    return weights({str(number): torch.zeros(side, 1024) for number in range(count)})


def weights(tensors):
    return Weights(tensors, lambda path: BaseWeight(tensors[path], None))


def computed(one, weights):
    """Return the result of a function for each layer, computed in batches as `attach` does."""
    division, found = TorchDivision(None), {}
    for batch in batches(division.share(weights, "")):
        found |= zip(batch, division.each(one, batch), strict=True)
    return found


def config(*targets, **options):
    targets = targets or tuple(SIZES)
    return AdamssConfig(rank=16, subspaces=4, subspace_rank=2, targets=targets, **options)


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in SIZES.items()})


@openmp
def test_as_many_at_a_time_as_there_are_threads():
    together = threading.Barrier(3, timeout=60)
    threads = set()

    def one(path):
        together.wait()
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        threads.add(threading.get_ident())
        return path

    # With fewer threads at a time the barrier would break, and with more the set would be larger.
    assert computed(one, layers(6)) == {path: path for path in layers(6)}
    assert len(threads) == 3


def test_large_ones_one_by_one_where_all_threads_work_on_them():
    seen = []

    def one(path):
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return path

    wide = layers(2, EXACT_SIDE + 1)
    assert list(computed(one, wide)) == list(wide)
    assert seen == [(threading.current_thread(), 3)] * 2


def test_layers_of_one_shape_are_computed_together_and_their_order_is_that_of_the_model():
    mixed = {name: torch.zeros(side, 1024) for name, side in {"b": 8, "a": EXACT_SIDE + 1, "c": 8}.items()}
    assert list(computed(str, weights(mixed))) == ["b", "c", "a"]
    assert list(TorchBackend().bank(adamss.attach(net(), config())).only().layers) == list(SIZES)


def test_threads_are_afterwards_what_they_were():
    adamss.attach(net(), config())
    assert torch.get_num_threads() == 3
    found = []
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [3]


@pytest.mark.parametrize("include_bias", [False, True])
def test_a_layer_has_the_same_factors_alone_and_among_others(include_bias):
    among = adamss.attach(net(), config(include_bias=include_bias))
    for name in SIZES:
        alone = adamss.attach(net(), config(name, include_bias=include_bias))[name].adamss
        assert_same_state(among[name].adamss, alone)


def test_the_error_is_that_of_the_first_layer_and_the_model_is_unchanged():
    model = net()
    with torch.no_grad():
        model["q"].weight[0, 0] = torch.nan
        model["v"].weight[0, 0] = torch.inf
    before = state(model)
    with pytest.raises(adamss.errors.ArrayValueError, match=r"^q: weight"):
        adamss.attach(model, config())
    assert_same_state(model, before)
    assert all(required(model).values())
    assert torch.get_num_threads() == 3
