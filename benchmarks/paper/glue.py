"""Reproduce Table 1 of the paper: RoBERTa on six tasks of GLUE.

The validation set is scored after every epoch, and the score of a run is that of its best epoch, as in the paper. The
paper does not state whether it prints means or medians over the seeds, so the table has both. ::

    python benchmarks/paper/glue.py --row RoBERTa-base --tasks RTE MRPC
    python benchmarks/paper/glue.py --model path/to/roberta --data path/to/glue --methods AdaMSS --seeds 0

``--data`` is a folder with one folder for each task (``rte``, ``stsb``, ...), named as in GLUE on the hub. An
interrupted command continues when it is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages paper and demo

import numpy as np
import torch
from demo.sentences import HEAD
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from paper import settings
from paper.common import DivergedError, Run, Table, adapted, complete, counted, data_set, fit, pretrained

TABLE = Table(
    title="Table 1 (GLUE)",
    rows=settings.GLUE,
    methods=settings.GLUE_METHODS,
    tasks=settings.GLUE_TASKS,
    columns=settings.GLUE_TASKS,
    seeds=settings.GLUE_SEEDS,
    epochs=settings.GLUE_EPOCHS,
    batch=settings.GLUE_BATCH,
    device_batch=settings.GLUE_BATCH,
    warmup=settings.GLUE_WARMUP,
    clip=settings.GLUE_CLIP,
    budget=settings.GLUE_BUDGET,
    constants={"length": settings.GLUE_LENGTH},
    note="Best validation epoch of each run; accuracy, CoLA: Matthews correlation, STS-B: Pearson correlation. "
    "The rates of LoRA, PiSSA and full fine-tuning are chosen, the paper's are not known. "
    "STS-B of RoBERTa-base: the paper's row of settings is scrambled.",
)
COLUMNS = {
    "SST-2": ("sentence",),
    "MRPC": ("sentence1", "sentence2"),
    "CoLA": ("sentence",),
    "QNLI": ("question", "sentence"),
    "RTE": ("sentence1", "sentence2"),
    "STS-B": ("sentence1", "sentence2"),
}


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return Pearson's correlation, or 0 if one side is constant, like Matthews' correlation in scikit-learn."""
    if not (np.ptp(predicted) and np.ptp(labels)):
        return 0.0
    return float(pearsonr(predicted, labels).statistic)


def metric_of(task: str) -> Callable[[Any], dict[str, float]]:
    """Return the function that scores predictions on a task, in per cent."""

    def metric(found: Any) -> dict[str, float]:
        logits, labels = np.asarray(found.predictions, dtype=np.float64), found.label_ids
        if not np.isfinite(logits).all():
            raise DivergedError("the evaluation")
        if task == "STS-B":
            return {"score": 100 * pearson(logits[:, 0], labels)}
        score = matthews_corrcoef if task == "CoLA" else accuracy_score
        return {"score": 100 * float(score(labels, logits.argmax(1)))}

    return metric


@cache
def tokenized(folder: Path | None, task: str, model: str) -> tuple[Any, Any, Any]:
    """Return training set, validation set, and the function that makes a batch from examples."""
    name = task.replace("-", "").lower()
    tokenizer = pretrained(AutoTokenizer, model)
    columns = (*COLUMNS[task], "label")
    found = data_set(folder, name, "nyu-mll/glue", name, needs={"train": columns, "validation": columns})

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        texts = [rows[column] for column in COLUMNS[task]]
        encoded = tokenizer(*texts, truncation=True, max_length=settings.GLUE_LENGTH)
        return dict(encoded) | {"labels": rows["label"]}

    parts = []
    for split in ("train", "validation"):
        rows = found[split]
        parts.append(rows.map(encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True))
    return *parts, DataCollatorWithPadding(tokenizer)


def score(run: Run) -> dict[str, Any]:
    """Train on a task, and return the score of the best epoch."""
    data, validation, collate = tokenized(run.arguments.data, run.task, run.model)
    set_seed(run.seed)
    model = pretrained(
        AutoModelForSequenceClassification,
        run.model,
        num_labels=1 if run.task == "STS-B" else 2,
        dtype=torch.float32,
    )
    model = adapted(model, run, head=[HEAD])
    trainer = fit(model, run, data=data, evaluated=validation, collate=collate, metric=metric_of(run.task))
    epochs = [entry["eval_score"] for entry in trainer.state.log_history if "eval_score" in entry]
    return {
        "scores": {run.task: max(epochs)},
        **counted(trainer),
        "best_epoch": epochs.index(max(epochs)) + 1,
        "last": epochs[-1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs and print the table."""
    return complete(argv, TABLE, TABLE.parser("Table 1 of the paper: RoBERTa on GLUE."), score)


if __name__ == "__main__":
    sys.exit(main())
