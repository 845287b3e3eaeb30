"""Verbs that exchange adapters with Hugging Face PEFT: export as LoRA, and PEFT's own AdaMSS in both directions."""

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
"""Types of models where PEFT 0.21 does not adapt ``out_proj`` and ``conv1d``, since kernels read their weights."""

EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Names of the layers of experts before transformers 5 fused the weights of all experts into one Parameter."""


def to_lora(model: Model, folder: str | os.PathLike[str], *, name: Name = None) -> LoraFolder:
    """Write an adapter as a LoRA with exactly the same update.

    Servers (vLLM, llama.cpp, SGLang, TGI, diffusers) read this format. M and the block-structured expansion of C form
    a LoRA of rank q. The folder has PEFT's two files. All layers have the same rank, which is the largest q; smaller
    layers are padded with zeros. ``lora_alpha`` equals the rank, so that the scale is 1, and the weights are float32.
    Frozen subspaces are included, since they contribute to the update. The rows of ``trained_tokens`` are written in
    PEFT's form (``trainable_token_indices``), which servers may not read. The folder loads with
    ``peft.PeftModel.from_pretrained(base_model, folder)``.

    If several processes hold parts of the model, all of them must call `to_lora`, and one of them writes.

    Parameters
    ----------
    model
        An adapted model of any framework, merged or not. Its module paths become the names in the file, and servers
        expect those of PyTorch. `save` an adapter of another framework and `load` it into the PyTorch model first.
    folder
        Folder to write. It is created if it does not exist, and files of the same names are replaced.
    name
        Name or names of the adapters, or weights by name. None means the only adapter, or the active ones. Several
        adapters become one LoRA, whose update is the sum of their updates and whose rank is the sum of their ranks.

    Returns
    -------
    LoraFolder
        Description of the folder, with `path`, `rank`, `layers` and `saved`. It prints as a sentence.

    Raises
    ------
    LayerError, LayerTypeError
        If a layer appears in the model twice, or if PEFT's LoRA has no form for the update or the trained rows of a
        layer.
    StateError
        If the model has no such adapter; if the update of a bias is not zero; if several adapters have values for one
        module or for rows of one embedding, which cannot be added; if q is above 512, the largest rank that servers
        accept (the message says which K and r_k would fit); or if a layer is one of a stack.
    ArrayValueError
        If factors are not finite.

    Warns
    -----
    AdamssWarning
        If there are ``modules_to_save``, which a LoRA cannot contain; the message names the separate file that holds
        them. If the weight of an adapted layer is tied to another one (an embedding to ``lm_head``). If PEFT reads
        the LoRA of a layer only from version 0.17 on, or does not load it at all.

    Examples
    --------
    >>> import numpy as np, adamss, tempfile
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora = adamss.to_lora(model, folder)
    ...     lora.rank, sorted(file.name for file in lora.path.iterdir())
    (2, ['adapter_config.json', 'adapter_model.safetensors'])
    """
    path = checked_path(folder, name="folder", to_write=True)
    backend, bank = adapted(model, "to_lora")
    weights = chosen(bank, name, "to_lora")
    if name is not None and not isinstance(name, Mapping):
        weights = dict.fromkeys(weights, 1.0)  # not the weights with which the adapters are active
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
    """Write an adapter in the format of PEFT's own AdaMSS, if that format can represent it.

    PEFT does not store which columns belong to a subspace. It computes the segmentation again at each load, with its
    own procedure. The format therefore fits adapters that come from PEFT (`from_peft`), even if they were trained
    further, and adapters with one subspace. `to_lora` writes any adapter. The folder loads correctly only on the same
    base model in the same dtype, which PEFT does not check. PyTorch and scikit-learn must be installed.

    If several processes hold parts of the model, all of them must call `to_peft`, and one of them writes.

    Parameters
    ----------
    model
        An adapted model of any framework, merged or not. Its module paths become the names in the file.
    folder
        Folder to write. It is created if it does not exist, and files of the same names are replaced.
    name
        Name of the adapter. None means the only one, or the active one.

    Returns
    -------
    PeftFolder
        Description of the folder, with `path`, `layers` and `saved`. It prints as a sentence.

    Raises
    ------
    LayerError, LayerTypeError
        If a layer appears in the model twice, or is not a linear layer.
    StateError
        If the model has no such adapter, or if PEFT would load a different one: because it would group the columns
        differently, because each subspace has its own basis, because a module to save is tied to another module, or
        because there are ``trained_tokens``. The message names the reason.
    ArrayValueError
        If factors are not finite.
    MissingBackendError
        If PyTorch or scikit-learn is not installed.

    Warns
    -----
    AdamssWarning
        If subspaces are frozen. The format has no mask, so that PEFT would train all subspaces.

    Examples
    --------
    >>> import numpy as np, adamss, tempfile
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> model = NumpyModel({"query": NumpyLinear(np.eye(4))})
    >>> model = adamss.attach(model, adamss.AdamssConfig(targets=["query"], rank=4, subspaces=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = adamss.to_peft(model, folder)
    ...     written.layers, sorted(file.name for file in written.path.iterdir())
    (1, ['adapter_config.json', 'adapter_model.safetensors'])
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
    # PEFT has one number of subspaces for all layers, and clamps it to the number of columns as we do.
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
    """Attach an adapter that PEFT's AdaMSS saved (`save_pretrained`). The outputs are the same as in PEFT.

    PEFT does not store which columns of a weight belong to a subspace. The segmentation is computed again with PEFT's
    procedure, and compared with the file: the size of each subspace, and the span and the singular vectors of the
    basis in this weight. If the basis does not equal that of the file bit for bit, the segmentation must also stay
    the same when the weight is rounded differently. Another base model, or this one in another dtype, is therefore an
    error, whereas PEFT would silently assign columns to wrong subspaces. (The comparison is strong evidence but no
    proof, since the file does not say which column is where. An adapter with a single subspace needs no segmentation,
    and only its shapes are compared.) Once attached, the segmentation is part of the adapter
    and `save` stores it, so that the adapter can be loaded in any dtype. PyTorch and scikit-learn must be installed,
    whatever the framework of the model.

    Parameters
    ----------
    base_model
        Model that the adapter was trained on, in the same dtype. Its module paths must be the names in the file.
    folder
        Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    name
        Name of the adapter in this model, as in `load`.

    Returns
    -------
    Model
        The adapted model. All subspaces are trainable, since PEFT stores no mask. It is the same object if the
        framework's models are mutable.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such folder, or one of its files is missing.
    CheckpointError
        If the folder holds an adapter of another method (the message says which), is damaged, or does not fit the
        model. The model is unchanged.
    LayerError, LayerTypeError
        If an adapted layer appears in the model twice, or is not a linear layer.
    StateError
        If the name is taken, or the weights hold the update of another adapter.
    MissingBackendError
        If PyTorch or scikit-learn is not installed.

    Examples
    --------
    The folder usually comes from PEFT's ``save_pretrained``. Here `to_peft` writes it:

    >>> import numpy as np, adamss, tempfile
    >>> from adamss.backend import NumpyLinear, NumpyModel
    >>> base = NumpyModel({"query": NumpyLinear(np.diag([4.0, 3.0, 2.0, 1.0]))})
    >>> config = adamss.AdamssConfig(targets=["query"], rank=4, subspaces=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = adamss.to_peft(adamss.attach(base, config), folder)
    ...     model = adamss.from_peft(base, folder)
    >>> adamss.adapters(model)["default"].layers, adamss.summary(model).total.trained
    (('query',), 8)
    """
    backend = backend_for(base_model)
    with backend.exact():
        bank = new_name(backend, base_model, name, "from_peft")
        adapter = peft.read_folder(checked_path(folder, name="folder"))
        modules = backend.modules(base_model)
        require_modules([*adapter.layers, *adapter.saved], modules)
        require_distinct(list(adapter.layers), modules)
        require_one_path(adapter.layers, modules, "from_peft")
        # PEFT trains a copy of each module to save, so its tensors were untied there.
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
    """Return the linear layers whose names PEFT mistakes for those of experts.

    Transformers 5 has fused the experts of its models into Parameters. In such a model, PEFT turns
    ``target_modules`` with these names into ``target_parameters``, which is wrong for dense layers of the same names.
    """
    fused = (getattr(module, "gate_up_proj", None) for module in modules.values())
    experts = any(getattr(array, "ndim", 0) == 3 for array in fused)
    linear = [path for path, form in forms.items() if form == "linear"]
    return [path for path in linear if experts and path.rpartition(".")[2] in EXPERTS]


def _require_linear(sites: Mapping[str, Site], verb: str) -> None:
    """Check that every layer is a linear one, since PEFT's AdaMSS has no form for others."""
    for path, site in sites.items():
        if not site.kind.linear:
            raise LayerTypeError(
                f"{verb}: {path} is a {type(site.layer).__name__}, but PEFT's AdaMSS adapts linear layers only; "
                "use adamss.save and adamss.load, or merge the model and save that"
            )


def _require_base(
    backend: Backend, modules: Mapping[str, Any], path: str, tensors: Mapping[str, StoredTensor]
) -> None:
    """Check that tensors of a folder that do not belong to the adapter equal those of the base model."""
    arrays = backend.arrays(modules[path]) if path in modules else {}
    for name, tensor in tensors.items():
        what = f"its tensor {shown(join_path(path, name))} belongs to no adapted layer and no module to save"
        if name not in arrays:
            raise CheckpointError(f"{what}, and the model has no tensor of this name")
        present = backend.to_stored(backend.whole(arrays[name]))
        if present.shape != tensor.shape or not np.array_equal(present.numpy(), tensor.numpy()):
            raise CheckpointError(
                f"{what}, and differs from that of this model, so that the adapter was trained on another base"
            )


def _shortest_targets(layers: Iterable[str], modules: Mapping[str, Any]) -> list[str] | str:
    """Return targets that match exactly these layers.

    They are the last components of the paths if possible, since servers know those, else whole paths. If a whole path
    is also the end of another path, a regular expression is returned.
    """
    layers = list(layers)
    for names in (list(dict.fromkeys(path.rpartition(".")[2] for path in layers)), layers):
        if not names or set(match(names, modules, name="targets")) == {*layers}:
            return names
    return "|".join(re.escape(path) for path in layers)


def _peft_grouping(backend: Backend, base: BaseWeight, rank: int, subspaces: int, seed: int) -> Grouping:
    """Return the segmentation and the basis that PEFT computes from a whole weight, on the device of the weight."""
    W = backend.to_stored(base.W).numpy()
    b = None if base.b is None else backend.to_stored(base.b).numpy()
    on = str(device(base.W)) if is_torch_array(base.W) else "cpu"
    return peft.grouping_of(peft.rows_of(W, b), rank, subspaces, seed, device=on)


def _factors_from_peft(backend: Backend, adapter: PeftAdapter, path: str, base: BaseWeight) -> Factors:
    """Return the factors of one layer of a PEFT folder, with the segmentation that PEFT computes from the base."""
    layer = adapter.layers[path]
    found = _peft_grouping(backend, whole(backend, base), adapter.rank, adapter.subspaces, adapter.seed)
    difference = peft.why_not_the_same(layer, found)
    if difference is None and len(layer.B) > 1 and not peft.is_the_same_basis(layer, found):
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
    """Return why a segmentation is uncertain, or None. It is if it changes when the weight is rounded differently."""
    on = str(device(base.W)) if is_torch_array(base.W) else "cpu"
    for rows in peft.rounded_otherwise(found.rows):
        again = peft.grouping_of(rows, adapter.rank, adapter.subspaces, adapter.seed, device=on)
        if not np.array_equal(again.labels, found.labels):
            return "its basis is not that of the file to the bit, and rounding decides how its columns are grouped"
    return None


def _host_factors(backend: Backend, factors: Factors, path: str) -> Factors:
    """Return the factors as NumPy arrays, with A, B and C in float32 or float64."""
    arrays = Factors(*(backend.to_stored(array).numpy() for array in factors))
    arrays = arrays._replace(labels=arrays.labels.astype(np.int64), ranks=arrays.ranks.astype(np.int64))
    wide = {name: as_working_precision(getattr(arrays, name)) for name in "ABC"}
    if not all(np.isfinite(array).all() for array in wide.values()):
        raise ArrayValueError(f"{path} has factors that are not finite; nothing is written")
    return arrays._replace(**wide)
