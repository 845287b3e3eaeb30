"""Division of a model's layers among processes and threads, so that each layer is decomposed once.

The eigenvectors of a small matrix take about as long on two threads as on one. Therefore each small layer on the CPU
gets one thread, and PyTorch's threads work on several layers at a time. Even a single small layer gets one thread: a
result may differ in its last bit with the number of threads, and must not depend on the number of layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamss import errors
from adamss.backend import BaseWeight, Division
from adamss.backend.interface import Weights, by_shape
from adamss.core import Factors
from adamss.core.decomposition import EXACT_SIDE
from adamss.core.fingerprint import fingerprint
from adamss.errors import AdamssWarning, StateError
from adamss_torch.sharding import as_bytes, device_of, exchanged_objects, is_sharded, local, unshard

__all__ = ["TorchDivision", "divided"]

T = TypeVar("T")


@contextmanager
def divided(model: nn.Module, *, enabled: bool) -> Iterator[Division]:
    """Return a context in which all processes divide the layers of a model: see `Processes.divided`."""
    division = TorchDivision(*_everyone(model)) if enabled else TorchDivision(None)
    try:
        yield division
    except Exception as error:
        division.tell(error)
        raise


def _everyone(model: nn.Module) -> tuple[dist.ProcessGroup | None, torch.device]:
    """Return the group of all processes, and a device on which they can send.

    The group is None for a single process, and where the processes cannot send from the device of the model.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None, device
    group = dist.group.WORLD
    assert group is not None
    kinds = {each.type for each in group._device_types}
    if device.type not in kinds and "cpu" not in kinds:
        return None, device  # for example NCCL with a model on the CPU
    return group, device_of(group, torch.empty(0, device=device))


class TorchDivision(Division):
    """Decompose each layer on one process, which sends its factors to all; small layers get one thread each.

    Parameters
    ----------
    group
        Group of all processes. None means that this process works on its own.
    device
        Device from which the processes send.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = torch.device("cpu") if device is None else device
        self._told = group is None
        self._failure: Exception | None = None
        self._differ = False
        self._owners: dict[str, int] = {}
        self._devices: dict[str, torch.device] = {}

    def share(self, weights: Weights, settings: str) -> Iterator[tuple[str, BaseWeight]]:
        """Yield this process's layers, which are all layers unless the processes have the same layers and weights."""
        paths = by_shape(weights)
        if self._group is None or not self._agree(_plan(weights, settings, self._group)):
            for path in paths:
                yield path, _gathered(weights[path])
            return
        size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        # Layers are sorted by size, so that the layers of one round take about the same time.
        paths.sort(key=lambda path: -math.prod(weights.shape(path)))
        self._owners = {path: number % size for number, path in enumerate(paths)}
        for start in range(0, len(paths), size):
            mine = None
            for path in paths[start : start + size]:
                base = weights[path]
                self._devices[path] = local(base.W).device
                base = _gathered(base)  # all processes take part in gathering the weight, and one keeps it
                mine = (path, base) if self._owners[path] == rank else mine
                del base
            if mine is not None:
                yield mine

    def gather(self, layers: Mapping[str, Factors]) -> dict[str, Factors]:
        """Return the factors of each layer, which are bit for bit those that a single process would compute."""
        if self._group is None:
            return dict(layers)
        mine = {path: [_Form.of(array) for array in layers[path]] for path in self._owners if path in layers}
        said = self._said(mine, self._failure)
        self._warn_of_differing_weights()
        rank, found = dist.get_rank(self._group), dict(layers)
        for path, owner in self._owners.items():
            if owner == rank:
                self._send(torch.cat([as_bytes(array) for array in layers[path]]), owner)
            else:
                found[path] = self._received(said[owner][path], owner, self._devices[path])
        return found

    @contextmanager
    def carrying(self) -> Iterator[bool]:
        """See `Division.carrying`: an error is kept until `gather`, where the other processes receive it."""
        try:
            yield self._failure is None
        except Exception as error:
            if self._group is None:
                raise
            self._failure = error

    def each(self, function: Callable[[str], T], batch: Mapping[str, BaseWeight]) -> list[T]:
        """Return a function's results for the paths of a batch, computing several small layers at a time."""
        threads = torch.get_num_threads()
        if not (_is_small(next(iter(batch.values()))) and threads > 1 and _threads_are_our_own()):
            return list(map(function, batch))

        def begin() -> None:
            torch.set_num_threads(1)
            torch.set_grad_enabled(False)

        pool = ThreadPoolExecutor(min(len(batch), threads), thread_name_prefix="adamss", initializer=begin)
        try:
            return list(pool.map(function, batch))
        finally:
            pool.shutdown(cancel_futures=True)
            # The number holds for the thread that sets it, but new threads inherit the last value set, so restore it.
            torch.set_num_threads(threads)

    def tell(self, error: Exception) -> None:
        """Tell the other processes of an error, if they still wait for the first message of this process."""
        if not self._told:
            self._say(_Failure.of(error))

    def _agree(self, plan: tuple[str, str | None]) -> bool:
        """Return whether all processes put the same adapters on the same weights."""
        outlines, values = zip(*self._said(plan), strict=True)
        alike = len({*outlines}) == 1
        if alike and len({*values}) == 1 and values[0] is not None:
            return True
        self._differ = alike and None not in values
        return False

    def _warn_of_differing_weights(self) -> None:
        if self._differ:
            warnings.warn(
                "the processes put the same adapters on base weights that differ, so each computed its own factors; "
                "if they are to train one model, load the same weights on all of them first (DistributedDataParallel "
                "does not synchronise the frozen parts of adapters)",
                AdamssWarning,
                stacklevel=4,
            )

    def _say(self, thing: Any) -> list[Any]:
        self._told = True
        assert self._group is not None
        return exchanged_objects(thing, self._group, self._device)

    def _said(self, thing: Any, failure: Exception | None = None) -> list[Any]:
        """Send an object to all processes, and return those of all by rank; raise on all if one has failed."""
        said = self._say(thing if failure is None else _Failure.of(failure))
        if failure is not None:
            raise failure
        for rank, each in enumerate(said):
            if isinstance(each, _Failure):
                raise each.error(rank)
        return said

    def _received(self, forms: list[_Form], owner: int, device: torch.device) -> Factors:
        sizes = [form.bytes for form in forms]
        parcel = self._send(torch.empty(sum(sizes), dtype=torch.uint8), owner).to(device)
        parts = torch.split(parcel, sizes)
        return Factors(*(form.filled(part) for form, part in zip(forms, parts, strict=True)))

    def _send(self, parcel: Tensor, owner: int) -> Tensor:
        assert self._group is not None
        parcel = parcel.to(self._device)
        dist.broadcast(parcel, src=dist.get_global_rank(self._group, owner), group=self._group)
        return parcel


class _Failure(NamedTuple):
    """An error in a form that can be sent, since not every exception can be pickled."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        known = isinstance(error, errors.AdamssError)
        return cls(type(error).__name__, str(error) if known else f"{type(error).__name__}: {error}")

    def error(self, rank: int) -> Exception:
        """Return the error to raise for a failure of the process `rank`."""
        kind = getattr(errors, self.kind, StateError)
        error: Exception = kind(f"process {rank} has failed: {self.text}")
        return error


class _Form(NamedTuple):
    """Memory layout of an array, since products with an array of another layout may differ in the last bit."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, array: Tensor) -> _Form:
        array = array.contiguous() if 0 in array.stride() else array
        return cls(tuple(array.shape), tuple(array.stride()), array.dtype)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def filled(self, part: Tensor) -> Tensor:
        """Return the array whose bytes are given, in this layout."""
        array = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=part.device)
        # Copy the bytes first: a part may start at an address that is not aligned for the dtype.
        return array.copy_(part.clone().view(self.dtype).view(self.shape))


def _gathered(base: BaseWeight) -> BaseWeight:
    return BaseWeight(unshard(base.W), None if base.b is None else unshard(base.b))


def _is_small(base: BaseWeight) -> bool:
    return bool(base.W.device.type == "cpu" and min(base.W.shape) <= EXACT_SIDE)


def _threads_are_our_own() -> bool:
    """Return whether the number of threads can be set for one thread without affecting the others."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def _plan(
    weights: Mapping[str, BaseWeight], settings: str, group: dist.ProcessGroup
) -> tuple[str, str | None]:
    """Return two texts by which processes compare the layers that they adapt, and the values of their weights.

    The second text is None if the values cannot be compared.
    """
    outline = [(path, *(_described(tensor) for tensor in base)) for path, base in weights.items()]
    return repr((settings, outline)), _values(weights, dist.get_world_size(group))


def _described(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tuple(tensor.shape), str(tensor.dtype), is_sharded(tensor))


def _values(weights: Mapping[str, BaseWeight], processes: int) -> str | None:
    found: list[Any] = []
    for base in weights.values():
        for tensor in base:
            if tensor is None:
                continue
            if is_sharded(tensor):
                if tensor.device_mesh.size() != processes:
                    return None
                continue  # the processes hold parts of one tensor
            try:
                found.append(fingerprint(tensor if tensor.ndim == 2 else tensor[None, :]))
            except Exception:  # the decomposition reports what is wrong with the weight in its own words
                return None
    return repr(found)
