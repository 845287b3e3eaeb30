"""Reproduce Table 2 of the paper: Vision Transformers on seven sets of images.

The score is the accuracy on the test set after the last epoch. As in the authors' script, training images are cropped
and mirrored at random, and test images are cropped at the centre. Also as there, a tenth of the training images is
left out if a set has no validation part; here it is the same tenth for all runs. ::

    python benchmarks/paper/image.py --row ViT-base --tasks Pets FGVC --workers 8
    python benchmarks/paper/image.py --model path/to/vit --data path/to/sets --tasks Cars --seeds 7

``--data`` is a folder with one folder for each set (``Pets``, ...). The parts ``train`` and ``test`` in it have one
folder for each class, or the set was written by `datasets`.
"""

from __future__ import annotations

import math
import random
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
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from paper import settings
from paper.common import DivergedError, Run, Table, adapted, complete, counted, data_set, fit, pretrained

TABLE = Table(
    title="Table 2 (images)",
    rows=settings.IMAGE,
    methods=settings.IMAGE_METHODS,
    tasks=settings.IMAGE_TASKS,
    columns=settings.IMAGE_TASKS,
    seeds=settings.IMAGE_SEEDS,
    epochs=settings.IMAGE_EPOCHS,
    batch=settings.IMAGE_BATCH,
    device_batch=settings.IMAGE_DEVICE_BATCH,
    warmup=settings.CHOSEN_IMAGE_WARMUP,
    clip=settings.CHOSEN_IMAGE_CLIP,
    budget=settings.IMAGE_BUDGET,
    subspaces="estimate",
    note="Accuracy on the test set after the last epoch. The rates of LoRA, PiSSA and full fine-tuning, warm-up and "
    "clipping are chosen, the paper's are not known.",
)
HUB: dict[str, str | dict[str, str]] = {
    "Pets": "timm/oxford-iiit-pet",
    "Cars": {
        "train": "Multimodal-Fatima/StanfordCars_train",
        "test": "Multimodal-Fatima/StanfordCars_test",
    },
    "CIFAR10": "uoft-cs/cifar10",
    "EuroSAT": "timm/eurosat-rgb",
    "FGVC": {
        "train": "Multimodal-Fatima/FGVC_Aircraft_train",
        "test": "Multimodal-Fatima/FGVC_Aircraft_test",
    },
    "RESISC45": "timm/resisc45",
    "CIFAR100": "uoft-cs/cifar100",
}
LEFT_OUT, SPLIT_SEED = 0.1, 0


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return a random box with 8 to 100 % of an image's area and a shape between 3:4 and 4:3.

    If ten draws give no box that fits, the box is the whole image.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        shape = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def cropped(image: Image.Image, size: tuple[int, int], *, training: bool) -> Image.Image:
    """Return an RGB image of a size (width, height): randomly cropped and mirrored for training, else the centre."""
    image = image.convert("RGB")
    if not training:
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    image = image.resize(size, Image.Resampling.BILINEAR, box=random_box(*image.size))
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def pixels(processor: Any, label: str, *, training: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function that turns rows of a data set into inputs of a model."""
    size = (processor.size["width"], processor.size["height"])

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        (images,) = (values for name, values in rows.items() if name in ("image", "img"))
        parts = [cropped(image, size, training=training) for image in images]
        values = processor(images=parts, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(values), "labels": rows[label]}

    return transform


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack examples into a batch."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@cache
def prepared(folder: Path | None, task: str, model: str) -> tuple[Any, Any, int]:
    """Return training set, test set, and number of classes."""
    hub, parts = HUB[task], {}
    processor = pretrained(AutoImageProcessor, model)
    columns = ("image or img", "label or fine_label")
    if folder or isinstance(hub, str):
        found = data_set(folder, task, str(hub), needs={"train": columns, "test": columns})
    else:
        found = {part: data_set(None, task, name, needs={part: columns})[part] for part, name in hub.items()}
    train, test = found["train"], found["test"]
    if "validation" not in found:
        train = train.train_test_split(test_size=LEFT_OUT, seed=SPLIT_SEED)["train"]
    label = "fine_label" if "fine_label" in train.column_names else "label"
    for name, part in (("train", train), ("test", test)):
        kept = part.select_columns([c for c in part.column_names if c in ("image", "img", label)])
        parts[name] = kept.with_transform(pixels(processor, label, training=name == "train"))
    return parts["train"], parts["test"], train.features[label].num_classes


def accuracy(found: Any) -> dict[str, float]:
    """Return the share of correctly classified images, in per cent."""
    logits = np.asarray(found.predictions)
    if not np.isfinite(logits).all():
        raise DivergedError("the evaluation")
    return {"score": 100 * float((logits.argmax(1) == found.label_ids).mean())}


def score(run: Run) -> dict[str, Any]:
    """Train on a set, and return the test accuracy after the last epoch."""
    data, test, classes = prepared(run.arguments.data, run.task, run.model)
    set_seed(run.seed)
    model = pretrained(
        AutoModelForImageClassification,
        run.model,
        num_labels=classes,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    model = adapted(model, run, head=[HEAD])
    trainer = fit(model, run, data=data, collate=collate, metric=accuracy)
    found = trainer.evaluate(test)
    return {"scores": {run.task: found["eval_score"]}, **counted(trainer)}


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs and print the table."""
    return complete(argv, TABLE, TABLE.parser("Table 2 of the paper: ViT on seven sets of images."), score)


if __name__ == "__main__":
    sys.exit(main())
