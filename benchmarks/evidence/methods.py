"""The methods that are compared: AdaMSS, and what PEFT has, each with a grid of learning rates.

All of them adapt the query and value projections of the upper layers and train the same head. Settings that are not
said here are the defaults of PEFT 0.21. Ranks are chosen so that DoRA, LoRA-Pro, MiSS (r = 16) and GraLoRA have as
many trained parameters as LoRA with r = 8; LoRA-FA, which trains B alone, has half of them. VeRA (r = 256, d = 0.1),
FourierFT (1000 frequencies, scaling 150) and RandLoRA (r = 32, alpha 640) have PEFT's defaults.

`NOT_COMPARED` has the methods of the paper's tables that are missing here, and why.
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
"""Learning rates of the head that every method but the head alone may choose from; the first is where it starts."""

AfterStep = Callable[[int], None]
"""Called after each step of the optimiser with the number of completed steps, before gradients are cleared."""


def is_head(name: str) -> bool:
    """Return whether a parameter belongs to the head."""
    return HEAD in name.split(".")


def live(model: nn.Module) -> int:
    """Return how many numbers are trained, those of the head left out."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates.

    Attributes
    ----------
    adapter : float
        Of all that is trained but the head.
    head : float
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
        ``() -> int``: how many numbers are trained now, without the head.
    penalty : callable or None
        ``() -> Tensor``: what the method adds to the loss.
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
        ``"first"`` or ``"then"``: the order of work.
    rates : tuple of float
        Learning rates to search, ascending.
    """

    name: str
    group: str = "first"
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)

    @property
    def head_rates(self) -> tuple[float, ...]:
        """The learning rates of the head to search."""
        return HEAD_RATES

    def settings(self) -> dict[str, Any]:
        """Return what determines a run beside task, rates, seed and steps: plain values, for the key in a journal."""
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
            Changed in place.
        targets : tuple of str
            Names of the layers to adapt.
        rates : Rates
            Learning rates.
        seed : int
            Of what the method draws at random; PyTorch's generator is seeded already.
        steps : int
            How many steps the run takes.
        """


def adamw(model: nn.Module, rates: Rates, **others: float) -> torch.optim.AdamW:
    """Return AdamW without weight decay for what is trained.

    Parameters
    ----------
    model : nn.Module
    rates : Rates
    **others : float
        Learning rates of parameters by the last component of their name.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = rates.head if is_head(name) else others.get(name.rpartition(".")[2], rates.adapter)
            groups.setdefault(own, []).append(parameter)
    return torch.optim.AdamW([{"params": p, "lr": r} for r, p in groups.items()], weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """The head alone."""

    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)

    @property
    def head_rates(self) -> tuple[float, ...]:
        """None beside the rate that is searched already."""
        return HEAD_RATES[:1]

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Freeze the layers; the rate that is searched is the head's."""
        top.layers.requires_grad_(False)
        own = Rates(adapter=rates.adapter, head=rates.adapter)
        return Session(model=top, optimizer=adamw(top, own), live=partial(live, top))


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """All of the upper layers."""

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Train every weight."""
        top.requires_grad_(True)
        return Session(model=top, optimizer=adamw(top, rates), live=partial(live, top))


# --- AdaMSS -----------------------------------------------------------------------------------------------


class ByScore(adamss_torch.BudgetController):
    """Keeps the subspaces of the highest scores, as AdaMSS does.

    Parameters
    ----------
    model, optimizer, config, on_allocation
        As for `adamss_torch.BudgetController`.
    seed : int
        Of a choice at random.
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
    """Keeps subspaces at random."""

    def scores(self) -> Tensor:
        """Return random numbers above zero, other ones for each run and each allocation."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        return torch.rand(len(self.plan.costs), generator=generator) + 0.1


class BySmallestScore(ByScore):
    """Keeps the subspaces that the score would freeze."""

    def scores(self) -> Tensor:
        """Return the reciprocal of the score."""
        return 1 / (super().scores() + 1e-30)


class ByNorm(ByScore):
    """Keeps the subspaces whose trained factors are the largest."""

    def scores(self) -> Tensor:
        """Return the l1 norm of B_k and C_k together for each subspace."""
        layers = adamss.backend.get_backend("torch").bank(self.model).only().layers
        norms = []
        for path in self.plan.paths:
            factors = layers[path]
            owners = torch.repeat_interleave(torch.arange(len(factors.ranks)), factors.ranks)
            columns = factors.B.detach().abs().sum(0)[: len(owners)]  # what follows is padding
            norm = torch.zeros(len(factors.ranks)).index_add(0, owners, columns)
            norms.append(norm.index_add(0, factors.labels.long(), factors.C.detach().abs().sum(0)))
        return torch.cat(norms)


SELECTIONS = {"score": ByScore, "random": AtRandom, "smallest": BySmallestScore, "l1 norm": ByNorm}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much stays trained, and which subspaces.

    Attributes
    ----------
    share : float
        Of the model's subspaces, or of their parameters, that is left at the end.
    unit : str
        What is counted: ``"subspaces"`` or ``"parameters"``.
    start, end, interval : float
        When the reduction begins and ends, and how often it happens, as shares of the steps.
    power : float
        Exponent of the schedule.
    window : str
        What becomes of the averages at an allocation: ``"reset"`` or ``"running"``.
    selection : str
        A key of `SELECTIONS`.
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
        """Return the schedule for a model with so many subspaces, and parameters in their factors."""
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
    """AdaMSS of this repository, R = 100.

    Attributes
    ----------
    options : dict
        Arguments of `adamss.AdamssConfig`; a `seed` of None is the run's.
    budget : Budget or None
    random_B : bool
        Whether to start from random orthonormal columns of B_k, a control for those that the weight gives.
    rate_ratio : float
        Learning rate of B over that of C, which is the one that is searched.
    """

    options: dict[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    random_B: bool = False
    rate_ratio: float = 1.0

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Attach, and follow the budget if there is one."""
        options = {
            name: seed if (name, value) == ("seed", None) else value for name, value in self.options.items()
        }
        config = adamss.AdamssConfig(targets=targets, modules_to_save=[HEAD], **options)
        model = adamss.attach(top, config)
        if self.random_B:
            randomise_B(model, seed)
        optimizer = adamw(model, rates, B=rates.adapter * self.rate_ratio)
        # Not the elements of the Parameters: C is padded where a subspace has fewer columns than subspace_rank.
        layers = adamss.backend.get_backend("torch").bank(model).only().layers.values()
        counts = [sum(adamss.core.count_factors(factors) for factors in layers)]
        if self.budget is None:
            return Session(model=model, optimizer=optimizer, live=lambda: counts[-1])
        SELECTIONS[self.budget.selection](  # the optimiser's hooks keep it
            model,
            optimizer,
            self.budget.config(adamss.summary(model).total.K, counts[0], steps),
            seed=seed,
            on_allocation=lambda allocation: counts.append(allocation.parameters),
        )
        return Session(model=model, optimizer=optimizer, live=lambda: counts[-1])


@torch.no_grad()
def randomise_B(model: nn.Module, seed: int) -> None:
    """Give every B_k random orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    for path, factors in adamss.backend.get_backend("torch").bank(model).only().layers.items():
        B = model.get_submodule(f"{path}.adamss.default").B  # a row is a column of some B_k, in their order
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
        Name of its config class.
    options : dict
        Arguments of that class.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt by PEFT."""
        return self.session(self.adapted(top, targets, **self.options), rates)

    def adapted(self, top: Top, targets: tuple[str, ...], **options: Any) -> nn.Module:
        """Return PEFT's model."""
        import peft

        config = getattr(peft, self.config)(target_modules=list(targets), modules_to_save=[HEAD], **options)
        with (
            warnings.catch_warnings()
        ):  # of deprecated attributes of transformers, and layers too small for a rank
            warnings.simplefilter("ignore")
            return peft.get_peft_model(top, config)

    def session(self, model: nn.Module, rates: Rates, **hooks: Any) -> Session:
        """Return the session with AdamW."""
        return Session(model=model, optimizer=adamw(model, rates), live=partial(live, model), **hooks)


@dataclass(frozen=True, kw_only=True)
class AdaLora(Peft):
    """AdaLoRA: ranks go down from 12 to 8 on average, between the same steps as our budget.

    Its penalty, which PEFT adds to the loss that a model returns, is added here: our model returns logits.
    """

    config: str = "AdaLoraConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt, and allocate after each step."""
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
            """Count a rank as frozen once the allocation has set its singular value to zero for good."""
            if not pattern.rank_pattern:
                return whole
            kept = sum(sum(map(bool, kept)) for kept in pattern.rank_pattern.values())
            return round(whole * kept / sum(p.numel() for p in elements.values()))

        session = self.session(model, rates, penalty=penalty, after_step=model.base_model.update_and_allocate)
        return dataclasses.replace(session, live=left)


@dataclass(frozen=True, kw_only=True)
class PeftAdamss(Peft):
    """PEFT's AdaMSS with its adaptive allocation, between the same steps and down to the same third as ours."""

    config: str = "AdamssConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt, and allocate after each step."""
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
    """LoRA-FA: A is frozen, and PEFT's own optimiser corrects the gradient of B."""

    config: str = "LoraConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt, with that optimiser; the head in a group of its own."""
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
    """LoRA-Pro: the optimiser of the package ``lora-pro-adamw`` corrects the gradients of both factors."""

    config: str = "LoraConfig"

    def start(self, top: Top, targets: tuple[str, ...], rates: Rates, seed: int, steps: int) -> Session:
        """Adapt, with that optimiser."""
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
"""What `adamss.AdamssConfig.paper` sets: Algorithms 1 and 2 as the paper describes them."""


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
"""Methods of the paper's tables that are missing, and why."""
