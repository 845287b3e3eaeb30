"""Fine-tune MiniLM in Flax NNX, and exchange adapters with PyTorch.

The task, the batches, the learning rates and the initial values of the head are those of `in_torch`. The encoder is
the NNX model of `minilm_nnx`. ::

    python benchmarks/demo/in_jax.py
    python benchmarks/demo/in_jax.py --model path/to/bert --steps 500

Afterwards the adapter trained in JAX is loaded into the PyTorch model, and one trained in PyTorch into the JAX model.
Each must give the same predictions for all test sentences in both frameworks, else the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # set before torch is loaded, see demo/in_torch.py
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the package demo

import jax
import numpy as np
import optax
import torch
from flax import nnx
from safetensors.numpy import save_file
from tabulate import tabulate
from tqdm import tqdm

import adamss
from demo import in_torch
from demo.minilm_nnx import SentenceClassifier, load_encoder
from demo.sentences import (
    BATCH_SIZE,
    HEAD,
    MAX_TOKENS,
    REPORT_HEADER,
    Corpus,
    accuracy,
    batch_order,
    bundled_model,
    quiet_transformers,
    report_row,
    same_answers,
    scipy_sentences,
    split,
)

TARGETS = ["query", "value"]
LORA_RANK = 8
TORCH_STEPS = 30

# --- The three methods ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune.

    Attributes
    ----------
    prepare : callable
        ``(model, rngs) -> model``: adds the adapter.
    trained : filter of NNX
        Filter of the trained variables.
    learning_rate : float
        Rate that the search in `in_torch` has chosen.
    """

    prepare: Callable[[SentenceClassifier, nnx.Rngs], SentenceClassifier]
    trained: Any
    learning_rate: float


def prepare_adamss(model: SentenceClassifier, rngs: nnx.Rngs) -> SentenceClassifier:
    """Adapt the target layers by AdaMSS. The variables of adapter and head then have the type `nnx.LoRAParam`."""
    config = adamss.AdamssConfig(
        rank=100, subspaces=10, subspace_rank=1, targets=TARGETS, modules_to_save=[HEAD]
    )
    return adamss.attach(model, config)


def prepare_lora(model: SentenceClassifier, rngs: nnx.Rngs) -> SentenceClassifier:
    """Adapt the same layers by the LoRA of Flax."""
    for _, module in list(nnx.iter_modules(model)):
        for name in TARGETS:
            layer = getattr(module, name, None)
            if isinstance(layer, nnx.Linear):
                sizes = (layer.in_features, LORA_RANK, layer.out_features)
                setattr(module, name, nnx.LoRA(*sizes, base_module=layer, rngs=rngs))
    return model


IN_HEAD = nnx.All(nnx.Param, nnx.PathContains(HEAD))
ADAMSS = "AdaMSS K=10 r=1"
METHODS = {
    "head only": Method(
        prepare=lambda model, rngs: model,
        trained=IN_HEAD,
        learning_rate=in_torch.METHODS["head only"].learning_rate,
    ),
    ADAMSS: Method(
        prepare=prepare_adamss,
        trained=nnx.LoRAParam,
        learning_rate=in_torch.METHODS[in_torch.ADAMSS].learning_rate,
    ),
    f"LoRA r={LORA_RANK} (Flax)": Method(
        prepare=prepare_lora,
        trained=nnx.Any(nnx.LoRAParam, IN_HEAD),
        learning_rate=in_torch.METHODS["LoRA r=8"].learning_rate,
    ),
}


# --- Training -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Run:
    """A model in training, with its losses and step times.

    Attributes
    ----------
    model : SentenceClassifier
    trained : filter of NNX
        Filter of the trained variables.
    optimizer : nnx.Optimizer
        AdamW on the trained variables, with a learning rate that falls linearly to zero.
    update : callable
        The compiled step: ``(model, optimizer, inputs, labels) -> loss``.
    losses : list of float
        Training loss of each step.
    seconds : list of float
        Duration of each step, without the steps that compiled.
    compiled : set
        Shapes of the batches so far. The first batch of another shape compiles.
    """

    model: SentenceClassifier
    trained: Any
    optimizer: nnx.Optimizer
    update: Callable[..., jax.Array]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    compiled: set[tuple[int, ...]] = field(default_factory=set)

    @classmethod
    def start(cls, model: SentenceClassifier, method: Method, steps: int) -> Run:
        """Make the optimiser of the variables that the method trains, and compile the step."""
        schedule = optax.linear_schedule(method.learning_rate, 0.0, steps)
        rule = optax.adamw(schedule, weight_decay=1e-2)  # PyTorch's default, as in the search of the rates
        differentiated = nnx.DiffState(0, method.trained)

        @nnx.jit
        def update(
            model: SentenceClassifier, optimizer: nnx.Optimizer, inputs: Mapping[str, Any], labels: Any
        ) -> jax.Array:
            def loss(model: SentenceClassifier) -> jax.Array:
                return optax.softmax_cross_entropy_with_integer_labels(model(**inputs), labels).mean()

            value, gradients = nnx.value_and_grad(loss, argnums=differentiated)(model)
            optimizer.update(model, gradients)
            return value

        model.train()
        optimizer = nnx.Optimizer(model, rule, wrt=method.trained)
        return cls(model=model, trained=method.trained, optimizer=optimizer, update=update)

    def step(self, inputs: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Take one training step on one batch."""
        start = time.perf_counter()
        loss = self.update(self.model, self.optimizer, inputs, labels)
        jax.block_until_ready(nnx.state((self.model, self.optimizer)))
        seconds = time.perf_counter() - start
        shape = inputs["input_ids"].shape
        if shape in self.compiled:
            self.seconds.append(seconds)
        self.compiled.add(shape)
        self.losses.append(float(loss))

    def trained_arrays(self) -> dict[str, np.ndarray]:
        """Return the trained arrays by path."""
        state = nnx.to_flat_state(nnx.state(self.model, self.trained))
        return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}

    def trained_numbers(self) -> dict[str, int]:
        """Return how many numbers are trained in the adapter, and how many in the head."""
        sizes = {name: array.size for name, array in self.trained_arrays().items()}
        head = sum(size for name, size in sizes.items() if HEAD in name)
        return {"adapter": sum(sizes.values()) - head, "head": head}

    def save(self, path: Path, *, adapted: bool) -> Path:
        """Write the trained arrays, through `adamss.save` if the model is adapted by AdaMSS; return the path."""
        if adapted:
            adamss.save(self.model, path)
        else:
            save_file(self.trained_arrays(), path)
        return path


def tokenize(tokenizer: Callable, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Turn texts into one batch of token ids and mask, padded to one of four lengths so that few shapes compile."""
    batch = tokenizer(
        list(texts),
        padding=True,
        pad_to_multiple_of=MAX_TOKENS // 4,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="np",
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def train(runs: Sequence[Run], tokenizer: Callable, corpus: Corpus, *, steps: int, seed: int) -> None:
    """Train all runs side by side: each batch goes to every run before the next one is drawn."""
    order = batch_order(len(corpus), steps, BATCH_SIZE, seed)
    with tqdm(order, total=steps, desc="training", unit="step", mininterval=0.5) as progress:
        for indices in progress:
            batch = corpus.take(indices)
            inputs = tokenize(tokenizer, batch.texts)
            for run in runs:
                run.step(inputs, batch.labels)
            progress.set_postfix_str("loss " + " ".join(f"{run.losses[-1]:.2f}" for run in runs))


@nnx.jit
def logits(model: SentenceClassifier, inputs: Mapping[str, Any]) -> jax.Array:
    """Return the logits of one batch."""
    return model(**inputs)


def predict(model: SentenceClassifier, tokenizer: Callable, texts: Sequence[str]) -> np.ndarray:
    """Return the logits (len(texts), classes), with dropout off."""
    model.eval()
    batches = (tokenize(tokenizer, texts[i : i + 64]) for i in range(0, len(texts), 64))
    return np.concatenate([logits(model, inputs) for inputs in batches])


# --- The command ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all parts of the demo share: the model's source, the split of the data, and the settings."""

    source: in_torch.Source
    tokenizer: Callable
    train: Corpus
    test: Corpus
    steps: int
    seed: int
    output: Path

    @classmethod
    def open(cls, arguments: argparse.Namespace) -> Session:
        """Load the data and the tokenizer of the model that the command line asks for."""
        quiet_transformers()
        source = in_torch.Source(name=str(arguments.model or bundled_model()), offline=True)
        train_part, test_part = split(scipy_sentences())
        return cls(
            source=source,
            tokenizer=source.tokenizer(),
            train=train_part,
            test=test_part,
            steps=arguments.steps,
            seed=arguments.seed,
            output=arguments.output,
        )

    def classifier(self, seed: int) -> SentenceClassifier:
        """Load the encoder, and give it the head that the PyTorch demo has for this seed."""
        rngs = nnx.Rngs(seed)
        classes = len(self.train.classes)
        model = SentenceClassifier(load_encoder(self.source.name, rngs=rngs), classes, rngs=rngs)
        torch.manual_seed(seed)
        head = torch.nn.Linear(model.classifier.in_features, classes)
        model.classifier.kernel.set_value(jax.numpy.asarray(head.weight.detach().numpy().T))
        model.classifier.bias.set_value(jax.numpy.asarray(head.bias.detach().numpy()))
        return model

    def start(self, method: Method) -> Run:
        """Prepare a copy of the base for a method."""
        model = method.prepare(self.classifier(self.seed), nnx.Rngs(self.seed))
        return Run.start(model, method, self.steps)

    def in_jax(self, model: SentenceClassifier) -> np.ndarray:
        """Return the logits of the test sentences from an NNX model."""
        return predict(model, self.tokenizer, self.test.texts)

    def in_torch(self, model: torch.nn.Module) -> np.ndarray:
        """Return the logits of the test sentences from a PyTorch model."""
        return in_torch.predict(model, self.tokenizer, self.test.texts, "cpu").numpy()


def compare(session: Session) -> tuple[np.ndarray, Path]:
    """Train the three methods, print the table, and return the logits of AdaMSS and its file."""
    print(
        f"{len(session.train)} sentences to train on, {len(session.test)} to test on, "
        f"{len(session.train.classes)} classes; adapted: {', '.join(TARGETS)}; JAX on {jax.default_backend()}"
    )
    runs = {name: session.start(method) for name, method in METHODS.items()}
    train(list(runs.values()), session.tokenizer, session.train, steps=session.steps, seed=session.seed)

    session.output.mkdir(parents=True, exist_ok=True)
    rows, predictions, files = [], {}, {}
    for name, run in runs.items():
        predictions[name] = session.in_jax(run.model)
        file_name = f"{name.split()[0].lower()}-jax.safetensors"
        files[name] = run.save(session.output / file_name, adapted=name == ADAMSS)
        correct = accuracy(predictions[name], session.test)
        rows.append(report_row(name, correct, **run.trained_numbers(), seconds=run.seconds, path=files[name]))
    print(tabulate(rows, headers=REPORT_HEADER, stralign="right", disable_numparse=True))
    return predictions[ADAMSS], files[ADAMSS]


def train_in_torch(session: Session) -> tuple[np.ndarray, Path]:
    """Train an AdaMSS adapter for a few steps in PyTorch, and return its logits and file."""
    base = session.source.classifier(len(session.train.classes), session.seed)
    method = in_torch.METHODS[in_torch.ADAMSS]
    steps = min(session.steps, TORCH_STEPS)
    run = in_torch.Run.start(method.prepare(base, TARGETS), method.learning_rate, steps)
    in_torch.train([run], session.tokenizer, session.train, steps=steps, seed=session.seed, device="cpu")
    return session.in_torch(run.model), method.save(run.model, session.output)


def travel(session: Session, here: tuple[np.ndarray, Path]) -> bool:
    """Load the adapter of each framework into a fresh base of the other; return whether the predictions agree."""
    # Another seed, so that the fresh bases have other heads than the training started from.
    before, path = here
    base = session.source.classifier(len(session.train.classes), session.seed + 1)
    after = session.in_torch(adamss.load(base, path))
    there = same_answers("adapter trained in JAX, loaded into PyTorch", before, after)

    before, path = train_in_torch(session)
    after = session.in_jax(adamss.load(session.classifier(session.seed + 1), path))
    back = same_answers("adapter trained in PyTorch, loaded into JAX", before, after)
    return there and back


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a sentence encoder in JAX: AdaMSS, LoRA, head only."
    )
    parser.add_argument("--model", type=Path, help="folder of a BERT model (default: MiniLM-L6)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of head, LoRA, batches and dropout (default: 0)"
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the adapters")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    session = Session.open(parse(argv))
    return 0 if travel(session, compare(session)) else 1


if __name__ == "__main__":
    sys.exit(main())
