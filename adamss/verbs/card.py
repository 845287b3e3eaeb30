"""Model cards of adapters, as ``README.md`` files in the form of the Hugging Face Hub."""

from __future__ import annotations

import os
import re

from adamss.io.checkpoint import Checkpoint
from adamss.verbs.table import summary_of_file

__all__ = ["model_card"]

LONGEST_LIST = 8
"""Largest number of layers that a card lists. The card counts the others."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

USE = {
    "adamss": """\
```python
import adamss

model = adamss.load(base_model, "{where}")
```
""",
    "lora": """\
The LoRA has rank {rank} and exactly the update of the AdaMSS adapter. Software that reads PEFT's LoRA can load it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{where}")
```
""",
    "merged": """\
The update is in the weights. The folder loads as the base model does, and with the class that was trained if that
has modules of its own, such as a head.
""",
    "peft": """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{where}")
```
""",
}
LIBRARY = {"adamss": "adamss", "lora": "peft", "peft": "peft"}
"""The library that loads a format, as the hub asks for it."""


def model_card(
    stored: Checkpoint, base: str | None, *, form: str = "adamss", where: str = "path/to/this/folder"
) -> str:
    """Return the text of a model card, which states what an adapter changes, its settings, and how to load it.

    Parameters
    ----------
    stored
        The adapter.
    base
        Name of the base model. The path of a local folder is left out, because it means nothing on other machines.
    form
        Format of the folder: ``"adamss"``; ``"lora"`` or ``"peft"``, which PEFT reads; ``"merged"``, a model.
    where
        Path or repository that the code example loads.
    """
    known = base is not None and HUB_NAME.fullmatch(base) and not os.path.exists(base)
    header = [f"library_name: {LIBRARY[form]}"] if form in LIBRARY else []
    header += [f"base_model: {base}"] if known else []
    header += ["tags:", *(f"- {tag}" for tag in ("adamss", *(["lora"] if form == "lora" else []), "adapter"))]
    summary, config = summary_of_file(stored), stored.config
    of = f" for [{base}](https://huggingface.co/{base})" if known else ""
    settings = {
        "rank R": config.rank,
        "subspaces K": config.subspaces,
        "rank of a subspace r_k": config.subspace_rank,
        "segmentation": config.segmentation,
        "basis": config.basis,
        "modules_to_save": ", ".join(stored.saved) or "none",
    }
    rank = max(row.q for row in summary.rows)
    counts = [
        f"{summary.total.trained:,} trained parameters in {len(summary.rows)} layers, "
        f"{summary.total.active} of {summary.total.K} subspaces trained to the end"
    ]
    counts += [f"{summary.saved:,} parameters of modules that were trained whole"] if summary.saved else []
    counts += [f"{summary.tokens:,} parameters of the rows of single tokens"] if summary.tokens else []
    layers = [*stored.layers][:LONGEST_LIST]
    more = len(stored.layers) - len(layers)
    lines = [
        "---",
        *header,
        "---",
        "",
        f"# {'Model with a merged AdaMSS adapter' if form == 'merged' else 'AdaMSS adapter'}{of}",
        "",
        "AdaMSS (Adaptive Multi-Subspace fine-tuning, Zheng et al., NeurIPS 2025) changes a frozen weight by",
        "`W = W0 + sum_k A_k B_k C_k` over K small subspaces found in the weight itself.",
        "",
        *(f"- {count}" for count in counts),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {_cell(str(value))} |" for name, value in settings.items()),
        "",
        "## Use",
        "",
        USE[form].format(where=where, rank=rank),
        "## Layers",
        "",
        *(f"- `{_cell(path)}`" for path in layers),
        *([f"- and {more} more"] if more else []),
        "",
        "Written by " + ", ".join(f"{name} {version}" for name, version in stored.writer.items()) + ".",
    ]
    return "\n".join(_printable(line) for line in "\n".join(lines).splitlines()) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def _printable(text: str) -> str:
    """Replace characters that are not printable, since names come from a file that may be hostile."""
    return "".join(char if char.isprintable() else " " for char in text)
