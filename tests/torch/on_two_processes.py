"""The program of the processes in test_distributed.py: ``python on_two_processes.py RANK PROCESSES FOLDER``.

A process reads names of scenarios, one on each line, and runs them. It answers each with a line of JSON: the
traceback, or an empty string. Sums are in float64 unless a scenario says otherwise, because processes and shards add
up in another order than one process.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import json
import os
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch_support
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch_support import assert_same_state, controlled, loss_of, state, step

import adamss
from adamss import AdamssConfig, AdamssWarning, BudgetConfig, core, errors
from adamss.io import checkpoint as files
from adamss_torch import BudgetController, sharding
from adamss_torch.backend import adapters_of

SCENARIOS: dict[str, Callable[[], None]] = {}
FOUR_PROCESSES = ("hybrid_sharding_over_four",)
STEPS = 8
PARAMETERS = {"interval": 2, "unit": "parameters", "target": 150}
SCHEDULES = (
    {"interval": 3},
    {"interval": 2, "window": "running"},
    {"interval": 2, "revive": True},
    {"interval": 2, "window": "running", "revive": True},
    PARAMETERS | {"interval": 3},
    PARAMETERS | {"window": "running"},
    PARAMETERS | {"revive": True},
    PARAMETERS | {"window": "running", "revive": True},
)


def scenario(run: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[run.__name__] = run
    return run


# ---- models and training -------------------------------------------------------------------------------------


class Net(torch_support.Net):
    """The shared test network with an additional buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(16))

    def forward(self, x):
        return super().forward(x + self.shift.to(x.dtype))


def net(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def config(**changes) -> AdamssConfig:
    # C has one row, which only one of two processes holds; B has five rows.
    settings = {"targets": ["query", "value"], "rank": 6, "subspaces": 5, "modules_to_save": ["classifier"]}
    return AdamssConfig(**(settings | changes))


def adapted(**changes) -> nn.Module:
    return adamss.attach(net(), config(**changes), divide=False)


def schedule(**changes) -> BudgetConfig:
    return BudgetConfig(**({"target": 4, "end_step": 6} | changes))


def batch(number: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def mine(x: torch.Tensor) -> torch.Tensor:
    return x[dist.get_rank() :: dist.get_world_size()]


def everything(x: torch.Tensor) -> torch.Tensor:
    return x


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.02, weight_decay=0.1)


def trained(model: nn.Module) -> list[torch.Tensor]:
    """Return all trained Parameters, gathered from their shards."""
    return [whole(p.detach()) for p in adamss.trainable_parameters(model)]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def moved(model: nn.Module) -> nn.Module:
    """Set all trained Parameters of a model, sharded or not, to random values, and return the model."""
    with torch.no_grad():
        for number, p in enumerate(adamss.trainable_parameters(model)):
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(number), dtype=p.dtype) / 4
            if hasattr(p, "device_mesh"):
                values = distribute_tensor(values, p.device_mesh, p.placements)
            p.copy_(values)
    return model


def partly_frozen(model: nn.Module) -> nn.Module:
    for adapter in adapters_of(model).values():
        adapter.active.copy_(torch.tensor([True, False, True, True, False]))
    return model


def frozen_elements(model: nn.Module) -> list[torch.Tensor]:
    """Return, for each gathered B and C, which elements are frozen."""
    adapters = adapters_of(model).values()
    pairs = [pair for a in adapters for pair in zip(a.trained_elements(), (a.B, a.C), strict=True)]
    return [~elements.expand(p.shape) for elements, p in pairs]


def trained_values(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of each B and C, gathered from their shards."""
    return [whole(p.detach()).clone() for a in adapters_of(model).values() for p in (a.B, a.C)]


def assert_kept(frozen: list[torch.Tensor], before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """Check that no frozen element has changed, and that each tensor with trained elements has."""
    for where, old, new in zip(frozen, before, after, strict=True):
        assert torch.equal(old[where], new[where]), "a frozen element has moved"
        assert where.all() or not torch.equal(old, new)


class Run:
    """A complete training of a model, wrapped or not, under a budget, with the masks that it decided.

    `data` returns the part of a batch that this process sees.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Callable[[torch.Tensor], torch.Tensor],
        config: BudgetConfig,
        *,
        controlled_model: nn.Module | None = None,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    ) -> None:
        self.model = model
        self.masks: list[dict[str, torch.Tensor]] = []
        optimizer = make_optimizer(model)
        watched = model if controlled_model is None else controlled_model
        with controlled(watched, optimizer, config, on_allocation=self._decided) as controller:
            values = trained_values(model)
            for number in range(STEPS):
                frozen, before = frozen_elements(model), values
                step(model, optimizer, data(batch(number)).to(next(model.parameters()).dtype))
                values = trained_values(model)
                assert_kept(frozen, before, values)
            assert controller.reached
            assert controller.step == STEPS

    def _decided(self, allocation) -> None:
        same_on_all(*allocation.masks.values())
        for path, adapter in adapters_of(self.model).items():
            assert torch.equal(adapter.active.cpu(), allocation.masks[path])
        self.masks.append(allocation.masks)

    def equals(self, other: Run) -> None:
        assert len(self.masks) > 1
        assert_same_training(self.model, self.masks, other.model, other.masks)
        assert sum(int(mask.sum()) for mask in self.masks[-1].values()) < 20


def assert_same_training(model, masks, other, expected) -> None:
    """Check that the masks are equal, and the trained values equal up to rounding."""
    assert len(masks) == len(expected)
    for ours, theirs in zip(masks, expected, strict=True):
        for path, mask in theirs.items():
            assert torch.equal(ours[path], mask), f"another decision at {path}"
    for a, b in zip(trained(model), trained(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@functools.cache
def alone_with(config: BudgetConfig) -> Run:
    """Return the training of a single process that sees all data."""
    return Run(adapted(), everything, config)


def same_on_all(*tensors: torch.Tensor) -> None:
    """Check by hashes that these tensors are equal on all processes."""
    digest = hashlib.sha256(
        b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)
    ).hexdigest()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest)
    assert len(set(found)) == 1, f"the processes have different values: {found}"


@contextmanager
def raising(kind: type[Exception], *words: str) -> Iterator[None]:
    """Check that an error of exactly this type is raised, and that its message contains these words."""
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    assert type(caught) is kind and all(word in str(caught) for word in words), repr(caught)


@contextmanager
def warning(*words: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(each.message) for each in caught if issubclass(each.category, AdamssWarning)]
    assert len(found) == 1 and all(word in found[0] for word in words), found


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all Parameters and buffers, gathered from their shards."""
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


# ---- DistributedDataParallel ---------------------------------------------------------------------------------


@scenario
def ddp_takes_the_decisions_of_one_process():
    options = [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}]
    for number, settings in enumerate(SCHEDULES):
        config = schedule(**settings)
        model = adapted()
        wrapper = DistributedDataParallel(model, **options[number % 3])
        sharing = Run(wrapper, mine, config, controlled_model=wrapper if number % 2 else model)
        sharing.equals(alone_with(config))
        same_on_all(*trained(model))


def accumulates(model: nn.Module, context: Callable[[nn.Module, bool], AbstractContextManager]) -> None:
    """Compare a training that accumulates two batches in each step with a single process that sees all data."""
    alone, decisions = adapted(), []
    for each, data in ((model, mine), (alone, everything)):
        optimizer, seen = adamw(each), []
        with controlled(each, optimizer, schedule(interval=2), on_allocation=seen.append) as budget:
            for number in range(6):
                optimizer.zero_grad()
                for last in (False, True):
                    with context(each, last) if each is model else nullcontext():
                        loss_of(each, data(batch(2 * number + last))).backward()
                optimizer.step()
            assert budget.step == 6
        decisions.append([allocation.masks for allocation in seen])
    for masks in decisions[0]:
        same_on_all(*masks.values())
    assert_same_training(model, decisions[0], alone, decisions[1])


@scenario
def ddp_accumulates_without_synchronising():
    wrapper = DistributedDataParallel(adapted())
    accumulates(wrapper, lambda model, last: nullcontext() if last else model.no_sync())


@scenario
def ddp_decides_alike_even_if_gradients_are_not_synchronised():
    """Within `no_sync` each process has its own scores. The first one decides, and the other warns if it differs."""
    for give_the_wrapper in (True, False):
        model = adapted()
        wrapper = DistributedDataParallel(model)
        optimizer, seen, config = adamw(model), [], schedule(end_step=4, interval=4)
        watched = wrapper if give_the_wrapper else model
        with (
            controlled(watched, optimizer, config, on_allocation=seen.append),
            warnings.catch_warnings(record=True) as caught,
            wrapper.no_sync(),
        ):
            warnings.simplefilter("always")
            for number in range(4):
                loss_of(wrapper, mine(batch(number))).backward()
                optimizer.step()
        same_on_all(*seen[0].masks.values())
        told = any("scored the subspaces otherwise" in str(each.message) for each in caught)
        assert told == (dist.get_rank() == 1), [str(each.message) for each in caught]


@scenario
def ddp_does_not_send_the_buffers_of_adapters():
    rank = dist.get_rank()

    def check(wrapper, model):
        """Change every buffer on the second process. Synchronised ones get the values of the first process again."""
        own = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".A")}
        kept = {name: buffer.clone() for name, buffer in own.items()}
        with torch.no_grad():
            model.shift += rank
            for buffer in own.values():
                buffer.mul_(1 + rank)
        x = mine(batch(0))
        # Tensors that are kept for the backward pass must not be written in between, or autograd raises.
        (loss_of(wrapper, x) + loss_of(wrapper, 2 * x)).backward()
        assert not model.shift.any(), "a buffer of the model's own was not synchronised"
        for name, buffer in own.items():
            assert torch.equal(buffer, (1 + rank) * kept[name]), f"{name} was sent"
            buffer.copy_(kept[name])

    model = adapted()
    check(DistributedDataParallel(model), model)
    torch.compiler.set_stance("force_eager")
    check(DistributedDataParallel(torch.compile(model)), model)
    torch.compiler.set_stance("default")
    gc.collect()
    # After `consolidate`, the mask of the folded subspaces is another buffer.
    for path, adapter in adapters_of(model).items():
        adapter.active.copy_(torch.tensor([True, False, False, True, False]) ^ ("value" in path))
        with torch.no_grad():
            adapter.C.copy_(torch.randn(adapter.C.shape, generator=torch.Generator().manual_seed(0)))
    adamss.consolidate(model)
    check(DistributedDataParallel(model), model)


@scenario
def ddp_of_a_model_of_which_a_part_was_adapted():
    outer = nn.Sequential(adapted())
    wrapper = DistributedDataParallel(outer)
    with warning("broadcast_buffers=False"), controlled(wrapper, adamw(outer), schedule()):
        pass
    del wrapper
    wrapper = DistributedDataParallel(outer, broadcast_buffers=False)
    with controlled(wrapper, adamw(outer), schedule()):  # warnings are errors
        pass


@scenario
def ddp_refuses_adapters_that_do_not_fit_together():
    with raising(errors.StateError, "DistributedDataParallel", "wrap the model then"):
        adamss.attach(DistributedDataParallel(net()), config())
    model = net(seed=dist.get_rank())
    with warning("base weights that differ"):
        adamss.attach(model, config())
    wrapper = DistributedDataParallel(model)
    with raising(errors.StateError, "different bases"):
        BudgetController(wrapper, adamw(model), schedule())


@scenario
def ddp_with_the_zero_redundancy_optimizer():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero(model, **options):
        settings = {"optimizer_class": torch.optim.AdamW, "lr": 0.02, "weight_decay": 0.1} | options
        return ZeroRedundancyOptimizer(adamss.trainable_parameters(model), **settings)

    for options in ({}, {"parameters_as_bucket_view": True}):
        model = adapted()
        wrapper, make = DistributedDataParallel(model), functools.partial(zero, **options)
        sharing = Run(wrapper, mine, schedule(), make_optimizer=make)
        sharing.equals(alone_with(schedule()))
        same_on_all(*trained(model))
    with raising(errors.ConfigTypeError, "overlap_with_ddp"):
        BudgetController(adapted(), zero(adapted(), overlap_with_ddp=True), schedule())


# ---- attach on several processes -----------------------------------------------------------------------------


def counted() -> AbstractContextManager[mock.Mock]:
    """Count the decompositions on this process."""
    return mock.patch.object(core, "decompose", wraps=core.decompose)


def assert_same_adapters(ours: nn.Module, theirs: nn.Module) -> None:
    assert_same_state(numbers(ours), numbers(theirs))
    for path, adapter in adapters_of(ours).items():
        other = adapters_of(theirs)[path]
        for name in ("A", "B", "C"):
            a, b = getattr(adapter, name), getattr(other, name)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride()), f"{path}.{name} lies otherwise in memory"


@scenario
def attach_decomposes_each_layer_once():
    """The processes share the decompositions and exchange the results, which equal those of one process."""
    for changes in (
        {},
        {"targets": ["query", "value", "dense", "classifier"], "modules_to_save": []},
        {"targets": r".*0\.query", "modules_to_save": []},
        {"basis": "per_subspace", "include_bias": True, "subspace_rank": 2},
        {"factor_dtype": "float32", "segmentation": "spectral"},
    ):
        with counted() as calls:
            model = adamss.attach(net(), config(**changes))
        alone = adamss.attach(net(), config(**changes), divide=False)
        layers, rank = len(adapters_of(alone)), dist.get_rank()
        assert calls.call_count == (layers + 1 - rank) // 2, f"of {layers} layers"
        assert list(adapters_of(model)) == list(adapters_of(alone))
        assert_same_adapters(model, alone)
        same_on_all(*numbers(model).values())


@scenario
def attach_of_different_models_is_not_divided():
    rank = dist.get_rank()
    # The models differ like the stages of a pipeline, or have the same layers with other settings.
    for changes in ({"targets": rf"layers\.{rank}\..*(query|value)"}, {"rank": 4 + rank}):
        with counted() as calls:
            model = adamss.attach(net(), config(**changes))
        assert calls.call_count == len(adapters_of(model))
        assert_same_adapters(model, adamss.attach(net(), config(**changes), divide=False))
    with warning("base weights that differ"), counted() as calls:
        model = adamss.attach(net(seed=rank), config())
    assert calls.call_count == 4
    assert_same_adapters(model, adamss.attach(net(seed=rank), config(), divide=False))
    if rank == 0:  # without `divide` a process does not wait for the others
        adamss.attach(net(), config(), divide=False)


@scenario
def attach_fails_on_all_or_none():
    rank = dist.get_rank()

    def fails(kind, *words, model, **changes):
        before = state(model)
        with raising(kind, *words):
            adamss.attach(model, config(**changes))
        assert_same_state(model, before)
        assert all(p.requires_grad for p in model.parameters())

    spoilt = net()
    with torch.no_grad():
        spoilt.layers[1].value.weight[0, 0] = float("nan")
    fails(errors.ArrayValueError, "layers.1.value", model=spoilt)
    fails(errors.ArrayValueError, "layers.1.value", model=spoilt if rank == 1 else net())
    fails(errors.TargetError, "nothing", model=net(), targets=["nothing"] if rank == 1 else ["query"])
    twice = net()
    if rank == 0:
        adamss.attach(twice, config(), divide=False)
    with raising(errors.StateError, "attached already"):
        adamss.attach(twice, config())
    # After the error, all processes can attach together again.
    assert_same_adapters(adamss.attach(net(), config()), adapted())


@scenario
def load_is_divided_if_asked():
    model = moved(adapted())
    path = folder() / f"portable{dist.get_rank()}"
    adamss.save(model, path)
    with counted() as calls:
        loaded = adamss.load(net(), path, divide=True)
    assert calls.call_count == 2
    assert_same_adapters(loaded, adamss.load(net(), path))
    with raising(errors.CheckpointError, "base weight"):
        adamss.load(net(seed=dist.get_rank()), path, divide=True)
    if dist.get_rank() == 0:  # without `divide` a process does not wait for the others
        adamss.load(net(), path)


# ---- FSDP2 ---------------------------------------------------------------------------------------------------


def sharded(model: nn.Module, *, by: str = "layer", shape: tuple[int, ...] = (2,), **options) -> nn.Module:
    """Shard a model over the processes: as a whole, each layer, or each linear layer."""
    from torch.distributed.fsdp import fully_shard

    options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if by == "linear":
        for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
            fully_shard(module, **options)
    if by != "root":
        for layer in model.layers:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def attached_first(**options) -> nn.Module:
    return sharded(adapted(), **options)


def attached_last(**options) -> nn.Module:
    """Return a model to which the adapter is attached after it was sharded and has run."""
    model = sharded(net(), **options)
    model(mine(batch(99)))
    return adamss.attach(model, config())


@scenario
def fsdp_takes_the_decisions_of_one_process():
    cases = [(attached_first, options) for options in ({"by": "root"}, {}, {"reshard_after_forward": False})]
    cases += [(attached_first, {"reshard_after_forward": True, "by": "linear"})]
    cases += [(attached_last, {"reshard_after_forward": kept}) for kept in (False, True)]
    cases += [(attached_last, {"by": by}) for by in ("root", "linear")]
    replicas = [(build, {"shape": s}) for s in ((2, 1), (1, 2)) for build in (attached_first, attached_last)]
    for number, (build, options) in enumerate(cases + replicas):
        config = schedule(**SCHEDULES[number % len(SCHEDULES)])
        model = build(**options)
        assert all(hasattr(p, "full_tensor") for p in adamss.trainable_parameters(model))
        sharing = Run(model, mine, config)
        sharing.equals(alone_with(config))
        same_on_all(*trained(model))


@scenario
def fsdp_is_attached_to_layer_by_layer():
    alone = adapted()
    for divide in (True, False):
        for options in ({}, {"by": "root"}, {"shape": (2, 1)}, {"shape": (1, 2), "by": "linear"}):
            model = sharded(net(), **options)
            with counted() as calls, gathered() as most:
                adamss.attach(model, config(), divide=divide)
            assert calls.call_count == (2 if divide else 4)
            # One for this process, and one that is being gathered for another process.
            assert most[0] <= 2, f"{most[0]} weights were whole at the same time"
            assert_same_state(numbers(model), numbers(alone))
            assert all(hasattr(p, "full_tensor") for p in adamss.trainable_parameters(model))


@contextmanager
def gathered() -> Iterator[list[int]]:
    """Yield a list whose entry is the largest number of gathered weights on this process at the same time."""
    original, alive, most = sharding.unshard, [], [0]

    def watching(tensor):
        full = original(tensor)
        if full.ndim == 2:
            alive.append(weakref.ref(full))
            most[0] = max(most[0], sum(each() is not None for each in alive))
        return full

    with mock.patch.object(sharding, "unshard", watching):
        yield most


@scenario
def hybrid_sharding_over_four():
    for build in (attached_first, attached_last):
        sharing = Run(build(shape=(2, 2)), mine, schedule(interval=2))
        sharing.equals(alone_with(schedule(interval=2)))
        same_on_all(*trained(sharing.model))
        path = folder() / f"hybrid-{build.__name__}.safetensors"
        adamss.save(sharing.model, path)
        files.read(path)


@scenario
def fsdp_in_bfloat16():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def build(attach_first):
        model = net(dtype=torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if attach_first:
            return sharded(adamss.attach(model, config()), mp_policy=policy)
        return adamss.attach(sharded(model, mp_policy=policy), config())

    for attach_first in (True, False):
        model = build(attach_first)
        with torch.no_grad():
            out = model(mine(batch(0)).float())
            base = net(dtype=torch.float32)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), base(mine(batch(0)).float()), rtol=0.05, atol=0.05)
        sharing = Run(model, mine, schedule(interval=2))
        assert all(p.dtype == torch.float32 for p in adamss.trainable_parameters(model))
        same_on_all(*trained(model))
        assert sum(int(mask.sum()) for mask in sharing.masks[-1].values()) == 4


@scenario
def fsdp_accumulates_gradients():
    def synchronised(model, last):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)
        return nullcontext()

    accumulates(attached_first(), synchronised)


@scenario
def fsdp_keeps_frozen_elements_while_others_stand_in_their_places():
    """A forward pass before the optimiser's step leaves gathered Parameters in the model, instead of the shards."""
    for build in (attached_first, attached_last):
        model = moved(partly_frozen(build(by="root")))
        optimizer = adamw(model)
        with controlled(model, optimizer, schedule(end_step=9, interval=9)):
            for number in range(3):
                frozen, before = frozen_elements(model), trained_values(model)
                optimizer.zero_grad()
                loss_of(model, mine(batch(number))).backward()
                with torch.no_grad():
                    model(mine(batch(9)))  # leaves gathered Parameters in place of the shards
                optimizer.step()
                adamss.summary(model)  # reading puts the shards back
                assert_kept(frozen, before, trained_values(model))


@scenario
def fsdp_does_not_count_steps_that_a_scaler_skips():
    for fused in (False, True):
        model = sharded(adamss.attach(net(dtype=torch.float32), config()))
        optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.02, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with controlled(model, optimizer, schedule(interval=2)) as budget:
            for number in range(7):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, mine(batch(number)).float())).backward()
                if number == 3 and dist.get_rank() == 1:
                    adapters_of(model)["layers.0.query"].B.grad.to_local()[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
            assert (budget.step, budget.active_count, scaler.get_scale()) == (6, 4, 4.0)
            assert budget.state_dict()["left_out"] == 0
            same_on_all(*budget.masks.values(), *trained(model))


@scenario
def fsdp_leaves_a_step_out_on_all():
    """The gradient is not finite in the shard of only one process, but all processes must skip the step."""
    rank = dist.get_rank()
    model = moved(attached_first())
    optimizer = torch.optim.SGD(adamss.trainable_parameters(model), lr=0.0)
    with controlled(model, optimizer, schedule(end_step=40, interval=20)) as budget:

        def step(number, spoil):
            optimizer.zero_grad()
            loss_of(model, mine(batch(number))).backward()
            if spoil:
                B = adapters_of(model)["layers.0.query"].B
                if rank == 1:
                    B.grad.to_local()[0, 0] = float("nan")
            optimizer.step()
            return {path: layer["B"]["sensitivity"] for path, layer in budget.state_dict()["layers"].items()}

        before = step(0, spoil=False)
        with warning("NaN or infinity"):
            after = step(1, spoil=True)
        assert budget.step == 2 and budget.state_dict()["left_out"] == 1
        for path, value in before.items():
            assert value.full_tensor().any()
            assert torch.equal(value.to_local(), after[path].to_local()), "an average was changed"
        moved(model)  # the optimiser has applied the gradient that is not finite
        later = step(2, spoil=False)
        assert not torch.equal(later["layers.0.query"].full_tensor(), after["layers.0.query"].full_tensor())


@scenario
def fsdp_resumes():
    """A training resumes from a distributed checkpoint, and budget states move between one process and several."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    config = schedule(window="running", interval=2)

    def train(model, optimizer, numbers, data=mine):
        for number in numbers:
            step(model, optimizer, data(batch(number)))

    def state_of(model, optimizer, budget):
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "budget": budget.state_dict()}

    straight = attached_first()
    optimizer = adamw(straight)
    with controlled(straight, optimizer, config) as budget:
        train(straight, optimizer, range(5))
        dcp.save(state_of(straight, optimizer, budget), checkpoint_id=folder() / "dcp")
        middle = budget.state_dict()
        train(straight, optimizer, range(5, 9))
        masks = budget.masks
    for build in (attached_first, attached_last):
        resumed = build()
        optimizer = adamw(resumed)
        with controlled(resumed, optimizer, config) as budget:
            found = state_of(resumed, optimizer, budget)
            dcp.load(found, checkpoint_id=folder() / "dcp")
            weights = {"model_state_dict": found["model"], "optim_state_dict": found["optimizer"]}
            set_state_dict(resumed, optimizer, **weights)
            budget.load_state_dict(found["budget"])
            kept = sum(int(layer["active"].sum()) for layer in middle["layers"].values())
            assert (budget.step, budget.active_count) == (5, kept)
            train(resumed, optimizer, range(5, 9))
            assert all(torch.equal(budget.masks[path], mask) for path, mask in masks.items())
        for a, b in zip(trained(resumed), trained(straight), strict=True):
            assert torch.equal(a, b)

    # From one process to several, and back.
    alone = adapted()
    optimizer = adamw(alone)
    with controlled(alone, optimizer, config) as budget:
        train(alone, optimizer, range(5), everything)
        saved = budget.state_dict()
    model = attached_first()
    with controlled(model, adamw(model), config) as budget:
        budget.load_state_dict(saved)
        spread = budget.state_dict()
    other = adapted()
    with controlled(other, adamw(other), config) as budget:
        budget.load_state_dict(spread)
        back = budget.state_dict()
    for path, layer in saved["layers"].items():
        for name in "BC":
            for kind, value in layer[name].items():
                assert torch.equal(spread["layers"][path][name][kind].full_tensor(), value)
                assert torch.equal(back["layers"][path][name][kind], value)


@scenario
def fsdp_saves_what_one_process_saves():
    rank = dist.get_rank()
    alone = partly_frozen(moved(adapted()))
    for build in (attached_first, attached_last):
        for options in ({}, {"reshard_after_forward": False}):
            model = partly_frozen(moved(build(**options)))
            model(mine(batch(0)))  # leaves gathered Parameters in place of the shards
            for training in (True, False):
                ours = folder() / f"sharded-{build.__name__}-{training}-{len(options)}.safetensors"
                theirs = folder() / f"alone-{training}-{rank}.safetensors"
                with mock.patch.object(files, "write", wraps=files.write) as write:
                    adamss.save(model, ours, training=training)
                assert write.call_count == (rank == 0), "one process, the first, is to write"
                adamss.save(alone, theirs, training=training)
                assert files.read(ours) == files.read(theirs), f"{build.__name__} {options} {training}"
            names = (f"{name}-lora-{build.__name__}-{len(options)}" for name in ("sharded", rank))
            lora = [folder() / name for name in names]
            with warnings.catch_warnings():  # `to_lora` puts modules_to_save into a separate file
                warnings.simplefilter("ignore")
                for exported, where in zip((model, alone), lora, strict=True):
                    adamss.to_lora(exported, where)
            dist.barrier()
            for name in ("adapter_model.safetensors", "modules_to_save.safetensors", "adapter_config.json"):
                ours, theirs = ((where / name).read_bytes() for where in lora)
                assert ours == theirs, f"{build.__name__} {options} {name}"
            with raising(errors.StateError, "first") if rank else raising(FileNotFoundError):
                adamss.save(model, folder() / "missing" / "file.safetensors")
            if rank == 0:  # reading does not wait for the other processes
                assert str(adamss.summary(model)) == str(adamss.summary(alone))
                assert "R=6" in repr(model)
    same = folder() / "sharded-attached_first-True-0.safetensors"
    for reloaded in (
        sharded(adamss.load(net(), same)),
        adamss.load(sharded(net()), same),
        adamss.load(sharded(net()), same, divide=True),
        adamss.load(sharded(net()), folder() / "sharded-attached_first-False-0.safetensors", divide=True),
    ):
        x = mine(batch(1))
        torch.testing.assert_close(reloaded(x), alone(x), rtol=0, atol=1e-10)
        assert all(hasattr(p, "full_tensor") for p in adamss.trainable_parameters(reloaded))
        for adapter in adapters_of(reloaded).values():
            adapter.active.fill_(True)
        Run(reloaded, mine, schedule())
    with raising(errors.CheckpointError, "base weight"):
        adamss.load(sharded(net(seed=1)), same)


@scenario
def fsdp_merges_and_detaches():
    x = batch(5)
    base = net()
    for build in (attached_first, attached_last):
        for options in ({"reshard_after_forward": False}, {"by": "linear", "shape": (2, 1)}):
            model, alone = partly_frozen(moved(build(**options))), partly_frozen(moved(adapted()))
            start = numbers(model)

            def both(verb=adamss.summary, pair=(model, alone)):
                """Call a verb on the sharded model and on the other one, and compare their outputs."""
                for each in pair:
                    verb(each)
                with torch.no_grad():
                    torch.testing.assert_close(pair[0](x), pair[1](x), rtol=0, atol=1e-12)

            both()
            with adamss.disabled(model):
                assert torch.equal(model(x), base(x)), "switched off, it is not the base model"
            assert_same_state(numbers(model), start)
            both(adamss.merge)
            merged, expected = (
                {name: value for name, value in numbers(each).items() if name.endswith("weight")}
                for each in (model, alone)
            )
            assert not torch.equal(merged["layers.0.query.weight"], start["layers.0.query.weight"])
            assert_same_state(merged, expected)
            before = numbers(model)
            with adamss.disabled(model):
                assert torch.equal(model(x), base(x))
            assert_same_state(numbers(model), before)
            both(adamss.unmerge)
            assert_same_state(numbers(model), start)
            both(adamss.consolidate)
            Run(model, mine, schedule(target=2)).equals(Run(alone, everything, schedule(target=2)))
            both()
            adamss.detach(model)
            assert torch.equal(model(x), base(x))
            assert_same_state(numbers(model), numbers(base))
            assert all(p.requires_grad for p in model.parameters())
            loss_of(model, mine(x)).backward()
            assert all(p.grad is not None for p in model.parameters())
            if "shape" not in options:
                again = adamss.attach(model, config())
                Run(again, mine, schedule()).equals(alone_with(schedule()))


def with_two(base: nn.Module) -> nn.Module:
    """Attach two adapters with random values to a model; they share some layers and not others."""
    for name, targets in (("a", ["query", "value"]), ("b", ["query", "dense"])):
        adamss.attach(base, config(targets=targets, modules_to_save=[]), name=name)
        moved(base)
    return base


def steps_of(model: nn.Module, share: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Take three steps with the trained adapter, and return the values of both adapters."""
    optimizer = adamw(model)
    for number in range(3):
        optimizer.zero_grad()
        model(share(batch(number))).square().mean().backward()
        optimizer.step()
    both = [adapters_of(model, name).values() for name in ("a", "b")]
    return [whole(p.detach()) for adapters in both for adapter in adapters for p in (adapter.B, adapter.C)]


@scenario
def ddp_trains_one_of_two_adapters():
    for name in ("a", "b"):
        alone, model = (adamss.activate(with_two(net()), name) for _ in range(2))
        expected, wrapped = steps_of(alone, everything), nn.parallel.DistributedDataParallel(model)
        torch.testing.assert_close(steps_of(wrapped, mine), expected, rtol=1e-9, atol=1e-12)
        other = "b" if name == "a" else "a"
        with raising(errors.StateError, "activate first"):
            adamss.activate(wrapped, other)
        adamss.activate(wrapped, name)


@scenario
def fsdp_has_several_adapters():
    x = batch(7)
    for name in ("a", "b"):
        alone = adamss.activate(with_two(net()), name)
        for model in (with_two(sharded(net())), sharded(with_two(net()))):
            adamss.activate(model, name)
            expected = steps_of(copy.deepcopy(alone), everything)
            torch.testing.assert_close(steps_of(model, mine), expected, rtol=1e-9, atol=1e-12)
            other = copy.deepcopy(alone)
            steps_of(other, everything)
            for what in ({"a": 0.5, "b": 2.0}, "a", []):
                with torch.no_grad():
                    actual, wanted = (adamss.activate(each, what)(x) for each in (model, other))
                torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)
            for each in (model, other):
                adamss.activate(each, ["a", "b"])
                adamss.unmerge(adamss.merge(adamss.merge(each, name="a"), name="b"), name="a")
            with torch.no_grad():
                torch.testing.assert_close(model(x), other(x), rtol=1e-9, atol=1e-12)
            ours, theirs = folder() / f"several-{name}", folder() / f"alone-{name}-{dist.get_rank()}"
            adamss.save(model, ours, name=name, training=True)
            adamss.save(other, theirs, name=name, training=True)
            dist.barrier()
            loaded = [adamss.load(net(), path) for path in (ours, theirs)]
            torch.testing.assert_close(trained(loaded[0]), trained(loaded[1]), rtol=1e-9, atol=1e-12)


@scenario
def fsdp_refuses_what_it_cannot_do():
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallel = net()
    mesh = init_device_mesh("cpu", (2,))
    for layer in parallel.layers:
        parallelize_module(layer, mesh, {"query": ColwiseParallel()})
    with raising(errors.LayerError, "layers.0.query", "fully_shard"):
        adamss.attach(parallel, config())
    assert all(p.requires_grad for p in parallel.parameters()), "something was changed"

    tied = net()
    tied.layers[0].dense.weight = tied.layers[1].dense.weight
    tied = sharded(adamss.attach(tied, config(targets=["0.dense"])), by="root")
    before = numbers(tied)
    with raising(errors.LayerError, "shared"):
        adamss.merge(tied)
    assert_same_state(before, numbers(tied))


@scenario
def fsdp1_is_refused_but_to_save():
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    with raising(errors.StateError, "FSDP1", "fully_shard"):
        adamss.attach(FullyShardedDataParallel(net(), device_id=device), config())
    model = FullyShardedDataParallel(adapted(), device_id=device, use_orig_params=True)
    with raising(errors.StateError, "FSDP1", "fully_shard"):
        BudgetController(model, torch.optim.SGD(model.parameters(), lr=0.1), schedule())
    with raising(errors.StateError, "summon_full_params"):
        adamss.save(model, folder() / "fsdp1.safetensors")
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        adamss.save(model, folder() / "fsdp1.safetensors")
    dist.barrier()
    x = batch(3)
    torch.testing.assert_close(adamss.load(net(), folder() / "fsdp1.safetensors")(x), model(x))


# ---- the process ---------------------------------------------------------------------------------------------


def folder() -> Path:
    return Path(sys.argv[3])


def main(rank: int, processes: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # scenarios and libraries print to stderr, so that only answers go to the pipe
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=AdamssWarning)
    warnings.filterwarnings("error", message=".*returned a view tensor.*")
    store = dist.FileStore(str(folder() / "store"), processes)
    # The timeout makes a process fail instead of waiting forever.
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=30)
    )
    for line in sys.stdin:
        try:
            SCENARIOS[line.strip()]()
            dist.barrier()
        except BaseException:
            print(json.dumps(traceback.format_exc()), file=answers)
            os._exit(1)  # a regular exit would wait for processes that wait for this one
        print(json.dumps(""), file=answers)
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
