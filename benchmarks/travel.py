"""Move adapters between frameworks and formats, and check that the embeddings stay the same.

The first adapter is trained in JAX, loaded in PyTorch, exported as LoRA, loaded by PEFT, and merged. The second is
trained by PEFT's own AdaMSS, loaded in PyTorch and in JAX by `adamss.from_peft`, and exported back to PEFT. The model
is MiniLM-L6 in Flax NNX and in PyTorch. Every station compares sentence embeddings (the mean of the token vectors,
scaled to length 1). ::

    python benchmarks/travel.py
    python benchmarks/travel.py --model path/to/bert --steps 20 --json travel.json

The exit status is 1 if an entry of an embedding differs by more than 1e-5 from its value at the first station.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # set before torch is loaded, see demo/in_torch.py

import numpy as np
import peft
import torch
from demo import in_torch
from demo.in_jax import Method, Run, tokenize, train
from demo.minilm_nnx import SentenceClassifier, load_encoder
from demo.sentences import Corpus, bundled_model, quiet_transformers, scipy_sentences, split
from flax import nnx
from paired import environment
from tabulate import tabulate
from transformers import AutoModel

import adamss

CONFIG = adamss.AdamssConfig(targets=["query", "value"], rank=100, subspaces=10, subspace_rank=1)
PEFT_CONFIG = {"target_modules": ["query", "value"], "r": 100, "num_subspaces": 10, "subspace_rank": 1}
SENTENCES = 64
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Base models, sentences, and the folder for the adapter files.

    Attributes
    ----------
    model : Path
        Folder of a BERT and its tokenizer.
    tokenizer : callable
    train, test : Corpus
    folder : Path
        Folder for the adapter files that pass between the stations.
    steps : int
        Optimiser steps of each training.
    """

    model: Path
    tokenizer: Callable
    train: Corpus
    test: Corpus
    folder: Path
    steps: int

    def in_torch(self) -> torch.nn.Module:
        """Return the base in PyTorch."""
        return AutoModel.from_pretrained(self.model, dtype=torch.float32, local_files_only=True).eval()

    def in_jax(self) -> Any:
        """Return the base in Flax NNX."""
        return load_encoder(self.model, rngs=nnx.Rngs(0))

    def embeddings(self, model: Any) -> np.ndarray:
        """Return the embeddings (sentences, width) of the test sentences, for a model of either framework."""
        model.eval()
        inputs = tokenize(self.tokenizer, self.test.texts[:SENTENCES])
        mask = inputs["attention_mask"][..., None]
        if isinstance(model, torch.nn.Module):
            with torch.no_grad():
                output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
            hidden = output.last_hidden_state.numpy()
        else:
            hidden = np.asarray(model(**inputs))
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@dataclass
class Stations:
    """The stations of one adapter, and the differences between its embeddings at them."""

    embeddings: Callable[[Any], np.ndarray]
    base: np.ndarray
    rows: list[dict[str, Any]] = field(default_factory=list)
    first: np.ndarray | None = None
    last: np.ndarray | None = None

    def arrive(self, name: str, model: Any) -> Any:
        """Compare the embeddings with those of the base, the first and the previous station; return the model."""
        here = self.embeddings(model)
        first = here if self.first is None else self.first
        last = here if self.last is None else self.last
        self.rows.append(
            {
                "station": name,
                "from_base": float(np.abs(here - self.base).max()),
                "from_start": float(np.abs(here - first).max()),
                "from_before": float(np.abs(here - last).max()),
            }
        )
        self.first, self.last = first, here
        return model

    @property
    def largest(self) -> float:
        """Largest difference between the embeddings at any station and at the first."""
        return max(row["from_start"] for row in self.rows)


def trained_in_jax(journey: Journey) -> Any:
    """Return an encoder whose adapter was trained to tell the classes of the sentences through a fixed head."""
    encoder = adamss.attach(journey.in_jax(), CONFIG)
    model = SentenceClassifier(encoder, len(journey.train.classes), rngs=nnx.Rngs(1))
    method = Method(prepare=lambda model, rngs: model, trained=nnx.LoRAParam, learning_rate=1e-2)
    run = Run.start(model, method, journey.steps)
    train([run], journey.tokenizer, journey.train, steps=journey.steps, seed=0)
    return run.model.encoder


def trained_by_peft(journey: Journey) -> torch.nn.Module:
    """Return a model of PEFT's AdaMSS, trained on the same task through a fixed head."""
    model = peft.get_peft_model(journey.in_torch(), peft.AdamssConfig(**PEFT_CONFIG))
    torch.manual_seed(1)
    classifier = in_torch.SentenceClassifier(model, len(journey.train.classes))
    classifier.classifier.requires_grad_(False)
    run = in_torch.Run.start(classifier, 1e-2, journey.steps)
    in_torch.train([run], journey.tokenizer, journey.train, steps=journey.steps, seed=0, device="cpu")
    return model


def from_jax(journey: Journey) -> Stations:
    """Train in JAX, then go through files to PyTorch, to PEFT as LoRA, to merged models, and back to JAX."""
    stations = Stations(journey.embeddings, journey.embeddings(journey.in_torch()))
    portable, training = journey.folder / "portable.safetensors", journey.folder / "training.safetensors"
    there = stations.arrive("trained in JAX (Flax NNX)", trained_in_jax(journey))
    adamss.save(there, portable)
    adamss.save(there, training, training=True)
    here = stations.arrive("portable file, loaded in PyTorch", adamss.load(journey.in_torch(), portable))
    adamss.to_lora(here, journey.folder / "lora")
    lora = peft.PeftModel.from_pretrained(journey.in_torch(), journey.folder / "lora")
    stations.arrive("exported as LoRA, loaded by PEFT", lora)
    stations.arrive("merged by PEFT (merge_and_unload)", lora.merge_and_unload())
    stations.arrive("merged by adamss", adamss.merge(here))
    stations.arrive("training file, loaded in PyTorch", adamss.load(journey.in_torch(), training))
    back = journey.folder / "back.safetensors"
    adamss.save(here, back)
    stations.arrive("saved by PyTorch, loaded in JAX", adamss.load(journey.in_jax(), back))
    return stations


def from_peft(journey: Journey) -> Stations:
    """Train by PEFT's AdaMSS, then load the adapter in PyTorch and in JAX, and export it back to PEFT."""
    stations = Stations(journey.embeddings, journey.embeddings(journey.in_torch()))
    theirs, ours = journey.folder / "peft", journey.folder / "to_peft"
    trained_by_peft_model = stations.arrive("trained by PEFT's AdaMSS", trained_by_peft(journey))
    trained_by_peft_model.save_pretrained(theirs)
    stations.arrive("its folder, loaded in PyTorch", adamss.from_peft(journey.in_torch(), theirs))
    here = stations.arrive("its folder, loaded in JAX", adamss.from_peft(journey.in_jax(), theirs))
    adamss.to_peft(here, ours)
    stations.arrive(
        "exported from JAX, loaded by PEFT", peft.PeftModel.from_pretrained(journey.in_torch(), ours)
    )
    return stations


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each adapter, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description="An adapter on its way between frameworks and formats.")
    parser.add_argument("--model", type=Path, help="folder of a BERT with its tokenizer (default: MiniLM-L6)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="5 steps: a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps = 5
    quiet_transformers()
    warnings.filterwarnings("ignore", module=r"peft\.|transformers\.")
    about = environment(["torch", "jax", "flax", "peft", "adamss"])
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    model = arguments.model or bundled_model()
    train_part, test_part = split(scipy_sentences())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        journey = Journey(
            model=model,
            tokenizer=in_torch.Source(name=str(model), offline=True).tokenizer(),
            train=train_part,
            test=test_part,
            folder=Path(folder),
            steps=arguments.steps,
        )
        for name, travel in (("from JAX", from_jax), ("from PEFT", from_peft)):
            found[name] = travel(journey)
            headers = ["station", "from the base", "from where it was trained", "from the station before"]
            rows = [
                [row["station"], *(f"{row[key]:.1e}" for key in ("from_base", "from_start", "from_before"))]
                for row in found[name].rows
            ]
            table = tabulate(rows, headers=headers, colalign=("left", "right", "right", "right"))
            print(
                f"\nEmbeddings of {SENTENCES} sentences, largest difference of an entry, {name}",
                table,
                sep="\n",
            )
    if arguments.json:
        results = {name: stations.rows for name, stations in found.items()}
        arguments.json.write_text(json.dumps({"environment": about, "results": results}, indent=2) + "\n")
    return int(max(stations.largest for stations in found.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
