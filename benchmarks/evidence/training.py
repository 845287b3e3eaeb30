"""Training runs, and the journal in which they are recorded.

A run is determined by its `Job`: the same job gives the same record, except for the seconds. The seed decides the
order of the batches, the initial values of the head, dropout, and the method's own random draws. Batches, initial
head and dropout are the same for all methods, so that methods can be compared within a seed.

A run uses AdamW without weight decay and without gradient clipping. The learning rate rises linearly during the first
6 % of the steps and then falls linearly to zero. The head has its own rate (`evidence.methods.HEAD_RATES`), with the
same schedule. Each run uses one thread, and several processes work in parallel.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from demo.sentences import batch_order
from torch import Tensor, nn
from tqdm import tqdm

from evidence import tasks
from evidence.methods import HEAD_RATES, Method, Rates, Session
from evidence.tasks import Part, Task

WARMUP = 0.06
"""Share of the steps during which the learning rate rises."""

PROTOCOL = 1
"""Version of the training procedure; a change that affects records increases it. Older records are not reused."""

PACKAGES = ("adamss", "torch", "peft", "transformers", "numpy")

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that determines a run.

    Attributes
    ----------
    task : str
        Key of `evidence.tasks.PLANS`.
    method : Method
    rate, head_rate : float
        Learning rates of the adapter and of the head.
    seed : int
    steps : int
    search : bool
        Whether the run belongs to the search of the rates. Such a run never uses the test part.
    """

    task: str
    method: Method
    rate: float
    seed: int
    steps: int
    head_rate: float = HEAD_RATES[0]
    search: bool = False

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the record, as plain values."""
        plan = {key: value for key, value in asdict(tasks.PLANS[self.task]).items() if key != "steps"}
        return {
            "task": {"name": self.task, **plan},
            "method": {**self.method.settings(), "head_rate": self.head_rate},
            "rate": self.rate,
            "seed": self.seed,
            "steps": self.steps,
            "search": self.search,
            "protocol": PROTOCOL,
        }

    @property
    def key(self) -> str:
        """Hash of the settings, under which the journal stores the run."""
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


# --- One run ----------------------------------------------------------------------------------------------


def schedule(steps: int) -> Callable[[int], float]:
    """Return the function from step to factor of the learning rate: a linear rise, then a linear fall to zero."""
    rise = max(1, round(WARMUP * steps))
    return lambda step: min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))


@torch.no_grad()
def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return accuracy and mean cross entropy on a part, with dropout off."""
    model.eval()
    right, loss = 0, 0.0
    for batch in part.batches(100):
        logits = model(batch.hidden, batch.mask)
        right += int((logits.argmax(1) == batch.labels).sum())
        loss += float(nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
    return right / len(part), loss / len(part)


def run(
    task: Task,
    method: Method,
    learning_rate: float,
    seed: int,
    steps: int,
    *,
    head_rate: float = HEAD_RATES[0],
    search: bool = False,
    watch: Callable[[int, Session], None] | None = None,
) -> Record:
    """Train once and evaluate.

    Parameters
    ----------
    task : Task
    method : Method
    learning_rate, head_rate : float
        Learning rates of the adapter and of the head.
    seed : int
    steps : int
    search : bool
        Whether to skip the evaluation on the test part.
    watch : callable or None
        ``(step, session) -> None``: called after each step with the number of completed steps.

    Returns
    -------
    dict
        ``validation``, ``validation_loss``, ``test`` and ``test_loss`` are accuracies and cross entropies. They are
        None if the loss was not finite or the part was not used. ``trained``, ``end_trained`` and ``mean_trained``
        count the trained parameters without those of the head: at the start, at the end, and averaged over the steps.
        ``last_loss`` is the mean loss over the last tenth of the steps. ``diverged`` tells whether a loss was not
        finite or the last loss is above that of guessing, log(classes). ``seconds`` is the duration.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    batch = tasks.PLANS[task.name].batch
    rates = Rates(adapter=learning_rate, head=head_rate)
    session = method.start(task.model(seed), task.targets, rates, seed, steps)
    trained, trained_steps, losses = session.live(), [], []
    scheduler = torch.optim.lr_scheduler.LambdaLR(session.optimizer, schedule(steps))
    for step, indices in enumerate(batch_order(len(task.train), steps, batch, seed)):
        torch.manual_seed(1_000_003 * seed + step)  # the same dropout for all methods
        trained_steps.append(session.live())
        losses.append(train_step(session, task.train.take(indices), step))
        if not math.isfinite(losses[-1]):
            break
        scheduler.step()
        if watch is not None:
            watch(step + 1, session)
    last = float(np.mean(losses[-max(1, steps // 10) :]))
    diverged = not math.isfinite(last) or last > math.log(len(task.classes))
    results: Record = dict.fromkeys(["validation", "validation_loss", "test", "test_loss"])
    if math.isfinite(last):
        results["validation"], results["validation_loss"] = evaluate(session.model, task.validation)
        if not search:
            results["test"], results["test_loss"] = evaluate(session.model, task.test)
    return {
        "trained": trained,
        "mean_trained": round(float(np.mean(trained_steps)), 1),
        "end_trained": session.live(),
        **results,
        "last_loss": last if math.isfinite(last) else None,
        "diverged": diverged,
        "seconds": round(time.perf_counter() - started, 2),
    }


def train_step(session: Session, batch: Part, step: int) -> float:
    """Take one step and return the loss without the method's penalty.

    If loss or penalty are not finite, no step is taken and NaN is returned.
    """
    model = session.model.train()
    loss = nn.functional.cross_entropy(model(batch.hidden, batch.mask), batch.labels)
    whole: Tensor = loss if session.penalty is None else loss + session.penalty()
    if not torch.isfinite(whole):
        return math.nan
    whole.backward()
    session.optimizer.step()
    if session.after_step is not None:
        session.after_step(step + 1)
    session.optimizer.zero_grad()
    return loss.item()


# --- The journal ------------------------------------------------------------------------------------------


class Journal:
    """File of records, with one JSON object a line in the order in which the runs ended.

    An interruption may cut off the last line. Such a line is ignored, and the first `add` removes it. Any other line
    that cannot be read is an error.

    Parameters
    ----------
    path : Path
        File of the journal. It is read if it exists; else the first `add` makes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, Record] = {}
        self._repaired: bytes | None = None
        if path.is_dir():
            raise SystemExit(f"{path} is a folder; give the name of a file for the journal")
        if not path.exists():
            return
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                key = record["key"]
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines) - 1:
                    raise SystemExit(f"{path}, line {number + 1} is damaged: {error}") from error
                self._repaired = whole[: len(whole) - len(line)]
                return
            self.records[key] = record
        if lines and not lines[-1].endswith(b"\n"):
            self._repaired = whole + b"\n"

    def _repair(self) -> None:
        """Repair the end of the file.

        This happens only before records are added, because a command that just reads may see a line that another
        command is still writing.
        """
        if self._repaired is not None:
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_bytes(self._repaired)
            unfinished.replace(self.path)
            self._repaired = None

    def __contains__(self, job: Job) -> bool:
        return job.key in self.records

    def __getitem__(self, job: Job) -> Record:
        return self.records[job.key]

    def add(self, job: Job, record: Record) -> None:
        """Append the record of a job."""
        whole = {"key": job.key, "name": job.method.name, **job.settings(), **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[job.key] = whole


# --- Many runs --------------------------------------------------------------------------------------------


def one_thread() -> None:
    """Limit this process to one thread, and silence its warnings."""
    torch.set_num_threads(1)
    # Every process would print the deprecation warnings of libraries, which say nothing about the results.
    warnings.simplefilter("ignore")


def work(job: Job, cache: Path | None) -> Record:
    """Run a job in this process, and return its record with package versions and date."""
    record = run(
        tasks.load_task(job.task, cache),
        job.method,
        job.rate,
        job.seed,
        job.steps,
        head_rate=job.head_rate,
        search=job.search,
    )
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {**record, "versions": versions, "date": f"{datetime.now(UTC):%Y-%m-%d}"}


class Runner:
    """Runs the jobs that a journal lacks, on several processes. Only the parent process writes the journal.

    Parameters
    ----------
    journal : Journal
    processes : int
        Number of worker processes. With 1, jobs run in this process.
    cache : Path or None
        Folder of the cached hidden states. None means the default.
    """

    def __init__(self, journal: Journal, processes: int = 1, cache: Path | None = None):
        self.journal, self.processes, self.cache = journal, processes, cache
        self._pool: Executor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, jobs: Iterable[Job], label: str = "") -> None:
        """Run the jobs that the journal lacks, and record each as soon as it ends."""
        pending = {job.key: job for job in jobs if job not in self.journal}
        if not pending:
            return
        # Fill the cache before the workers start, else each of them would run the frozen layers.
        for name in dict.fromkeys(job.task for job in pending.values()):
            tasks.load_task(name, self.cache)
        with tqdm(total=len(pending), desc=label, unit="run", mininterval=1) as progress:
            for job, record in self._results(list(pending.values())):
                self.journal.add(job, record)
                progress.update()

    def _results(self, jobs: Sequence[Job]) -> Iterable[tuple[Job, Record]]:
        if self.processes == 1:
            one_thread()
            yield from ((job, work(job, self.cache)) for job in jobs)
            return
        futures = {self._processes().submit(work, job, self.cache): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()

    def _processes(self) -> Executor:
        if self._pool is None:
            # A spawned worker imports torch itself, and OpenMP reads the variable then.
            os.environ["OMP_NUM_THREADS"] = "1"
            self._pool = ProcessPoolExecutor(
                self.processes, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread
            )
        return self._pool
