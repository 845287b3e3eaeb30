"""Test that the states of version 0.1 load; `tests/data/make_state.py` wrote them."""

import runpy
from pathlib import Path

import pytest
import torch
from torch_support import assert_same_state, state

import adamss
from adamss import errors
from adamss_torch.backend import adapters_of

DATA = Path(__file__).parents[1] / "data"
MAKER = runpy.run_path(str(DATA / "make_state.py"))


@pytest.fixture
def states():
    return torch.load(DATA / "v1-states.pt", weights_only=True)


@pytest.fixture
def training():
    """Yield an adapted model, its optimiser and its controller, and remove the controller afterwards."""
    model, optimizer, controller = MAKER["trained"](0)
    yield model, optimizer, controller
    controller.remove()


def test_a_training_goes_on(states, training):
    saved = states["plain"]
    model, optimizer, controller = training
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    controller.load_state_dict(saved["controller"])
    torch.testing.assert_close(model(MAKER["inputs"]()), saved["outputs"], rtol=1e-5, atol=1e-5)
    for _ in range(2):
        MAKER["step"](model, optimizer)
    torch.testing.assert_close(model(MAKER["inputs"]()), saved["outputs at the end"], rtol=1e-5, atol=1e-5)
    for path, mask in saved["masks at the end"].items():
        assert torch.equal(controller.masks[path], mask)


@pytest.mark.parametrize("form", ["consolidated", "merged"])
def test_what_the_weights_hold_goes_into_a_model_of_the_same_form(states, training, form):
    model, _, _ = training
    with pytest.raises(RuntimeError, match="Merge, consolidate or unmerge the model likewise first"):
        model.load_state_dict(states[form]["model"])
    if form == "merged":
        adamss.merge(model)
    else:
        for path, adapter in adapters_of(model).items():
            adapter.active.copy_(states[form]["model"][f"{path}.adamss.active"])
        adamss.consolidate(model)
    model.load_state_dict(states[form]["model"])
    torch.testing.assert_close(model(MAKER["inputs"]()), states[form]["outputs"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_the_compacted_form_is_refused_whole(states, training, strict):
    model, _, _ = training
    before = state(model)
    with pytest.raises(errors.StateError, match=r"^0: .*compact.*adamss\.save"):
        model.load_state_dict(states["compacted"]["model"], strict=strict)
    assert_same_state(model, before)


def test_the_state_of_a_controller_of_the_compacted_form_is_refused(states, training):
    _, _, controller = training
    saved = states["plain"]["controller"]
    saved["layers"]["0"]["owned"] = saved["layers"]["0"]["active"]
    with pytest.raises(errors.StateError, match=r"0 had been shrunk by compact.*adamss\.save"):
        controller.load_state_dict(saved)
    assert controller.step == 0
