"""Shared code of the commands for the paper's tables: arguments, journal, methods, training, and printing.

A table is a grid of runs (method, task, seed). Each run is one line of JSON in the journal. An interrupted run
continues from its last checkpoint, so the same command can be repeated until the table is complete.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from arguments import integer, positive, positive_number
from demo.in_torch import find_targets
from demo.sentences import quiet_transformers
from evidence.methods import is_head
from evidence.training import Journal
from tabulate import tabulate
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import adamss
from adamss.config import SEGMENTATIONS
from adamss_torch.backend import adapters_of
from adamss_torch.transformers import AdamssCallback
from paper.settings import MEAN, RANK, SUBSPACES, Method, Rates, Row, Schedule

PROTOCOL = 1
"""Version of these scripts; a change that affects weights or scores increases it. Older records are not reused."""


class MissingError(Exception):
    """A model or a data set is missing; the message says which folder to give or what to download."""


class DivergedError(Exception):
    """A loss, a prediction or a weight is not finite; the argument says at which step."""


# --- Loading ----------------------------------------------------------------------------------------------


@contextmanager
def told_if_missing(what: str, name: str, option: str) -> Iterator[None]:
    """Turn any failure to load something into a `MissingError` of one line."""
    if Path(name).is_absolute() and not Path(name).exists():
        raise MissingError(f"{what}: there is no {name}; give another folder with {option}")
    try:
        yield
    except Exception as error:  # the hub, datasets and transformers each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingError(
            f"{what} could not be loaded: download {name}, or give a folder with {option} ({reason})"
        ) from error


def pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Return ``loader.from_pretrained(name)``.

    Raises
    ------
    MissingError
        If `name` can be loaded neither from a folder nor from the hub.
    """
    with told_if_missing(f"the {loader.__name__.removeprefix('Auto')}", name, "--model"):
        return loader.from_pretrained(name, **options)


def data_set(folder: Path | None, name: str, *hub: str, needs: Mapping[str, Sequence[str]]) -> Any:
    """Return the parts of a data set, from a folder or from the hub.

    Parameters
    ----------
    folder : Path or None
        Folder with the data sets. ``folder/name`` was written by `save_to_disk`, or has files that
        `datasets.load_dataset` reads (CSV, JSON lines, Parquet, images in one folder for each class). None means the
        hub.
    name : str
        Name of the data set, and of its folder.
    hub : str
        Name on the hub, and optionally the configuration.
    needs : mapping of str to sequence of str
        Columns that each part must have. ``"a or b"`` means either of the two.

    Raises
    ------
    MissingError
        If the data set, a part or a column is missing.
    """
    import datasets

    path = Path(folder).resolve() / name if folder else None
    with told_if_missing(f"the data set {name}", str(path or hub[0]), "--data"):
        if path and ((path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(*([str(path)] if path else hub))
    for part, columns in needs.items():
        if part not in found:
            raise MissingError(f"the data set {name} has no part {part}; give another folder with --data")
        for column in columns:
            if not set(column.split(" or ")) & set(found[part].column_names):
                raise MissingError(
                    f"the data set {name} has no column {column} in {part}; give another folder with --data"
                )
    return found


def located(name: str | Path | None) -> str | None:
    """Return the absolute path if a file or folder of this name exists, else the name itself.

    The settings of a run contain it, so a folder must have one spelling whatever the working directory.
    """
    if name is None:
        return None
    return str(Path(name).resolve() if Path(name).exists() else name)


# --- Runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper: its runs, and how they are trained.

    Attributes
    ----------
    title : str
    rows : mapping of str to Row
        Models by name.
    methods : mapping of str to Method
    tasks : tuple of str
        Data sets to train on. Each has its own training.
    columns : tuple of str
        Names of the scores. They are the tasks if each training has one score.
    seeds : tuple of int
    epochs, batch, device_batch : int
        Number of epochs, examples of one optimiser step, and examples of one forward pass. Gradients are accumulated
        from `device_batch` to `batch`.
    warmup : float
        Share of the steps during which the learning rate rises.
    clip : float
        Largest norm of the gradient. 0 means no clipping.
    budget : Schedule
    subspaces : int or str
        K, or "estimate".
    dtype : str
        Default of ``--dtype``.
    save_steps : int or None
        Optimiser steps between checkpoints. None means one checkpoint after each epoch.
    constants : mapping of str to Any
        Further settings of the paper that determine the weights.
    training_options, scoring_options : tuple of str
        Arguments that only this command has. The former determine the weights, the latter only the scores of given
        weights.
    note : str
        Text below the table.
    """

    title: str
    rows: Mapping[str, Row]
    methods: Mapping[str, Method]
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch: int
    device_batch: int
    warmup: float
    clip: float
    budget: Schedule
    subspaces: int | str = SUBSPACES
    dtype: str = "fp32"
    save_steps: int | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    training_options: tuple[str, ...] = ()
    scoring_options: tuple[str, ...] = ()
    note: str = ""

    def parser(self, description: str) -> argparse.ArgumentParser:
        """Return an argument parser with the options that all commands share."""
        parser = argparse.ArgumentParser(description=description)
        add = parser.add_argument
        first = next(iter(self.rows))
        add("--row", choices=list(self.rows), default=first, help="model of the paper (default: %(default)s)")
        add("--model", help="folder or hub name of its weights (default: the paper's, from the hub)")
        add("--data", type=Path, metavar="FOLDER", help="with a folder of each data set (default: the hub)")
        add("--tasks", nargs="+", choices=self.tasks, default=list(self.tasks))
        add("--methods", nargs="+", choices=list(self.methods), default=list(self.methods))
        add(
            "--seeds",
            nargs="+",
            type=integer(0, 2**32 - 1),
            default=list(self.seeds),
            help="default: the paper's",
        )
        add(
            "--output", type=Path, default=Path("paper-output"), metavar="FOLDER", help="where the journal is"
        )
        add("--epochs", type=positive, default=self.epochs, help="default: %(default)s")
        more = "examples at a time, accumulated to the paper's batch (default: %(default)s)"
        add("--device-batch", type=positive, default=self.device_batch, metavar="N", help=more)
        add("--dtype", choices=["fp32", "bf16"], default=self.dtype, help="default: %(default)s")
        as_in = "AdaMSS as the authors' code or as their text has it (default: %(default)s)"
        add("--variant", choices=["reference", "paper"], default="reference", help=as_in)
        add(
            "--subspaces",
            type=subspaces,
            default=self.subspaces,
            metavar="K",
            help='or "estimate": default %(default)s',
        )
        ways = [name for name in SEGMENTATIONS if name != "ksubspaces"]  # ksubspaces would need a dimension
        add("--segmentation", choices=ways, help="default: that of the variant")
        add("--target", type=positive, help="subspaces that the budget leaves (default: in settings.py)")
        add("--learning-rate", type=positive_number, help="of the adapter (default: the paper's)")
        add("--workers", type=integer(0), default=0, help="processes that load data (default: %(default)s)")
        add("--report", action="store_true", help="print the table of the journal and run nothing")
        return parser


def subspaces(text: str) -> int | str:
    """Read the value of ``--subspaces``: a positive integer, or "estimate"."""
    return text if text == "estimate" else positive(text)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a table.

    Attributes
    ----------
    table : Table
    arguments : argparse.Namespace
    task : str
    method : Method
    seed : int
    """

    table: Table
    arguments: argparse.Namespace
    task: str
    method: Method
    seed: int

    @property
    def row(self) -> Row:
        """Row of the table: the paper's model with its settings."""
        return self.table.rows[self.arguments.row]

    @property
    def model(self) -> str:
        """Folder or hub name of the weights."""
        return self.arguments.model or self.row.hub

    @property
    def rates(self) -> Rates:
        """Learning rates and weight decay: from the paper for AdaMSS and the linear probe, else chosen by us."""
        rates = self.row.chosen.get(self.method.kind, self.row.rates[self.task])
        new = self.arguments.learning_rate
        return rates if new is None else Rates(new, rates.head, rates.weight_decay)

    @property
    def schedule(self) -> Schedule:
        """Schedule of the budget. Its target is that of ``--target``, else of the row, else of the table."""
        target = self.arguments.target or self.row.target or self.table.budget.target
        return replace(self.table.budget, target=target)

    def training(self) -> dict[str, Any]:
        """Return everything that determines the weights, as plain values."""
        given = vars(self.arguments)
        names = ["epochs", "dtype", *self.table.training_options]
        special: dict[str, Any] = {}
        if self.method.kind == "adamss":
            names += ["variant", "subspaces", "segmentation"]
            special["rank"] = RANK
        if self.method.budget:
            special["schedule"] = asdict(self.schedule)
        return {
            "protocol": PROTOCOL,
            "table": self.table.title,
            "task": self.task,
            "method": asdict(self.method),
            "seed": self.seed,
            "model": located(self.model),
            "data": located(self.arguments.data),
            "rates": asdict(self.rates),
            "batch": self.table.batch,
            "warmup": self.table.warmup,
            "clip": self.table.clip,
            **self.table.constants,
            **special,
            **{name: given[name] for name in names},
        }

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the scores, as plain values for the journal."""
        return self.training() | {name: vars(self.arguments)[name] for name in self.table.scoring_options}

    @property
    def key(self) -> str:
        """Hash of the settings, under which the journal stores the run."""
        return hashed(self.settings())

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints. It depends only on what determines the weights, not on how they are scored."""
        return self.arguments.output / "runs" / hashed(self.training())


def hashed(settings: Mapping[str, Any]) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def complete(
    argv: Sequence[str] | None,
    table: Table,
    parser: argparse.ArgumentParser,
    score: Callable[[Run], dict[str, Any]],
) -> int:
    """Do the runs of a table that the journal lacks, and print the table.

    Parameters
    ----------
    argv : sequence of str or None
        Arguments of the command.
    table : Table
    parser : argparse.ArgumentParser
    score : callable
        ``run -> record``: trains, and returns a dict with ``scores`` by column, in per cent, and the items of
        `counted`.

    Returns
    -------
    int
        Exit status. It is 2 if a model or a data set is missing; the table then lacks the runs that need it.
    """
    arguments = parser.parse_args(argv)
    for name in ("tasks", "methods", "seeds"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    if table.batch % arguments.device_batch:
        parser.error(f"--device-batch must divide the batch of {table.batch}")
    if torch.cuda.device_count() > 1 and not arguments.report:
        parser.error("the batch is the paper's on one GPU: set CUDA_VISIBLE_DEVICES to one of them")
    quiet_transformers()
    # Without this variable tokenizers warns about the processes that load data.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"transformers\.|accelerate\.|torch\.|peft\.|datasets\.")
    journal = Journal(arguments.output / "runs.jsonl")
    records = []
    missing: dict[str, str] = {}  # message for each task whose model or data set is missing
    for task in arguments.tasks:
        for name in arguments.methods:
            for seed in arguments.seeds:
                method = table.methods[name]
                run = Run(table=table, arguments=arguments, task=task, method=method, seed=seed)
                if not (run in journal or arguments.report or task in missing):
                    print(f"{task}, {name}, seed {seed}", file=sys.stderr)
                    try:
                        journal.add(run, finished(run, score))
                    except MissingError as error:
                        missing[task] = str(error)
                if run in journal:
                    records.append(journal[run])
    print_table(table, arguments, records)
    for message in dict.fromkeys(missing.values()):
        print(message, file=sys.stderr)
    return 2 if missing else 0


def finished(run: Run, score: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a run, and remove its checkpoints."""
    # The recorded seconds of a resumed run cover only the time since it was resumed.
    start, resumed = time.perf_counter(), last_checkpoint(run.folder) is not None
    try:
        found = score(run)
    except DivergedError as error:
        found = {"diverged": error.args[0]}
    if torch.cuda.is_available():
        gc.collect()  # model and optimiser form a reference cycle
        torch.cuda.empty_cache()
    for checkpoint in run.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return found | {"seconds": round(time.perf_counter() - start, 1), "resumed": resumed}


# --- Methods ----------------------------------------------------------------------------------------------


def adapted(
    model: nn.Module, run: Run, *, targets: Sequence[str] = (), head: Sequence[str] = ()
) -> nn.Module:
    """Prepare a model for the method of a run: add the adapter, and freeze all other parameters except the head.

    Parameters
    ----------
    model : nn.Module
    run : Run
    targets : sequence of str
        Names of the layers to adapt. Empty means query and value, under the names that the architecture uses.
    head : sequence of str
        Names of the modules that are trained whole.
    """
    method, arguments = run.method, run.arguments
    if torch.cuda.is_available():
        model.to("cuda")  # the Trainer would move it later, but decomposing the weights is faster on the GPU
    targets = list(targets) or find_targets(model)
    if method.kind == "full":
        return model
    if method.kind == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in head)
        return model
    if method.kind == "adamss":
        given = {"subspaces": arguments.subspaces, "segmentation": arguments.segmentation}
        config = getattr(adamss.AdamssConfig, arguments.variant)(
            targets=targets,
            rank=RANK,
            subspace_rank=method.rank,
            modules_to_save=list(head),
            seed=run.seed,
            **{name: value for name, value in given.items() if value is not None},
        )
        return adamss.attach(model, config)
    from peft import LoraConfig, get_peft_model

    pissa = method.kind == "pissa"
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.rank if pissa else 2 * method.rank,
        init_lora_weights="pissa_niter_4" if pissa else True,
        bias="lora_only" if method.biases else "none",
        target_modules=targets,
        modules_to_save=list(head) or None,
    )
    return get_peft_model(model, config)


def trained(model: nn.Module) -> int:
    """Count the parameters that are trained at present, without those of the head and of frozen subspaces."""
    adapters = adapters_of(model)
    if adapters:
        return sum(adamss.core.count_factors(each.factors(), active_only=True) for each in adapters.values())
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))


# --- Training ---------------------------------------------------------------------------------------------


class FineTuning(Trainer):
    """The Trainer of transformers with two learning rates, which stops when the loss is not finite.

    Parameters
    ----------
    rates : Rates
        Learning rates and weight decay of AdamW. The head has its own rate.
    """

    def __init__(self, *arguments: Any, rates: Rates, **options: Any):
        super().__init__(*arguments, **options)
        self.rates = rates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW for the trained parameters, with separate groups for head and adapter."""
        if self.optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[is_head(name)].append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": groups[head], "lr": self.rates.head if head else self.rates.adapter}
                    for head in groups
                    if groups[head]
                ],
                weight_decay=self.rates.weight_decay,
            )
        return self.optimizer

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Take one step.

        Raises
        ------
        DivergedError
            If the loss is not finite.
        """
        loss = super().training_step(*arguments, **options)
        if not torch.isfinite(loss):
            raise DivergedError(f"step {self.state.global_step + 1}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the number of trained parameters in addition to what the Trainer logs."""
        super().log(logs | {"trained": trained(self.model)}, start_time)


def fit(
    model: nn.Module,
    run: Run,
    *,
    data: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    evaluated: Any = None,
    metric: Callable[[Any], dict[str, float]] | None = None,
    autocast: bool = True,
) -> FineTuning:
    """Train an adapted model, from the last checkpoint of the run if there is one.

    Parameters
    ----------
    model : nn.Module
    run : Run
    data : data set
        Training examples.
    collate : callable
        ``examples -> batch``.
    evaluated : data set or None
        Data set on which the model is scored after each epoch.
    metric : callable or None
        ``predictions with labels -> scores``.
    autocast : bool
        Whether ``--dtype bf16`` means autocast over float32 weights. If False, the caller has loaded the weights in
        bfloat16.

    Returns
    -------
    FineTuning
        The Trainer. Its ``state.log_history`` also has the logs of earlier processes that worked on the run.

    Raises
    ------
    DivergedError
        If a loss, or a weight after the last step, is not finite.
    """
    table, arguments = run.table, run.arguments
    steps = math.ceil(len(data) / table.batch) * arguments.epochs
    each = "epoch" if table.save_steps is None else "steps"
    interval = min(table.save_steps or 1, steps)
    settings = TrainingArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=arguments.device_batch,
        per_device_eval_batch_size=4 * arguments.device_batch,
        gradient_accumulation_steps=table.batch // arguments.device_batch,
        num_train_epochs=arguments.epochs,
        lr_scheduler_type="linear",
        warmup_steps=round(table.warmup * steps),
        max_grad_norm=table.clip,
        use_cpu=not torch.accelerator.is_available(),  # else the Trainer refuses bf16 without a GPU
        bf16=autocast and arguments.dtype == "bf16",
        eval_strategy="no" if evaluated is None else "epoch",
        logging_strategy=each,
        logging_steps=interval,
        save_strategy=each,
        save_steps=interval,
        save_total_limit=2,
        seed=run.seed,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=arguments.workers,
        logging_nan_inf_filter=False,  # losses that are not finite must be visible; they end the training
        disable_tqdm=not sys.stderr.isatty(),
    )
    callbacks = []
    if run.method.kind == "adamss":
        total = adamss.summary(model).total.K
        if run.method.budget and run.schedule.target >= total:
            print(NEVER_FALLS.format(total), file=sys.stderr)
        callbacks.append(AdamssCallback(run.schedule.config(steps, total) if run.method.budget else None))
    trainer = FineTuning(
        model,
        settings,
        rates=run.rates,
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=collate,
        compute_metrics=metric,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # the command prints only the table
    trainer.train(resume_from_checkpoint=last_checkpoint(run.folder))
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        # The loss of the last step was computed from the weights before it, so it may still be finite.
        raise DivergedError("the last step")
    return trainer


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None.

    A complete checkpoint has a readable state file, which the Trainer writes last.
    """
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _readable(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _readable(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except json.JSONDecodeError:
        return False


def counted(trainer: FineTuning) -> dict[str, Any]:
    """Return the number of trained parameters, averaged over the log entries, and the number of subspaces."""
    found = [entry["trained"] for entry in trainer.state.log_history if "loss" in entry]
    total = adamss.summary(trainer.model).total.K if adapters_of(trainer.model) else None
    return {"trained": statistics.fmean(found), "subspaces": total}


# --- The table --------------------------------------------------------------------------------------------

HEADERS = ["method", "task", "mean", "deviation", "median", "seeds", "paper"]
HEADERS += ["trained", "paper: trained", "diverged"]
NEVER_FALLS = (
    "the budget never falls, so that AdaMSS is AdaMSS_base: its target is not below the {} subspaces"
)


def print_table(table: Table, arguments: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> None:
    """Print our scores next to the paper's, then the runs that diverged or whose budget never fell."""
    row = table.rows[arguments.row]
    by_task = table.columns == table.tasks
    columns = [name for name in table.columns if name in arguments.tasks or not by_task]
    lines: list[list[Any]] = []
    for name in arguments.methods:
        own = [record for record in records if record["name"] == name]
        printed = row.published.get(name)
        means = []
        for column in columns:
            of_task = [r for r in own if column == r["task"] or not by_task]
            done = [r for r in of_task if "scores" in r]
            scores = [r["scores"][column] for r in done]
            means += [statistics.fmean(scores)] if scores else []
            lines.append(
                [
                    name,
                    column,
                    _shown(statistics.fmean(scores) if scores else None),
                    _shown(statistics.stdev(scores) if len(scores) > 1 else None),
                    _shown(statistics.median(scores) if scores else None),
                    len(scores),
                    _shown(printed.scores.get(column) if printed else None),
                    f"{statistics.fmean(r['trained'] for r in done):,.0f}" if done else "-",
                    printed.parameters if printed else "-",
                    len(of_task) - len(done) or "-",
                ]
            )
        if by_task and len(means) == len(table.columns):
            published = _shown(printed.scores.get(MEAN) if printed else None)
            lines.append(
                [name, MEAN, _shown(statistics.fmean(means)), "-", "-", "-", published, "-", "-", "-"]
            )
    print(f"{table.title}, {arguments.row}: {arguments.model or row.hub}")
    settings = f"{arguments.epochs} epochs, batch {table.batch}, {arguments.dtype}"
    print(f"{settings}; AdaMSS: the {arguments.variant}'s, R = {RANK}, K = {arguments.subspaces}")
    aligned = ("left", "left", *["right"] * (len(HEADERS) - 2))
    print(tabulate(lines, headers=HEADERS, colalign=aligned, disable_numparse=True))
    if table.note:
        print(table.note)
    for record in records:
        where = f"{record['task']}, {record['name']}, seed {record['seed']}"
        if "diverged" in record:
            print(f"diverged, in no mean: {where}, at {record['diverged']}")
        elif "schedule" in record and record["schedule"]["target"] >= record["subspaces"]:
            print(f"{where}: {NEVER_FALLS.format(record['subspaces'])}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
