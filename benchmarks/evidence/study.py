"""Studies: choose the learning rates of every task and method, run several seeds with them, and compare the results.

The rate is the one with the highest validation accuracy in a single run, whose seed is used only for the search. Ties
go to the smallest rate. If the best rate is at an edge of the method's grid, up to two further rates beyond that edge
are tried. If the best is still at the edge then, the tables mark it with an asterisk. All these runs use the first
rate of the head in `evidence.methods.HEAD_RATES`. Finally the other rate of the head is tried with the best rate, and
kept if it is better. A diverged run is never chosen and does not enter a mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from arguments import positive
from scipy import stats

from evidence.methods import Method, Rates
from evidence.tasks import PLANS, default_cache
from evidence.training import Job, Journal, Record, Runner

RESULTS = Path(__file__).parent / "results"

SEARCH_SEED = 1000
"""Seed of the runs that choose the learning rates. The reported runs have the seeds 0, 1, 2, ..."""

EXTENSIONS = 2
"""Largest number of rates that are tried beyond either edge of a grid."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method in a study.

    Attributes
    ----------
    method : Method
    follows : str or None
        Name of the entry whose learning rates this one takes. None means a search of its own.
    rate : float or None
        Learning rate of the adapter that replaces the searched one; the head's rate is kept. None means no
        replacement.
    seeds : int or None
        Number of seeds to run. None means that of the study.
    """

    method: Method
    follows: str | None = None
    rate: float | None = None
    seeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size of a study.

    Attributes
    ----------
    seeds : int
        Number of seeds for each method.
    steps : int or None
        Training steps. None means those of the task's plan.
    rates : int or None
        Number of rates to try, from the middle of each grid. None means all of them, and rates beyond the edges.
    """

    seeds: int = 5
    steps: int | None = None
    rates: int | None = None

    def job(self, task: str, method: Method, rates: Rates, seed: int | None) -> Job:
        """Return the job of one run; a seed of None means a run of the search."""
        return Job(
            task=task,
            method=method,
            rate=rates.adapter,
            head_rate=rates.head,
            seed=SEARCH_SEED if seed is None else seed,
            steps=self.steps or PLANS[task].steps,
            search=seed is None,
        )

    def final_jobs(self, task: str, entry: Entry, choice: Choice) -> dict[int, Job]:
        """Return the jobs with the chosen rates, by seed."""
        rates = Rates(adapter=choice.rate, head=choice.head_rate)
        return {seed: self.job(task, entry.method, rates, seed) for seed in range(entry.seeds or self.seeds)}

    def grid(self, method: Method) -> tuple[float, ...]:
        """Return the rates that are tried first."""
        if self.rates is None:
            return method.rates
        first = (len(method.rates) - self.rates + 1) // 2
        return method.rates[first : first + self.rates]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen learning rates.

    Attributes
    ----------
    rate : float
        Learning rate of the adapter. NaN if every run of the search diverged.
    edge : bool
        Whether `rate` is the lowest or the highest that was tried.
    head_rate : float
        Learning rate of the head. NaN until it is chosen.
    trials, diverged : int
        Number of runs in the search of both rates, and how many of them diverged.
    """

    rate: float
    edge: bool
    head_rate: float = math.nan
    trials: int = 0
    diverged: int = 0

    def __str__(self) -> str:
        return f"{self.rate:.1g}{'*' if self.edge else ''}"


# --- The learning rate ------------------------------------------------------------------------------------


def choose(found: Mapping[float, Record]) -> Choice:
    """Choose the rate with the highest validation accuracy, or the smallest of those that tie.

    Parameters
    ----------
    found : mapping of float to dict
        Record of each rate that was tried.
    """
    alive = {rate: record["validation"] for rate, record in found.items() if not record["diverged"]}
    if not alive:
        return Choice(rate=math.nan, edge=True)
    best = min(alive, key=lambda rate: (-alive[rate], rate))
    return Choice(rate=best, edge=len(found) > 1 and best in (min(found), max(found)))


def beyond(grid: Sequence[float], tried: Sequence[float], best: float) -> float | None:
    """Return the next rate to try, one grid step beyond the edge; None if the best is not at an edge or at the limit.

    Examples
    --------
    >>> beyond([0.001, 0.003, 0.01, 0.03], [0.001, 0.003, 0.01, 0.03], 0.03)
    0.09
    >>> beyond([0.001, 0.003, 0.01, 0.03], [0.001, 0.003, 0.01, 0.03], 0.01)
    """
    above, below = (sum(r > grid[-1] for r in tried), sum(r < grid[0] for r in tried))
    step = (grid[-1] / grid[0]) ** (1 / (len(grid) - 1)) if len(grid) > 1 else 1.0
    if best == max(tried) and above < EXTENSIONS:
        return float(f"{grid[-1] * step ** (above + 1):.1g}")
    if best == min(tried) and below < EXTENSIONS:
        return float(f"{grid[0] / step ** (below + 1):.1g}")
    return None


def search(
    journal: Journal, settings: Settings, task: str, method: Method
) -> tuple[Choice | None, list[Job]]:
    """Choose both rates from the records in the journal, or return the runs that are needed next.

    Returns
    -------
    Choice or None
        None while a run is missing.
    list of Job
        Missing runs that are known so far. Their results may ask for further runs.
    """

    def at(rate: float, head_rate: float = method.head_rates[0]) -> Job:
        return settings.job(task, method, Rates(adapter=rate, head=head_rate), None)

    grid = settings.grid(method)
    rates = list(grid)
    while True:
        if missing := [at(rate) for rate in rates if at(rate) not in journal]:
            return None, missing
        tried = [journal[at(rate)] for rate in rates]
        choice = choose(dict(zip(rates, tried, strict=True)))
        if math.isnan(choice.rate) or settings.rates is not None:
            return _counted(dataclasses.replace(choice, head_rate=method.head_rates[0]), tried), []
        further = beyond(grid, rates, choice.rate)
        if further is None:
            break
        rates.append(further)
    heads = {head: at(choice.rate, head) for head in method.head_rates}
    if missing := [job for job in heads.values() if job not in journal]:
        return None, missing
    best = choose({head: journal[job] for head, job in heads.items()})
    tried += [journal[job] for head, job in heads.items() if head != method.head_rates[0]]
    return _counted(dataclasses.replace(choice, head_rate=best.rate), tried), []


def _counted(choice: Choice, tried: Sequence[Record]) -> Choice:
    """Return the choice with the counts of the runs that led to it."""
    diverged = sum(record["diverged"] for record in tried)
    return dataclasses.replace(choice, trials=len(tried), diverged=diverged)


def rate_of(
    journal: Journal, settings: Settings, task: str, entry: Entry, entries: Mapping[str, Entry]
) -> Choice | None:
    """Return the rates of an entry, or of the one that it follows; None while runs of the search are missing."""
    leader = entries[entry.follows].method if entry.follows else entry.method
    choice, _ = search(journal, settings, task, leader)
    return dataclasses.replace(choice, rate=entry.rate, edge=False) if choice and entry.rate else choice


def conduct(runner: Runner, settings: Settings, task: str, entries: Mapping[str, Entry], label: str) -> None:
    """Do all runs of a study on one task that the journal lacks: first the searches, then the seeds."""
    journal = runner.journal
    while jobs := [
        job
        for entry in entries.values()
        if entry.follows is None
        for job in search(journal, settings, task, entry.method)[1]
    ]:
        runner.run(jobs, f"{label} {task}, learning rates")
    runner.run(final_jobs(journal, settings, task, entries), f"{label} {task}, seeds")


def final_jobs(
    journal: Journal, settings: Settings, task: str, entries: Mapping[str, Entry]
) -> Iterator[Job]:
    """Yield the runs with the chosen rates, for all entries whose search is complete."""
    for entry in entries.values():
        choice = rate_of(journal, settings, task, entry, entries)
        if choice is not None and not math.isnan(choice.rate):
            yield from settings.final_jobs(task, entry, choice).values()


# --- Outcomes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference with its 95 % interval.

    Attributes
    ----------
    mean : float
        Mean of the differences. NaN without any pair.
    low, high : float
        Ends of the interval. NaN with fewer than two pairs.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.low):
            return f"{100 * self.mean:+.1f}"
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Return the mean of ``ours - theirs`` over the common seeds, with its 95 % t interval.

    Parameters
    ----------
    ours, theirs : mapping of int to float
        Value of each seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = np.asarray([ours[seed] - theirs[seed] for seed in seeds])
    if not len(differences):
        return Difference(mean=math.nan, low=math.nan, high=math.nan)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Difference(mean=mean, low=math.nan, high=math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return Difference(mean=mean, low=mean - half, high=mean + half)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a method on one task.

    Attributes
    ----------
    choice : Choice
        Learning rates of the method.
    records : dict
        Records by seed, without those that diverged.
    diverged : int
        Number of seeds that diverged.
    runs : int
        Number of seeds that were run.
    """

    choice: Choice
    records: Mapping[int, Record]
    diverged: int
    runs: int

    def values(self, name: str = "test") -> dict[int, float]:
        """Return one figure of the records by seed."""
        return {seed: record[name] for seed, record in self.records.items()}

    @property
    def mean(self) -> float:
        """Mean test accuracy; NaN without records."""
        return float(np.mean(list(self.values().values()))) if self.records else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the test accuracy over the seeds; NaN with fewer than two records."""
        return float(np.std(list(self.values().values()), ddof=1)) if len(self.records) > 1 else math.nan

    @property
    def parameters(self) -> float:
        """Trained parameters without those of the head, averaged over the steps."""
        return float(np.mean(list(self.values("mean_trained").values()))) if self.records else math.nan

    def divergence(self) -> str:
        """Return a description of how many runs diverged; empty if none did."""
        if math.isnan(self.choice.rate):
            return f"at all {self.choice.trials} rates"
        return f"{self.diverged} of {self.runs}" if self.diverged else ""

    def trained(self) -> str:
        """Format the number of trained parameters; under a budget, its average over the steps and its final value."""
        if not self.records:
            return "-"
        ends = float(np.mean(list(self.values("end_trained").values())))
        start = next(iter(self.records.values()))["trained"]
        return f"{start:,}" if ends == start else f"{self.parameters:,.0f} (end {ends:,.0f})"


def outcomes(
    journal: Journal, settings: Settings, task: str, entries: Mapping[str, Entry]
) -> dict[str, Outcome]:
    """Return the outcome of every method that has a run at the chosen rates or that diverged at every rate."""
    found = {}
    for name, entry in entries.items():
        choice = rate_of(journal, settings, task, entry, entries)
        if choice is None:
            continue
        jobs = {} if math.isnan(choice.rate) else settings.final_jobs(task, entry, choice)
        records = {seed: journal[job] for seed, job in jobs.items() if job in journal}
        if records or math.isnan(choice.rate):
            alive = {seed: record for seed, record in records.items() if not record["diverged"]}
            found[name] = Outcome(
                choice=choice, records=alive, diverged=len(records) - len(alive), runs=len(records)
            )
    return found


def versions(journal: Journal) -> str:
    """Return a line with the number of runs in a journal and the package versions that they used."""
    found: dict[str, set[str]] = {}
    for record in journal.records.values():
        for name, version in record.get("versions", {}).items():
            found.setdefault(name, set()).add(version)
    named = (f"{name} {' and '.join(sorted(each))}" for name, each in found.items())
    return f"\n{len(journal.records):,} runs, with {', '.join(named)}"


HEADER = [
    "method",
    "trained",
    "rate",
    "head's",
    "trials",
    "accuracy",
    "deviation",
    "minus {baseline}",
    "diverged",
]


def rows(found: Mapping[str, Outcome], baseline: str) -> list[list[str]]:
    """Return the rows of a task's table, with accuracies in per cent."""
    reference = found[baseline].values() if baseline in found else {}
    return [
        [
            name,
            outcome.trained(),
            str(outcome.choice),
            "" if name == "head alone" else f"{outcome.choice.head_rate:.1g}",
            f"{outcome.choice.trials}"
            + (f" ({outcome.choice.diverged} diverged)" if outcome.choice.diverged else ""),
            "-" if math.isnan(outcome.mean) else f"{100 * outcome.mean:.1f}",
            "-" if math.isnan(outcome.deviation) else f"{100 * outcome.deviation:.1f}",
            "" if name == baseline else str(paired(outcome.values(), reference)),
            outcome.divergence(),
        ]
        for name, outcome in found.items()
    ]


# --- The command line -------------------------------------------------------------------------------------


def open_journal(arguments: argparse.Namespace, name: str) -> Journal:
    """Return the journal of a study.

    Its file is that of ``--journal``. The default is in `RESULTS`, or in the cache for a dry run.

    Raises
    ------
    SystemExit
        If ``--report`` is given and the journal has no runs.
    """
    usual = default_cache() / f"{name}-quick.jsonl" if arguments.quick else RESULTS / f"{name}.jsonl"
    journal = Journal(arguments.journal or usual)
    if arguments.report and not journal.records:
        raise SystemExit(f"{journal.path} has no runs to report; run the command without --report first")
    return journal


def parser(description: str, journal: str) -> argparse.ArgumentParser:
    """Return an argument parser with the options that all studies share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--tasks", nargs="+", choices=list(PLANS), help="tasks to run on")
    result.add_argument("--seeds", type=positive, help="runs of each method with the chosen learning rate")
    result.add_argument("--steps", type=positive, help="training steps (default: those of the task's plan)")
    result.add_argument("--journal", type=Path, help=f"file of the runs (default: {journal})")
    result.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, help="default: one for each core"
    )
    result.add_argument("--cache", type=Path, help="folder for hidden states (default: the user's cache)")
    result.add_argument(
        "--report", action="store_true", help="print the tables of the journal and run nothing"
    )
    result.add_argument(
        "--quick", action="store_true", help="a dry run of a few minutes, with its own journal"
    )
    return result
