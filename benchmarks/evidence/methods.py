"""The compared methods: AdaMSS and the methods of PEFT, each with a grid of learning rates.

All of them adapt the query and value projections of the upper layers and train the same head. Settings that are not
given here are the defaults of PEFT 0.21. Ranks are chosen so that DoRA, LoRA-Pro, MiSS (r = 16) and GraLoRA have as
many trained parameters as LoRA with r = 8. LoRA-FA trains only B, so it has half as many. VeRA (r = 256, d = 0.1),
FourierFT (1000 frequencies, scaling 150) and RandLoRA (r = 32, alpha 640) have PEFT's defaults.

`NOT_COMPARED` lists the methods of the paper's tables that are missing here, with the reasons.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from demo.sentences import HEAD
from torch import Tensor, nn

import adamss
import adamss_torch
from adamss import BudgetConfig
from evidence.tasks import Top

HEAD_RATES = (1e-2, 3e-2)
"""Learning rates of the head that are searched, for every method that also trains an adapter.

The search of the adapter's rate uses the first of them.
"""

AfterStep = Callable[[int], None]
"""Called after each step of the optimiser with the number of completed steps, before gradients are cleared."""


def is_head(name: str) -> bool:
    """Return whether a parameter belongs to the head."""
    return HEAD in name.split(".")


def live(model: nn.Module) -> int:
    """Return the number of trained parameters, without those of the head."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of one run.

    Attributes
    ----------
    adapter : float
        Rate of all trained parameters outside the head.
    head : float
        Rate of the head.
    """

    adapter: float
    head: float = HEAD_RATES[0]


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model in training.

    Attributes
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer
    live : callable
        ``() -> int``: the number of parameters that are trained at present, without those of the head.
    penalty : callable or None
        ``() -> Tensor``: the term that the method adds to the loss.
    after_step : callable or None
        See `AfterStep`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    live: Callable[[], int]
    penalty: Callable[[], Tensor] | None = None
    after_step: AfterStep | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to fine-tune.

    Attributes
    ----------
    name : str
    group : str
        ``"first"`` or ``"then"``: the order in which the methods are run.
    rates : tuple of float
        Learning rates of the adapter to search, ascending.
    """

    name: str
    group: str = "first"
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)

    @property
    def head_rates(self) -> tuple[float, ...]:
        """Learning rates of the head to search."""
        return HEAD_RATES

    def settings(self) -> dict[str, Any]:
        """Return the settings of the method as plain values, for the key of a run in the journal.

        Together with task, rates, seed and steps they determine a run.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("name", "group", "rates"):
            del own[name]
        own = {key: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for key, v in own.items()}
        return {"family": type(self).__name__, **own}

    @abstractmethod
    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt a model and make its optimiser.

        Parameters
        ----------
        top : Top
            Model to adapt; it is changed in place.
        targets : tuple of str
            Names of the layers to adapt.
        rates : Rates
            Learning rates.
        seed : int
            Seed of the method's own random draws. PyTorch's global generator is seeded already.
        steps : int
            Number of steps that the run takes.
        """


def adamw(model: nn.Module, rates: Rates, **others: float) -> torch.optim.AdamW:
    """Return AdamW without weight decay for the trained parameters.

    Parameters
    ----------
    model : nn.Module
    rates : Rates
    **others : float
        Other learning rates for some parameters, by the last component of the parameter's name.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = rates.head if is_head(name) else others.get(name.rpartition(".")[2], rates.adapter)
            groups.setdefault(own, []).append(parameter)
    return torch.optim.AdamW([{"params": p, "lr": r} for r, p in groups.items()], weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """Train only the head."""

    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)

    @property
    def head_rates(self) -> tuple[float, ...]:
        """One placeholder, because `rates` are already the rates of the head."""
        return HEAD_RATES[:1]

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Freeze the layers, and give the head the rate that is searched (`rates.adapter`)."""
        top.layers.requires_grad_(False)
        own = Rates(adapter=rates.adapter, head=rates.adapter)
        return Session(model=top, optimizer=adamw(top, own), live=partial(live, top))


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train all weights of the upper layers and the head."""

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Train every weight."""
        top.requires_grad_(True)
        return Session(model=top, optimizer=adamw(top, rates), live=partial(live, top))


# --- AdaMSS -----------------------------------------------------------------------------------------------


class ByScore(adamss_torch.BudgetController):
    """A budget controller that keeps the subspaces with the highest scores, as AdaMSS does.

    Parameters
    ----------
    model, optimizer, config, on_allocation
        As for `adamss_torch.BudgetController`.
    seed : int
        Seed for subclasses that choose at random.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: BudgetConfig,
        *,
        seed: int = 0,
        on_allocation: Callable[[adamss_torch.Allocation], None] | None = None,
    ):
        super().__init__(model, optimizer, config, on_allocation=on_allocation)
        self.model, self.seed = model, seed


class AtRandom(ByScore):
    """A budget controller that keeps random subspaces."""

    def scores(self) -> Tensor:
        """Return positive random scores, which differ between runs and between allocations."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        return torch.rand(len(self.plan.costs), generator=generator) + 0.1


class BySmallestScore(ByScore):
    """A budget controller that keeps the subspaces with the lowest scores."""

    def scores(self) -> Tensor:
        """Return the reciprocal of the score."""
        return 1 / (super().scores() + 1e-30)


class ByNorm(ByScore):
    """A budget controller that keeps the subspaces with the largest trained factors."""

    def scores(self) -> Tensor:
        """Return, for each subspace, the sum of the l1 norms of B_k and C_k."""
        layers = adamss.backend.get_backend("torch").bank(self.model).only().layers
        norms = []
        for path in self.plan.paths:
            factors = layers[path]
            owners = torch.repeat_interleave(torch.arange(len(factors.ranks)), factors.ranks)
            columns = factors.B.detach().abs().sum(0)[: len(owners)]  # the other columns are padding
            norm = torch.zeros(len(factors.ranks)).index_add(0, owners, columns)
            norms.append(norm.index_add(0, factors.labels.long(), factors.C.detach().abs().sum(0)))
        return torch.cat(norms)


SELECTIONS = {"score": ByScore, "random": AtRandom, "smallest": BySmallestScore, "l1 norm": ByNorm}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget relative to the model and the training, and the rule that selects the subspaces to keep.

    Attributes
    ----------
    share : float
        Share of the model's subspaces, or of their parameters, that is still trained at the end.
    unit : str
        Unit of the budget: ``"subspaces"`` or ``"parameters"``.
    start, end, interval : float
        Start and end of the reduction, and distance between two allocations, as shares of the steps.
    power : float
        Exponent of the schedule.
    window : str
        Whether an allocation resets the averages of the score: ``"reset"`` or ``"running"``.
    selection : str
        Key of `SELECTIONS`.
    """

    share: float = 1 / 3
    unit: str = "subspaces"
    start: float = 0.1
    end: float = 0.5
    interval: float = 0.05
    power: float = 3.0
    window: str = "reset"
    selection: str = "score"

    def config(self, subspaces: int, parameters: int, steps: int) -> BudgetConfig:
        """Return the schedule for a model with these numbers of subspaces and of parameters in their factors."""
        start = round(self.start * steps)
        total = parameters if self.unit == "parameters" else subspaces
        return BudgetConfig(
            target=max(1, round(self.share * total)),
            unit=self.unit,  # type: ignore[arg-type]
            start_step=start,
            end_step=max(start + 1, round(self.end * steps)),
            interval=max(1, round(self.interval * steps)),
            power=self.power,
            window=self.window,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class Adamss(Method):
    """AdaMSS as implemented in this repository.

    Attributes
    ----------
    options : dict
        Arguments of `adamss.AdamssConfig`. A `seed` of None is replaced by the seed of the run.
    budget : Budget or None
    random_B : bool
        Whether B_k starts with random orthonormal columns, as a control for those computed from the weight.
    rate_ratio : float
        Learning rate of B over that of C. The search is over the rate of C.
    """

    options: dict[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    random_B: bool = False
    rate_ratio: float = 1.0

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Attach the adapter, and a budget controller if the method has a budget."""
        options = {
            name: seed if (name, value) == ("seed", None) else value for name, value in self.options.items()
        }
        config = adamss.AdamssConfig(targets=targets, modules_to_save=[HEAD], **options)
        model = adamss.attach(top, config)
        if self.random_B:
            randomise_B(model, seed)
        optimizer = adamw(model, rates, B=rates.adapter * self.rate_ratio)
        # The sizes of the Parameters would count padding: C is padded if a subspace has fewer columns than
        # subspace_rank.
        layers = adamss.backend.get_backend("torch").bank(model).only().layers.values()
        counts = [sum(adamss.core.count_factors(factors) for factors in layers)]
        if self.budget is None:
            return Session(model=model, optimizer=optimizer, live=lambda: counts[-1])
        SELECTIONS[self.budget.selection](  # hooks of the optimiser keep the controller alive
            model,
            optimizer,
            self.budget.config(adamss.summary(model).total.K, counts[0], steps),
            seed=seed,
            on_allocation=lambda allocation: counts.append(allocation.parameters),
        )
        return Session(model=model, optimizer=optimizer, live=lambda: counts[-1])


@torch.no_grad()
def randomise_B(model: nn.Module, seed: int) -> None:
    """Replace every B_k by random orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    for path, factors in adamss.backend.get_backend("torch").bank(model).only().layers.items():
        B = model.get_submodule(f"{path}.adamss.default").B  # its rows are the columns of B_1, B_2, ...
        if factors.A.shape[0] != 1:
            raise ValueError("a random B is for the shared basis: in another, a part of B is padding")
        first = 0
        for rank in factors.ranks.tolist():
            Q, _ = torch.linalg.qr(torch.randn(B.shape[1], rank, generator=generator))
            B[first : first + rank] = Q.T
            first += rank


# --- PEFT -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Peft(Method):
    """A method of PEFT.

    Attributes
    ----------
    config : str
        Name of PEFT's config class.
    options : dict
        Arguments of the config class.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt the model by PEFT, and make its AdamW."""
        return self.session(self.adapted(top, targets, **self.options), rates)

    def adapted(self, top: Top, targets: tuple[str, ...], **options: Any) -> nn.Module:
        """Return the model as adapted by PEFT."""
        import peft

        config = getattr(peft, self.config)(target_modules=list(targets), modules_to_save=[HEAD], **options)
        with warnings.catch_warnings():  # PEFT reads attributes that transformers 5 has deprecated
            warnings.simplefilter("ignore")
            return peft.get_peft_model(top, config)

    def session(self, model: nn.Module, rates: Rates, **hooks: Any) -> Session:
        """Return a session of this model with AdamW."""
        return Session(model=model, optimizer=adamw(model, rates), live=partial(live, model), **hooks)


@dataclass(frozen=True, kw_only=True)
class AdaLora(Peft):
    """AdaLoRA, whose mean rank falls from 12 to 8 between the same steps as our budget.

    PEFT adds AdaLoRA's penalty to the loss that a model returns. Our models return logits, so this class passes the
    penalty to the session.
    """

    config: str = "AdaLoraConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt the model, and let AdaLoRA allocate its ranks after each step."""
        schedule = {
            "total_step": steps,
            "tinit": round(0.1 * steps),
            "tfinal": steps - round(0.5 * steps),
            "deltaT": max(1, round(0.05 * steps)),
        }
        model = self.adapted(top, targets, **schedule, **self.options)
        factors = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
        weight = model.peft_config["default"].orth_reg_weight

        def penalty() -> Tensor:
            grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
            return weight * torch.stack([torch.linalg.norm(G - torch.eye(len(G))) for G in grams]).mean()

        whole = live(model)
        pattern = model.peft_config["default"]
        elements = {name: p for name, p in model.named_parameters() if "lora_E" in name}

        def left() -> int:
            """Return the parameters of the ranks that are left: AdaLoRA sets the others to zero for good."""
            if not pattern.rank_pattern:
                return whole
            kept = sum(sum(map(bool, kept)) for kept in pattern.rank_pattern.values())
            return round(whole * kept / sum(p.numel() for p in elements.values()))

        session = self.session(model, rates, penalty=penalty, after_step=model.base_model.update_and_allocate)
        return dataclasses.replace(session, live=left)


@dataclass(frozen=True, kw_only=True)
class PeftAdamss(Peft):
    """PEFT's AdaMSS with its adaptive allocation, over the same steps and to the same third as our budget."""

    config: str = "AdamssConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt the model, and let PEFT allocate the subspaces after each step."""
        layers = sum(
            isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets for n, m in top.named_modules()
        )
        schedule = {
            "use_asa": True,
            "asa_target_subspaces": round(layers * self.options["num_subspaces"] / 3),
            "init_warmup": round(0.1 * steps),
            "final_warmup": round(0.5 * steps),
            "mask_interval": max(1, round(0.05 * steps)),
        }
        model = self.adapted(top, targets, **schedule, **self.options)
        return self.session(model, rates, after_step=model.base_model.update_and_allocate)


@dataclass(frozen=True, kw_only=True)
class LoraFa(Peft):
    """LoRA-FA, which freezes A; an optimiser of PEFT corrects the gradient of B."""

    config: str = "LoraConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt the model, and make that optimiser with a separate group for the head."""
        from peft.optimizers import create_lorafa_optimizer

        model = self.adapted(top, targets, **self.options)
        optimizer = create_lorafa_optimizer(
            model, r=self.options["r"], lora_alpha=self.options["lora_alpha"], lr=rates.adapter
        )
        (group,) = optimizer.param_groups
        names = group["names"]
        kept = [i for i, name in enumerate(names) if not is_head(name)]
        rest = [i for i, name in enumerate(names) if is_head(name)]
        columns = ("params", "names", "scaling_factors")
        head = {**group, "lr": rates.head, **{key: [group[key][i] for i in rest] for key in columns}}
        group.update({key: [group[key][i] for i in kept] for key in columns})
        optimizer.add_param_group(head)
        return Session(model=model, optimizer=optimizer, live=partial(live, model))


@dataclass(frozen=True, kw_only=True)
class LoraPro(Peft):
    """LoRA-Pro, in which the optimiser of the package ``lora-pro-adamw`` corrects the gradients of both factors."""

    config: str = "LoraConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt the model, and make that optimiser."""
        try:
            from lora_pro import LoRAProAdamW
        except ModuleNotFoundError as error:
            raise SystemExit("lora_pro is missing: pip install --no-deps lora-pro-adamw==0.2.1") from error

        model = self.adapted(top, targets, **self.options)
        optimizer = LoRAProAdamW(model, lr=rates.adapter, weight_decay=0.0)
        head, _ = optimizer.param_groups
        head["lr"] = rates.head
        return Session(model=model, optimizer=optimizer, live=partial(live, model))


# --- The list ---------------------------------------------------------------------------------------------


ALGORITHMS = {
    "subspaces": "estimate",
    "segmentation": "ncut",
    "basis": "per_subspace",
    "initial_B": "qr",
}
"""Settings of `adamss.AdamssConfig.paper`, which follow Algorithms 1 and 2 of the paper."""


def ours(name: str, budget: Budget | None = None, **options: Any) -> Adamss:
    """Return AdaMSS with R = 100 and the given settings."""
    return Adamss(name=name, options={"rank": 100, **options}, budget=budget)


def lora(name: str, r: int, **options: Any) -> Peft:
    """Return LoRA with alpha = 2 r."""
    return Peft(name=name, config="LoraConfig", options={"r": r, "lora_alpha": 2 * r, **options})


def _all_methods() -> list[Method]:
    shapes = {
        "K=3 r=1": {"subspaces": 3, "subspace_rank": 1},
        "K=10 r=1": {"subspaces": 10, "subspace_rank": 1},
        "K=32 r=1": {"subspaces": 32, "subspace_rank": 1},
        "K=10 r=3": {"subspaces": 10, "subspace_rank": 3},
    }
    low = (3e-4, 1e-3, 3e-3, 1e-2)
    peft_shape = {"r": 100, "num_subspaces": 10, "subspace_rank": 1}
    then = {"group": "then"}
    eight = {"r": 8, "lora_alpha": 16}
    return [
        Head(name="head alone"),
        Full(name="full"),
        lora("LoRA r=1", 1),
        lora("LoRA r=2", 2),
        lora("LoRA r=8", 8),
        AdaLora(name="AdaLoRA", options={"init_r": 12, "target_r": 8, "lora_alpha": 16}),
        Peft(
            name="PiSSA r=8",
            config="LoraConfig",
            options={"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"},
            rates=low,
        ),
        Peft(name="PEFT AdaMSS K=10 r=1", config="AdamssConfig", options=peft_shape),
        PeftAdamss(name="PEFT AdaMSS K=10 r=1, budget", options=peft_shape),
        *(ours(f"AdaMSS {name}", **options) for name, options in shapes.items()),
        *(ours(f"AdaMSS {name}, budget", Budget(), **options) for name, options in shapes.items()),
        dataclasses.replace(ours("AdaMSS, the paper's algorithms", subspace_rank=1, **ALGORITHMS), **then),
        Peft(name="DoRA r=8", config="LoraConfig", options={**eight, "use_dora": True}, **then),
        Peft(name="VeRA", config="VeraConfig", rates=(3e-3, 1e-2, 3e-2, 1e-1), **then),
        Peft(name="FourierFT", config="FourierFTConfig", rates=(1e-2, 3e-2, 1e-1, 3e-1), **then),
        LoraFa(name="LoRA-FA r=8", options=eight, **then),
        LoraPro(name="LoRA-Pro r=8", options=eight, **then),
        Peft(name="RandLoRA", config="RandLoraConfig", rates=low, **then),
        Peft(name="MiSS r=16", config="MissConfig", options={"r": 16}, rates=low, **then),
        Peft(name="GraLoRA r=8", config="GraloraConfig", options={"r": 8, "alpha": 16}, **then),
    ]


METHODS = {method.name: method for method in _all_methods()}

NOT_COMPARED = {
    "DyLoRA": "for which PyPI has no package",
    "LoRETTA": "whose package loretta 0.1.0 adapts only models that have a Hugging Face config",
    "WeGeFT": "for which PyPI has no package",
}
"""Methods of the paper's tables that are missing here, with the reasons as the end of a sentence."""
