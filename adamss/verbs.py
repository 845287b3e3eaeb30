"""The verbs on models: attach, summary, save, load, merge, detach, ...

Written once for all frameworks. Each finds the backend from the type of the model, and checks all that can
be checked before anything is changed, so that a call that fails leaves the model as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_torch_array
from tqdm.auto import tqdm

from adamss import checkpoint as files
from adamss import core, peft
from adamss._summary import Summary, summarise, total
from adamss._targets import match, near_matches
from adamss.backend.interface import Adaptation, Backend, BaseWeight, Each, Model
from adamss.backend.registry import backend_for
from adamss.checkpoint import Checkpoint, StoredLayer, StoredTensor, join_path
from adamss.config import AdamssConfig, shown
from adamss.core import Factors
from adamss.core._array import as_working_precision, check_concrete, check_matrix, device, namespace
from adamss.errors import (
    AdamssWarning,
    ArrayTypeError,
    ArrayValueError,
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    LayerError,
    StateError,
    TargetError,
)
from adamss.lora import LoraFolder, lora_layers, write_lora
from adamss.peft import Grouping, PeftAdapter, PeftFolder

__all__ = [
    "attach",
    "consolidate",
    "detach",
    "disabled",
    "from_peft",
    "load",
    "merge",
    "save",
    "summary",
    "to_lora",
    "to_peft",
    "trainable_parameters",
    "unmerge",
]

LOSS_WORTH_A_WARNING = 0.05
COUNTERS = ("num_batches_tracked",)
"""What PyTorch counts in its layers and other frameworks do not: a file may lack it, or have it in vain."""


_Arrays = TypeVar("_Arrays", BaseWeight, Factors)


def attach(model: Model, config: AdamssConfig, *, divide: bool = True) -> Model:
    """Adapt the layers of a model that ``config.targets`` names, and freeze the rest.

    Only the factors B and C and the ``modules_to_save`` are trained afterwards. C starts at zero: the
    outputs are those of the base model, to the bit.

    Layers are decomposed where their weights are, one after the other, so that beside weights and factors there is
    memory for one layer alone: tens of megabytes for a width up to 2048, less than five times the layer's float32
    weight beyond. PyTorch takes small layers on the CPU, of a side up to 512, as many at a time as it has threads. A
    bar shows how far it is, on a terminal and after a second.

    Parameters
    ----------
    model
        A model of any framework with a backend. PyTorch: changed in place.
    config
        What to adapt, and how.
    divide
        Where several processes run (`torch.distributed`): each layer is decomposed by one of them, which sends the
        factors to the others. All processes must call `attach` then, and an error on one is raised on all; those
        that have other layers or weights than the rest are left to themselves. False: each process decomposes
        all layers and waits for no other, as it must where only some of them attach.

    Returns
    -------
    Model
        The adapted model; the same object where the framework's models are mutable.

    Raises
    ------
    TargetError
        If nothing matches ``targets`` or ``modules_to_save``; the message lists near matches.
    LayerTypeError, LayerError
        If a matched module has no weight that can be adapted.
    ArrayTypeError, ArrayValueError
        If a weight is complex or integer, or holds NaN or infinity; the message names the layer.
    StateError
        If adapters are attached already.
    """
    if not isinstance(config, AdamssConfig):
        raise ConfigTypeError(f"config must be an adamss.AdamssConfig, found {type(config).__name__}")
    backend = backend_for(model)
    with backend.exact(), backend.divided(model, enabled=divide) as division:
        _require_base(backend, model, "attach")
        modules = backend.modules(model)
        paths = _once(match(config.targets, modules, name="targets"), modules)
        saved = []
        if config.modules_to_save:
            saved = _once(match(config.modules_to_save, modules, name="modules_to_save"), modules)
        _require_disjoint(paths, saved)
        weights = {path: _weight(backend, modules, path) for path in paths}

        with _progress(len(weights)) as count:

            def initial(batch: Mapping[str, BaseWeight], each: Each) -> dict[str, Factors]:
                return _initial_factors(backend, batch, config, each, count)

            layers = division.factors(weights, initial, settings=lambda: json.dumps(config.to_dict()))
        if config.budget is not None:
            core.plan_budget(layers, config.budget)  # complains of what cannot be kept to
        return backend.insert(model, layers, config=config, saved=dict.fromkeys(saved))


def summary(model: Model) -> Summary:
    """Return effective settings and counts of every adapted layer; prints as a table.

    Parameters
    ----------
    model
        An adapted model.

    Returns
    -------
    Summary
        With `rows` and `total`.

    Raises
    ------
    StateError
        If the model has no adapters.
    """
    backend, adaptation = _adapted(model, "summary")
    rows = [
        summarise(path, adaptation.shapes[path], _outline(backend, factors, path))
        for path, factors in adaptation.layers.items()
    ]
    modules = backend.modules(model)
    saved = (array for path in adaptation.saved for array in backend.arrays(modules[path]).values())
    return Summary(tuple(rows), total(rows), sum(int(np.prod(array.shape)) for array in saved))


def trainable_parameters(model: Model) -> Any:
    """Return what to hand to an optimiser, in the framework's own form.

    B and C of every adapted layer, then the parameters of ``modules_to_save``. PyTorch: a list of Parameters.

    Parameters
    ----------
    model
        An adapted model.

    Raises
    ------
    StateError
        If the model has no adapters.
    """
    backend, _ = _adapted(model, "trainable_parameters")
    return backend.parameters(model)


def save(model: Model, path: str | os.PathLike[str], *, training: bool = False) -> None:
    """Write the adapter, and ``modules_to_save``, to one safetensors file.

    Where several processes hold parts of the model (PyTorch's ``fully_shard``), all of them call this and one
    writes.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    path
        Where to; an existing file is replaced, whole or not at all.
    training
        False: portable, with ``M = A B``, the smallest. True: A and B, to resume training to the bit.

    Raises
    ------
    StateError
        If the model has no adapters, or was merged with ``keep_base=False``.
    """
    backend, adaptation = _adapted(model, "save")
    if adaptation.merged:
        _require_kept_base(adaptation, "save")
    modules = backend.modules(model)
    layers = {}
    with backend.exact():
        for layer_path, factors in adaptation.layers.items():
            base = _weight(backend, modules, layer_path)
            check_concrete(*factors, name=layer_path)
            factors, base = _whole(backend, factors), _whole(backend, base)
            layers[layer_path] = _stored_layer(backend, factors, base, training=training)
        saved = {}
        for module_path in adaptation.saved:
            arrays = backend.arrays(modules[module_path])
            check_concrete(*arrays.values(), name=module_path)
            saved[module_path] = {
                name: backend.to_stored(backend.whole(array)) for name, array in arrays.items()
            }
    from adamss import __version__

    writer = {"adamss": __version__, "backend": backend.name, **backend.versions()}
    checkpoint = Checkpoint(adaptation.config, layers, saved, writer)
    backend.once(model, lambda: files.write(_checked_path(path), checkpoint))


def to_lora(model: Model, folder: str | os.PathLike[str]) -> LoraFolder:
    """Write the adapter as a LoRA, without loss: what servers (vLLM, llama.cpp, SGLang, TGI, diffusers) read.

    M and the block-structured expansion of C are a LoRA of rank q. The folder has PEFT's two files, ``lora_alpha``
    equal to the rank so that the scale is 1, one rank for all layers (the largest q; zeros fill the rest up), and
    weights in float32. Frozen subspaces are part of it, for they contribute. It loads with
    ``peft.PeftModel.from_pretrained(base_model, folder)``.

    Where several processes hold parts of the model, all of them call this and one writes.

    Parameters
    ----------
    model
        An adapted model of any framework, merged or not. Module paths become the names in the file: those of PyTorch
        are what servers look for, and an adapter trained elsewhere gets them by `save` and `load`.
    folder
        Where to; made if it does not exist, and the files in it replaced.

    Returns
    -------
    LoraFolder
        With `path`, `rank`, `layers`, `saved`; prints as a sentence.

    Raises
    ------
    StateError
        If the model has no adapters; if the update of a bias is not zero; if q is above 512, the most that servers
        take (the message says which K and r_k would fit); if a layer is one of a stack.
    ArrayValueError
        If factors are not finite.

    Warns
    -----
    AdamssWarning
        If there are ``modules_to_save``, which are no part of a LoRA: the message names the file beside it where they
        are.
    """
    backend, adaptation = _adapted(model, "to_lora")
    modules = backend.modules(model)
    with backend.exact():
        layers = lora_layers(backend, adaptation)
        saved = {
            join_path(path, name): backend.to_stored(backend.whole(array))
            for path in adaptation.saved
            for name, array in backend.arrays(modules[path]).items()
        }
    targets = _shortest_targets(layers, modules)
    path = _checked_path(folder, name="folder")
    backend.once(model, lambda: write_lora(path, layers, targets=targets, saved=saved))
    written = LoraFolder.of(path, layers, saved)
    if saved:
        warnings.warn(f"to_lora: {written}", AdamssWarning, stacklevel=2)
    return written


def to_peft(model: Model, folder: str | os.PathLike[str]) -> PeftFolder:
    """Write the adapter as one of PEFT's AdaMSS, where its format has room for it.

    PEFT does not store which columns make a subspace, but finds them again at each load, by a procedure of its own.
    So this is for adapters that came from PEFT (`from_peft`), trained further here or not, and for those of one
    subspace; `to_lora` writes any. What is written loads right on this very base, in this very dtype: PEFT does not
    check. Takes PyTorch and scikit-learn.

    Where several processes hold parts of the model, all of them call this and one writes.

    Parameters
    ----------
    model
        An adapted model of any framework, merged or not. Module paths become the names in the file.
    folder
        Where to; made if it does not exist, and the files in it replaced.

    Returns
    -------
    PeftFolder
        With `path`, `layers`, `saved`; prints as a sentence.

    Raises
    ------
    StateError
        If the model has no adapters, or PEFT would take them for others: it would group the columns otherwise, or
        there is a basis for each subspace. The message names the layer.
    ArrayValueError
        If factors are not finite.
    MissingBackendError
        If PyTorch or scikit-learn is not installed.

    Warns
    -----
    AdamssWarning
        If subspaces are frozen: the format has no mask, and PEFT would train all of them.
    """
    backend, adaptation = _adapted(model, "to_peft")
    modules, config = backend.modules(model), adaptation.config
    layers = {}
    with backend.exact():
        for layer_path, factors in adaptation.layers.items():
            peft.check_layer_name(layer_path, "to_peft")
            base = _whole(backend, _weight(backend, modules, layer_path))
            arrays = _host_factors(backend, _whole(backend, factors), layer_path)
            found = _peft_grouping(backend, base, config.rank, config.subspaces, config.seed)
            layer = peft.layer_of(arrays, found.labels, found.basis.shape)
            if isinstance(layer, str):
                raise StateError(
                    f"to_peft: {layer_path} has no form in PEFT's AdaMSS: {layer}; adamss.to_lora exports it without "
                    "loss, and PEFT and servers read that"
                )
            layers[layer_path] = layer
        saved = {
            join_path(module_path, name): backend.to_stored(backend.whole(array))
            for module_path in adaptation.saved
            for name, array in backend.arrays(modules[module_path]).items()
        }
    frozen = sum(
        int((~np.asarray(backend.to_stored(f.active).numpy())).sum()) for f in adaptation.layers.values()
    )
    if frozen:
        warnings.warn(
            f"to_peft: PEFT's format has no mask; {frozen} frozen subspaces are part of the file, and PEFT would "
            "train them on",
            AdamssWarning,
            stacklevel=2,
        )
    path = _checked_path(folder, name="folder")
    settings = peft.adamss_config(
        config,
        subspace_rank=max(A.shape[0] for layer in layers.values() for A in layer.A),
        targets=_shortest_targets(layers, modules),
        saved=adaptation.saved,
    )
    tensors = peft.adamss_tensors(layers) | {f"{peft.PREFIX}{name}": tensor for name, tensor in saved.items()}
    backend.once(model, lambda: peft.write_folder(path, settings, tensors))
    return PeftFolder(Path(path), len(layers), adaptation.saved)


def from_peft(base_model: Model, folder: str | os.PathLike[str]) -> Model:
    """Attach an adapter that PEFT's AdaMSS wrote (`save_pretrained`), of the same outputs.

    PEFT does not store which columns of a weight make a subspace. They are found again by its own procedure, and what
    is found is compared with the sizes and the basis in the file: another base, or this one rounded to another dtype,
    is an error here where PEFT scrambles the adapter in silence. From then on the grouping is part of the model, and
    `save` keeps it, so that the adapter can be loaded in any dtype. Takes PyTorch and scikit-learn, whatever the
    framework of the model.

    Parameters
    ----------
    base_model
        The model that the adapter was trained on, in the same dtype, without adapters. Paths of its modules are the
        names in the file.
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Model
        The adapted model, all subspaces trainable (PEFT stores no mask); the same object where the framework's models
        are mutable.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such folder, or one of its files is missing.
    CheckpointError
        If it holds an adapter of another method (the message says which), is damaged, or does not fit the model. The
        model is unchanged.
    StateError
        If adapters are attached already.
    MissingBackendError
        If PyTorch or scikit-learn is not installed.
    """
    backend = backend_for(base_model)
    with backend.exact():
        _require_base(backend, base_model, "from_peft")
        adapter = peft.read_folder(_checked_path(folder, name="folder"))
        modules = backend.modules(base_model)
        _require_modules([*adapter.layers, *adapter.saved], modules)
        _require_distinct(list(adapter.layers), modules)
        saved = {
            module_path: _saved_arrays(backend, module_path, tensors, backend.arrays(modules[module_path]))
            for module_path, tensors in adapter.saved.items()
        }
        layers = {}
        with _progress(len(adapter.layers)) as count:
            for layer_path in filter(adapter.layers.__contains__, modules):
                base = backend.weight(modules[layer_path], layer_path)
                check_matrix(base.W, name=f"{layer_path}: weight")
                layers[layer_path] = _factors_from_peft(backend, adapter, layer_path, base)
                count()
        config = AdamssConfig(
            targets=_shortest_targets(layers, modules),
            rank=adapter.rank,
            subspaces=adapter.subspaces,
            subspace_rank=adapter.subspace_rank,
            modules_to_save=tuple(adapter.saved),
            include_bias=True,
            seed=adapter.seed,
        )
        return backend.insert(base_model, layers, config=config, saved=saved)


def load(
    base_model: Model,
    path: str | os.PathLike[str],
    *,
    trainable: bool = True,
    check_base: bool = True,
    divide: bool = False,
) -> Model:
    """Attach an adapter from a file, whatever framework, device or dtype it was trained with.

    Segmentation, factors and mask come from the file. From a portable one the basis is made anew, and shared by
    all subspaces: the update is the same, and R (with it the number of trained parameters) may not be.

    Parameters
    ----------
    base_model
        The model that the adapter was trained on, in any dtype, without adapters.
    path
        A file that `save` wrote.
    trainable
        For a portable file. True: the basis is ``A = orth([M, U])``, its first R columns, so that
        training can go on in the whole subspace; this decomposes the weights. False: ``A = orth(M)``, which is
        all that inference needs and quick.
    check_base
        Whether to compare the fingerprints of the base weights. Turn it off to put an adapter on a model other
        than its own on purpose.
        With ``trainable=False``, or a file that was saved with ``training=True``, the weights are not looked at
        then: a PyTorch model may still be on the meta device. The adapter is loaded to the CPU, and the weights come
        afterwards, by ``load_state_dict(..., strict=False, assign=True)``.
    divide
        Whether several processes divide the decompositions among them, as in `attach`; all must call `load` then.

    Returns
    -------
    Model
        The adapted model; the same object where the framework's models are mutable.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If the file is damaged, foreign or of an unknown version, or does not fit the model; if its factors hold NaN
        or infinity (`save` keeps what a training that diverged has left, `load` does not take it up), or a number
        overflows the dtype that it gets in this model. The message says which. The model is unchanged.
    LayerError
        If a weight has no values, on the meta device, and they are needed.
    StateError
        If adapters are attached already.
    """
    backend = backend_for(base_model)
    with backend.exact(), backend.divided(base_model, enabled=divide) as division:
        _require_base(backend, base_model, "load")
        modules = backend.modules(base_model)
        stored = files.read(_checked_path(path), modules=len(modules))
        _require_modules([*stored.layers, *stored.saved], modules)
        _require_distinct([*stored.layers, *stored.saved], modules)
        weights = {
            layer_path: backend.weight(modules[layer_path], layer_path) for layer_path in stored.layers
        }
        for layer_path, layer in stored.layers.items():
            _check_base_shape(layer_path, layer, weights[layer_path])
            decompose = trainable and layer.M is not None
            _check_base_present(backend, layer_path, weights[layer_path], needed=check_base or decompose)
        saved = {
            module_path: _saved_arrays(backend, module_path, tensors, backend.arrays(modules[module_path]))
            for module_path, tensors in stored.saved.items()
        }

        with _progress(len(weights)) as count:

            def loaded(batch: Mapping[str, BaseWeight], each: Each) -> dict[str, Factors]:
                def one(layer_path: str) -> Factors:
                    base, layer = batch[layer_path], stored.layers[layer_path]
                    if backend.has_values(base.W):
                        check_matrix(base.W, name=f"{layer_path}: weight")
                    if check_base:
                        _check_base_values(layer_path, layer, base)
                    factors = _loaded_factors(
                        backend, layer, base, stored.config, path=layer_path, trainable=trainable
                    )
                    count()
                    return factors

                return dict(zip(batch, each(one, batch), strict=True))

            layers = division.factors(
                weights, loaded, settings=lambda: _digest(stored, trainable, check_base)
            )
        return backend.insert(base_model, layers, config=stored.config, saved=saved)


def merge(model: Model, *, keep_base: bool = True) -> Model:
    """Fold the update into the weights, so that inference costs what the base model costs.

    Each weight becomes ``round(W0 + delta)``, the sum formed in float32 or wider. What `consolidate` has folded is
    merged anew with the rest: `unmerge` gives back the model as it was before both.

    Parameters
    ----------
    model
        An adapted model.
    keep_base
        Keep a copy of W0 on the CPU, so that `unmerge` and `detach` are exact. Without it they raise.

    Returns
    -------
    Model
        The merged model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no adapters or is merged already, or was consolidated with ``keep_base=False``.
    ArrayValueError
        If a merged weight is not finite; the message names the layer, and no layer is merged.

    Warns
    -----
    AdamssWarning
        If the rounding to the dtype of a weight lost more than 5 % of its update.
    """
    backend, adaptation = _adapted(model, "merge")
    if adaptation.merged:
        _require_kept_base(adaptation, "merge")
        raise StateError("merge: the updates are merged already; call adamss.unmerge(model) first")
    if adaptation.folded:
        _require_kept_base(adaptation, "merge")
    modules = backend.modules(model)
    merged, lost = {}, {}
    with backend.exact():
        for path, factors in adaptation.layers.items():
            base = _weight(backend, modules, path)
            check_concrete(*base, *factors, name=path)
            try:
                result = core.merge(*_whole(backend, base), _whole(backend, factors))
            except ArrayValueError as error:
                raise ArrayValueError(f"{path}: {error}") from error
            merged[path], lost[path] = _spread(backend, result, base), float(result.lost)
    worst = max(lost, key=lambda path: lost[path])
    if lost[worst] > LOSS_WORTH_A_WARNING:
        dtype = backend.dtype_name(merged[worst].W)
        warnings.warn(
            f"rounding to {dtype} lost {lost[worst]:.0%} of the update of {worst} "
            f"(more than 5 % in {sum(loss > LOSS_WORTH_A_WARNING for loss in lost.values())} of {len(lost)} "
            "layers); merge into a float32 model, or leave the adapter unmerged",
            AdamssWarning,
            stacklevel=2,
        )
    if adaptation.folded:
        model = backend.unfold(model)
    return backend.fold(model, merged, keep_base=keep_base)


def unmerge(model: Model) -> Model:
    """Take the update out of the weights again: W0 to the bit, the adapters as before `merge`.

    Parameters
    ----------
    model
        A merged model.

    Returns
    -------
    Model
        The adapted model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model is not merged, or was merged with ``keep_base=False``.
    """
    backend, adaptation = _adapted(model, "unmerge")
    if not adaptation.merged:
        raise StateError("unmerge: the updates are not merged")
    _require_kept_base(adaptation, "unmerge")
    return backend.unfold(model)


def consolidate(model: Model, *, keep_base: bool = True) -> Model:
    """Fold the frozen subspaces into the weights, so that the forward computes only what is still trained.

    Each weight becomes ``W0 + sum of A_k B_k C_k over the frozen k``. Outputs and gradients of the trained subspaces
    are the same, up to rounding; `save` goes on writing every subspace, `detach` gives W0 back. Training goes on as
    before, and what is frozen later is folded by the next call, which else changes nothing.
    `adamss_torch.BudgetController.compact` and `adamss_jax.compact` do the same for parameters and optimiser.

    Parameters
    ----------
    model
        An adapted model with frozen subspaces, not merged.
    keep_base
        Keep a copy of W0 on the CPU, so that `detach`, `merge` and `disabled` are exact. Without it they raise, and
        nothing more can be thawed.

    Returns
    -------
    Model
        The model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no adapters, is merged, or has no frozen subspaces.
    ArrayTypeError
        If a weight is in half precision, which would lose the update: merge at the end instead.
    ArrayValueError
        If a weight would not be finite; the message names the layer, and nothing is changed.
    """
    backend, adaptation = _adapted(model, "consolidate")
    if adaptation.merged:
        raise StateError("consolidate: the updates are merged; call adamss.unmerge(model) first")
    folded = {path: ~factors.active for path, factors in adaptation.layers.items()}
    already = adaptation.folded
    new = {path: mask & ~already[path] if path in already else mask for path, mask in folded.items()}
    if not any(bool(namespace(mask).any(mask)) for mask in new.values()):
        if already:
            return model
        raise StateError("consolidate: there is no frozen subspace to fold; all of them are trained")
    modules = backend.modules(model)
    merged = {}
    with backend.exact():
        for path, factors in adaptation.layers.items():
            base = _weight(backend, modules, path)
            if backend.dtype_name(base.W) not in ("float32", "float64"):
                raise ArrayTypeError(
                    f"{path}: consolidating into {backend.dtype_name(base.W)} would round the update away; "
                    "leave the model as it is, and merge at the end"
                )
            W, b = _whole(backend, base)
            result = _folded_weight(W, b, _whole(backend, factors), folded[path], path)
            merged[path] = _spread(backend, result, base)
        return backend.consolidate(
            model, merged, folded, keep_base=keep_base and (adaptation.base_kept or not already)
        )


def detach(model: Model) -> Model:
    """Take the adapters off: the base model back, bit for bit, ``modules_to_save`` included.

    Parameters
    ----------
    model
        An adapted model, merged or not.

    Returns
    -------
    Model
        The base model; the same object where the framework's models are mutable.

    Raises
    ------
    StateError
        If the model has no adapters, or was merged with ``keep_base=False``.
    """
    backend, adaptation = _adapted(model, "detach")
    _require_kept_base(adaptation, "detach")
    return backend.remove(model)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Compute what the base model computes, ``modules_to_save`` included, within a ``with`` block.

    Parameters
    ----------
    model
        An adapted model.

    Yields
    ------
    Model
        The same object, switched off, where the framework's models are mutable; else a model without
        the update.

    Raises
    ------
    StateError
        If the model has no adapters, or was merged with ``keep_base=False``.
    """
    backend, adaptation = _adapted(model, "disabled")
    _require_kept_base(adaptation, "disabled")
    with backend.disabled(model) as base:
        yield base


# ---- state -----------------------------------------------------------------------------------------


READ_ONLY = ("summary", "trainable_parameters", "disabled")


def _adapted(model: Model, verb: str) -> tuple[Backend, Adaptation]:
    backend = backend_for(model)
    adaptation = backend.adaptation(model)
    if adaptation is None:
        raise StateError(f"{verb}: the model has no adapters; call adamss.attach or adamss.load first")
    if adaptation.disabled and verb not in READ_ONLY:
        raise StateError(f"{verb}: the model is switched off by adamss.disabled; leave its with block first")
    return backend, adaptation


def _require_base(backend: Backend, model: Model, verb: str) -> None:
    if backend.adaptation(model) is not None:
        raise StateError(f"{verb}: the model has adapters already; call adamss.detach(model) first")


def _require_kept_base(adaptation: Adaptation, verb: str) -> None:
    if not adaptation.base_kept:
        raise StateError(
            f"{verb}: the base weights were dropped (keep_base=False); load the base model afresh"
        )


def _require_disjoint(targets: list[str], saved: list[str]) -> None:
    for outer in saved:
        for inner in (*targets, *(path for path in saved if path != outer)):
            if inner == outer or inner.startswith(f"{outer}." if outer else ""):
                raise TargetError(
                    f"{inner!r} is matched for adapting or saving and lies within {outer!r}, which "
                    "modules_to_save trains whole; leave one of them out"
                )


# ---- attaching -------------------------------------------------------------------------------------


def _once(paths: list[str], modules: Mapping[str, Any]) -> list[str]:
    """Return the first path of each module that the paths name: one that appears twice is adapted once."""
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    return list(dict.fromkeys(first[id(modules[path])] for path in paths))


@contextmanager
def _progress(layers: int) -> Iterator[Callable[[], None]]:
    """Give what moves a bar by a layer: on a terminal, and if all take more than a second."""
    one_at_a_time = threading.Lock()
    with tqdm(total=layers, desc="adamss", unit="layer", delay=1.0, leave=False, disable=None) as bar:

        def count() -> None:
            with one_at_a_time:
                bar.update()

        yield count


def _initial_factors(
    backend: Backend,
    batch: Mapping[str, BaseWeight],
    config: AdamssConfig,
    each: Each,
    count: Callable[[], None],
) -> dict[str, Factors]:
    """Return the factors of layers of one shape, to start a training from."""

    def decomposed(path: str) -> core.Decomposition:
        decomposition = core.decompose(
            _decomposition_input(backend, path, batch[path], config), config.rank, seed=config.seed
        )
        count()
        return decomposition

    decompositions = dict(zip(batch, each(decomposed, batch), strict=True))
    xp = namespace(*next(iter(decompositions.values())))
    labels = core.segment(
        core.Decomposition(*map(xp.stack, zip(*decompositions.values(), strict=True))),
        config.subspaces,
        config.segmentation,
        dimension=config.segmentation_dimension,
        seed=config.seed,
    )
    labels_of = dict(zip(batch, xp.unstack(labels), strict=True))

    def initial(path: str) -> Factors:
        factors = core.initial_factors(
            decompositions[path],
            labels_of[path],
            config.subspace_rank,
            basis=config.basis,
            initial_B=config.initial_B,
        )
        return _cast(backend, factors, _factor_dtype(backend, batch[path], config))

    return dict(zip(batch, each(initial, batch), strict=True))


def _decomposition_input(backend: Backend, path: str, base: BaseWeight, config: AdamssConfig) -> Any:
    check_matrix(base.W, name=f"{path}: weight")
    dtype = _factor_dtype(backend, base, config)
    if not backend.has_dtype(dtype):
        raise ConfigError(
            f"factor_dtype = {dtype!r}: {backend.name} has no such dtype as it is set up; choose 'float32'"
        )
    W = base.W
    if config.include_bias and base.b is not None:
        W = _with_bias_row(base)
        check_matrix(W[-1:, :], name=f"{path}: bias")
    return backend.decomposition_input(W)


def _with_bias_row(base: BaseWeight) -> Any:
    """Return (d + 1, n): the weight, and the bias as one more input row."""
    xp = namespace(base.W, base.b)
    return xp.concat([base.W, xp.astype(xp.reshape(base.b, (1, -1)), base.W.dtype)], axis=0)


def _outline(backend: Backend, factors: Factors, path: str) -> Factors:
    """Return labels, ranks and mask as NumPy arrays, and A, B, C that have shapes alone: enough to count."""
    check_concrete(factors.labels, factors.ranks, factors.active, name=path)
    small = {
        name: backend.to_stored(getattr(factors, name)).numpy() for name in ("labels", "ranks", "active")
    }
    nothing = np.zeros(())
    return Factors(*(np.broadcast_to(nothing, tuple(array.shape)) for array in factors))._replace(**small)


def _factor_dtype(backend: Backend, base: BaseWeight, config: AdamssConfig, *, loading: bool = False) -> str:
    if config.factor_dtype is not None and (backend.has_dtype(config.factor_dtype) or not loading):
        return config.factor_dtype
    dtype = backend.dtype_name(base.W)
    return "float64" if dtype == "float64" else "float32"


def _cast(backend: Backend, factors: Factors, dtype: str) -> Factors:
    return factors._replace(**{name: backend.cast(getattr(factors, name), dtype) for name in "ABC"})


def _whole(backend: Backend, arrays: _Arrays) -> _Arrays:
    """Return a base weight, or factors, with all the entries of each array."""
    return type(arrays)(*(None if array is None else backend.whole(array) for array in arrays))


def _spread(backend: Backend, merged: core.Merged, base: BaseWeight) -> core.Merged:
    """Return whole merged arrays in the form of those of the layer: only those of one are whole at a time."""
    b = None if merged.b is None else backend.spread(merged.b, like=base.b)
    return merged._replace(W=backend.spread(merged.W, like=base.W), b=b)


def _folded_weight(W: Any, b: Any, factors: Factors, folded: Any, path: str) -> core.Merged:
    """Return the base weight with the update of some subspaces."""
    try:
        return core.merge(W, b, core.only(factors, folded))
    except ArrayValueError as error:
        raise ArrayValueError(f"{path}: {error}") from error


def _weight(backend: Backend, modules: Mapping[str, Any], path: str) -> BaseWeight:
    """Return the base weight of a layer, with its values."""
    base = backend.weight(modules[path], path)
    if not backend.has_values(base.W):
        raise LayerError(f"{path} is on the meta device: its weight has no values; load the weights first")
    return base


# ---- files -----------------------------------------------------------------------------------------


def _checked_path(path: str | os.PathLike[str], name: str = "path") -> str:
    try:
        return os.fsdecode(path)
    except TypeError as error:
        raise ConfigTypeError(f"{name} must be a string or a pathlib.Path, found {path!r}") from error


def _stored_layer(backend: Backend, factors: Factors, base: BaseWeight, *, training: bool) -> StoredLayer:
    if training:
        basis = {"A": backend.to_stored(factors.A), "B": backend.to_stored(factors.B)}
    else:
        basis = {"M": backend.to_stored(core.contract(factors))}
    labels = backend.to_stored(factors.labels).numpy()
    ranks = backend.to_stored(factors.ranks).numpy()
    return StoredLayer(
        C=backend.to_stored(factors.C),
        labels=_smallest(labels),
        ranks=_smallest(ranks),
        active=backend.to_stored(factors.active),
        base=files.fingerprint(base.W),
        **basis,
    )


def _shortest_targets(layers: Mapping[str, Any], modules: Mapping[str, Any]) -> list[str]:
    """Return the last names of the layers, as servers know them, or whole paths if those would mean others too."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    return names if set(match(names, modules, name="targets")) == layers.keys() else list(layers)


def _peft_grouping(backend: Backend, base: BaseWeight, rank: int, subspaces: int, seed: int) -> Grouping:
    """Return what PEFT finds in a weight of the whole, where it is."""
    W = backend.to_stored(base.W).numpy()
    b = None if base.b is None else backend.to_stored(base.b).numpy()
    on = str(device(base.W)) if is_torch_array(base.W) else "cpu"
    return peft.grouping_of(peft.rows_of(W, b), rank, subspaces, seed, device=on)


def _factors_from_peft(backend: Backend, adapter: PeftAdapter, path: str, base: BaseWeight) -> Factors:
    """Return the factors of one layer of a PEFT folder, its columns grouped as PEFT finds them in the base."""
    layer = adapter.layers[path]
    found = _peft_grouping(backend, _whole(backend, base), adapter.rank, adapter.subspaces, adapter.seed)
    difference = peft.why_not_the_same(layer, found)
    if difference is not None:
        raise CheckpointError(
            f"{path}: the adapter was trained on another base, or on this one in another dtype: {difference}. Which "
            "columns make a subspace is not in PEFT's files and cannot be found from this base; load it on the base "
            "and in the dtype that it was trained on, and adamss.save it from there"
        )
    factors = peft.factors_of(layer, found.labels)
    dtype = "float64" if backend.dtype_name(base.W) == "float64" else "float32"
    arrays = Factors(*(backend.from_stored(StoredTensor.of(array), like=base.W) for array in factors))
    return _cast(backend, arrays, dtype)


def _host_factors(backend: Backend, factors: Factors, path: str) -> Factors:
    """Return factors as NumPy arrays, A, B and C in float32 or float64."""
    arrays = Factors(*(backend.to_stored(array).numpy() for array in factors))
    arrays = arrays._replace(labels=arrays.labels.astype(np.int64), ranks=arrays.ranks.astype(np.int64))
    wide = {name: as_working_precision(getattr(arrays, name)) for name in "ABC"}
    if not all(np.isfinite(array).all() for array in wide.values()):
        raise ArrayValueError(f"{path} has factors that are not finite; nothing is written")
    return arrays._replace(**wide)


def _smallest(integers: np.ndarray[Any, Any]) -> StoredTensor:
    """Return non-negative integers in the smallest unsigned dtype that holds them."""
    return StoredTensor.of(integers.astype(np.min_scalar_type(int(integers.max()))))


def _require_modules(paths: list[str], modules: Mapping[str, Any]) -> None:
    missing = [path for path in paths if path not in modules]
    if missing:
        raise CheckpointError(
            f"the model has no layer {', '.join(shown(path) for path in missing[:3])}"
            f"{f' (and {len(missing) - 3} more)' if len(missing) > 3 else ''}, which the file adapts; "
            f"{near_matches(missing[:1], modules)}"
        )


def _require_distinct(paths: list[str], modules: Mapping[str, Any]) -> None:
    seen: dict[int, str] = {}
    for path in paths:
        other = seen.setdefault(id(modules[path]), path)
        if other != path:
            raise CheckpointError(
                f"{other!r} and {path!r} are one module in this model; the file adapts them apart: "
                "it was trained on another model"
            )


def _check_base_shape(path: str, layer: StoredLayer, base: BaseWeight) -> None:
    shape = tuple(base.W.shape)
    if shape != layer.base.shape:
        raise CheckpointError(
            f"{path}: the weight has shape {shape} (inputs, outputs), the file's {layer.base.shape}: "
            "it was trained on another model"
        )
    rows = (layer.M or layer.A or layer.C).shape[-2]
    if rows > shape[0] and base.b is None:
        raise CheckpointError(f"{path}: the file adapts the bias too, but the layer has none")


def _check_base_present(backend: Backend, path: str, base: BaseWeight, *, needed: bool) -> None:
    if needed and not backend.has_values(base.W):
        raise LayerError(
            f"{path} is on the meta device: its weight has no values; load the weights first, or pass "
            "check_base=False, trainable=False, by which the adapter is loaded alone and the weights may come later"
        )


def _check_base_values(path: str, layer: StoredLayer, base: BaseWeight) -> None:
    difference = layer.base.difference(files.fingerprint(base.W))
    if not difference <= files.FINGERPRINT_TOLERANCE:
        raise CheckpointError(
            f"{path}: the base weight is not the one that the adapter was trained on (its fingerprint "
            f"differs by {difference:.0%}); load the right base model, or pass check_base=False"
        )


def _digest(stored: Checkpoint, *choices: bool) -> str:
    """Return what tells whether two processes load the same, in the same way."""
    digest = hashlib.sha256(repr((stored.config, choices)).encode())
    for path, layer in stored.layers.items():
        for name, tensor in layer.tensors().items():
            digest.update(f"{path} {name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.data)
    return digest.hexdigest()


def _saved_arrays(
    backend: Backend, path: str, tensors: Mapping[str, StoredTensor], present: Mapping[str, Any]
) -> dict[str, Any]:
    optional = {name for name in {*tensors, *present} if name.rpartition(".")[2] in COUNTERS}
    tensors = {name: tensor for name, tensor in tensors.items() if name in present or name not in optional}
    if tensors.keys() | optional != present.keys() | optional:
        raise CheckpointError(
            f"{path}: the file holds {', '.join(sorted(tensors))[:200] or 'nothing'}, "
            f"the model has {', '.join(sorted(present)) or 'nothing'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != tuple(present[name].shape):
            raise CheckpointError(
                f"{join_path(path, name)}: the file has shape {tensor.shape}, the model {tuple(present[name].shape)}"
            )
    return {
        name: _saved_array(backend, join_path(path, name), tensor, present[name])
        for name, tensor in tensors.items()
    }


def _saved_array(backend: Backend, name: str, tensor: StoredTensor, present: Any) -> Any:
    """Return what a file has for an array of the model, rounded to that one's dtype but never cut off."""
    dtype = backend.dtype_name(present)
    if tensor.dtype == dtype:
        return backend.from_stored(tensor, like=present)
    real = "float" in tensor.dtype and "float" in dtype
    fits = real or tensor.dtype.rstrip("0123456789") == dtype.rstrip("0123456789")
    if fits:
        # Overflow is found below, whatever a framework makes of it.
        with np.errstate(over="ignore"):
            array = backend.from_stored(tensor, like=present, dtype=dtype)
        rounded = backend.to_stored(array)
        if real:
            fits = rounded.is_finite() or not tensor.is_finite()
        else:
            fits = np.array_equal(rounded.numpy(), tensor.numpy())
    if not fits:
        raise CheckpointError(
            f"{name}: the file has {tensor.dtype}, of which the model's {dtype} cannot hold all"
        )
    return array


def _loaded_factors(
    backend: Backend,
    layer: StoredLayer,
    base: BaseWeight,
    config: AdamssConfig,
    *,
    path: str,
    trainable: bool,
) -> Factors:
    """Return the factors of a layer in the dtype that they get in this model."""
    dtype = _factor_dtype(backend, base, config, loading=True)
    # Overflow is found below, whatever a framework makes of it.
    with np.errstate(over="ignore", invalid="ignore"):
        factors = _factors_in(dtype, backend, layer, base, config, trainable=trainable)
    xp = namespace(factors.C)
    if not all(bool(xp.all(xp.isfinite(array))) for array in factors[:3]):
        raise CheckpointError(
            f"{path}: the file holds numbers too large for {dtype}; load it into a model of a wider dtype"
        )
    return factors


def _factors_in(
    dtype: str,
    backend: Backend,
    layer: StoredLayer,
    base: BaseWeight,
    config: AdamssConfig,
    *,
    trainable: bool,
) -> Factors:

    def array(stored: StoredTensor, *, dtype: str | None = None) -> Any:
        return backend.from_stored(stored, like=base.W, dtype=dtype)

    labels = array(layer.labels, dtype="int64")
    ranks = array(layer.ranks, dtype="int64")
    C, active = array(layer.C, dtype=dtype), array(layer.active)
    if layer.M is None:
        assert layer.A is not None and layer.B is not None  # `checkpoint.read` has seen to it
        return Factors(array(layer.A, dtype=dtype), array(layer.B, dtype=dtype), C, labels, ranks, active)
    M = array(layer.M, dtype="float64" if dtype == "float64" else "float32")
    U = None
    if trainable:
        W = _with_bias_row(base) if M.shape[0] > base.W.shape[0] else base.W
        U = core.decompose(backend.decomposition_input(W), config.rank, seed=config.seed).U
        U = backend.cast(U, backend.dtype_name(M))
    factors = core.factors_from_directions(M, C, labels, ranks, active, U=U)
    return _cast(backend, factors, dtype)
