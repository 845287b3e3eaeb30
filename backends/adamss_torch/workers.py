"""Decomposing small layers several at a time, on the CPU.

The eigenvectors of a small matrix take about as long on two threads as on one. So each small layer gets one thread,
and there are as many of them at a time as PyTorch has threads. Always one: a result may differ in its last bit with
the number of threads, and is not to depend on how many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from adamss.backend import BaseWeight
from adamss.backend.interface import Compute, Each, batches
from adamss.core import Factors
from adamss.core.decomposition import EXACT_SIDE

__all__ = ["computed"]


def computed(compute: Compute, layers: Mapping[str, BaseWeight]) -> dict[str, Factors]:
    """Return the factors of all layers, in their order.

    Parameters
    ----------
    compute
        As for `adamss.backend.Division.factors`.
    layers
        Base weight of each layer by module path, whole.
    """
    found: dict[str, Factors] = {}
    for batch in batches(layers):
        with _workers(batch) as each:
            found |= compute(batch, each)
    return {path: found[path] for path in layers}


@contextmanager
def _workers(batch: Mapping[str, BaseWeight]) -> Iterator[Each]:
    """Give a `map` that takes small layers several at a time."""
    threads = torch.get_num_threads()
    if not (_is_small(next(iter(batch.values()))) and threads > 1 and _threads_are_our_own()):
        yield map
        return

    def begin() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    pool = ThreadPoolExecutor(min(len(batch), threads), thread_name_prefix="adamss", initializer=begin)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        # It holds for the calling thread alone, but threads that begin later take over what was said last.
        torch.set_num_threads(threads)


def _is_small(base: BaseWeight) -> bool:
    return bool(base.W.device.type == "cpu" and min(base.W.shape) <= EXACT_SIDE)


def _threads_are_our_own() -> bool:
    """Whether a thread can be told how many threads it may use, without a word to the others."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()
