"""Training with the Trainer of Hugging Face `transformers`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adamss
from adamss import plots
from adamss.backend import Adaptation
from adamss.backend.ledger import base_weight, sites_of
from adamss.backend.training import adapter_of
from adamss.config import BudgetConfig
from adamss.core.fingerprint import FINGERPRINT_TOLERANCE, Fingerprint, fingerprint
from adamss.errors import AdamssWarning, ConfigError, ConfigTypeError, MissingBackendError, StateError
from adamss_torch.adapter import Adapter
from adamss_torch.backend import TorchBackend, adapters_of, record_of
from adamss_torch.bank import CHILD, OnLoan, without_weights
from adamss_torch.budget import Allocation, BudgetController, bare_optimizer
from adamss_torch.sharding import is_sharded

try:
    from transformers import PreTrainedModel, TrainerCallback
    from transformers.integrations.integration_utils import TensorBoardCallback
except ImportError as error:
    raise MissingBackendError(
        "adamss_torch.transformers needs Hugging Face transformers: pip install 'adamss[transformers]'"
    ) from error

__all__ = ["ADAPTER_FILE", "AdamssCallback"]

ADAPTER_FILE = "adapter.safetensors"
"""File that `adamss.load` reads, in each folder that the Trainer saves."""

TRAINER_FILE = "model.safetensors"
"""File from which the Trainer reads back what it saved. Here it holds what is trained and nothing else."""

MODULES_FILE = "modules.json"
"""File by which folders of sentence-transformers are recognised."""

CONFIG_FILE = "config.json"
"""File that makes a folder a model for `AutoModel`. Without base weights, the model would get random ones."""

KEY = "adamss"
"""Key of our state in the optimiser's state, which keeps entries that belong to no Parameter.

Our state consists of that of the controller, and of the fingerprints of the base weights.
"""


class AdamssCallback(TrainerCallback):
    """Train an adapted model with `transformers.Trainer`: the budget, its log, and small checkpoints.

    ::

        model = adamss.attach(model, AdamssConfig(..., budget=BudgetConfig(...)))
        trainer = Trainer(model, arguments, ..., callbacks=[AdamssCallback()])
        trainer.train()

    - **Budget**: the callback puts a `adamss_torch.BudgetController` on the Trainer's optimiser when `train` begins.
    - **Log**: ``adamss/active`` (the number of trained subspaces), ``adamss/parameters`` (the number of trained
      parameters) and ``adamss/budget`` are logged with the loss. The Trainer calls its own reporters (TensorBoard,
      ...) before the callbacks that it is given. Call `lead` so that these reporters see the values too, and so that
      TensorBoard gets pictures. ``state.log_history`` has every allocation, which `adamss.plots.active` draws.
    - **Files**: while the model is adapted and not merged, the Trainer's checkpoints and ``trainer.save_model`` hold
      what is trained, and not the base: ``model.safetensors``, which the Trainer reads, and ``adapter.safetensors``,
      which `adamss.load` reads. They hold no ``config.json``, because `AutoModel` could not load the folder; a
      ``config.json`` that an earlier save has left there is removed with the weights that it belonged to. (If the
      model is not a `transformers.PreTrainedModel`, the Trainer writes all weights. The base is then taken out of
      checkpoints, but not out of what ``trainer.save_model`` writes.)
    - **Resuming**: attach to the base model again and call ``trainer.train(resume_from_checkpoint=...)``. On the CPU
      this gives the same bits as a training that was not interrupted. The controller's state is in ``optimizer.pt``.
      A second ``trainer.train()`` that resumes nothing begins the schedule again with the subspaces that the first
      one has left trained: without ``revive``, frozen subspaces stay frozen.

    Evaluation, accumulated gradients, mixed precision, ``load_best_model_at_end`` and `accelerate launch` are handled
    by the Trainer and work as usual. Training with DeepSpeed raises an error. With FSDP a budget cannot be resumed.

    Parameters
    ----------
    budget
        Schedule of the budget. None means the one that the adapter was attached with; if that is None too, nothing is
        frozen.
    name
        Name of the adapter. None means the one that is trained when the training begins.
    on_allocation
        Function that is called with an `adamss_torch.Allocation` after each decision.

    Attributes
    ----------
    controller
        The `BudgetController`, once the training has begun. None without a schedule.

    Raises
    ------
    StateError
        When the Trainer is made, if its model has no adapters or is merged.
    """

    def __init__(
        self,
        budget: BudgetConfig | None = None,
        *,
        name: str | None = None,
        on_allocation: Callable[[Allocation], None] | None = None,
    ) -> None:
        if budget is not None and not isinstance(budget, BudgetConfig):
            raise ConfigTypeError(
                f"AdamssCallback: budget must be an adamss.BudgetConfig or None, found {type(budget).__name__}"
            )
        self.budget = budget
        self.name = name
        self.on_allocation = on_allocation
        self.controller: BudgetController | None = None
        self._hook: Any = None
        self._told: list[Allocation] = []
        self._counts: dict[str, int] = {}
        self._reporters: Sequence[Any] = ()
        self._sizes_due = False
        self._base: dict[str, list[Any]] = {}

    def lead(self, trainer: Any, *, pictures: bool = False) -> None:
        """Put this callback before all others of a Trainer, so that its reporters see what it adds to the log.

        Parameters
        ----------
        trainer
            That has this callback.
        pictures
            Whether TensorBoard gets `adamss.plots.sizes` when the training begins and ends, and `adamss.plots.active`
            after each allocation that changes something, which takes about a second. Nothing is drawn under
            ``report_to="none"``.

        Raises
        ------
        ConfigError
            If pictures are asked for, and the Trainer reports, but not to TensorBoard.
        MissingBackendError
            If they are asked for and matplotlib is not installed.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._reporters = callbacks if pictures and trainer.args.report_to else ()
        if not self._reporters:
            return
        if not any(isinstance(each, TensorBoardCallback) for each in callbacks):
            raise ConfigError(
                f"AdamssCallback: pictures are for TensorBoard, and report_to = {trainer.args.report_to!r}; add "
                "'tensorboard' to it (pip install tensorboard)"
            )
        if find_spec("matplotlib") is None:
            raise MissingBackendError("AdamssCallback: pictures need matplotlib: pip install 'adamss[plots]'")

    # ---- events -----------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the model save only what is trained."""
        _save_what_is_trained(kwargs["model"], self.name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put a controller on the optimiser, in the state of the checkpoint if there is one."""
        model = kwargs["model"]
        adaptation = _save_what_is_trained(model, self.name)
        self._remove()
        self._sizes_due = True
        bare = bare_optimizer(kwargs["optimizer"])
        # If a checkpoint was loaded, our state is in that of the optimiser.
        stored = bare.state.pop(KEY, None) or {}  # type: ignore[call-overload]
        if not any(is_sharded(adapter.B) for adapter in adapters_of(model, adaptation.name).values()):
            self._base = _fingerprints(model, adaptation)
            _check_base(stored.get("base", {}), self._base)
            self._hook = bare.register_state_dict_post_hook(self._add_state)
        config = adaptation.config.budget if self.budget is None else self.budget
        if config is None:
            return
        self.controller = BudgetController(
            model, bare, config, name=adaptation.name, on_allocation=self._allocated
        )
        if stored.get("controller") is not None:
            self.controller.load_state_dict(stored["controller"])
        elif state.global_step:
            warnings.warn(
                f"AdamssCallback: the checkpoint of step {state.global_step} holds no state of a budget, whose "
                "schedule begins now",
                AdamssWarning,
                stacklevel=2,
            )
        self._told, self._counts = [], _counts(self.controller.masks)
        if not any(plots.ALLOCATION in entry for entry in state.log_history):
            self._record(state, self.controller.step, self._counts, budget=config.to_dict())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the sizes of the subspaces once. When the training begins, TensorBoard is not ready yet."""
        if self._sizes_due:
            self._sizes_due = False
            self._draw("sizes", kwargs["model"], state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the allocations of the step that change something in the history."""
        told, self._told = self._told, []
        for allocation in told:
            counts = _counts(allocation.masks)
            changed = {path: count for path, count in counts.items() if count != self._counts[path]}
            if changed:
                self._counts = counts
                self._record(state, allocation.step, changed)
                self._draw("active", state.log_history, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the number of trained subspaces and the budget to the log."""
        logs = kwargs["logs"]
        if self.controller is None or "loss" not in logs:
            return
        controller = self.controller
        more = {
            "adamss/active": controller.active_count,
            "adamss/parameters": controller.parameters,
            "adamss/budget": controller.budget,
        }
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the base out of a checkpoint that the Trainer has written by itself."""
        model, folder = kwargs["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not isinstance(vars(model).get("save_pretrained"), _SavePretrained):
            _shrink(model, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the sizes once more and remove the controller, which warns if the training was too short for it."""
        self._draw("sizes", kwargs["model"], state)
        self._remove()

    # ---- pictures ---------------------------------------------------------------------------------------

    def _allocated(self, allocation: Allocation) -> None:
        self._told.append(allocation)
        if self.on_allocation is not None:
            self.on_allocation(allocation)

    def _record(self, state: Any, step: int, active: dict[str, int], **more: Any) -> None:
        """Add an allocation to the history of the Trainer, but not to its reporters, which accept only numbers."""
        entry = {plots.ALLOCATION: {"step": step, "active": active, **more}}
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **entry})

    def _draw(self, name: str, source: Any, state: Any) -> None:
        """Give a picture of `adamss.plots` to TensorBoard, if the Trainer reports to it and this process writes."""
        writers = [each.tb_writer for each in self._reporters if isinstance(each, TensorBoardCallback)]
        for writer in writers:
            if writer is not None:
                from matplotlib.figure import Figure

                # A figure of pyplot would open a window on a machine with a screen.
                figure = Figure(figsize=(8, 8), layout="constrained")
                getattr(plots, name)(source, ax=figure.add_subplot())
                writer.add_figure(f"adamss/{name}", figure, state.global_step)

    # ---- the budget -------------------------------------------------------------------------------------

    def _add_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        ours = {"base": self._base, "controller": self.controller and self.controller.state_dict()}
        return state_dict | {"state": state_dict["state"] | {KEY: ours}}

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.controller is not None:
            self.controller.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no hooks on an optimiser.
        return vars(self) | {"controller": None, "_hook": None, "_reporters": ()}


def _counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {path: int(mask.sum()) for path, mask in masks.items()}


def _fingerprints(model: nn.Module, adaptation: Adaptation) -> dict[str, list[Any]]:
    """Return the fingerprints of the base weights of the adapted layers, in plain values."""
    backend = TorchBackend()
    bank = backend.bank(model)
    with backend.exact():
        sites = sites_of(backend, model, adaptation.layers)
        marks = {path: fingerprint(base_weight(backend, site, bank).W) for path, site in sites.items()}
    return {path: [list(mark.shape), mark.norm, list(mark.projections)] for path, mark in marks.items()}


def _check_base(stored: dict[str, list[Any]], ours: dict[str, list[Any]]) -> None:
    """Check that a checkpoint was trained on these base weights.

    Raises
    ------
    StateError
        If it was trained on others; the message names a layer.
    """
    for path in stored.keys() & ours.keys():
        there, here = (Fingerprint(tuple(m[0]), m[1], tuple(m[2])) for m in (stored[path], ours[path]))
        if not there.difference(here) <= FINGERPRINT_TOLERANCE:
            raise StateError(
                f"AdamssCallback: the checkpoint was trained on other base weights than this model's, in {path}; "
                "resume on the base that the training began with"
            )


# ---- files ---------------------------------------------------------------------------------------------


def _save_what_is_trained(model: nn.Module, name: str | None) -> Adaptation:
    """Make a model save only what is trained while it is adapted and not merged, and return the adapter.

    Raises
    ------
    StateError
        If the model has no such adapter, or if the adapter is merged.
    """
    adaptation = adapter_of(TorchBackend(), model, "AdamssCallback", name)
    if isinstance(model, PreTrainedModel):
        _SavePretrained(model)
        # The Trainer compares the keys that a checkpoint lacks with these names, and warns if they differ.
        _Untrained(model)
    else:
        vars(model).setdefault("_keys_to_ignore_on_save", None)
    return adaptation


def _untrained(model: nn.Module) -> set[str]:
    """Return the names of the frozen parameters of the base; no names if the model is merged or has no adapters."""
    adapters = TorchBackend().bank(model).adapters.values()
    if not adapters or any(each.merged for each in adapters):
        return set()
    ours = {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if not p.requires_grad and id(p) not in ours}


class _Untrained(OnLoan, Set[str]):
    """Substitute for a model's `_keys_to_ignore_on_save`: the names of what is not trained when it is read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "_keys_to_ignore_on_save")
        self._model = model
        self._record = record_of(model)

    def _names(self) -> set[str]:
        names = _untrained(self._model) if record_of(self._model) is self._record else set()
        return names or {name for former in self.former for name in former or ()}

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


class _SavePretrained(OnLoan):
    """Substitute for a model's `save_pretrained` that saves what is trained.

    It saves the whole model once that is merged or no longer has these adapters. It is an object that holds the
    model, and not a closure, so that a copy of the model gets its own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "save_pretrained")
        self._model = model
        self._record = record_of(model)

    def __call__(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> Any:
        model: Any = self._model
        if record_of(model) is not self._record or not _untrained(model):
            whole = type(model).save_pretrained
            return whole(model, save_directory, is_main_process=is_main_process, **options)
        for name in ("push_to_hub", "variant"):
            if options.get(name):
                raise ConfigError(
                    f"save_pretrained: {name} is for whole models, and this model saves only its adapter; merge it "
                    "first, or upload the folder"
                )
        if is_main_process:
            state_dict = options.get("state_dict")
            _write(model, Path(save_directory), model.state_dict() if state_dict is None else state_dict)
        return None


def _write(model: nn.Module, folder: Path, state_dict: dict[str, Tensor]) -> None:
    untrained = _untrained(model)
    # Tensors are copied, because safetensors refuses two names for the same memory.
    kept = {name: tensor.detach().clone() for name, tensor in state_dict.items() if name not in untrained}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    save_file(without_weights(kept), folder / TRAINER_FILE, metadata={"format": "pt"})
    name = adapter_of(TorchBackend(), model, "AdamssCallback").name
    adamss.save(model, folder / ADAPTER_FILE, name=name)


def _shrink(model: nn.Module, folder: Path) -> None:
    """Take the base out of a checkpoint that the Trainer has written.

    Raises
    ------
    StateError
        If the Trainer is that of another library whose form of checkpoints cannot be read back into adapters.
    """
    weights = folder / TRAINER_FILE
    written = load_file(weights) if weights.is_file() else {}
    own = [name for name in model.state_dict() if f".{CHILD}." in f".{name}"]
    if (folder / MODULES_FILE).is_file() or (written and not set(own) <= set(written)):
        raise StateError(
            f"AdamssCallback: the Trainer of this {type(model).__name__} writes its checkpoints in a form of its "
            "own, and reads them back into a model without adapters: set save_strategy='no' and "
            "load_best_model_at_end=False, and call adamss.save(model, path) after the training"
        )
    if written and _untrained(model):
        _write(model, folder, written)
