"""Adapters in the formats of others."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from adamss.backend.bank import DEFAULT
from adamss.backend.interface import Backend, Model
from adamss.backend.ledger import base_weight, check_together, put, sites_of, values_of_saved, whole
from adamss.backend.registry import backend_for
from adamss.backend.sites import BaseWeight, Site
from adamss.backend.targets import match
from adamss.backend.tensors import StoredTensor, join_path
from adamss.config import AdamssConfig, shown
from adamss.core import Factors
from adamss.core._array import as_working_precision, check_matrix, device
from adamss.errors import (
    AdamssWarning,
    ArrayValueError,
    CheckpointError,
    LayerError,
    LayerTypeError,
    StateError,
)
from adamss.io import peft
from adamss.io.lora import LoraFolder, lora_layers, write_lora
from adamss.io.peft import Grouping, PeftAdapter, PeftFolder
from adamss.io.peft_folder import PREFIX, check_layer_name, write_folder
from adamss.verbs.common import (
    Name,
    adapted,
    cast_factors,
    checked_path,
    chosen,
    name_of,
    new_name,
    one_of,
    progress,
    require_distinct,
    require_modules,
    require_one_path,
    require_shared,
    saved_arrays,
    tied_weights,
)

__all__ = ["from_peft", "to_lora", "to_peft"]

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types of models of which PEFT 0.21 adapts no ``out_proj`` and no ``conv1d``: their kernels read the weights."""

EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""What the layers of experts were called before transformers 5 made one Parameter of all."""


def to_lora(model: Model, folder: str | os.PathLike[str], *, name: Name = None) -> LoraFolder:
    """Write an adapter as a LoRA, without loss: what servers (vLLM, llama.cpp, SGLang, TGI, diffusers) read.

    M and the block-structured expansion of C are a LoRA of rank q. The folder has PEFT's two files, ``lora_alpha``
    equal to the rank so that the scale is 1, one rank for all layers (the largest q; zeros fill the rest up), and
    weights in float32. Frozen subspaces are part of it, for they contribute, and so are ``trained_tokens``, as PEFT
    writes them (``trainable_token_indices``; servers may not read them). It loads with
    ``peft.PeftModel.from_pretrained(base_model, folder)``.

    Where several processes hold parts of the model, all of them call this and one writes.

    Parameters
    ----------
    model
        An adapted model of any framework, merged or not. Module paths become the names in the file: those of PyTorch
        are what servers look for, and an adapter trained elsewhere gets them by `save` and `load`.
    folder
        Where to; made if it does not exist, and the files in it replaced.
    name
        Of the adapter; several, or weights by name, for one LoRA of the sum of their updates, whose rank is the sum
        of theirs; None for the only one, or what is active.

    Returns
    -------
    LoraFolder
        With `path`, `rank`, `layers`, `saved`; prints as a sentence.

    Raises
    ------
    LayerError
        If a layer appears in the model twice, or PEFT's LoRA has no form for its update, or for its trained rows.
    StateError
        If the model has no such adapter; if the update of a bias is not zero; if several have values of one module,
        or of rows of one embedding, which do not add up; if q is above 512, the most that servers
        take (the message says which K and r_k would fit); if a layer is one of a stack.
    ArrayValueError
        If factors are not finite.

    Warns
    -----
    AdamssWarning
        If there are ``modules_to_save``, which are no part of a LoRA: the message names the file beside it where they
        are. If the weight of an adapted layer is tied to another (embeddings and ``lm_head``).
    """
    path = checked_path(folder, name="folder", to_write=True)
    backend, bank = adapted(model, "to_lora")
    weights = chosen(bank, name, "to_lora")
    if name is not None and not isinstance(name, Mapping):
        weights = dict.fromkeys(weights, 1.0)  # whatever it is active with
    check_together(bank, weights)
    adapters = {one: bank.adapters[one] for one in weights}
    every = dict.fromkeys(path for each in adapters.values() for path in each.layers)
    rows = {path: own for each in adapters.values() for path, own in each.tokens.items()}
    modules = backend.modules(model)
    require_one_path([*every, *rows], modules, "to_lora")
    for path_of_rows in rows:
        if (why := backend.rows_refusal(model, path_of_rows)) is not None:
            raise LayerError(
                f"to_lora: {path_of_rows} has trained_tokens, with which PEFT would compute something else: {why}; "
                "adamss.save takes it, or merge the model and save that"
            )
    sites = sites_of(backend, model, every)
    forms: dict[str, str] = {path: backend.lora_form(model, site) for path, site in sites.items()}
    renamed = _taken_for_experts(forms, modules)
    forms |= dict.fromkeys(renamed, "parameter")
    with backend.exact():
        layers = lora_layers(backend, [(each, weights[one]) for one, each in adapters.items()], sites, forms)
        saved = {
            join_path(path, name): backend.to_stored(backend.whole(array))
            for each in adapters.values()
            for path, values in values_of_saved(backend, model, bank, each).items()
            for name, array in values.items()
        }
        tokens = {
            path: (ids, backend.to_stored(backend.whole(values))) for path, (ids, values) in rows.items()
        }
    named = [path for path, layer in layers.items() if layer.form != "parameter"]
    targets, base = _shortest_targets(named, modules), name_of(modules)
    backend.once(
        model,
        lambda: write_lora(path, layers, targets=targets, saved=saved, base=base, tokens=tokens),
    )
    written = LoraFolder.of(path, layers, saved)
    if saved:
        warnings.warn(f"to_lora: {written}", AdamssWarning, stacklevel=2)
    if renamed:
        more = f" (and {len(renamed) - 1} more)" if len(renamed) > 1 else ""
        warnings.warn(
            f"to_lora: {renamed[0]}{more} has a name that PEFT takes for that of experts "
            "when it loads a LoRA into this model, so that it is written as one of target_parameters: PEFT reads it "
            "from version 0.17 on, servers may not; adamss.merge_and_unload makes a model that everybody reads",
            AdamssWarning,
            stacklevel=2,
        )
    kind = getattr(getattr(modules.get(""), "config", None), "model_type", None)
    refused = [path for path in layers if kind in MAMBA and path.rpartition(".")[2] in ("out_proj", "conv1d")]
    if refused:
        warnings.warn(
            f"to_lora: {refused[0]}: PEFT loads no LoRA of such a layer of a model of type {kind!r}; other loaders "
            "may; leave it out of targets, or merge the model and save that",
            AdamssWarning,
            stacklevel=2,
        )
    tied = tied_weights(backend, model, layers)
    if tied:
        warnings.warn(
            f"to_lora: {tied}; the LoRA is right as long as it is not merged: PEFT's merge_and_unload and servers "
            "that merge would change both (adamss.merge_and_unload does not)",
            AdamssWarning,
            stacklevel=2,
        )
    return written


def to_peft(model: Model, folder: str | os.PathLike[str], *, name: str | None = None) -> PeftFolder:
    """Write an adapter as one of PEFT's AdaMSS, where its format has room for it.

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
    name
        Of the adapter; None for the only one, or the one that is active.

    Returns
    -------
    PeftFolder
        With `path`, `layers`, `saved`; prints as a sentence.

    Raises
    ------
    LayerError
        If a layer appears in the model twice.
    StateError
        If the model has no such adapter, or PEFT would take it for another: it would group the columns otherwise,
        there is a basis for each subspace, or a module to save is tied to another; if there are ``trained_tokens``.
        The message names which.
    ArrayValueError
        If factors are not finite.
    MissingBackendError
        If PyTorch or scikit-learn is not installed.

    Warns
    -----
    AdamssWarning
        If subspaces are frozen: the format has no mask, and PEFT would train all of them.
    """
    path = checked_path(folder, name="folder", to_write=True)
    backend, bank = adapted(model, "to_peft")
    adaptation = one_of(bank, name, "to_peft")
    modules, config = backend.modules(model), adaptation.config
    require_one_path(adaptation.layers, modules, "to_peft")
    for name, others in backend.shared(model, adaptation.saved).items():
        if others:
            raise StateError(
                f"to_peft: {name} of modules_to_save is tied to {', '.join(sorted(others))}, and PEFT would give it "
                "weights of its own; adamss.save the adapter, or merge and save the model"
            )
    if adaptation.tokens:
        raise StateError(
            f"to_peft: {', '.join(adaptation.tokens)} has trained_tokens, for which PEFT's AdaMSS has no place; "
            "adamss.to_lora writes them"
        )
    layers, sites = {}, sites_of(backend, model, adaptation.layers)
    # PEFT has one number for all layers, and cuts it as we do where a layer has fewer columns.
    subspaces = max(factors.ranks.shape[0] for factors in adaptation.layers.values())
    _require_linear(sites, "to_peft")
    with backend.exact():
        for layer_path, site in sites.items():
            check_layer_name(layer_path, "to_peft")
            base, factors = (
                whole(backend, base_weight(backend, site, bank)),
                adaptation.layers[layer_path],
            )
            arrays = _host_factors(backend, whole(backend, factors), layer_path)
            found = _peft_grouping(backend, base, config.rank, subspaces, config.seed)
            layer = peft.layer_of(arrays, found.labels, found.basis.shape)
            if isinstance(layer, str):
                raise StateError(
                    f"to_peft: {layer_path} has no form in PEFT's AdaMSS: {layer}; adamss.to_lora exports it without "
                    "loss (but for an update of the bias), and PEFT and servers read that"
                )
            layers[layer_path] = layer
        saved = {
            join_path(module_path, name): backend.to_stored(backend.whole(array))
            for module_path, values in values_of_saved(backend, model, bank, adaptation).items()
            for name, array in values.items()
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
    settings = peft.adamss_config(
        config,
        subspaces=subspaces,
        subspace_rank=max(A.shape[0] for layer in layers.values() for A in layer.A),
        targets=_shortest_targets(layers, modules),
        saved=adaptation.saved,
        base=name_of(modules),
    )
    tensors = peft.adamss_tensors(layers) | {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    backend.once(model, lambda: write_folder(path, settings, tensors))
    return PeftFolder(Path(path), len(layers), adaptation.saved)


def from_peft(base_model: Model, folder: str | os.PathLike[str], *, name: str = DEFAULT) -> Model:
    """Attach an adapter that PEFT's AdaMSS wrote (`save_pretrained`), of the same outputs.

    PEFT does not store which columns of a weight make a subspace. They are found again by its own procedure, and what
    is found is compared with the file: the size of each subspace, the span of the basis and its singular vectors in
    this weight; and where the basis is not that of the file to the bit, the grouping must withstand a rounding of
    the weight. So another base, or this one rounded to another dtype, is an error here where PEFT scrambles the
    adapter in silence. (It is strong evidence, and no proof: the file does not say which column is where.) From then
    on the grouping is part of the model, and `save` keeps it, so that the adapter can be loaded in any dtype. Takes
    PyTorch and scikit-learn, whatever the framework of the model.

    Parameters
    ----------
    base_model
        The model that the adapter was trained on, in the same dtype. Paths of its modules are the names in the file.
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    name
        Of the adapter in this model, as in `load`.

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
    LayerError
        If a layer of it appears in the model twice.
    StateError
        If an adapter of that name is attached already, or the weights hold the update of another.
    MissingBackendError
        If PyTorch or scikit-learn is not installed.
    """
    backend = backend_for(base_model)
    with backend.exact():
        bank = new_name(backend, base_model, name, "from_peft")
        adapter = peft.read_folder(checked_path(folder, name="folder"))
        modules = backend.modules(base_model)
        require_modules([*adapter.layers, *adapter.saved], modules)
        require_distinct(list(adapter.layers), modules)
        require_one_path(adapter.layers, modules, "from_peft")
        # PEFT trains a copy of what it saves.
        alone = {
            join_path(path, name): frozenset[str]() for path, own in adapter.saved.items() for name in own
        }
        require_shared(backend, base_model, adapter.saved, alone, modules)
        saved = {
            module_path: saved_arrays(backend, module_path, tensors, backend.arrays(modules[module_path]))
            for module_path, tensors in adapter.saved.items()
        }
        for module_path, tensors in adapter.base.items():
            _require_base(backend, modules, module_path, tensors)
        layers: dict[str, Factors] = {}
        sites = {
            path: backend.site(module, path) for path, module in modules.items() if path in adapter.layers
        }
        _require_linear(sites, "from_peft")
        shapes = {}
        with progress(len(sites)) as count:
            for layer_path, site in sites.items():
                base = base_weight(backend, site, bank)
                check_matrix(base.W, name=f"{layer_path}: weight")
                shapes[layer_path] = int(base.W.shape[0]), int(base.W.shape[1])
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
        return put(backend, base_model, layers, shapes, config=config, saved=saved, name=name)


def _taken_for_experts(forms: Mapping[str, str], modules: Mapping[str, Any]) -> list[str]:
    """Return the linear layers whose names PEFT takes for those of experts that transformers has fused since.

    In a model with fused experts it turns such ``target_modules`` into ``target_parameters``, which the dense layers
    of the same names are not.
    """
    fused = (getattr(module, "gate_up_proj", None) for module in modules.values())
    experts = any(getattr(array, "ndim", 0) == 3 for array in fused)
    linear = [path for path, form in forms.items() if form == "linear"]
    return [path for path in linear if experts and path.rpartition(".")[2] in EXPERTS]


def _require_linear(sites: Mapping[str, Site], verb: str) -> None:
    """Check that every layer is a linear one, which a LoRA or PEFT's AdaMSS takes it for."""
    for path, site in sites.items():
        if not site.kind.linear:
            raise LayerTypeError(
                f"{verb}: {path} is a {type(site.layer).__name__}, whose update is none of a linear layer; "
                "adamss.save takes it, or merge the model and save that"
            )


def _require_base(
    backend: Backend, modules: Mapping[str, Any], path: str, tensors: Mapping[str, StoredTensor]
) -> None:
    """Check that the tensors of a folder that are no part of the adapter are those of the base."""
    arrays = backend.arrays(modules[path]) if path in modules else {}
    for name, tensor in tensors.items():
        what = f"its tensor {shown(join_path(path, name))} belongs to no adapted layer and no module to save"
        if name not in arrays:
            raise CheckpointError(f"{what}, and the model has none of the name")
        present = backend.to_stored(backend.whole(arrays[name]))
        if present.shape != tensor.shape or not np.array_equal(present.numpy(), tensor.numpy()):
            raise CheckpointError(
                f"{what}, and is another than in this base, which the adapter was not trained on"
            )


def _shortest_targets(layers: Iterable[str], modules: Mapping[str, Any]) -> list[str] | str:
    """Return what names these layers and no others: their last names, as servers know them, else whole paths.

    A whole path may be the end of another; then it is a regular expression.
    """
    layers = list(layers)
    for names in (list(dict.fromkeys(path.rpartition(".")[2] for path in layers)), layers):
        if not names or set(match(names, modules, name="targets")) == {*layers}:
            return names
    return "|".join(re.escape(path) for path in layers)


def _peft_grouping(backend: Backend, base: BaseWeight, rank: int, subspaces: int, seed: int) -> Grouping:
    """Return what PEFT finds in a weight of the whole, where it is."""
    W = backend.to_stored(base.W).numpy()
    b = None if base.b is None else backend.to_stored(base.b).numpy()
    on = str(device(base.W)) if is_torch_array(base.W) else "cpu"
    return peft.grouping_of(peft.rows_of(W, b), rank, subspaces, seed, device=on)


def _factors_from_peft(backend: Backend, adapter: PeftAdapter, path: str, base: BaseWeight) -> Factors:
    """Return the factors of one layer of a PEFT folder, its columns grouped as PEFT finds them in the base."""
    layer = adapter.layers[path]
    found = _peft_grouping(backend, whole(backend, base), adapter.rank, adapter.subspaces, adapter.seed)
    difference = peft.why_not_the_same(layer, found)
    if difference is None and not peft.is_the_same_basis(layer, found):
        difference = _why_uncertain(adapter, found, base)
    if difference is not None:
        raise CheckpointError(
            f"{path}: the adapter was trained on another base, on this one in another dtype, or with another "
            f"library or device: {difference}. Which columns make a subspace is not in PEFT's files and cannot be "
            "found from this base; load it where it was trained, and adamss.save it from there"
        )
    factors = peft.factors_of(layer, found.labels)
    dtype = "float64" if backend.dtype_name(base.W) == "float64" else "float32"
    arrays = Factors(*(backend.from_stored(StoredTensor.of(array), like=base.W) for array in factors))
    return cast_factors(backend, arrays, dtype)


def _why_uncertain(adapter: PeftAdapter, found: Grouping, base: BaseWeight) -> str | None:
    """Return why a grouping cannot be told from a weight: it is another one when the weight is rounded otherwise."""
    on = str(device(base.W)) if is_torch_array(base.W) else "cpu"
    for rows in peft.rounded_otherwise(found.rows):
        again = peft.grouping_of(rows, adapter.rank, adapter.subspaces, adapter.seed, device=on)
        if not np.array_equal(again.labels, found.labels):
            return "its basis is not that of the file to the bit, and rounding decides how its columns are grouped"
    return None


def _host_factors(backend: Backend, factors: Factors, path: str) -> Factors:
    """Return factors as NumPy arrays, A, B and C in float32 or float64."""
    arrays = Factors(*(backend.to_stored(array).numpy() for array in factors))
    arrays = arrays._replace(labels=arrays.labels.astype(np.int64), ranks=arrays.ranks.astype(np.int64))
    wide = {name: as_working_precision(getattr(arrays, name)) for name in "ABC"}
    if not all(np.isfinite(array).all() for array in wide.values()):
        raise ArrayValueError(f"{path} has factors that are not finite; nothing is written")
    return arrays._replace(**wide)
