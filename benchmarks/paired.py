"""Paired timing: the compared calls alternate, so that a slow moment of the machine affects all of them.

The ratio to the baseline is taken within each round. The median ratio is reported with a distribution-free
confidence interval.
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
    """Ratio of two times, with its confidence interval.

    Attributes
    ----------
    median : float
        Median of the ratios within the rounds.
    low, high : float
        Ends of the confidence interval of the median, whose level is at least 95 %.
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

    Each round calls every callable once, in a random order. In a fixed order a call would always find the caches and
    the heap that the same predecessor leaves, which has been seen to shift a ratio by a tenth.

    Parameters
    ----------
    calls : mapping of str to callable
        Functions to time. Each must leave the state in which the next one can run.
    repeats : int
        Number of timed rounds.
    warmup : int
        Number of rounds before those, which are not timed.
    label : str
        Text of the progress bar.

    Returns
    -------
    dict of str to (repeats,) array
        Seconds of every call. Equal indices belong to the same round.
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
    """Make glibc keep freed memory instead of returning it to the system and requesting it again.

    Whether glibc returns memory depends on where a tensor happens to lie in the heap, and fresh pages cost up to a
    tenth of a layer's step. Without this function, the time ratio of two equal programs varies from run to run.
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
        Seconds of two callables in the same rounds. With fewer than six rounds no interval reaches 95 %, and its
        ends are NaN.
    """
    ratios = numerator / denominator
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(confidence_level=0.95)
    return Ratio(median=float(np.median(ratios)), low=float(interval.low), high=float(interval.high))


def paired_ratios(
    calls: Mapping[str, Callable[[], object]], *, baseline: str, repeats: int = 100, warmup: int = 5
) -> dict[str, Ratio]:
    """Time callables in alternation and return the ratio of each to the baseline.

    Parameters
    ----------
    calls, repeats, warmup
        As for `paired_times`.
    baseline : str
        Name of the call whose time the others are divided by.
    """
    seconds = paired_times(calls, repeats=repeats, warmup=warmup)
    return {name: ratio(seconds[name], seconds[baseline]) for name in calls}


def environment(packages: Iterable[str]) -> dict[str, object]:
    """Describe the environment of a measurement: machine, threads, package versions, date (UTC).

    Parameters
    ----------
    packages : iterable of str
        Distributions to report the versions of. If torch is among them, its number of threads is reported too.
    """
    packages = list(packages)
    threads = {}
    if "torch" in packages:
        import torch

        threads["torch_threads"] = torch.get_num_threads()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        # Threads that spin on a core that another program needs can make a step ten times slower.
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
