"""The adaptive budget in a PyTorch training loop, driven by hooks on the optimiser's step."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from adamss.backend.training import adapter_in_training, identity, same_subspaces, schedule_of
from adamss.config import BudgetConfig
from adamss.core import BudgetPlan, BudgetState, advance, initial_budget_state, observe, plan_budget
from adamss.core.budget import Processes
from adamss.errors import (
    AdamssWarning,
    ConfigError,
    ConfigTypeError,
    StateError,
)
from adamss_torch.adapter import STRUCTURE, Adapter
from adamss_torch.backend import TorchBackend, adapters_of
from adamss_torch.frozen import FrozenElements
from adamss_torch.sharding import (
    agree,
    is_sharded,
    local,
    part_like,
    rebuilt,
    same_everywhere,
    shard_like,
    sum_over_shards,
)

__all__ = ["Allocation", "BudgetController"]

_CONTROLLED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Weak references to controllers, by their optimiser and by each of their adapters."""


class Allocation(NamedTuple):
    """One decision of a `BudgetController`, as it is passed to `on_allocation`.

    Attributes
    ----------
    step
        Number of completed optimiser steps.
    budget
        Budget at this step, in the unit of the schedule.
    active
        Number of subspaces that are trained from now on.
    parameters
        Number of trained parameters ``sum r_k (n_k + R_k)`` of the active subspaces.
    scores
        Scores of the subspaces, (K,) float32 on the CPU, by module path. A subspace that was frozen before has the
        score zero.
    masks
        Masks of the active subspaces, (K,) booleans on the CPU, by module path.

    Examples
    --------
    >>> import adamss, adamss_torch, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=4))
    >>> optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.1)
    >>> schedule, told = adamss.BudgetConfig(target=1, end_step=3), []
    >>> budget = adamss_torch.BudgetController(model, optimizer, schedule, on_allocation=told.append)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(2, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> told[-1].step, told[-1].active, int(told[-1].masks["0"].sum())
    (3, 1, 1)
    """

    step: int
    budget: int
    active: int
    parameters: int
    scores: dict[str, Tensor]
    masks: dict[str, Tensor]


@dataclass
class _Progress:
    """Progress of a controller, in an object of its own so that it can be reported after the controller is gone."""

    plan: BudgetPlan
    state: BudgetState
    reached: bool = False
    told: bool = False
    told_of_left_out: bool = False

    @property
    def active(self) -> int:
        """Number of subspaces that are trained."""
        return int(self.state.active.sum())

    def tell(self, *, moved: bool) -> None:
        """Warn once if the target was not reached; called when the training is over.

        Parameters
        ----------
        moved
            Whether B or C have changed since the beginning.
        """
        step = int(self.state.step)
        if self.told or self.reached or not (step or moved):
            return
        self.told = True
        config, left_out = self.plan.config, int(self.state.left_out)
        if not step:
            why = (
                "B and C have changed, but never in the optimiser's step(), which the controller follows; call "
                "step(), or the wrapper that calls it"
            )
        elif step < config.end_step:
            why = f"training ended after {step} optimiser steps, the schedule ends at {config.end_step}"
        else:
            why = f"no step since the last allocation had a gradient to score by ({left_out} were not finite)"
        warnings.warn(
            f"budget: the target of {config.target} {config.unit} was not reached: {why}; {self.active} of "
            f"{len(self.plan.costs)} subspaces are trained",
            AdamssWarning,
            stacklevel=3,
        )


class _Reductions(Processes):
    """Communication for `core.observe` and `core.advance`: sums over shards, and one decision for all processes.

    Parameters
    ----------
    controller
        Controller whose `scores` are used, since a subclass may score by something else.

    Attributes
    ----------
    row, mask
        Scores and decision of the last allocation, (T,) on the CPU. None if this step made no allocation.
    """

    def __init__(self, controller: BudgetController) -> None:
        self._controller = weakref.ref(controller)
        self._like = controller._parameters[0]
        self._group = _synchronised_over(controller._adapters)
        self.row: Tensor | None = None
        self.mask: Tensor | None = None

    def all_usable(self, usable: Tensor) -> Tensor:
        """Return whether the gradients are usable on all processes; one shard that is not finite spoils the step."""
        if not is_sharded(self._like):
            return usable
        return sum_over_shards((~usable).to(torch.float32), self._like) == 0

    def scores(self, plan: BudgetPlan, products: Tensor) -> Tensor:
        """Return the scores of the controller."""
        controller = self._controller()
        assert controller is not None
        self.row = controller.scores()
        return self.row

    def agree(self, active: Tensor) -> Tensor:
        """Return the decision of the first process, and warn if this process decided differently."""
        self.mask = agree(active.to(torch.uint8), self._like, self._group).to("cpu", torch.bool)
        if not torch.equal(self.mask, active):
            warnings.warn(
                "budget: this process scored the subspaces otherwise than the first one, whose decision it takes; "
                "are the gradients synchronised before the optimiser's step?",
                AdamssWarning,
                stacklevel=8,
            )
        return self.mask


class BudgetController:
    """Keep the budget of an adapted model while an optimiser trains it.

    Making the controller is all that a training loop has to add. Before each step of the optimiser, the controller
    updates the scores of the subspaces: ``|w g|``, smoothed, times its uncertainty. After the step it restores frozen
    elements and, when the schedule says so, chooses the subspaces that stay trained.

    A step that `torch.amp.GradScaler` skips does not count, whether the optimiser is fused or not. Gradients may be
    accumulated, clipped and scaled as usual. With ``revive=True`` frozen subspaces keep their gradients, which count
    in the norm by which a loop clips; otherwise their gradients are zero.

    Several processes are supported with DistributedDataParallel (wrapped before the controller is made; it needs no
    ``find_unused_parameters``) and FSDP2 (``fully_shard`` before the optimiser is made). All processes must make a
    controller. Scores come from the synchronised gradients, summed over shards, and all processes adopt the decision
    of the first one. DeepSpeed, FSDP1 and ``ZeroRedundancyOptimizer(overlap_with_ddp=True)`` raise an error. If only
    a part of the module that DistributedDataParallel wraps was adapted, pass ``broadcast_buffers=False`` to it;
    otherwise it sends every basis with each forward.

    Parameters
    ----------
    model
        An adapted model, wrapped or not.
    optimizer
        Optimiser that trains all B and C of the adapter, in any number of groups. Wrappers with an ``optimizer`` of
        their own (`accelerate`) are unwrapped. `torch.optim.LBFGS` is refused, since its step evaluates many
        gradients.
    config
        Schedule of the budget. None means the one that the adapter was attached with.
    name
        Name of the adapter. None means the one that is trained. Steps during which the adapter is not trained do not
        count in its schedule.
    on_allocation
        Function that is called with an `Allocation` after each decision.

    Attributes
    ----------
    config
        Schedule of the budget.
    plan
        The schedule together with the subspaces of the model.

    Raises
    ------
    StateError
        If the model has no adapters, is merged, or does not train the adapter; if the optimiser or the model has a
        controller already; if ``revive=True`` and frozen subspaces were consolidated and cannot return; or if the
        processes train different subspaces.
    ConfigError
        If no schedule was given, the model cannot keep to it, or the optimiser does not hold every B and C.
    ConfigTypeError
        If `optimizer` or `config` has the wrong type, or the optimiser is one that cannot be followed.

    References
    ----------
    .. [1] Zheng et al., "Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", NeurIPS 2025.

    Examples
    --------
    >>> import adamss, adamss_torch, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["0"], rank=4, subspaces=4))
    >>> optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=0.1)
    >>> schedule = adamss.BudgetConfig(target=1, end_step=5)
    >>> budget = adamss_torch.BudgetController(model, optimizer, schedule)
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(2, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> budget.active_count, adamss.summary(model).total.active
    (1, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: BudgetConfig | None = None,
        *,
        name: str | None = None,
        on_allocation: Callable[[Allocation], None] | None = None,
    ) -> None:
        adaptation = adapter_in_training(TorchBackend(), model, "BudgetController", name)
        self.config = schedule_of(adaptation, config, "BudgetController")
        self._optimizer = bare_optimizer(optimizer)
        self._adapters = adapters_of(model, adaptation.name)
        self.plan = plan_budget(adaptation.layers, self.config)
        # Adapters in the order of the plan, which is sorted by path and may not be the order of the model.
        self._adapters = {path: self._adapters[path] for path in self.plan.paths}
        # Keep the Parameters that the optimiser knows: FSDP2 puts others in their places at times.
        self._trained = {path: (adapter.B, adapter.C) for path, adapter in self._adapters.items()}
        _check_held(self._optimizer, self._adapters)
        for thing, what in (
            (self._optimizer, "the optimiser"),
            (next(iter(self._adapters.values())), "the model"),
        ):
            if _controller_of(thing) is not None:
                raise StateError(
                    f"BudgetController: {what} has a controller already; call remove() on that one first"
                )
        _check_may_return(self.config, self._adapters)
        self._reductions = _Reductions(self)
        self._on_allocation = on_allocation
        self._frozen = FrozenElements(list(self._adapters.values()))
        weights = self._joined(local(p.detach()) for p in self._parameters)
        state = initial_budget_state(self.plan, weights)
        # Step, flag and masks are kept on the host, where reading them does not wait for a device.
        state = state._replace(step=0, waiting=False, active=state.active.cpu())
        self._observed: BudgetState | None = None
        self._progress = _Progress(self.plan, state)
        self._loads = sum(adapter.loads for adapter in self._adapters.values())
        # Nothing below can fail, so either all adapters and the optimiser get the controller or none does.
        for adapter in self._adapters.values():
            adapter.revive, adapter.followed, adapter.controlled = self.config.revive, True, True
            _CONTROLLED[adapter] = weakref.ref(self)
        _CONTROLLED[self._optimizer] = weakref.ref(self)
        self._handles = (
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        )
        self._at_end = weakref.finalize(self, _ended, self._progress, self._frozen)

    # ---- what a user reads ----------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of completed optimiser steps, not counting those that were skipped."""
        return int(self._state.step)

    @property
    def budget(self) -> int:
        """Budget of the schedule at the present step, in its unit. The masks follow it at the next allocation."""
        budget: int = self.plan.budget_at(self.step)
        return budget

    @property
    def active_count(self) -> int:
        """Number of subspaces that are trained."""
        return self._progress.active

    @property
    def parameters(self) -> int:
        """Trained parameters ``sum r_k (n_k + R_k)`` of the subspaces that are trained."""
        active = self._state.active.tolist()
        return sum(cost for cost, kept in zip(self.plan.costs, active, strict=True) if kept)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks of the subspaces that are trained, (K,) booleans on the CPU, by module path."""
        return {path: adapter.active.cpu().clone() for path, adapter in self._adapters.items()}

    @property
    def reached(self) -> bool:
        """Whether the last allocation of the schedule has been made."""
        return self._progress.reached

    # ---- the step of the optimiser ----------------------------------------------------------------------

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._look_for_loaded_masks()
        self._observed = None
        if not self._scoring or not self._in_training:
            return None
        this, *given = args  # the optimiser itself comes first
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            # A fused optimiser unscales gradients in its own kernel, so they are still scaled here.
            self._observe(getattr(optimizer, "grad_scale", None))
            return None

        def observed() -> Any:
            loss = closure()
            # Gradients are read before the step, since some optimisers overwrite them.
            if self._observed is None:
                self._observe(None)
            return loss

        return ((this, observed), kwargs) if given else (args, {**kwargs, "closure": observed})

    @torch.no_grad()
    def _observe(self, scale: Tensor | None) -> None:
        parameters = self._parameters
        weights = self._joined(local(p.detach()) for p in parameters)
        gradients = self._joined(
            torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad) for p in parameters
        )
        if scale is not None:
            gradients = gradients / scale.to(gradients.device)
        self._observed = observe(self.plan, self._state, weights, gradients, self._reductions)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            self._observed = None
            return
        if self._any_frozen:
            self._frozen.restore()
        if not self._in_training:
            return
        reductions = self._reductions
        reductions.row = reductions.mask = None
        self._state = self._observed or self._state
        self._observed = None
        self._state = advance(self.plan, self._state, reductions)
        if reductions.row is not None or self._state.left_out.device.type == "cpu":
            self._warn_of_left_out()
        if reductions.mask is not None and reductions.row is not None:
            self._allocated(reductions.row, reductions.mask)

    def _look_for_loaded_masks(self) -> None:
        """Adopt the masks of a state that was loaded into the model, and warn if they differ."""
        loads = sum(adapter.loads for adapter in self._adapters.values())
        if loads == self._loads:
            return
        self._loads = loads
        before = self._state.active
        self._state = self._state._replace(active=self._masks_of_model())
        self._frozen.look(afresh=True)
        if not torch.equal(before, self._state.active):
            warnings.warn(
                f"budget: a state was loaded into the model, with other masks ({self.active_count} subspaces are "
                f"trained, {int(before.sum())} before); load the controller's own state too, or it goes on from step "
                f"{self.step}",
                AdamssWarning,
                stacklevel=4,
            )

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self._trained.values() for parameter in pair]

    @property
    def _state(self) -> BudgetState:
        return self._progress.state

    @_state.setter
    def _state(self, state: BudgetState) -> None:
        self._progress.state = state

    @property
    def _scoring(self) -> bool:
        return bool(self._state.waiting) or self.step < self.config.end_step

    @property
    def _in_training(self) -> bool:
        """Whether this adapter is trained now, rather than another one of the model."""
        return self._parameters[0].requires_grad

    @property
    def _any_frozen(self) -> bool:
        return self.active_count < len(self.plan.costs)

    def _masks_of_model(self) -> Tensor:
        """Return the masks of the adapters, (T,) on the CPU."""
        row: Tensor = self.plan.join({path: a.active.cpu() for path, a in self._adapters.items()})
        return row

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """Join tensors that belong to the B and C of this process into one vector, in float32 or wider."""
        first = local(self._parameters[0])
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self._parameters) else torch.float32
        return torch.cat([part.detach().reshape(-1).to(first.device, wide) for part in parts])

    def _split(self, vector: Tensor) -> list[Tensor]:
        """Undo `_joined`: return one tensor for each Parameter, in the shape of its part on this process."""
        shapes = [local(p.detach()).shape for p in self._parameters]
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _warn_of_left_out(self) -> None:
        if not self._progress.told_of_left_out and bool(self._state.left_out):
            self._progress.told_of_left_out = True
            warnings.warn(
                f"budget: a gradient held NaN or infinity at step {self.step} or shortly before; such steps are left "
                "out of the importance averages, and this is said once",
                AdamssWarning,
                stacklevel=4,
            )

    # ---- allocation -------------------------------------------------------------------------------------

    def _allocated(self, row: Tensor, mask: Tensor) -> None:
        """Put a decision into force, and report it to `on_allocation`."""
        masks = self.plan.split(mask)
        for path, adapter in self._adapters.items():
            adapter.active.copy_(masks[path])
        self._frozen.look()
        self._progress.reached = self.step >= self.config.end_step
        if self._on_allocation is not None:
            self._on_allocation(
                Allocation(
                    self.step, self.budget, self.active_count, self.parameters, self.plan.split(row), masks
                )
            )

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Return the score of every subspace, (T,) float32 on the CPU, in the order of `plan`.

        Scores cover the steps since the last allocation, or all steps with a running window. Where the model is
        sharded over processes, all of them must call this method. A subclass may score by something else; subspaces
        that are worth keeping must have scores above zero.
        """
        parts = iter(self._split(self._state.sensitivity * self._state.uncertainty))
        wholes = {
            path: tuple(_in_whole(next(parts), parameter) for parameter in pair)
            for path, pair in self._trained.items()
        }
        elements = self.plan.join_elements({path: (B.t(), C) for path, (B, C) in wholes.items()})
        return sum_over_shards(self.plan.scores(elements), self._parameters[0]).float().cpu()

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs in addition to the states of the model and the optimiser.

        The state consists of tensors and plain values. Averages have the shapes of their Parameters, and are sharded
        over processes as these are.
        """
        halves = zip(self._split(self._state.sensitivity), self._split(self._state.uncertainty), strict=True)
        pairs = iter(
            [
                {"sensitivity": rebuilt(s.clone(), p), "uncertainty": rebuilt(u.clone(), p)}
                for p, (s, u) in zip(self._parameters, halves, strict=True)
            ]
        )
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "waiting": bool(self._state.waiting),
            "reached": self._progress.reached,
            "left_out": int(self._state.left_out),
            "layers": {
                path: {
                    "active": adapter.active.clone(),
                    "identity": _identity(adapter),
                    "B": next(pairs),
                    "C": next(pairs),
                }
                for path, adapter in self._adapters.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned: step, averages and masks.

        The optimiser's own state may be loaded before or after. The controller keeps its own schedule; a warning
        names the settings that differ from those with which the state was made.

        Raises
        ------
        StateError
            If the state is of another model, of the compacted form that is no longer supported, or not a state of a
            controller. Nothing is changed then.
        """
        layers = _checked_state(state, self._adapters)
        differing = [
            name for name, value in self.config.to_dict().items() if state["config"].get(name, value) != value
        ]
        if differing:
            warnings.warn(
                f"budget: the state was made with another schedule; this controller goes on with its own "
                f"{', '.join(f'{name} = {getattr(self.config, name)}' for name in differing)}",
                AdamssWarning,
                stacklevel=2,
            )
        for path, layer in layers.items():
            self._adapters[path].active.copy_(layer["active"])
        pairs = [layers[path][name] for path in self._adapters for name in "BC"]
        averages = {
            kind: self._joined(
                part_like(pair[kind], p) for pair, p in zip(pairs, self._parameters, strict=True)
            )
            for kind in ("sensitivity", "uncertainty")
        }
        self._state = BudgetState(
            step=int(state["step"]),
            waiting=bool(state["waiting"]),
            left_out=torch.full_like(self._state.left_out, int(state["left_out"])),
            active=self._masks_of_model(),
            **averages,
        )
        self._progress.reached = bool(state["reached"])
        self._progress.told_of_left_out = bool(state["left_out"])
        self._frozen.look()

    def __reduce__(self) -> Any:
        raise StateError(
            "BudgetController: a copy would not be on the hooks of its optimiser; make a new controller, and give it "
            "state_dict() of this one"
        )

    def remove(self) -> None:
        """Remove the hooks, and warn if the target was not reached. Frozen subspaces still get no gradients."""
        for handle in self._handles:
            handle.remove()
        for thing in (self._optimizer, *self._adapters.values()):
            _CONTROLLED.pop(thing, None)
        self._at_end()


def _ended(progress: _Progress, frozen: FrozenElements) -> None:
    """Release frozen elements and report the progress when a controller is removed or garbage-collected."""
    # A controller may be collected while a compiler is tracing with fake tensors.
    with _disable_current_modes():
        moved = frozen.moved()
        frozen.release()
    for adapter in frozen.adapters:
        adapter.revive = adapter.controlled = False
        adapter.followed = adapter.followed and bool(progress.state.step)
    progress.tell(moved=moved)


# ---- scores ----------------------------------------------------------------------------------------------


def _in_whole(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return an array of the shape of the whole Parameter that holds this process's part and zeros elsewhere."""
    if not is_sharded(parameter):
        return part
    places = torch.arange(parameter.numel(), device=part.device).view(parameter.shape)
    mine = shard_like(places, parameter).reshape(-1).to(part.device)
    return part.new_zeros(parameter.numel()).index_copy(0, mine, part.reshape(-1)).view(parameter.shape)


# ---- checks ----------------------------------------------------------------------------------------------


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimiser whose step is called, without the wrappers around it.

    Raises
    ------
    ConfigTypeError
        If it is not a `torch.optim.Optimizer`, or one whose gradients cannot be scored.
    """
    seen = optimizer
    while True:
        if type(seen).__module__.partition(".")[0] == "deepspeed":
            raise ConfigTypeError(
                "BudgetController: DeepSpeed's optimisers keep flat copies of the parameters, in which B and C "
                "cannot be told apart; train with DistributedDataParallel or fully_shard instead"
            )
        inner = getattr(seen, "optimizer", None)
        if inner is None or inner is seen:
            break
        seen = inner
    if isinstance(seen, torch.optim.LBFGS):
        raise ConfigTypeError(
            "BudgetController: LBFGS evaluates many gradients in one step, so that there is none to score by; "
            "choose a first-order optimiser"
        )
    if getattr(seen, "_overlap_with_ddp", False):
        raise ConfigTypeError(
            "BudgetController: ZeroRedundancyOptimizer(overlap_with_ddp=True) steps within the backward, where there "
            "are no hooks; leave overlap_with_ddp out"
        )
    if not isinstance(seen, torch.optim.Optimizer):
        raise ConfigTypeError(
            f"BudgetController: optimizer must be a torch.optim.Optimizer, found {type(optimizer).__name__}"
        )
    return seen


def _check_held(optimizer: torch.optim.Optimizer, adapters: Mapping[str, Adapter]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        f"{path}.{name}"
        for path, adapter in adapters.items()
        for name in "BC"
        if id(getattr(adapter, name)) not in held
    ]
    if missing:
        what = "none" if len(missing) == 2 * len(adapters) else f"not {', '.join(missing[:3])}"
        more = f" and {len(missing) - 3} more" if 3 < len(missing) < 2 * len(adapters) else ""
        raise ConfigError(
            f"BudgetController: of the B and C of the model, the optimiser holds {what}{more}; make it from "
            "adamss.trainable_parameters(model), after the model was wrapped or moved, with all of them in one "
            "optimiser (several groups are fine)"
        )


def _controller_of(thing: Any) -> BudgetController | None:
    reference = _CONTROLLED.get(thing)
    return None if reference is None else reference()


def wrappers_of(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Return the DistributedDataParallel around these Parameters, one entry for each Parameter that is within one."""
    wanted = {id(parameter) for parameter in parameters}
    if not wanted or not dist.is_available() or not dist.is_initialized():
        return []
    kinds = _with_subclasses(nn.parallel.DistributedDataParallel)
    # A Parameter has no reference to its wrapper, so all live objects are searched. They are compared by type(),
    # since isinstance() looks up attributes of objects that may be lazy.
    every = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return [each for each in every for p in each.parameters() if id(p) in wanted]


def _with_subclasses(kind: type[Any]) -> set[type[Any]]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def _synchronised_over(adapters: Mapping[str, Adapter]) -> dist.ProcessGroup | None:
    """Return the group over which DistributedDataParallel synchronises the adapters; None if it does not.

    Raises
    ------
    StateError
        If the processes have different bases, subspaces or masks, since DistributedDataParallel does not synchronise
        these.
    """
    wrappers = wrappers_of(p for a in adapters.values() for p in (a.B, a.C))
    if not wrappers:
        return None
    sent = {id(buffer) for buffer in getattr(wrappers[0], "modules_buffers", ())}
    bases = [adapter.A for adapter in adapters.values() if id(adapter.A) in sent]
    if bases and wrappers[0].broadcast_buffers:
        warnings.warn(
            "DistributedDataParallel sends the frozen bases of the adapters with every forward "
            f"({sum(A.numel() for A in bases):,} numbers), because only a part of the module that it wraps was "
            "adapted; pass broadcast_buffers=False to it, or adapt the whole module",
            AdamssWarning,
            stacklevel=3,
        )
    fixed = [getattr(adapter, name) for adapter in adapters.values() for name in ("A", *STRUCTURE)]
    group: dist.ProcessGroup = wrappers[0].process_group
    if not same_everywhere(fixed, group):
        raise StateError(
            "BudgetController: the processes that train this model have adapters with different bases, subspaces or "
            "masks; load the same base weights on all before adamss.attach (or the same file), then wrap the model"
        )
    return group


def _checked_state(state: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> Mapping[str, Any]:
    try:
        layers: dict[str, Any] = state["layers"]
        names = set(layers)
        _ = int(state["step"]), bool(state["waiting"]), bool(state["reached"]), int(state["left_out"])
        _ = dict(state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError("BudgetController: this is no state of a controller (see state_dict)") from error
    if names != set(adapters):
        different = sorted(names ^ set(adapters))
        raise StateError(
            f"BudgetController: the state is of another model: it differs in {', '.join(different[:3])}"
            f"{f' and {len(different) - 3} more' if len(different) > 3 else ''}"
        )
    for path, adapter in adapters.items():
        _check_layer_state(path, layers[path], adapter)
    return layers


def _check_may_return(config: BudgetConfig, adapters: Mapping[str, Adapter]) -> None:
    for path, adapter in adapters.items():
        if config.revive and adapter.held is not None:
            raise StateError(
                f"BudgetController: revive=True, but frozen subspaces of {path} were consolidated and cannot return; "
                "start from a model that was not, or leave revive out"
            )


def _identity(adapter: Adapter) -> list[float]:
    return list(identity(adapter.A.float().numpy(force=True), adapter.labels.numpy(force=True)))


def _check_layer_state(path: str, layer: Any, adapter: Adapter) -> None:
    try:
        active = layer["active"]
        if layer.get("owned") is not None:
            raise StateError(
                f"BudgetController: in the state, {path} had been shrunk by compact(), a form that is gone; write "
                "the model with adamss.save(training=True) in the version that the state comes from, load that file, "
                "and begin a schedule anew"
            )
        fits = active.shape == adapter.active.shape and same_subspaces(layer["identity"], _identity(adapter))
        if fits and adapter.held is not None and bool((active.cpu() & adapter.held).any()):
            raise StateError(
                f"BudgetController: {path} has subspaces consolidated into its weight that are trained in the state; "
                "load it into a model that was not consolidated"
            )
        fits = fits and all(
            layer[name][kind].shape == getattr(adapter, name).shape
            for name in "BC"
            for kind in ("sensitivity", "uncertainty")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError("BudgetController: this is no state of a controller (see state_dict)") from error
    if not fits:
        raise StateError(f"BudgetController: the state is of another model: {path} has other subspaces there")
