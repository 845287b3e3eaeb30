"""Decomposing small layers several at a time, on the CPU.

The eigenvectors of a small matrix take as long on many threads as on one, and of the many small calls of k-means most
have nothing to divide. So each small layer gets one thread, and there are as many of them at a time as PyTorch has
threads. Always one: a result may differ in its last bit with the number of threads, and is not to depend on how many
layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from adamss.backend import BaseWeight
from adamss.core import Factors
from adamss.core.decomposition import EXACT_SIDE

__all__ = ["computed"]


def computed(
    compute: Callable[[str, BaseWeight], Factors], layers: Mapping[str, BaseWeight]
) -> dict[str, Factors]:
    """Return ``{path: compute(path, base)}`` in the order of the layers.

    Parameters
    ----------
    compute
        Return the factors of a layer. Called from several threads, if there are several small layers.
    layers
        Base weight of each layer by module path, whole.

    Raises
    ------
    Exception
        What `compute` raises for the first layer for which it does.
    """
    small = [path for path, base in layers.items() if _is_small(base)]
    found: dict[str, Factors] = {}
    if small and _threads_are_our_own():
        with _single_threads(min(len(small), torch.get_num_threads())) as workers:
            pending = [workers.submit(compute, path, layers[path]) for path in small]
            found = {path: each.result() for path, each in zip(small, pending, strict=True)}
    return {path: found[path] if path in found else compute(path, base) for path, base in layers.items()}


def _is_small(base: BaseWeight) -> bool:
    return bool(base.W.device.type == "cpu" and min(base.W.shape) <= EXACT_SIDE)


def _threads_are_our_own() -> bool:
    """Whether a thread can be told how many threads it may use, without a word to the others."""
    return torch.get_num_threads() > 1 and "parallel backend: OpenMP" in torch.__config__.parallel_info()


@contextmanager
def _single_threads(count: int) -> Iterator[Executor]:
    threads = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    pool = ThreadPoolExecutor(count, thread_name_prefix="adamss", initializer=begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # It holds for the calling thread alone, but threads that begin later take over what was said last.
        torch.set_num_threads(threads)
