"""Compare AdaMSS with other methods: test accuracy over seeds, each method at its own best learning rate.

For every task and method, four learning rates are tried with one seed, and more if the best of them is at the edge of
the grid. Five other seeds are then run with the best rate (see `evidence.study`). The column "trials" counts the runs
of the search. The table of each task has the mean difference to a baseline, paired by seed, with its 95 % t interval.
The interval covers only the variation between seeds, because all runs are tested on the same examples. The last
table summarises all tasks. ::

    python benchmarks/evidence/accuracy.py --plot accuracy.png
    python benchmarks/evidence/accuracy.py --quick

Every run is written to a journal as soon as it ends. So an interrupted command resumes where it stopped, and
``--report`` prints the tables of the runs in the journal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages demo and evidence

import numpy as np
from arguments import picture
from scipy import stats
from tabulate import tabulate

from evidence import study
from evidence.methods import METHODS, NOT_COMPARED
from evidence.study import Entry, Outcome, Settings
from evidence.tasks import PLANS
from evidence.training import Runner

GROUPS = {"first": ("first",), "then": ("then",), "all": ("first", "then")}
QUICK_METHODS = ("head alone", "LoRA r=8", "AdaMSS K=10 r=1", "AdaMSS K=10 r=1, budget")

Outcomes = Mapping[str, Mapping[str, Outcome]]
"""Outcomes by task, then by method."""


def over_tasks(found: Outcomes) -> list[list[str]]:
    """Return the rows of the last table: the methods that were run on every task, by descending mean accuracy."""
    shared = [name for name in METHODS if all(name in each and each[name].records for each in found.values())]
    means = np.asarray([[each[name].mean for name in shared] for each in found.values()])
    if not means.size:
        return []
    ranks = stats.rankdata(-means, axis=1)
    parameters = np.mean([[each[name].parameters for name in shared] for each in found.values()], axis=0)
    table = [
        [name, f"{parameters[i]:,.0f}", f"{100 * means[:, i].mean():.1f}", f"{ranks[:, i].mean():.1f}"]
        for i, name in enumerate(shared)
    ]
    order = np.argsort(-means.mean(0), kind="stable")
    return [table[i] for i in order]


def print_tables(found: Outcomes, baseline: str) -> None:
    """Print a table for each task, one over all tasks, and the methods that are not compared."""
    header = [title.format(baseline=baseline) for title in study.HEADER]
    for task, each in found.items():
        print(f"\n{task}: test accuracy in percent, mean and deviation over seeds")
        print(tabulate(study.rows(each, baseline), headers=header, disable_numparse=True))
    if len(found) > 1:
        print(f"\nover {', '.join(found)}: means of the tasks' means, for the methods that all of them have")
        columns = ["method", "trained", "accuracy", "rank"]
        print(tabulate(over_tasks(found), headers=columns, disable_numparse=True))
    for name, reason in NOT_COMPARED.items():
        print(f"not compared: {name}, {reason}")


def family(name: str) -> str:
    """Return the entry of the picture's legend that a method belongs to."""
    if name.startswith("AdaMSS"):
        return "AdaMSS, budget" if name.endswith("budget") else "AdaMSS"
    return name.partition(" r=")[0] if name.startswith("LoRA r=") else name


def draw(found: Outcomes, path: Path) -> None:
    """Draw accuracy against trained parameters, with one panel for each task.

    The parameters do not include the head's and are averaged over the steps. The bars are 95 % t intervals of the
    mean over the seeds. A dotted line shows the accuracy of training only the head.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "adamss"  # the same file for the same journal
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(found), figsize=(4.6 * len(found), 4.8), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(family(name) for each in found.values() for name in each))
    names = [name for name in names if name != "head alone"]
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    for axis, (task, each) in zip(axes[0], found.items(), strict=True):
        for kind in names:
            members = [o for n, o in each.items() if family(n) == kind and o.records and o.parameters]
            if not members:
                continue
            members.sort(key=lambda outcome: outcome.parameters)
            errors = [interval(outcome) for outcome in members]
            axis.errorbar(
                [outcome.parameters for outcome in members],
                [100 * outcome.mean for outcome in members],
                yerr=[100 * error for error in errors],
                color=colours[kind],
                marker="o" if kind.startswith("AdaMSS") else "s",
                markersize=5,
                linewidth=1,
                capsize=2,
                label=kind,
            )
        if "head alone" in each:
            axis.axhline(100 * each["head alone"].mean, color="grey", linestyle=":", label="head alone")
        axis.set(title=task, xscale="log", xlabel="trained parameters")
    axes[0][0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def interval(outcome: Outcome) -> float:
    """Return half the width of the 95 % t interval of the mean; 0 for one seed."""
    count = len(outcome.records)
    return float(stats.t.ppf(0.975, count - 1) * outcome.deviation / np.sqrt(count)) if count > 1 else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables; return the exit status."""
    parser = study.parser("Compare AdaMSS with other methods.", "results/accuracy.jsonl beside this file")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help="methods to run")
    parser.add_argument("--group", choices=list(GROUPS), default="all", help="which methods (default: all)")
    parser.add_argument("--baseline", choices=list(METHODS), default="LoRA r=8", metavar="NAME")
    parser.add_argument("--plot", type=picture, help="file for the picture, .png, .svg or .pdf")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    chosen = arguments.methods or (QUICK_METHODS if quick else METHODS)
    groups = ("first", "then") if arguments.methods else GROUPS[arguments.group]
    entries = {name: Entry(method=METHODS[name]) for name in chosen if METHODS[name].group in groups}
    names = arguments.tasks or (["docstrings"] if quick else list(PLANS))
    settings = Settings(
        seeds=arguments.seeds or (2 if quick else 5),
        steps=arguments.steps or (20 if quick else None),
        rates=2 if quick else None,
    )
    journal = study.open_journal(arguments, "accuracy")
    if not arguments.report:
        with Runner(journal, arguments.processes, arguments.cache) as runner:
            for group in groups:  # the first group is finished on all tasks before the next one starts
                some = {name: entry for name, entry in entries.items() if entry.method.group == group}
                for task in names:
                    study.conduct(runner, settings, task, some, group)
    found = {task: study.outcomes(journal, settings, task, entries) for task in names}
    found = {task: each for task, each in found.items() if each}
    print_tables(found, arguments.baseline)
    print(study.versions(journal))
    if arguments.plot and found:
        draw(found, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
