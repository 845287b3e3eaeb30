"""The commands. Each reads files, calls one function of the library, and turns what it returns into a `Result`."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from adamss import offline
from adamss._version import __version__
from adamss.cli.output import Result, emit, printable, progress, say, table
from adamss.config import SEGMENTATIONS
from adamss.errors import AdamssError, ConfigError, ConfigTypeError, TargetError
from adamss.io import checkpoint, writer
from adamss.io.weights import WeightFiles
from adamss.offline.convert import FORMATS
from adamss.offline.inspect import linear_layers, model_type, targeted
from adamss.offline.plan import layers_of, suggested
from adamss.verbs.merging import LOSS_WORTH_A_WARNING
from adamss.verbs.table import summary_of_file

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="adamss", message="%(prog)s %(version)s")
def app() -> None:
    """Inspect, compare, convert and merge AdaMSS adapters in files.

    Results go to standard output, and messages to standard error. The exit status is 0 on success, 1 if a check fails
    or a file is missing or cannot be read, and 2 if the arguments are wrong.
    """


PATH = click.Path()
"""For the completion of file names by the shell. The commands check paths themselves."""

POSITIVE = click.IntRange(min=1, max=10**9)

base_option = click.option(
    "--base",
    type=PATH,
    metavar="MODEL",
    required=True,
    help="Base model: a safetensors file, or a folder with one file or shards.",
)
out_option = click.option(
    "--out", type=PATH, metavar="FOLDER", required=True, help="Folder to write. It must not exist yet."
)
targets_option = click.option(
    "--targets",
    multiple=True,
    help="Names at the end of module paths, separated by commas; one regular expression for whole paths; or "
    "all-linear. The default depends on the type of the model.",
)
adapter_argument = click.argument("file", type=PATH)


class Number(click.ParamType[int]):
    """Type of an argument that is a count, such as ``50k`` or ``1.5M``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the count."""
        factors = {"k": 1e3, "m": 1e6, "b": 1e9}
        last = value[-1:].lower()
        digits, factor = (value[:-1], factors[last]) if last in factors else (value, 1.0)
        try:
            number = float(digits.replace(",", "").replace("_", "")) * factor
        except ValueError:
            number = 0.0
        if not 1 <= number < 1e15:
            self.fail(f"{value!r} is not a number of parameters, such as 50k or 1.5M")
        return round(number)


PICTURES = ("ordering", "spectrum", "sizes", "active")
USAGE = (ConfigError, ConfigTypeError, TargetError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Arguments after the name of the program. None means those of the process.

    Returns
    -------
    int
        Exit status: 0 on success, 1 if a check fails or a file is missing or cannot be read, 2 if the arguments are
        wrong, and 130 if the command was interrupted. Unless a check has failed, which is part of the result, an
        error is explained by one line on standard error.
    """
    # The hub's library logs every attempt of a download. An error tells the outcome once.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("always", category=UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            app.main(
                None if arguments is None else list(arguments), prog_name="adamss", standalone_mode=False
            )
        except click.exceptions.NoArgsIsHelpError as asked:
            asked.show()
            return 2
        except click.UsageError as wrong:
            command_path = "adamss" if wrong.ctx is None else wrong.ctx.command_path
            say(f"{wrong.format_message().rstrip('.')}; see {command_path} --help")
            return 2
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
        except (AdamssError, OSError) as error:
            say(_one_line(error))
            return 2 if isinstance(error, USAGE) else 1
        except MemoryError:
            say("there is not enough memory")
            return 1
    return 0


def command(function: Callable[..., Result]) -> click.Command:
    """Make a command of a function that returns a `Result`. The command prints it, as JSON if ``--json`` is given."""

    @functools.wraps(function)
    def run(as_json: bool, **options: Any) -> None:
        try:
            result = function(**options)
            emit(result, as_json=as_json)
        except KeyboardInterrupt:
            say("interrupted")
            raise SystemExit(130) from None
        if not result.right:
            raise SystemExit(1)

    return app.command()(
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(run)
    )


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, AdamssError):
        name = error.filename2 or error.filename
        return error.strerror if name is None else f"{error.strerror}: {os.fsdecode(name)!r}"
    return str(error)


def _split(words: Sequence[str]) -> list[str] | None:
    """Split arguments at commas, except those that contain a brace, since ``{2,3}`` in an expression is no list."""
    return (
        None
        if not words
        else [part for word in words for part in (word.split(",") if "{" not in word else [word]) if part]
    )


@command
@adapter_argument
def show(file: str) -> Result:
    """Print the content of an adapter.

    FILE is an adapter file, a folder that contains one, or user/name on the Hugging Face Hub. The whole file is
    checked first.

    \b
    Examples:
      adamss show adapter.safetensors
      adamss show adapter.safetensors --json | jq .total.trained
    """
    stored = offline.read_adapter(file)
    summary = summary_of_file(stored)
    training = any(layer.A is not None for layer in stored.layers.values())
    text = "\n".join(
        (
            str(
                dataclasses.replace(
                    summary,
                    rows=tuple(dataclasses.replace(row, path=printable(row.path)) for row in summary.rows),
                )
            ),
            f"form: {'training (A and B)' if training else 'portable (M)'}",
            f"config: {printable(str(stored.config), longest=10_000)}",
            "written by: "
            + ", ".join(printable(f"{name} {version}") for name, version in stored.writer.items()),
        )
    )
    document = {
        "format_version": checkpoint.FORMAT_VERSION,
        "form": "training" if training else "portable",
        "layers": [dataclasses.asdict(row) for row in summary.rows],
        "total": dataclasses.asdict(summary.total),
        "modules_to_save": {
            path: {name: list(tensor.shape) for name, tensor in own.items()}
            for path, own in stored.saved.items()
        },
        "trained_tokens": {path: list(rows.shape) for path, rows in stored.tokens.items()},
        "config": stored.config.to_dict(),
        "writer": dict(stored.writer),
    }
    return Result(document, text)


@command
@click.argument("model", type=PATH)
@targets_option
@click.option("--rank", type=POSITIVE, default=100, show_default=True, help="Rank R.")
@click.option("--subspaces", type=POSITIVE, default=10, show_default=True, help="Number of subspaces K.")
@click.option("--segmentation", type=click.Choice(SEGMENTATIONS), default="kmeans", show_default=True)
def inspect(model: str, targets: tuple[str, ...], rank: int, subspaces: int, segmentation: str) -> Result:
    """Measure the weights of a model.

    MODEL is a safetensors file, or a folder with one file or shards. Only one matrix is in memory at a time.

    The columns are: the energy in rank R, the sizes of the K subspaces, the K that the paper's Algorithm 2
    estimates, and the share of the representation Z* inside the subspaces, compared with random groups of columns
    and with a random matrix.

    \b
    Examples:
      adamss inspect model.safetensors --targets query,value
      adamss inspect path/to/sharded-model --targets all-linear --rank 64 --json
    """
    files = WeightFiles(model)
    layers = targeted(linear_layers(files), _split(targets), model_type(files.path))
    found = []
    with progress(len(layers), "matrix") as count:
        for report in offline.inspect(
            files, layers, rank=rank, subspaces=subspaces, segmentation=segmentation
        ):
            found.append(report)
            count()
    rows = [
        (
            each.path,
            f"{each.shape[0]} x {each.shape[1]}",
            each.dtype,
            f"{each.energy:.1%}",
            f"{min(each.sizes)} / {int(sorted(each.sizes)[len(each.sizes) // 2])} / {max(each.sizes)}",
            each.estimated,
            f"{each.inside:.3f}",
            f"{each.inside_by_chance:.3f}",
            f"{each.gain:.2f}",
            f"{each.gain_of_random:.2f}",
        )
        for each in found
    ]
    headers = [
        "layer",
        "d x n",
        "dtype",
        "energy",
        "n_k",
        "K est.",
        "inside",
        "by chance",
        "gain",
        "of random W",
    ]
    legend = (
        f"energy: share of ||W||^2 in rank {rank}. n_k: smallest / median / largest of {subspaces} subspaces "
        f"({segmentation}).\nK est.: K by Algorithm 2 without a lower bound. inside: share of ||Z*||^2 inside the "
        "subspaces. by chance: the same\nfor random groups of these sizes. gain: inside / by chance. "
        "of random W: gain for a matrix with random singular vectors."
    )
    document = {
        "rank": rank,
        "subspaces": subspaces,
        "segmentation": segmentation,
        "layers": [dataclasses.asdict(each) for each in found],
    }
    return Result(document, f"{table(rows, headers)}\n{legend}")


@command
@click.argument("model", type=PATH)
@click.option(
    "--params", type=Number(), help="Largest number of trained parameters: 50k, 1.5M. Default: any."
)
@targets_option
@click.option("--subspaces", type=POSITIVE, help="Fix the number of subspaces K.")
@click.option("--rank", type=POSITIVE, help="Fix the rank R.")
@click.option("--subspace-rank", type=POSITIVE, help="Fix the rank r_k of a subspace.")
def plan(
    model: str,
    params: int | None,
    targets: tuple[str, ...],
    subspaces: int | None,
    rank: int | None,
    subspace_rank: int | None,
) -> Result:
    """List settings that meet a budget of parameters.

    For each K and r_k, the table has the largest R within the budget, and the largest rank of a LoRA that trains no
    more parameters than these settings.

    MODEL is a safetensors file or a folder with weights. It may also be a config.json, from which transformers builds
    the model without values.

    \b
    Examples:
      adamss plan path/to/model --params 50k
      adamss plan config.json --params 1M --targets q_proj,v_proj --subspaces 16
    """
    all_layers, kind_of_model = layers_of(model)
    layers = targeted(all_layers, _split(targets), kind_of_model)
    plans = offline.plan(layers, params, rank=rank, subspaces=subspaces, subspace_rank=subspace_rank)
    best = suggested(plans)
    rows = [
        (
            str(each.subspaces),
            each.subspace_rank,
            each.rank,
            f"{each.trained:,}",
            each.directions,
            each.lora_rank or "-",
            "begin with this" if each is best else "",
        )
        for each in plans
    ]
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    limit = "any number of trained parameters" if params is None else f"at most {params:,} trained parameters"
    call = (
        f"adamss.AdamssConfig(targets={names!r}, rank={best.rank}, subspaces={best.subspaces}, "
        f"subspace_rank={best.subspace_rank})"
    )
    text = (
        f"{len(layers)} layers ({', '.join(map(printable, names[:8]))}), {limit}\n\n"
        f"{table(rows, ['K', 'r_k', 'R', 'trained', 'q', 'LoRA rank', ''])}\n\n{call}"
    )
    document = {
        "params": params,
        "layers": {path: list(shape) for path, shape in layers.items()},
        "plans": [dataclasses.asdict(each) for each in plans],
        "suggested": dataclasses.asdict(best),
    }
    return Result(document, text)


@command
@click.argument("kind", metavar="KIND", type=click.Choice(PICTURES))
@click.argument("sources", type=PATH, metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "--out", type=PATH, metavar="FILE", required=True, help="Picture to write, in .png, .svg or .pdf."
)
@click.option(
    "--base", type=PATH, metavar="MODEL", help="Base model of the adapter, for ordering and spectrum."
)
@click.option("--layer", multiple=True, help="Layers to draw, separated by commas; one for ordering.")
def plot(kind: str, sources: tuple[str, ...], out: str, base: str | None, layer: tuple[str, ...]) -> Result:
    """Draw an adapter, a model or a training run.

    The pictures are: ordering (|Z*| with its columns ordered by subspace), spectrum (singular values), sizes (of the
    subspaces) and active (number of trained subspaces over time). SOURCE is an adapter or, for ordering and spectrum,
    a model. For active, it is one or more checkpoints, or the trainer_state.json of a Trainer.

    \b
    Examples:
      adamss plot ordering adapter.safetensors --base path/to/model --out z.png
      adamss plot active runs/checkpoint-* --out active.svg
    """
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out must end in .png, .svg or .pdf, found {out!r}")
    if kind != "active" and len(sources) > 1:
        raise ConfigError(f"{kind} draws one source; found {len(sources)}")
    layers = _split(layer)
    if kind == "ordering" and layers and len(layers) > 1:
        raise ConfigError(f"ordering draws one layer; found {', '.join(layers)}")
    from adamss import plots

    source = sources[0] if len(sources) == 1 else sources
    options: dict[str, Any] = {}
    if kind in ("ordering", "spectrum"):
        options["base"] = base
    if kind == "ordering":
        options["layer"] = layers[0] if layers else None
    elif kind != "active":
        options["layers"] = layers
    axes = getattr(plots, kind)(source, **options)
    from matplotlib import pyplot

    figure = axes.figure
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix[1:])
    pyplot.close(figure)
    writer.replace(Path(out), picture.getvalue())
    return Result({"file": out, "kind": kind}, f"{out}: {kind}")


@command
@adapter_argument
@base_option
def verify(file: str, base: str) -> Result:
    """Check that a model is the base of an adapter.

    The adapter file is checked first. Then the weights of the model are compared with the fingerprints in the file.
    The exit status is 1 if a weight does not fit.

    \b
    Examples:
      adamss verify adapter.safetensors --base path/to/model
    """
    stored, files = offline.read_adapter(file), WeightFiles(base)
    with progress(len(stored.layers), "layer") as count:
        checks = offline.verify(stored, files, count=count)
    rows = [
        (
            each.path,
            each.tensor,
            f"{each.difference:.2%}",
            f"{each.tolerance:.2%}",
            "yes" if each.fits else "NO",
        )
        for each in checks
    ]
    wrong = sum(not each.fits for each in checks)
    verdict = (
        f"{printable(base)} is the model that the adapter was trained on, up to rounding"
        if not wrong
        else f"{wrong} of {len(checks)} weights are not those that the adapter was trained on"
    )
    headers = ["layer", "weight", "difference", "tolerance", "fits"]
    document = {"fits": not wrong, "layers": [dataclasses.asdict(each) for each in checks]}
    return Result(document, f"{table(rows, headers)}\n{verdict}", right=not wrong)


@command
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
def diff(a: str, b: str) -> Result:
    """Compare two adapters.

    The settings, the layers, the updates and all other trained tensors are compared. The exit status is 1 if the two
    adapters change a model differently.

    \b
    Examples:
      adamss diff first.safetensors second.safetensors
    """
    difference = offline.diff(offline.read_adapter(a), offline.read_adapter(b))
    lines = [
        f"{name}: {printable(str(ours))} | {printable(str(theirs))}"
        for name, (ours, theirs) in difference.settings.items()
    ]
    for which, paths in zip((a, b), difference.only, strict=True):
        lines += [f"only in {printable(which)}: {printable(path)}" for path in paths]
    rows = [
        (
            each.path,
            f"{each.distance:.3g}",
            f"{each.cosine:.3f}",
            f"{each.norms[0]:.3g} | {each.norms[1]:.3g}",
            f"{each.regrouped:.1%}",
            f"{each.active[0]} | {each.active[1]}",
        )
        for each in difference.layers
    ]
    if rows:
        lines.append(table(rows, ["layer", "distance", "cosine", "norms", "regrouped", "active"]))
        lines.append(
            "distance: ||dA - dB|| / larger norm. regrouped: share of columns that are in other subspaces."
        )
    for which, names in zip((a, b), difference.saved_only, strict=True):
        lines += [f"only in {printable(which)}: {printable(name)}" for name in names]
    lines += [
        f"{printable(name)}: largest difference {largest:.3g}" for name, largest in difference.saved.items()
    ]
    lines.append("the adapters change a model in the same way" if difference.same else "the adapters differ")
    document = dataclasses.asdict(difference) | {"same": difference.same}
    return Result(document, "\n".join(lines), right=difference.same)


@command
@adapter_argument
@click.option("--to", type=click.Choice(FORMATS), required=True, help="Format; PEFT reads lora and peft.")
@base_option
@out_option
def convert(file: str, to: str, base: str, out: str) -> Result:
    """Write an adapter in another format.

    FILE is an adapter of adamss, or a folder of PEFT's own AdaMSS. A LoRA (lora) has exactly the same update. PEFT's
    AdaMSS (peft) can only represent adapters that come from PEFT or have one subspace. Reading and writing it needs
    PyTorch and scikit-learn. The new folder includes a model card.

    \b
    Examples:
      adamss convert adapter.safetensors --to lora --base path/to/model --out adapter-lora
      adamss convert peft-folder --to adamss --base path/to/model --out adapter
    """
    text = offline.convert(file, to, WeightFiles(base), out)
    return Result({"folder": out, "format": to}, text)


@command
@adapter_argument
@base_option
@out_option
@click.option("--check/--no-check", "check_base", default=True, help="Verify the base model first (default).")
def merge(file: str, base: str, out: str, check_base: bool) -> Result:
    """Write the base model with an adapter merged into it.

    Only one tensor is in memory at a time. The new folder loads as the base model does, with from_pretrained and
    without adamss.

    \b
    Examples:
      adamss merge adapter.safetensors --base path/to/model --out merged
    """
    stored, files = offline.read_adapter(file), WeightFiles(base)
    with progress(len(stored.layers), "layer") as count:
        merged = offline.merge(stored, files, out, check_base=check_base, count=count)
    worst = max(merged.lost, key=lambda path: merged.lost[path])
    text = f"{len(merged.lost)} layers merged into {len(merged.files)} file(s) in {out!r}"
    if merged.lost[worst] > LOSS_WORTH_A_WARNING:
        warnings.warn(
            f"rounding to the dtype of the weights lost up to {merged.lost[worst]:.0%} of the update ({worst})",
            UserWarning,
            stacklevel=1,
        )
    if merged.added:
        added = ", ".join(map(printable, merged.added))
        text += f"\nadded: {added}. Load the folder with the class of the model that was trained"
        tensors = [
            own.get("weight") for path, own in stored.saved.items() if f"{path}.weight" in merged.added
        ]
        labels = [tensor.shape[0] for tensor in tensors if tensor is not None and len(tensor.shape) == 2]
        text += f", and num_labels={labels[0]} if that is a classifier" if len(labels) == 1 else ""
    document = {"folder": out, **merged._asdict()}
    return Result(document, text)
