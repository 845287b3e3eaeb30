"""Load damaged and hostile adapter files: each must raise an `AdamssError` or load what it says, and nothing else.

The campaign starts from valid files: both forms, both bases, with and without bias, saved modules, a budget, frozen
subspaces, every dtype, sizes of a few kilobytes and half a megabyte. It damages each file in one or several ways.
Most files get a correct checksum again, so that the checks after it are reached. Every file is loaded into a NumPy
model, and some also into ``adamss show`` and, where installed, into PyTorch and Equinox models. A file fails, and is
kept, for:

- any exception other than an `AdamssError`, including warnings;
- a model that has changed although the file was refused;
- an update, segmentation, mask, setting or saved tensor that differs from what an independent reader finds;
- a load that takes longer than `TIME_LIMIT`;
- memory above the sum of twice the file, the memory of the honest file in the same model, and `HEADER`. ::

    python tests/hostile/campaign.py --files 100000 --seed 0
    python tests/hostile/campaign.py --seed 0 --only 4711 --keep here
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import io
import json
import resource
import signal
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mutations import (
    FLOATS,
    TABLES,
    draft_of,
    mutated,
    pick,
    taken_apart,
    written,
)
from tabulate import tabulate
from tqdm import tqdm

import adamss
from adamss import cli
from adamss.backend import NumpyLinear, NumpyModel, get_backend
from adamss.core import Factors
from adamss.errors import AdamssError

TIME_LIMIT = 10.0
"""Largest time of a load, in seconds. Files load in milliseconds; the margin is for a busy machine."""

HEADER = 1 << 19
"""Bytes allowed for the Python objects of the header (names, shapes, numbers) and of the load, for any file size."""

SHOWN = 1 << 26
"""Bytes allowed in ``adamss show``, which has no model that would limit the number of layers."""

ADDRESS_SPACE = 4 << 30
"""Bytes that the process may map in addition, so that a huge allocation fails instead of filling the swap."""

RESIDENT = 64 << 20
"""Bytes by which one load may raise the resident memory, since libraries allocate memory that is not traced."""

BFLOAT16 = 2.0**-7
"""Rounding unit of bfloat16."""

# ---- valid files ---------------------------------------------------------------------------------------


Weights = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Origin:
    """A valid file, and the weights (W, b) by module path of its base model.

    `memory` is the peak of the memory of loading it with the most expensive settings, in bytes, by `trainable`.
    """

    name: str
    content: bytes
    weights: Weights
    memory: dict[bool, int] = field(default_factory=dict)


def base_model(weights: Weights) -> NumpyModel:
    return NumpyModel({path: NumpyLinear(W, b) for path, (W, b) in weights.items()})


def origins(folder: Path) -> list[Origin]:
    """Write the valid files from which mutations start, and return them."""
    common = {"rank": 5, "subspaces": 3, "subspace_rank": 2}
    budget = adamss.BudgetConfig(target=2, end_step=10)
    per_subspace = {"basis": "per_subspace", "include_bias": True}
    large = {"subspaces": 8, "rank": 16}
    half = {"dtype": "float32", "training": True, "code": "BF16"}
    chinese = ("编码.0.查询", "编码.1.查询", "head")
    wide = {"shape": (192, 160), "dtype": "float32"}
    head = {"modules_to_save": ["head"]}
    plan: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("portable, shared, float64, head, budget", head | {"budget": budget}, {}),
        ("training, shared, float32", {}, {"dtype": "float32", "training": True}),
        ("portable, per_subspace, bias, float32", per_subspace, {"dtype": "float32"}),
        (
            "training, per_subspace, bias, head, float64",
            per_subspace | head | {"subspaces": 4},
            {"training": True},
        ),
        (
            "portable, float16",
            {"factor_dtype": "float16", "targets": r"encoder\.\d\.query"},
            {"dtype": "float32"},
        ),
        ("training, bfloat16", {"factor_dtype": "float32"}, half),
        ("portable, names in Chinese", {"targets": ["查询"]}, {"names": chinese}),
        ("portable, large, head", head | large, wide | {"head": (160, 900)}),
        ("training, large, per_subspace, bias", per_subspace | large, wide | {"training": True}),
    ]
    found = []
    for number, (name, settings, options) in enumerate(plan):
        rng = np.random.default_rng(number)
        dtype = options.get("dtype", "float64")
        d, n = options.get("shape", (12, 10))
        names = options.get("names", ("encoder.0.query", "encoder.1.query", "head"))
        weights = {
            path: (rng.standard_normal((d, n)).astype(dtype), rng.standard_normal(n).astype(dtype))
            for path in names[:2]
        }
        inputs, outputs = options.get("head", (10, 4))
        weights["head"] = (rng.standard_normal((inputs, outputs)).astype(dtype), np.ones(outputs, dtype))
        model = adamss.attach(
            base_model(weights), adamss.AdamssConfig(**{"targets": ["query"], **common, **settings})
        )
        for _, _, C, labels, ranks, active in model.bank.only().layers.values():
            within = np.arange(C.shape[0])[:, None] < ranks[labels]
            C[...] = np.where(within, rng.standard_normal(C.shape), 0.0)
            active[rng.integers(active.size)] = False
        path = folder / f"{number}.safetensors"
        adamss.save(model, path, training=options.get("training", False))
        draft = draft_of(path.read_bytes())
        if "code" in options:
            # NumPy cannot write bfloat16, so the draft is converted.
            for _, tensor in draft.tensors:
                if tensor.dtype in FLOATS:
                    tensor.set(tensor.array(), options["code"])
            draft.metadata["config"]["factor_dtype"] = "bfloat16"
        base = base_model(weights)
        origin = Origin(name, written(draft), weights)
        # A false setting may ask for more than the file needs, up to what the model allows: all directions in
        # float64. The memory of that load is the limit.
        draft.metadata["config"] |= {"rank": 10**18, "factor_dtype": "float64"}
        path.write_bytes(written(draft))
        for trainable in (True, False):
            with traced() as memory:
                adamss.load(base, path, trainable=trainable)
                origin.memory[trainable] = memory()
        found.append(origin)
    return found


# ---- judging -------------------------------------------------------------------------------------------


class TooLongError(BaseException):
    """A load took too long. It derives from BaseException so that no ``except Exception`` catches it."""


class WrongError(Exception):
    """The loaded adapter differs from the file, or a model was changed."""


@dataclass(kw_only=True)
class Outcome:
    """The result of one file."""

    index: int
    kind: str
    size: int
    result: str = ""
    targets: Sequence[str] = ()
    failure: str = ""
    changed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the load, by target."""
    memory: int = 0
    """Bytes of the load, minus those of the honest file in the same model and minus `HEADER`."""


PARTS = ("M", "A", "B", "C", "labels", "ranks")


def update_of(values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the update ``A_k B_k C_k`` in the columns of subspace k by its definition, and the size of its terms."""
    C, labels, ranks = values["C"].astype("f8"), values["labels"].astype("i8"), values["ranks"].astype("i8")
    ends = np.cumsum(ranks)
    if "M" in values:
        blocks = [values["M"].astype("f8")[:, end - r : end] for end, r in zip(ends, ranks, strict=True)]
        sizes = [np.linalg.norm(block, axis=0)[None] for block in blocks]
    else:
        A, B = values["A"].astype("f8"), values["B"].astype("f8")
        bases = [A[k if len(A) > 1 else 0] for k in range(len(ranks))]
        parts = [B[:, end - r : end] for end, r in zip(ends, ranks, strict=True)]
        blocks = [basis @ part for basis, part in zip(bases, parts, strict=True)]
        sizes = [np.abs(basis) @ np.abs(part) for basis, part in zip(bases, parts, strict=True)]
    columns = [blocks[k] @ C[: ranks[k], j] for j, k in enumerate(labels)]
    size = [
        np.broadcast_to(sizes[k] @ np.abs(C[: ranks[k], j]), len(blocks[k])) for j, k in enumerate(labels)
    ]
    return np.stack(columns, axis=1), np.stack(size, axis=1)


def check_loaded(
    content: bytes, layers: Mapping[str, Any], saved: Mapping[str, Any], config: Any, *, eps: float = 0.0
) -> None:
    """Compare the loaded arrays, in NumPy and in the dtype of the model, with the content of the file.

    `eps` is the rounding unit of the factors if it is larger than that of the arrays.
    """
    tensors, metadata = taken_apart(content)
    tables = {name: json.loads(metadata[name]) for name in TABLES}
    if set(layers) != set(tables["layers"]) or set(saved) != set(tables["modules_to_save"]):
        raise WrongError(f"loaded layers {sorted(layers)} and saved modules {sorted(saved)}")
    for path, factors in layers.items():
        for name in ("labels", "ranks", "active"):
            if not np.array_equal(getattr(factors, name), tensors[f"{path}.{name}"].array()):
                raise WrongError(f"{path}: {name} is not that of the file")
        A, B, C = (np.asarray(array, dtype="f8") for array in factors[:3])
        with np.errstate(all="ignore"):
            there = {name: tensors[f"{path}.{name}"].array() for name in PARTS if f"{path}.{name}" in tensors}
            wanted, size = update_of(there)
            found, own = update_of({"A": A, "B": B, "C": C, "labels": factors.labels, "ranks": factors.ranks})
        eps = max(eps, *(float(np.finfo(array.dtype).eps) for array in factors[:3]))
        least = {"float16": 6e-8, "float64": 1e-300}.get(str(factors.C.dtype), 1e-37)
        # If one factor underflows, its error is multiplied by the other factor.
        floor = least * (1 + np.abs(C).max()) * (1 + np.abs(B).max()) * 100 * B.shape[0]
        with np.errstate(all="ignore"):
            bound = 50 * eps * np.maximum(size, own) + floor
            # Products that overflow although the factors are finite cannot be compared.
            right = (np.abs(found - wanted) <= bound) | ~np.isfinite(size * 2)
        if not right.all():
            raise WrongError(f"{path}: the update is not that of the file")
    for path, arrays in saved.items():
        for name, array in arrays.items():
            if f"{path}.{name}" not in tensors:
                raise WrongError(f"{path}.{name} is not in the file")
            with np.errstate(all="ignore"):
                wanted = tensors[f"{path}.{name}"].array().astype(array.dtype)
            if not np.array_equal(array, wanted, equal_nan=True):
                raise WrongError(f"{path}.{name} is not that of the file")
    for name, value in tables["config"].items():
        if name == "overrides":
            continue  # `load` ignores the patterns in a file
        mine = getattr(config, name)
        if isinstance(value, dict) and name == "budget":
            mine, value = [getattr(mine, key) for key in value], list(value.values())
        elif isinstance(value, list | dict):
            mine, value = list(mine), list(value)
        if mine != value:
            raise WrongError(f"config.{name} is {mine!r}, the file says {value!r}"[:300])


class Target(ABC):
    """A kind of model to load files into. Each origin has one model, which is restored after every load."""

    name: str

    def __init__(self) -> None:
        self.backend = get_backend(self.name)
        self.models: dict[int, tuple[Any, Any]] = {}

    @abstractmethod
    def build(self, weights: Weights) -> Any: ...

    @abstractmethod
    def state(self, model: Any) -> Any:
        """Return everything that a load could change in a model."""

    def model(self, origin: Origin) -> Any:
        if id(origin) not in self.models:
            model = self.build(origin.weights)
            self.models[id(origin)] = model, self.state(model)
        return self.models[id(origin)][0]

    def unchanged(self, origin: Origin) -> bool:
        model, before = self.models[id(origin)]
        return bool(self.state(model) == before)

    def load(self, origin: Origin, path: Path, options: Mapping[str, Any]) -> Callable[[bytes], None]:
        """Load a file, and return a function that checks the result against the content of the file."""
        model = adamss.load(self.model(origin), path, **options)

        def check(content: bytes) -> None:
            adaptation, modules = self.backend.bank(model).only(), self.backend.modules(model)
            layers = {name: Factors(*map(self.numpy, f)) for name, f in adaptation.layers.items()}
            saved = {
                name: {key: self.numpy(array) for key, array in self.backend.arrays(modules[name]).items()}
                for name in adaptation.saved
            }
            half = any(self.backend.dtype_name(f.C) == "bfloat16" for f in adaptation.layers.values())
            try:
                check_loaded(content, layers, saved, adaptation.config, eps=BFLOAT16 if half else 0.0)
                if layers.keys() & saved.keys():
                    raise WrongError(f"{sorted(layers.keys() & saved.keys())} are adapted and saved whole")
                if not half:
                    self.check_more(origin, model, layers, saved)
            finally:
                self.give_back(model)

        return check

    def numpy(self, array: Any) -> np.ndarray:
        return self.backend.to_stored(array).numpy()

    def check_more(self, origin: Origin, model: Any, layers: Mapping[str, Factors], saved: Any) -> None:  # noqa: B027
        """Make further checks that only this kind of model allows."""

    def give_back(self, model: Any) -> None:  # noqa: B027
        """Remove the loaded adapter, for models that are changed in place."""


class NumpyTarget(Target):
    name = "numpy"

    def build(self, weights: Weights) -> NumpyModel:
        return base_model(weights)

    def state(self, model: NumpyModel) -> Any:
        adapted = bool(model.bank) or any(layer.computed for layer in model.layers.values())
        return adapted, {
            path: layer.W.tobytes() + (b"" if layer.b is None else layer.b.tobytes())
            for path, layer in model.layers.items()
        }

    def check_more(self, origin: Origin, model: Any, layers: Mapping[str, Factors], saved: Any) -> None:
        for name, (W, _) in origin.weights.items():
            if name not in saved and model[name].W.tobytes() != W.tobytes():
                raise WrongError(f"{name} has another weight")


class ShowTarget(NumpyTarget):
    """The command ``adamss show``, which prints a file or the reason why it cannot."""

    def load(self, origin: Origin, path: Path, options: Mapping[str, Any]) -> Callable[[bytes], None]:
        """Print the file to memory, through an encoding that lacks most characters."""
        self.model(origin)
        out = io.TextIOWrapper(io.BytesIO(), "latin-1")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            status = cli.main(["show", str(path)])
        out.flush()
        text = out.buffer.getvalue().decode("latin-1")
        if status:
            raise AdamssError(f"{str(path)!r}: not shown")
        if any(not (char.isprintable() or char == "\n") for char in text):
            raise WrongError("show printed a control character")
        return lambda content: None


def nested(layers: Mapping[str, Any], new: Callable[[], Any], put: Callable[[Any, str, Any], None]) -> Any:
    """Return a tree of containers with the layers at their module paths."""
    root, made = new(), {}
    for path, layer in layers.items():
        place, above = root, ""
        for name in path.split(".")[:-1]:
            above += f"{name}."
            if above not in made:
                made[above] = new()
                put(place, name, made[above])
            place = made[above]
        put(place, path.rpartition(".")[2], layer)
    return root


class TorchTarget(Target):
    """PyTorch models, which are changed in place and restored by `detach`."""

    name = "torch"

    def build(self, weights: Weights) -> Any:
        import torch

        layers = {}
        for path, (W, b) in weights.items():
            layers[path] = torch.nn.Linear(*W.shape)
            with torch.no_grad():
                layers[path].weight.copy_(torch.from_numpy(np.ascontiguousarray(W.T)))
                layers[path].bias.copy_(torch.from_numpy(b))
        return nested(layers, torch.nn.Module, torch.nn.Module.add_module)

    def state(self, model: Any) -> Any:
        return (
            {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: len(module._forward_hooks) for name, module in model.named_modules()},
        )

    def check_more(self, origin: Origin, model: Any, layers: Mapping[str, Factors], saved: Any) -> None:
        """Compare the outputs of the layers with ``x (W + delta)``, unless numbers are very large."""
        import torch

        for path, factors in layers.items():
            delta, size = update_of(factors._asdict())
            W, b = origin.weights[path]
            if size.max() < 1e4 and factors.C.dtype == np.float32:
                update = delta[: len(W)] + W
                expected = update.sum(axis=0) + b + (delta[len(W)] if len(delta) > len(W) else 0)
                with torch.no_grad():
                    found = model.get_submodule(path)(torch.ones(1, len(W)))[0].numpy()
                bound = 1e-4 * (size.sum(axis=0) + np.abs(W).sum(axis=0) + 1)
                if not (np.abs(found - expected) <= bound).all():
                    raise WrongError(f"{path}: the output is not x (W + delta)")

    def give_back(self, model: Any) -> None:
        adamss.detach(model)


class EquinoxTarget(Target):
    """JAX models, which are immutable trees."""

    name = "equinox"

    def build(self, weights: Weights) -> Any:
        import equinox
        import jax

        layers = {}
        for path, (W, b) in weights.items():
            layer = equinox.nn.Linear(*W.shape, key=jax.random.key(0))
            arrays = tuple(jax.numpy.asarray(array, dtype="float32") for array in (W.T, b))
            layers[path] = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, arrays)
        return nested(layers, dict, dict.__setitem__)

    def state(self, model: Any) -> Any:
        import jax

        leaves, structure = jax.tree.flatten(model)
        return structure, [np.asarray(leaf).tobytes() for leaf in leaves]


def stage_of(error: AdamssError, path: Path) -> str:
    """Return the check that refused a file, as the name of a column of the table."""
    text = str(error)
    if "checksum" in text:
        return "checksum"
    container = ("truncated", "damaged", "no safetensors", "not written by", "format version", "its header")
    if any(words in text for words in container):
        return "container"
    return "content" if text.startswith(repr(str(path))) else "model"


def judge(
    outcome: Outcome,
    name: str,
    target: Target,
    origin: Origin,
    path: Path,
    content: bytes,
    options: Mapping[str, Any],
) -> None:
    """Load one file into one target, and record the result in `outcome`."""
    check: Callable[[bytes], None] | None = None
    path.write_bytes(content)
    resident = most_resident()
    start = time.perf_counter()
    with traced() as memory:
        try:
            with alarm():
                check = target.load(origin, path, options)
            outcome.result = "loaded"
        except AdamssError as error:
            outcome.result = stage_of(error, path)
        except (KeyboardInterrupt, SystemExit):
            raise
        except TooLongError:
            outcome.failure = f"hang: more than {TIME_LIMIT} s"
        except BaseException as error:
            outcome.failure = f"{type(error).__module__}.{type(error).__name__}: {error}"[:500]
        used = memory()
    outcome.seconds[name] = time.perf_counter() - start
    grown = most_resident() - resident
    if check is not None:
        try:
            check(content)
        except WrongError as error:
            outcome.failure = f"wrong: {error}"
        except Exception as error:
            outcome.failure = f"wrong, not comparable: {type(error).__name__}: {error}"[:500]
    if not target.unchanged(origin):
        outcome.changed = True
        outcome.failure = outcome.failure or "the model was changed"
    if name in ("numpy", "show") and grown > RESIDENT:
        outcome.failure = outcome.failure or f"memory: {grown:,} bytes of resident memory"
    if name == "numpy":
        honest = max(0, origin.memory[options["trainable"]] - 2 * len(origin.content))
        outcome.memory = max(0, used - honest - HEADER)
        if outcome.memory > 2 * len(content):
            outcome.failure = outcome.failure or f"memory: {used:,} bytes for a file of {len(content):,}"
    elif name == "show" and used > 2 * len(content) + SHOWN:
        outcome.failure = (
            outcome.failure or f"memory: show took {used:,} bytes for a file of {len(content):,}"
        )
    if outcome.failure:
        outcome.failure = f"{name} {dict(options)}: {outcome.failure}"


def most_resident() -> int:
    """Return the peak of the resident memory of this process, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Trace memory within this block, since tracing is slow; yield a function that returns the peak so far."""
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start(1)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        if not already:
            tracemalloc.stop()


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Stop the block after `TIME_LIMIT`. Signals work only in the main thread, so other threads have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _ring(*_: object) -> None:
    raise TooLongError


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn warnings into errors, limit the address space and catch the alarm, and restore all of these afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = Path("/proc/self/statm")
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, _ring) if main else None
    if mapped.exists():
        now = int(mapped.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if main:
            signal.signal(signal.SIGALRM, before)


def targets_of(frameworks: Sequence[str]) -> dict[str, Target]:
    """Return the targets by name: NumPy, ``adamss show``, and the given frameworks that are installed."""
    found: dict[str, Target] = {"numpy": NumpyTarget(), "show": ShowTarget()}
    if "torch" in frameworks and importlib.util.find_spec("torch"):
        found["torch"] = TorchTarget()
    if "equinox" in frameworks and importlib.util.find_spec("equinox"):
        found["equinox"] = EquinoxTarget()
    return found


SHARES = {"show": 0.1, "torch": 0.05, "equinox": 0.005}
"""Share of the files that a target other than the NumPy model also loads."""


def campaign(
    files: int,
    seed: int,
    *,
    frameworks: Sequence[str] = (),
    shares: Mapping[str, float] = SHARES,
    kinds: Sequence[str] = (),
    only: int | None = None,
    keep: Path | None = None,
) -> list[Outcome]:
    """Make files, load them, and return the outcome of each; the same seed gives the same files.

    File i depends only on `seed` and i; `only` makes just the file of this number. `kinds` names the mutations to
    choose from; none means all. NumPy loads every file, and the other targets load their `shares` if they are in
    `frameworks` and installed; ``show`` needs neither. Files that fail are kept in the folder `keep`.
    """
    targets = targets_of(frameworks)
    outcomes = []
    with guarded(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        valid = origins(folder)
        # The two large files at the end are slower, so they are chosen less often.
        weights = np.asarray([1.0] * (len(valid) - 2) + [0.15] * 2)
        path = folder / "file.safetensors"
        for origin in valid:
            path.write_bytes(origin.content)
            for target in targets.values():
                # Load each origin once, so that first imports and compilations count for no file.
                with contextlib.suppress(WrongError):
                    target.load(origin, path, {})(origin.content)
        numbers = range(files) if only is None else [only]
        for index in tqdm(numbers, desc="fuzz", unit="file", leave=False, disable=None):
            if not index % 500:
                # If a library hangs where no signal is handled, this ends the process with a traceback.
                faulthandler.dump_traceback_later(600, exit=True, file=sys.__stderr__)
            rng = np.random.default_rng([seed, index])
            origin = valid[rng.choice(len(valid), p=weights / weights.sum())]
            kind, content = mutated(origin.content, pick(rng, valid).content, rng, kinds)
            options = {"trainable": bool(rng.integers(4)), "check_base": bool(rng.integers(3))}
            outcome = Outcome(index=index, kind=kind, size=len(content))
            chosen = ["numpy", *(name for name, share in shares.items() if rng.random() < share)]
            outcome.targets = [name for name in chosen if name in targets]
            for name in outcome.targets:
                if not outcome.failure:
                    first = outcome.result
                    judge(outcome, name, targets[name], origin, path, content, options)
                    outcome.result = first or outcome.result
            if only is not None or outcome.failure:
                print(f"file {index}, {kind}, of {origin.name}: {outcome.failure or outcome.result}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{index}.safetensors").write_bytes(content)
            outcomes.append(outcome)
        faulthandler.cancel_dump_traceback_later()
    return outcomes


STAGES = ("loaded", "container", "checksum", "content", "model")


def table_of(outcomes: Sequence[Outcome]) -> str:
    """Return the table of outcomes by kind of mutation."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.kind, Counter())["failed" if outcome.failure else outcome.result] += 1
    columns = (*STAGES, "failed")
    rows = [
        [kind, found.total(), *(found[each] for each in columns)] for kind, found in sorted(counts.items())
    ]
    headers = ["(first) mutation", "files", "loaded", "refused: container", *columns[2:]]
    return tabulate(rows, headers, intfmt=",")


def last_line(outcomes: Sequence[Outcome], seed: int) -> str:
    """Return the line that summarises a campaign."""
    loaded = sum(outcome.result == "loaded" for outcome in outcomes)
    others = sum(bool(outcome.failure) and not outcome.changed for outcome in outcomes)
    changed = sum(outcome.changed for outcome in outcomes)
    longest = max((max(outcome.seconds.values()) for outcome in outcomes), default=0.0)
    most = max((outcome.memory / max(1, outcome.size) for outcome in outcomes), default=0.0)
    return (
        f"{len(outcomes):,} files (seed {seed}): loaded {loaded:,}, refused {len(outcomes) - loaded - others:,}, "
        f"other exceptions {others}, changed models {changed}, longest load {1e3 * longest:.0f} ms, "
        f"largest memory {most:.2f} x the file"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and print its table; return 1 if any file failed, else 0."""
    parser = argparse.ArgumentParser(description="Damaged and hostile adapter files.")
    parser.add_argument("--files", type=int, default=100_000, help="how many (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the campaign (default: 0)")
    parser.add_argument(
        "--only", type=int, metavar="INDEX", help="make and load this file of the campaign only"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", default="fuzz-failures", help="where files that fail are kept"
    )
    parser.add_argument(
        "--frameworks", nargs="*", default=["torch", "equinox"], help="besides NumPy (default: torch equinox)"
    )
    options = parser.parse_args(argv)
    outcomes = campaign(
        options.files, options.seed, frameworks=options.frameworks, only=options.only, keep=options.keep
    )
    print(table_of(outcomes))
    for name in targets_of(options.frameworks):
        seconds = [outcome.seconds[name] for outcome in outcomes if name in outcome.seconds]
        if seconds:
            print(f"{name}: {len(seconds):,} files, the longest load {1e3 * max(seconds):.0f} ms")
    print(
        "memory is that of the load into NumPy, less what the honest file takes in the same model besides itself and "
        f"{HEADER >> 10} KiB for the header"
    )
    print(last_line(outcomes, options.seed))
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
