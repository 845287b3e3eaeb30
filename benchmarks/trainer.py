"""Train the demo's task with the Trainer of transformers and `AdamssCallback`, under common training options.

The model is MiniLM-L6 with a classification head and with query and value adapted. The budget leaves a third of the
subspaces trained at the end. Each row of the table is a separate training. One training is interrupted half way and
resumed, and must end bit for bit like the first. Another runs on two processes. ::

    python benchmarks/trainer.py
    python benchmarks/trainer.py --model path/to/bert --steps 12 --json trainer.json
    python benchmarks/trainer.py --only bf16

The exit status is 1 if a budget was not kept or if the resumed training differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # set before torch is loaded, see demo/in_torch.py
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from demo.sentences import Corpus, bundled_model, load_tokenizer, quiet_transformers, scipy_sentences, split
from paired import Ratio, environment, paired_times, ratio
from tabulate import tabulate
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import adamss
from adamss_torch.transformers import ADAPTER_FILE, AdamssCallback

PLAIN, NF4, RESUMED, TWO_PROCESSES = (
    "float32",
    "NF4 base (bitsandbytes)",
    "interrupted half way and resumed",
    "two processes (accelerate launch)",
)
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    NF4: {},
    "bf16": {"bf16": True},
    "accumulation, 4 x 4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "load_best_model_at_end": {
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    },
    RESUMED: {},
    TWO_PROCESSES: {"per_device_train_batch_size": 8},
}


class Sentences(Dataset):
    """Tokenized sentences with their classes."""

    def __init__(self, corpus: Corpus, tokenizer: Any):
        self.encoded = tokenizer(list(corpus.texts), truncation=True, max_length=64)
        self.labels = corpus.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.encoded.items()} | {
            "labels": int(self.labels[index])
        }


def adapted(folder: str, classes: int, steps: int, *, nf4: bool = False) -> torch.nn.Module:
    """Return the model with an adapter; its budget falls to a third between 1/6 and 2/3 of the training."""
    torch.manual_seed(0)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=classes,
        dtype=torch.float32,
        local_files_only=True,
        quantization_config=four_bits if nf4 else None,
    )
    layers = 2 * model.config.num_hidden_layers
    schedule = adamss.BudgetConfig(
        target=layers * 10 // 3, start_step=steps // 6, end_step=steps * 2 // 3, interval=max(1, steps // 12)
    )
    config = adamss.AdamssConfig(
        targets=["query", "value"],
        rank=100,
        subspaces=10,
        modules_to_save=["classifier"],
        budget=schedule,
    )
    return adamss.attach(model, config)


def trainer_of(
    folder: str, steps: int, output: Path, options: dict[str, Any], *, nf4: bool = False
) -> tuple[Trainer, AdamssCallback]:
    """Return a Trainer for the demo's task, and its `AdamssCallback`."""
    tokenizer = load_tokenizer(folder, offline=True)
    train_part, test_part = split(scipy_sentences())
    settings = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-2,
        "max_steps": steps,
        "save_steps": steps // 2,
        "eval_steps": steps // 2,
        "logging_steps": steps // 2,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    callback = AdamssCallback()
    trainer = Trainer(
        adapted(folder, len(train_part.classes), steps, nf4=nf4),
        TrainingArguments(str(output), **(settings | options)),
        train_dataset=Sentences(train_part, tokenizer),
        eval_dataset=Sentences(test_part, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
        callbacks=[callback],
    )
    return trainer, callback


def measure(name: str, folder: str, steps: int, output: Path) -> dict[str, Any]:
    """Train under the options of this name, and return the record for the table."""
    trainer, callback = trainer_of(folder, steps, output, OPTIONS[name], nf4=name == NF4)
    trainer.train(
        resume_from_checkpoint=str(output / f"checkpoint-{steps // 2}") if name == RESUMED else None
    )
    saved = output / f"checkpoint-{steps}"
    model = trainer.model
    assert callback.controller is not None
    return {
        "options": name,
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "active": adamss.summary(model).total.active,
        "target": callback.controller.config.target,
        "adapter_bytes": (saved / ADAPTER_FILE).stat().st_size,
        "weights_bytes": (saved / "model.safetensors").stat().st_size,
        "whole_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "linear_bytes": sum(
            layer.weight.nbytes for layer in model.modules() if isinstance(layer, torch.nn.Linear)
        ),
        "trained": {
            key: tensor.detach().float().numpy().tobytes().hex()
            for key, tensor in model.state_dict().items()
            if key.endswith((".adamss.default.B", ".adamss.default.C", ".adamss.default.active"))
        },
    }


def nf4_over_float(folder: str, repeats: int) -> Ratio:
    """Return the time of a training step on the NF4 base over that on the float base, timed alternately."""
    train_part, _ = split(scipy_sentences())
    data = Sentences(train_part, load_tokenizer(folder, offline=True))
    batch = DataCollatorWithPadding(load_tokenizer(folder, offline=True))([data[i] for i in range(16)])
    calls = {}
    for nf4 in (False, True):
        model = adapted(folder, len(train_part.classes), 120, nf4=nf4).train()
        optimizer = torch.optim.AdamW(adamss.trainable_parameters(model))

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

        calls["nf4" if nf4 else "float"] = step
    seconds = paired_times(calls, repeats=repeats)
    return ratio(seconds["nf4"], seconds["float"])


def on_two_processes(arguments: Sequence[str]) -> None:
    """Run this script on two processes with ``accelerate launch``."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    # Without `--multi_gpu`, accelerate starts only one process. The Trainer still uses the CPU, by `use_cpu`.
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    subprocess.run([sys.executable, *launch, __file__, *arguments], check=True, env=os.environ | threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Train under each set of options, print the table, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="AdamssCallback in the Trainer, on the demo's task.")
    parser.add_argument("--model", type=Path, help="folder of a BERT with its tokenizer (default: MiniLM-L6)")
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--only", choices=list(OPTIONS), help="one training alone")
    parser.add_argument("--quick", action="store_true", help="20 steps of the first training: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.only, arguments.steps = PLAIN, 20
    quiet_transformers()
    warnings.filterwarnings("ignore", module=r"transformers\.|accelerate\.|torch\.")
    folder = str(arguments.model or bundled_model())
    if arguments.worker is not None:
        record = measure(arguments.only, folder, arguments.steps, arguments.worker)
        if torch.distributed.get_rank() == 0:
            (arguments.worker / "record.json").write_text(json.dumps(record))
        torch.distributed.destroy_process_group()
        return 0

    about = environment(["torch", "transformers", "accelerate", "adamss"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in OPTIONS if arguments.only is None else [arguments.only]:
            # The resumed training continues from the checkpoints of the first.
            output = Path(scratch) / ("0" if name in (PLAIN, RESUMED) else name.split()[0].strip(","))
            if name == RESUMED and arguments.only is not None:
                measure(PLAIN, folder, arguments.steps, output)
            if name == TWO_PROCESSES:
                output.mkdir()
                on_two_processes(
                    [
                        "--model",
                        folder,
                        "--steps",
                        str(arguments.steps),
                        "--only",
                        name,
                        "--worker",
                        str(output),
                    ]
                )
                records.append(json.loads((output / "record.json").read_text()))
            else:
                records.append(measure(name, folder, arguments.steps, output))
    trained = {record["options"]: record.pop("trained") for record in records}
    same = PLAIN not in trained or RESUMED not in trained or trained[PLAIN] == trained[RESUMED]
    headers = ["options", "test accuracy", "subspaces trained", "target"]
    headers += [
        "adapter.safetensors (KB)",
        "model.safetensors (KB)",
        "whole model (KB)",
        "linear layers (KB)",
    ]
    rows = [
        [r["options"], f"{r['accuracy']:.3f}", r["active"], r["target"]]
        + [f"{r[f'{key}_bytes'] / 1000:,.1f}" for key in ("adapter", "weights", "whole", "linear")]
        for r in records
    ]
    print(tabulate(rows, headers=headers, stralign="right", disable_numparse=True))
    if {PLAIN, RESUMED} <= trained.keys():
        print(f"resumed and uninterrupted: {'the same bits' if same else 'NOT the same bits'}")
    if {PLAIN, NF4} <= trained.keys():
        print(f"a step on the NF4 base over one on the float base: {nf4_over_float(folder, 30)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "results": records}, indent=2) + "\n")
    # The best model may come from a step before the end of the schedule, when more subspaces were trained.
    kept = all(r["active"] == r["target"] for r in records if r["options"] != "load_best_model_at_end")
    return int(not (same and kept))


if __name__ == "__main__":
    sys.exit(main())
