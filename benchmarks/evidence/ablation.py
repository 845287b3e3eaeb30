"""Measure the effect of each choice within AdaMSS by changing one setting at a time around a centre.

The centre has R = 100, K = 10, r_k = 1, k-means, a shared basis, orthonormal B, no bias and no budget. Each variant
changes one setting, has its own search for the learning rate (see `evidence.study`), and is compared with the centre
over the seeds that both have. Variants with a budget take the centre's rate. The centre and the selections run with
ten seeds, the others with five. A mean is over all seeds of its variant.

The search has one run for each rate, so it may pick either of two rates that are nearly equally good. The centre at
other rates shows the effect of that choice, and a column compares each variant with the centre at the variant's rate.

A second table tests whether the importance score chooses better than chance. At equal budgets, the subspaces that
stay trained are chosen by the score, at random, by the smallest score, or by the l1 norm of the trained factors.
Subspaces differ in size, so equally many of them may have different numbers of parameters. The comparison is
therefore repeated with a budget that counts parameters. ::

    python benchmarks/evidence/ablation.py
    python benchmarks/evidence/ablation.py --tasks tweets --variants "a third, score" "a third, random"
    python benchmarks/evidence/ablation.py --quick

``"the paper's algorithms"`` changes several settings at once: K is estimated (at least 10, and exactly 10 in all of
these layers), normalised cuts group the columns, each subspace has its own basis, and B comes from a QR
decomposition. Variants with a random segmentation or a random B draw again for each seed. ``"ksubspaces"`` fits
subspaces of dimension R / K = 10, and ``"contiguous, as heads"`` has one subspace for each attention head.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages demo and evidence

from arguments import positive
from tabulate import tabulate

from evidence import study
from evidence.methods import ALGORITHMS, Budget, ours
from evidence.study import Entry, Outcome, Settings
from evidence.tasks import NETWORKS, PLANS
from evidence.training import Runner

CENTRE = "centre"
CENTRE_RATES = (3e-3, 1e-2, 3e-2)
LEFT = {
    "a third": Budget(share=1 / 3),
    "a tenth": Budget(share=0.1),
    "a third of the parameters": Budget(share=1 / 3, unit="parameters"),
    "a tenth of the parameters": Budget(share=0.1, unit="parameters"),
}
SELECTIONS = ("score", "random", "smallest", "l1 norm")
QUICK = (CENTRE, "K=3", "segmentation random", "B random", "a third, score", "a third, random")


def variants(task: str, more_seeds: int) -> dict[str, Entry]:
    """Return the variants by name.

    Parameters
    ----------
    task : str
        Key of `evidence.tasks.PLANS`.
    more_seeds : int
        Number of seeds of the centre and of the comparison of selections.
    """

    def of(changes: Mapping[str, Any], **fields: Any) -> Entry:
        settings = {"subspaces": 10, "subspace_rank": 1, **changes}
        return Entry(method=dataclasses.replace(ours("", **settings), **fields))

    def under(budget: Budget, seeds: int | None = None) -> Entry:
        return dataclasses.replace(of({}, budget=budget), follows=CENTRE, seeds=seeds)

    heads = NETWORKS[PLANS[task].network].heads
    found = {CENTRE: dataclasses.replace(of({}), seeds=more_seeds)}
    found |= {
        f"rate {rate:g}": dataclasses.replace(of({}), follows=CENTRE, rate=rate, seeds=more_seeds)
        for rate in CENTRE_RATES
    }
    found |= {f"K={K}": of({"subspaces": K}) for K in (1, 3, 32, 100)}
    found |= {f"r_k={r}": of({"subspace_rank": r}) for r in (2, 3, 8)}
    found |= {
        f"segmentation {name}": of({"segmentation": name}) for name in ("ncut", "spectral", "contiguous")
    }
    found |= {
        "segmentation ksubspaces": of({"segmentation": "ksubspaces", "segmentation_dimension": 10}),
        "segmentation contiguous, as heads": of({"segmentation": "contiguous", "subspaces": heads}),
        "segmentation random": of({"segmentation": "random", "seed": None}),
        "basis per_subspace": of({"basis": "per_subspace"}),
        "B weighted": of({"initial_B": "weighted"}),
        "B qr": of({"initial_B": "qr"}),
        "B random": of({}, random_B=True),
        "bias included": of({"include_bias": True}),
    }
    found["the paper's algorithms"] = of(ALGORITHMS)
    found |= {f"rate of B {ratio:g} of C's": of({}, rate_ratio=ratio) for ratio in (0.25, 4.0, 16.0)}
    found |= {
        f"{left}, {selection}": under(dataclasses.replace(budget, selection=selection), more_seeds)
        for left, budget in LEFT.items()
        for selection in SELECTIONS
    }
    found |= {f"a third, power {power:g}": under(Budget(power=power)) for power in (1.0, 2.0, 5.0)}
    found |= {
        "a third, running window": under(Budget(window="running")),
        "two thirds": under(Budget(share=2 / 3)),
    }
    return {
        name: dataclasses.replace(each, method=dataclasses.replace(each.method, name=name))
        for name, each in found.items()
    }


def variant_rows(found: Mapping[str, Outcome]) -> list[list[str]]:
    """Return the rows of the first table: those of a study, with the difference from the centre at the same rate."""
    at_rates = [name for name in (CENTRE, *(f"rate {rate:g}" for rate in CENTRE_RATES)) if name in found]
    centres: dict[float, str] = {}
    for name in at_rates:  # the centre comes first, since its own rate may be one of CENTRE_RATES
        centres.setdefault(found[name].choice.rate, name)
    rows = []
    for (name, outcome), row in zip(found.items(), study.rows(found, CENTRE), strict=True):
        centre = centres.get(outcome.choice.rate)
        if name not in at_rates:
            same = str(study.paired(outcome.values(), found[centre].values())) if centre else ""
        elif name == centre:
            same = ""
        else:
            continue
        rows.append([*row[:-1], same, row[-1]])
    return rows


def selection_rows(found: Mapping[str, Outcome]) -> list[list[str]]:
    """Return the rows of the second table: the gain of each selection over a random one under the same budget."""
    rows = []
    for left in LEFT:
        by_lot = found.get(f"{left}, random")
        for selection in SELECTIONS:
            outcome = found.get(f"{left}, {selection}")
            if outcome is not None and by_lot is not None:
                gains = [
                    study.paired(outcome.values(name), by_lot.values(name)) for name in ("test", "test_loss")
                ]
                shown = ["", ""] if selection == "random" else [str(gains[0]), nats(gains[1])]
                rows.append([f"{left}, {selection}", outcome.trained(), f"{100 * outcome.mean:.1f}", *shown])
    return rows


def nats(difference: study.Difference) -> str:
    """Format a difference of cross entropies, in nats."""
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def print_tables(task: str, found: Mapping[str, Outcome]) -> None:
    """Print the tables of one task."""
    print(f"\n{task}: test accuracy in percent, mean and deviation over seeds")
    titles = [title.format(baseline=CENTRE) for title in study.HEADER]
    header = ["variant", *titles[1:-1], "at the same rate", titles[-1]]
    print(tabulate(variant_rows(found), headers=header, disable_numparse=True))
    if rows := selection_rows(found):
        seeds = max(each.runs for name, each in found.items() if name.endswith(", random"))
        print(f"\n{task}: which subspaces stay, {seeds} seeds")
        header = ["left", "trained", "accuracy", "minus random", "cross entropy minus random"]
        print(tabulate(rows, headers=header, disable_numparse=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables; return the exit status."""
    parser = study.parser("Change one choice of AdaMSS at a time.", "results/ablation.jsonl beside this file")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="variants to run in addition to the centre"
    )
    parser.add_argument("--more-seeds", type=positive, help="seeds of centre and selections (default: 10)")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    names = arguments.tasks or ["digits"]
    settings = Settings(
        seeds=arguments.seeds or (2 if quick else 5),
        steps=arguments.steps or (20 if quick else None),
        rates=2 if quick else None,
    )
    more = arguments.more_seeds or (2 if quick else 10)
    journal = study.open_journal(arguments, "ablation")
    wanted = {CENTRE, *(arguments.variants or ())} if arguments.variants else set(QUICK) if quick else None
    studies = {task: variants(task, more) for task in names}
    unknown = sorted((wanted or set()) - studies[names[0]].keys())
    if unknown:
        raise SystemExit(f"no variant {', '.join(unknown)}; there are {', '.join(studies[names[0]])}")
    with Runner(journal, arguments.processes, arguments.cache) as runner:
        for task, entries in studies.items():
            some = {name: entry for name, entry in entries.items() if wanted is None or name in wanted}
            if not arguments.report:
                study.conduct(runner, settings, task, some, "ablation")
            print_tables(task, study.outcomes(journal, settings, task, some))
    print(study.versions(journal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
