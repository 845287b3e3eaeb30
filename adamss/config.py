"""Settings of AdaMSS: frozen, keyword-only dataclasses that are validated when they are created."""

from __future__ import annotations

import copy
import dataclasses
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from operator import index
from typing import Any, Literal, Self, TypeVar, get_args

from adamss.errors import ConfigError, ConfigTypeError

__all__ = [
    "ALL_LINEAR",
    "BASES",
    "INITIAL_B",
    "SEGMENTATIONS",
    "AdamssConfig",
    "Basis",
    "BudgetConfig",
    "InitialB",
    "SubspaceEstimate",
    "shown",
]

Segmentation = Literal["kmeans", "ncut", "spectral", "ksubspaces", "contiguous", "random"]
Basis = Literal["shared", "per_subspace"]
InitialB = Literal["orthonormal", "weighted", "qr"]
Unit = Literal["subspaces", "parameters"]
Window = Literal["reset", "running"]
FactorDtype = Literal["float64", "float32", "bfloat16", "float16"]

SEGMENTATIONS, BASES, INITIAL_B, UNITS, WINDOWS, FACTOR_DTYPES = map(
    get_args, (Segmentation, Basis, InitialB, Unit, Window, FactorDtype)
)
LARGEST_POWER = 100
ALL_LINEAR = "all-linear"
ESTIMATE = "estimate"

OVERRIDABLE = {
    *("rank", "subspaces", "subspace_rank", "segmentation", "segmentation_dimension"),
    *("basis", "initial_B", "include_bias"),
}
"""Settings that `AdamssConfig.overrides` may set for single layers."""

T = TypeVar("T")

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 200


def shown(value: object) -> str:
    """Return the ``repr`` of a value for a message, shortened because a value from a file may be of any length."""
    return _shortened.repr(value)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Schedule by which the number of trained subspaces is reduced during training.

    Parameters
    ----------
    target
        Budget from ``end_step`` on, in `unit`.
    unit
        What the budget counts. With ``"subspaces"`` exactly `target` subspaces stay trained. With
        ``"parameters"`` at most `target` parameters stay trained.
    start_step
        Number of completed optimiser steps after which the reduction begins.
    end_step
        Number of completed optimiser steps after which the budget equals `target`.
    interval
        Number of steps between two allocations. An allocation always takes place at ``end_step``.
    power
        Exponent of the schedule between ``start_step`` and ``end_step`` (Zhu and Gupta, 2017).
    initial
        Budget at ``start_step``, where the schedule begins. None means everything that the model has. Every
        subspace is trained until the first allocation, whatever this value is.
    minimum_per_layer
        Number of subspaces that each layer keeps, those with the highest scores. A layer that has no more than
        this number keeps all of them.
    window
        Steps that the importance averages cover: ``"reset"`` clears the averages after each allocation,
        ``"running"`` keeps them.
    revive
        Whether a frozen subspace may be trained again later. False gives the one-way reduction of the paper.
    sensitivity_decay, uncertainty_decay
        Decay rates b1, in (0, 1), and b2, in [0, 1), of the importance averages (Zhang et al., 2022).

    Raises
    ------
    ConfigError, ConfigTypeError
        If a value cannot be used; the message names it.

    Examples
    --------
    >>> BudgetConfig(target=40, start_step=100, end_step=1000, interval=50).power
    3.0
    """

    target: int
    unit: Unit = "subspaces"
    start_step: int = 0
    end_step: int
    interval: int = 1
    power: float = 3.0
    initial: int | None = None
    minimum_per_layer: int = 0
    window: Window = "reset"
    revive: bool = False
    sensitivity_decay: float = 0.85
    uncertainty_decay: float = 0.85

    def __post_init__(self) -> None:
        _set_integer(self, "target", minimum=1)
        _set_integer(self, "start_step", minimum=0)
        _set_integer(self, "end_step", minimum=1)
        _set_integer(self, "interval", minimum=1)
        _set_integer(self, "minimum_per_layer", minimum=0)
        if self.initial is not None:
            _set_integer(self, "initial", minimum=1)
            if self.initial < self.target:
                raise ConfigError(f"target = {self.target} is more than initial = {self.initial}; lower it")
        if self.end_step <= self.start_step:
            raise ConfigError(
                f"end_step must come after start_step = {self.start_step}, found {self.end_step}"
            )
        _check_choice(self, "unit", UNITS)
        _check_choice(self, "window", WINDOWS)
        _check_bool(self, "revive")
        _check_real(self, "power", low=0.0, high=None)
        if self.power > LARGEST_POWER:
            raise ConfigError(f"power must be at most {LARGEST_POWER}, found {self.power}")
        _check_real(self, "sensitivity_decay", low=0.0, high=1.0)
        if not self.sensitivity_decay:
            raise ConfigError("sensitivity_decay must be above 0: without an average there is no uncertainty")
        _check_real(self, "uncertainty_decay", low=0.0, high=1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary that JSON can represent."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Create a config from a dictionary returned by `to_dict`.

        Raises
        ------
        ConfigError, ConfigTypeError
            If a setting is unknown, missing, or cannot be used.
        """
        return _from_dict(cls, settings)


@dataclass(frozen=True, kw_only=True)
class SubspaceEstimate:
    """Settings for estimating K from the weight of each layer (the paper's Algorithm 2).

    `adamss.core.estimate_subspaces` computes the estimate.

    Parameters
    ----------
    tau
        Soft threshold on the eigenvalues of the Laplacian, in (0, 1].
    minimum
        Lower bound K0 on K.
    maximum
        Upper bound on K. None means the rank R of the decomposition, or `minimum` if that is larger.
    exponent
        Positive exponent of the affinity between columns. The segmentation ``"ncut"`` uses the same exponent, and
        uses 2 if `AdamssConfig.subspaces` is a number. To fix K = 10 with another exponent, pass
        ``SubspaceEstimate(minimum=10, maximum=10, exponent=4)``.

    Raises
    ------
    ConfigError, ConfigTypeError
        If a value cannot be used; the message names it.

    Examples
    --------
    >>> AdamssConfig(targets=["query"], subspaces="estimate").subspaces
    SubspaceEstimate(tau=0.01, minimum=10, maximum=None, exponent=2.0)
    """

    tau: float = 0.01
    minimum: int = 10
    maximum: int | None = None
    exponent: float = 2.0

    def __post_init__(self) -> None:
        _check_real(self, "tau", low=0.0, high=None)
        if self.tau > 1:
            raise ConfigError(f"tau must be at most 1, found {self.tau}")
        _set_integer(self, "minimum", minimum=1)
        if self.maximum is not None:
            _set_integer(self, "maximum", minimum=1)
            if self.maximum < self.minimum:
                raise ConfigError(
                    f"maximum = {self.maximum} is less than minimum = {self.minimum}; raise it, or lower minimum"
                )
        _check_real(self, "exponent", low=0.0, high=None)
        if self.exponent > LARGEST_POWER:
            raise ConfigError(f"exponent must be at most {LARGEST_POWER}, found {self.exponent}")


@dataclass(frozen=True, kw_only=True)
class AdamssConfig:
    """Settings of an adapter: which modules it adapts, and how.

    A value that is too large for a layer (rank above min(d, n), subspaces above n, subspace_rank above the number
    of columns of a subspace) is clamped for that layer. `adamss.summary` shows the effective values.

    Parameters
    ----------
    targets
        Modules to adapt. A list of names (``["query", "value"]``) is matched at the end of each module path. A
        string is a regular expression that must match the whole path; modules that match it and cannot be adapted
        are skipped. ``"all-linear"`` selects every linear layer except the output head. None selects the modules
        that PEFT adapts by default for this type of model. A Parameter that a module uses directly, such as the
        weight of fused experts, is named in the same way as a module.
    exclude
        Modules to leave out, as a list of names or one regular expression, matched as for `targets`. Everything
        inside an excluded module is left out as well.
    overrides
        Settings for some of the layers. Each key is a regular expression that must match a run of whole components
        of the layer's path: ``{"layer.0": dict(subspaces=4)}`` applies to every layer inside a module called
        ``layer.0``. If several keys match, the later ones win. The settings that can be overridden are rank,
        subspaces, subspace_rank, segmentation, segmentation_dimension, basis, initial_B and include_bias.
    rank
        Rank R of the truncated SVD of the weight.
    subspaces
        Number K of subspaces. ``"estimate"`` or a `SubspaceEstimate` estimates K from the weight of each layer.
        The matrices of a stack (experts, scanned layers) share one K, the highest of their estimates.
    subspace_rank
        Trained rank r_k of each subspace.
    modules_to_save
        Names of modules that are trained in full and stored in the adapter file, such as a classifier head. They
        are matched as for `targets`.
    trained_tokens
        Ids of tokens whose rows of the input embedding (``model.get_input_embeddings()``) are trained and stored,
        such as the tokens that ``resize_token_embeddings`` added. For other embeddings, pass a dictionary of ids
        by name, matched as for `targets`: ``{"embed_tokens": [32000, 32001]}``. An output head that shares the
        weight uses the trained rows too. The ids are stored in ascending order. Not every backend supports this
        setting.
    segmentation
        Method that groups the columns into subspaces: ``"kmeans"``, ``"ncut"``, ``"spectral"``, ``"ksubspaces"``,
        ``"contiguous"`` or ``"random"``. See `adamss.core.segment`.
    segmentation_dimension
        Dimension of each subspace. Required for ``"ksubspaces"``, and not accepted for the other methods.
    basis
        Basis of the subspaces, ``"shared"`` or ``"per_subspace"``. See `adamss.core.initial_factors`.
    initial_B
        Initial value of B: ``"orthonormal"``, ``"weighted"`` or ``"qr"``. See `adamss.core.initial_factors`.
    include_bias
        Whether the bias of a linear layer is adapted too, as one more input row of the weight. Layers of other
        kinds, and linear layers without a bias, are adapted without it.
    factor_dtype
        Dtype of the factors: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``. None means the dtype
        of the weight, or float32 if the weight is in half precision.
    seed
        Seed of the decomposition and the segmentation. Global random state is neither read nor changed.
    budget
        Schedule by which the trained subspaces are reduced. None trains all of them throughout. The schedule is
        carried out in the training loop, by `adamss_torch.BudgetController` or `adamss_jax.budgeted`.

    Raises
    ------
    ConfigError, ConfigTypeError
        If a value cannot be used; the message names it.

    Examples
    --------
    >>> AdamssConfig(rank=100, subspaces=10, subspace_rank=1, targets=["query", "value"]).targets
    ('query', 'value')
    """

    targets: str | Iterable[str] | None = None
    exclude: str | Iterable[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    rank: int = 100
    subspaces: int | Literal["estimate"] | SubspaceEstimate = 10
    subspace_rank: int = 1
    modules_to_save: Iterable[str] = ()
    trained_tokens: Iterable[int] | Mapping[str, Iterable[int]] | None = field(default=None, hash=False)
    segmentation: Segmentation = "kmeans"
    segmentation_dimension: int | None = None
    basis: Basis = "shared"
    initial_B: InitialB = "orthonormal"
    include_bias: bool = False
    factor_dtype: FactorDtype | None = None
    seed: int = 0
    budget: BudgetConfig | None = None

    def __post_init__(self) -> None:
        _set_subspaces(self)
        for name in ("rank", "subspace_rank"):
            _set_integer(self, name, minimum=1)
        _set_integer(self, "seed", minimum=0)
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_pattern(name, value)
            elif value is not None or name == "exclude":
                _set_names(self, name)
        if self.targets == ():
            raise ConfigError("targets is empty; name at least one module, such as ['query', 'value']")
        if isinstance(self.modules_to_save, str):
            raise ConfigTypeError(
                f"modules_to_save must be a list of names, found the string {shown(self.modules_to_save)}; "
                f"write [{shown(self.modules_to_save)}]"
            )
        _set_names(self, "modules_to_save")
        if self.trained_tokens is not None:
            object.__setattr__(self, "trained_tokens", _token_ids(self.trained_tokens))
        _check_choice(self, "segmentation", SEGMENTATIONS)
        _check_choice(self, "basis", BASES)
        _check_choice(self, "initial_B", INITIAL_B)
        if self.factor_dtype is not None:
            _check_choice(self, "factor_dtype", FACTOR_DTYPES)
        _check_bool(self, "include_bias")
        if self.segmentation == "ksubspaces" and self.segmentation_dimension is None:
            raise ConfigError(
                "segmentation = 'ksubspaces' needs segmentation_dimension, the subspaces' dimension"
            )
        if self.segmentation_dimension is not None:
            _set_integer(self, "segmentation_dimension", minimum=1)
            if self.segmentation != "ksubspaces":
                raise ConfigError(
                    "segmentation_dimension is for segmentation = 'ksubspaces', "
                    f"found {shown(self.segmentation)}; leave it out"
                )
        if self.budget is not None and not isinstance(self.budget, BudgetConfig):
            raise ConfigTypeError(
                f"budget must be an adamss.BudgetConfig or None, found {type(self.budget).__name__}"
            )
        self._check_overrides()

    def _check_overrides(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise ConfigTypeError(
                f"overrides must be a dictionary of settings by pattern, found {shown(self.overrides)}"
            )
        overrides = {}
        for pattern, settings in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(settings, Mapping):
                raise ConfigTypeError(
                    f"overrides holds {shown(pattern)}: {shown(settings)}; write {{'layer.0': dict(subspaces=4)}}"
                )
            _check_pattern("overrides", pattern)
            _check_pattern("overrides", _run_of_components(pattern))
            unknown = sorted(str(name) for name in settings.keys() - OVERRIDABLE)
            if unknown:
                raise ConfigError(
                    f"overrides[{shown(pattern)}] has {', '.join(unknown[:3])[:200]}; the settings that can be "
                    f"overridden for a layer are {', '.join(sorted(OVERRIDABLE))}"
                )
            try:
                checked = dataclasses.replace(self, overrides={}, **settings)
            except (ConfigError, ConfigTypeError) as error:
                raise type(error)(f"overrides[{shown(pattern)}]: {error}") from error
            overrides[pattern] = {name: getattr(checked, name) for name in settings}
        object.__setattr__(self, "overrides", overrides)

    def for_layer(self, path: str) -> Self:
        """Return the settings of the layer at `path`, with the matching `overrides` applied."""
        own: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if re.fullmatch(_run_of_components(pattern), path, flags=re.DOTALL):
                own |= settings
        return self.unchecked(overrides={}, **own) if self.overrides else self

    def unchecked(self, **values: Any) -> Self:
        """Return a copy with other values, without validation.

        Validation would compile the patterns. Those of a file must not be compiled, see `from_file`.
        """
        new = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(new, name, value)
        return new

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """Create a config of the method that the paper describes (Algorithms 1 and 2); `settings` override it.

        K is estimated for each layer, normalised cuts group the columns, each subspace has its own basis, and B comes
        from a QR decomposition. R = 100 and r_k = 1.

        Examples
        --------
        >>> AdamssConfig.paper(targets=["query", "value"]).basis
        'per_subspace'
        """
        own: dict[str, Any] = {
            "subspaces": ESTIMATE,
            "segmentation": "ncut",
            "basis": "per_subspace",
            "initial_B": "qr",
        }
        return cls(**own | settings)

    @classmethod
    def reference(cls, **settings: Any) -> Self:
        """Create a config of the method that the paper's reference code runs; `settings` override it.

        K = 10, k-means groups the columns, all subspaces share one basis, and the bias is adapted as one more input
        row. R = 100 and r_k = 1. Tables 1 and 2 of the paper report the parameter counts of this method.

        Examples
        --------
        >>> AdamssConfig.reference(targets=["query", "value"], subspaces=5).include_bias
        True
        """
        own: dict[str, Any] = {
            "subspaces": 10,
            "segmentation": "kmeans",
            "basis": "shared",
            "include_bias": True,
        }
        return cls(**own | settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary that JSON can represent."""
        settings = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Create a config from a dictionary returned by `to_dict`.

        Raises
        ------
        ConfigError, ConfigTypeError
            If a setting is unknown, missing, or cannot be used.
        """
        if isinstance(settings, Mapping) and isinstance(settings.get("budget"), Mapping):
            settings = {**settings, "budget": BudgetConfig.from_dict(settings["budget"])}
        return _from_dict(cls, settings)

    @classmethod
    def from_file(cls, settings: Mapping[str, Any]) -> Self:
        """Create a config from an untrusted dictionary, read from an adapter file.

        The patterns (`targets`, `exclude` and the keys of `overrides`) are kept but not compiled. They were resolved
        at attach, and a hostile regular expression can take hours to compile.

        Raises
        ------
        ConfigError, ConfigTypeError
            If a setting is unknown, missing, or cannot be used.
        """
        if not isinstance(settings, Mapping):
            return cls.from_dict(settings)  # raises the error
        patterns: dict[str, Any] = {name: settings.get(name) for name in ("targets", "exclude")}
        patterns = {name: value for name, value in patterns.items() if isinstance(value, str) and value}
        harmless: dict[str, Any] = {name: (value,) for name, value in patterns.items()}
        overrides = settings.get("overrides")
        if isinstance(overrides, Mapping):
            harmless["overrides"] = {f"{number}": own for number, own in enumerate(overrides.values())}
        config = cls.from_dict({**settings, **harmless})
        if isinstance(overrides, Mapping):
            patterns["overrides"] = dict(zip(overrides, config.overrides.values(), strict=True))
        return config.unchecked(**patterns)


def _run_of_components(pattern: str) -> str:
    """Return a regular expression for paths in which `pattern` matches a run of whole components."""
    return rf"(?:.*\.)?(?:{pattern})(?:\..*)?"


def _from_dict(cls: type[T], settings: Mapping[str, Any]) -> T:
    if not isinstance(settings, Mapping):
        raise ConfigTypeError(
            f"{cls.__name__} must be made from a dictionary, found {type(settings).__name__}"
        )
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in settings.keys() - {field.name for field in fields})
    if unknown:
        raise ConfigError(f"{cls.__name__} has no setting {', '.join(unknown[:3])[:200]}")
    missing_value = dataclasses.MISSING
    needed = [f.name for f in fields if f.default is missing_value and f.default_factory is missing_value]
    missing = [name for name in needed if name not in settings]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**settings)


def _set_integer(config: object, name: str, *, minimum: int) -> None:
    value = getattr(config, name)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise ConfigTypeError(f"{name} must be an integer, found {shown(value)}") from None
    if number < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, found {number}")
    object.__setattr__(config, name, number)


def _set_subspaces(config: AdamssConfig) -> None:
    """Normalise ``config.subspaces`` to an integer or a `SubspaceEstimate`.

    ``"estimate"`` becomes a `SubspaceEstimate` with default settings. A dictionary, the form in which a file holds
    the settings, becomes a `SubspaceEstimate` with these settings.
    """
    value = config.subspaces
    if isinstance(value, str) and value == ESTIMATE:
        value = SubspaceEstimate()
    elif isinstance(value, Mapping):
        value = _from_dict(SubspaceEstimate, value)
    elif isinstance(value, str):
        raise ConfigError(
            f"subspaces must be an integer, 'estimate' or a SubspaceEstimate, found {shown(value)}"
        )
    if isinstance(value, SubspaceEstimate):
        object.__setattr__(config, "subspaces", value)
    else:
        _set_integer(config, "subspaces", minimum=1)


def _set_names(config: object, name: str) -> None:
    value = getattr(config, name)
    try:
        names = tuple(value)
    except TypeError:
        raise ConfigTypeError(f"{name} must be a list of names, found {shown(value)}") from None
    for entry in names:
        if not isinstance(entry, str):
            raise ConfigTypeError(f"{name} must hold strings, found {shown(entry)}")
        if not entry:
            raise ConfigError(f"{name} holds an empty name; leave it out")
    object.__setattr__(config, name, names)


def _token_ids(value: object) -> Any:
    """Return the ids as an ascending tuple, or a dictionary of such tuples by the name of the embedding."""
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) and name for name in value) or not value:
            raise ConfigError(f"trained_tokens must have the names of embeddings, found {shown(value)}")
        if any(isinstance(ids, Mapping) or ids is None for ids in value.values()):
            raise ConfigTypeError(f"trained_tokens must have ids for each name, found {shown(value)}")
        return {name: _token_ids(ids) for name, ids in value.items()}
    try:
        entries: list[Any] = [value] if isinstance(value, str | bytes) else [*value]  # type: ignore[misc]
        if any(isinstance(entry, bool) for entry in entries):
            raise TypeError
        ids = sorted(map(index, entries))
    except TypeError:
        raise ConfigTypeError(f"trained_tokens must be a list of integers, found {shown(value)}") from None
    if not ids:
        raise ConfigError("trained_tokens is empty; name at least one id, or leave it out")
    if ids[0] < 0 or len({*ids}) < len(ids):
        raise ConfigError(f"trained_tokens must be distinct ids from 0 on, found {shown(value)}")
    return tuple(ids)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name} is not a regular expression: {shown(pattern)} ({error})") from error
    if not pattern:
        raise ConfigError(f"{name} is an empty pattern; name at least one module")


def _check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; found {shown(value)}")


def _check_bool(config: object, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise ConfigTypeError(f"{name} must be True or False, found {shown(value)}")


def _check_real(config: object, name: str, *, low: float, high: float | None) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigTypeError(f"{name} must be a number, found {shown(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = float("inf")
    object.__setattr__(config, name, value)
    if high is None and not low < value < float("inf"):
        raise ConfigError(f"{name} must be positive and finite, found {value}")
    if high is not None and not low <= value < high:
        raise ConfigError(f"{name} must lie in [{low}, {high}), found {value}")
