"""Test on CUDA what the laws do not cover; the conformance suite runs on CUDA too. Skipped without a GPU."""

import pytest
import torch
from torch_support import assert_same_state

import adamss
from adamss_conformance.tolerances import assert_agrees
from adamss_torch import BudgetController

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_merge_keeps_the_base_on_the_cpu_and_gives_it_back(net, config, inputs):
    model, x = adamss.attach(net().cuda(), config()), inputs(4, 16).cuda()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    model.layers[0].query.adamss.default.C.data.fill_(0.1)
    adapted, W0 = model(x), model.layers[0].query.weight.clone()
    adamss.merge(model)
    assert model.layers[0].query.adamss.base["weight"].device.type == "cpu"
    assert_agrees(model(x).detach().cpu(), adapted.detach().cpu(), dtype="float32", what="merged")
    with adamss.disabled(model):
        assert torch.equal(model.layers[0].query.weight, W0)
    adamss.unmerge(model)
    assert torch.equal(model(x), adapted)


def test_travels_from_cuda_to_cpu_and_back(net, config, inputs, tmp_path):
    model, x = adamss.attach(net().cuda(), config(modules_to_save=["classifier"])), inputs(4, 16)
    model.layers[0].query.adamss.default.C.data.fill_(0.1)
    adamss.save(model, tmp_path / "a.safetensors")
    on_cpu = adamss.load(net(), tmp_path / "a.safetensors")
    assert_agrees(on_cpu(x).detach(), model(x.cuda()).detach().cpu(), dtype="float32", what="on the CPU")
    adamss.save(on_cpu, tmp_path / "b.safetensors")
    again = adamss.load(net().cuda(), tmp_path / "b.safetensors")
    assert_agrees(again(x.cuda()).detach().cpu(), on_cpu(x).detach(), dtype="float32", what="back on CUDA")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_tf32_leave_attach_alone(net, config, dtype):
    expected = adamss.attach(net().cuda(), config()).state_dict()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=dtype):
            actual = adamss.attach(net().cuda(), config()).state_dict()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same_state(actual, expected)


def test_compiles(net, config, inputs):
    """This test uses the default compiler; law 11 uses another one."""
    model, x = adamss.attach(net().cuda(), config()), inputs(4, 16).cuda()
    model.layers[0].query.adamss.default.C.data.fill_(0.1)
    y = torch.compile(model, fullgraph=True)(x)
    assert_agrees(y.detach().cpu(), model(x).detach().cpu(), dtype="float32", what="compiled")


def trained_with_a_budget(net, config, inputs, device, *, fused, scaler=None, steps=9):
    model = adamss.attach(net(dtype=torch.float64), config(rank=8, subspaces=5, subspace_rank=1)).to(device)
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.01, fused=fused)
    schedule, masks = adamss.BudgetConfig(target=5, end_step=6, interval=2), []
    budget = BudgetController(
        model,
        optimizer,
        schedule,
        on_allocation=lambda each: masks.append([m.tolist() for m in each.masks.values()]),
    )
    for number in range(steps):
        overflows = (True, False) if scaler is not None and number == 3 else (False,)
        for overflow in overflows:
            optimizer.zero_grad()
            loss = model(inputs(8, 16, dtype=torch.float64, seed=number).to(device)).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if overflow:
                adamss.trainable_parameters(model)[0].grad.fill_(float("inf"))
            (optimizer.step if scaler is None else lambda: scaler.step(optimizer))()
            if scaler is not None:
                scaler.update()
    return model, budget, masks


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_budget_decides_as_on_the_cpu(net, config, inputs, fused, scaled):
    _, budget, expected = trained_with_a_budget(net, config, inputs, "cpu", fused=False)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10) if scaled else None
    _, on_cuda, masks = trained_with_a_budget(net, config, inputs, "cuda", fused=fused, scaler=scaler)
    assert masks == expected
    assert on_cuda.step == budget.step == 9
    assert on_cuda.active_count == 5


def test_consolidate_on_the_device(net, config, inputs):
    model, *_ = trained_with_a_budget(net, config, inputs, "cuda", fused=True)
    x = inputs(4, 16, dtype=torch.float64).cuda()
    expected = model(x).detach().cpu()
    adamss.consolidate(model)
    assert_agrees(model(x).detach().cpu(), expected, dtype="float64", what="outputs")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
