"""Test that a verb that fails half way leaves the model unchanged, and so does a context that is left."""

import copy

import pytest
import torch
from torch import nn

import adamss
from adamss import errors
from adamss_torch import stores
from adamss_torch.backend import adapters_of

CONFIG = adamss.AdamssConfig(targets="[01]", rank=6, subspaces=4, modules_to_save=["head"])
VERBS = {
    "merge": (adamss.merge, None),
    "unmerge": (adamss.unmerge, adamss.merge),
    "consolidate": (adamss.consolidate, None),
    "merge after consolidate": (adamss.merge, adamss.consolidate),
    "detach": (adamss.detach, adamss.merge),
    "disabled": (lambda model: adamss.disabled(model).__enter__(), adamss.merge),
}


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self[1](self[0](x)))


def trained():
    torch.manual_seed(0)
    model = adamss.attach(Net().eval(), CONFIG)
    for adapter in adapters_of(model).values():
        adapter.C.data.normal_()
        adapter.active[1] = False
    model.head[1].weight.data.add_(1)
    return model


@pytest.mark.parametrize("failing", range(1, 7))
@pytest.mark.parametrize("name", VERBS)
def test_a_failure_at_any_write_is_undone(name, failing, monkeypatch):
    verb, before = VERBS[name]
    model, x = trained(), torch.randn(5, 8)
    if before is not None:
        before(model)
    output, state, summary = model(x), copy.deepcopy(model.state_dict()), adamss.summary(model)
    write, writes = stores.exchanged, iter(range(1, 100))

    def fails(*arguments):
        if next(writes) == failing:
            raise torch.OutOfMemoryError("no room")
        return write(*arguments)

    monkeypatch.setattr(stores, "exchanged", fails)
    monkeypatch.setattr("adamss_torch.backend.exchanged", fails)
    try:
        verb(model)
    except torch.OutOfMemoryError:
        assert torch.equal(model(x), output)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert adamss.summary(model) == summary
        assert torch.equal(adamss.detach(model)(x), adamss.detach(trained())(x))
    else:
        assert next(writes) <= failing  # the verb has fewer writes than that


@pytest.mark.parametrize("verb", [adamss.merge, adamss.consolidate])
def test_a_refused_state_changes_no_weight(verb):
    changed, model = verb(trained()), trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.StateError, match="holds other subspaces in the state"):
        model.load_state_dict(changed.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_module_writes_while_switched_off_is_not_kept():
    """In training mode batch normalisation writes its statistics, also when only reference outputs are computed."""
    model = trained()
    torch.manual_seed(0)
    base = Net().state_dict()
    inside = copy.deepcopy(model.head.state_dict())
    with adamss.disabled(model) as off:
        off.train()(torch.randn(16, 8))
    assert all(torch.equal(tensor, inside[name]) for name, tensor in model.head.state_dict().items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in adamss.detach(model).state_dict().items())


def test_what_was_made_in_inference_mode_is_refused_at_attach():
    with torch.inference_mode():
        model = Net()
    with pytest.raises(errors.LayerError, match=r"0 was made under torch.inference_mode"):
        adamss.attach(model, adamss.AdamssConfig(targets="[01]", rank=4))
    assert not hasattr(model[0], "adamss")
