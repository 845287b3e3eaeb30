"""Paired measurement: what is compared takes turns, so that a slow moment of the machine slows all of it.

The ratio to the baseline is taken within each round, and the median is reported with an interval that
assumes nothing about the distribution of the times.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

import numpy as np
from scipy import stats
from tqdm import tqdm

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's ``mallopt``."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Time of one thing over the time of another.

    Attributes
    ----------
    median : float
        Median of the ratios within the rounds.
    low, high : float
        Interval of the median that holds the true one with at least 95 % probability.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_times(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 100, warmup: int = 5, label: str = ""
) -> dict[str, np.ndarray]:
    """Time callables in alternation.

    Each round calls every one of them once, in an order of its own: what runs behind a given other finds the caches
    and the heap that this one leaves, which has been seen to shift a ratio by a tenth.

    Parameters
    ----------
    calls : mapping of str to callable
        What to time; each call has to leave things as the next one wants to find them.
    repeats : int
        Number of rounds.
    warmup : int
        Rounds before them that are not timed.
    label : str
        What the progress bar says.

    Returns
    -------
    dict of str to (repeats,) array
        Seconds of every call; the same index is the same round.
    """
    keep_memory()
    names = list(calls)
    seconds = {name: np.empty(repeats) for name in names}
    for _ in range(warmup):
        for call in calls.values():
            call()
    order = np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in tqdm(range(repeats), desc=label, leave=False, disable=None):
            for name in order.permutation(names):
                start = time.perf_counter()
                calls[name]()
                seconds[name][turn] = time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return seconds


def keep_memory() -> None:
    """Have glibc keep the memory that is freed, rather than give it back to the system and ask for it anew.

    Whether a program gives it back depends on where a tensor happens to end up, and pages that are asked for anew
    cost up to a tenth of a layer's step: without this, the ratio of two programs that do the same shifts from run to
    run.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for parameter, value in (M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_MAX, 0), (M_TOP_PAD, 2**29):
            if mallopt is not None:
                mallopt(parameter, value)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Ratio:
    """Return the median of ``numerator / denominator`` with its 95 % interval from order statistics.

    Parameters
    ----------
    numerator, denominator : (repeats,) array
        Seconds of two callables in the same rounds. Below six rounds no interval has 95 %, and it is NaN.
    """
    ratios = numerator / denominator
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(confidence_level=0.95)
    return Ratio(median=float(np.median(ratios)), low=float(interval.low), high=float(interval.high))


def paired_ratios(
    calls: Mapping[str, Callable[[], object]], *, baseline: str, repeats: int = 100, warmup: int = 5
) -> dict[str, Ratio]:
    """Time callables in alternation and return the ratio of each to one of them.

    Parameters
    ----------
    calls, repeats, warmup
        As for `paired_times`.
    baseline : str
        Name of the call that the others are divided by.
    """
    seconds = paired_times(calls, repeats=repeats, warmup=warmup)
    return {name: ratio(seconds[name], seconds[baseline]) for name in calls}


def environment(packages: Iterable[str]) -> dict[str, object]:
    """Describe what was measured on: machine, threads, versions of the packages, date (UTC).

    Parameters
    ----------
    packages : iterable of str
        Distributions whose versions to give; the threads of PyTorch are given if it is among them.
    """
    packages = list(packages)
    threads = {}
    if "torch" in packages:
        import torch

        threads["torch_threads"] = torch.get_num_threads()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        # Two threads that spin while a third wants their core can make a step ten times slower.
        print(f"other programs are running (load average {load}): expect wide intervals", file=sys.stderr)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        **threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": load,
        **{name: metadata.version(name) for name in packages},
    }
