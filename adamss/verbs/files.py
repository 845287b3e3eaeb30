"""Adapters in files."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace as changed
from typing import Any

import numpy as np

from adamss import core
from adamss._version import __version__
from adamss.backend.bank import DEFAULT, Adaptation, Bank, Rows
from adamss.backend.interface import Backend, Model, Weights, batches
from adamss.backend.ledger import (
    base_weight,
    put,
    reading,
    replaced,
    require_kept_base,
    sites_of,
    values_of_saved,
    whole,
)
from adamss.backend.registry import backend_for
from adamss.backend.sites import BaseWeight, Site, owner_of
from adamss.backend.tensors import StoredTensor, join_path
from adamss.config import AdamssConfig, shown
from adamss.core import Factors
from adamss.core._array import check_concrete, check_matrix, namespace
from adamss.core.fingerprint import Fingerprint, fingerprint, unknown, unlikely
from adamss.errors import (
    AdamssWarning,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    LayerError,
    LayerTypeError,
    StateError,
    TargetError,
)
from adamss.io import checkpoint as files
from adamss.io import folder
from adamss.io.checkpoint import Checkpoint, StoredLayer
from adamss.verbs.card import model_card
from adamss.verbs.common import (
    adapted,
    cast_factors,
    checked_path,
    embedding_of,
    factor_dtype,
    name_of,
    new_name,
    one_of,
    progress,
    require_distinct,
    require_modules,
    require_shared,
    saved_arrays,
    with_bias_row,
)

__all__ = ["load", "push_to_hub", "save"]


def save(
    model: Model, path: str | os.PathLike[str], *, name: str | None = None, training: bool = False
) -> None:
    """Write an adapter, its ``modules_to_save`` and the rows of ``trained_tokens``, to a file or a folder.

    A folder gets ``adapter.safetensors``, ``adamss_config.json`` (the settings, for people and scripts) and a model
    card ``README.md``, unless it has one. Where several processes hold parts of the model (PyTorch's
    ``fully_shard``), all of them call this and one writes.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    path
        A folder if it exists as one, ends in a separator or has no suffix; else a file, such as
        ``"adapter.safetensors"``. An existing file is replaced, whole or not at all.
    name
        Name of the adapter. None means the only one, or the active one.
    training
        False: portable, with ``M = A B``, the smallest. True: A and B, to resume training to the bit.

    Raises
    ------
    StateError
        If the model has no such adapter, several are active and none is named, or it was merged with
        ``keep_base=False``.
    CheckpointError
        If two tensors would have one name, or if names are so long, and the layers so small, that `load` would take
        the file for a hostile one. Nothing is written.
    ConfigError
        If the path is empty.
    """
    path = checked_path(path, to_write=True)
    backend, bank = adapted(model, "save")
    adaptation = one_of(bank, name, "save")
    if adaptation.merged:
        require_kept_base(bank, "save")
    _warn_of_a_budget_nobody_follows(backend, model, adaptation)
    modules = backend.modules(model)
    layers = {}
    with backend.exact():
        for layer_path, site in sites_of(backend, model, adaptation.layers).items():
            factors = adaptation.layers[layer_path]
            check_concrete(*factors, name=layer_path)
            mark = _fingerprint_of(backend, site, bank)
            stored = _stored_layer(backend, whole(backend, factors), mark, training=training)
            rank = adaptation.config.for_layer(layer_path).rank
            own_rank = None if rank == adaptation.config.rank else rank
            layers[layer_path] = changed(stored, blocks=site.blocks, view=site.view, rank=own_rank)
        if not layers:
            raise StateError("save: no adapted layer of the model is left; nothing is written")
        saved, values = {}, values_of_saved(backend, model, bank, adaptation)
        for module_path in adaptation.saved:
            if module_path not in modules:
                warnings.warn(
                    f"save: {module_path} of modules_to_save is not in the model any more: the file is without it",
                    AdamssWarning,
                    stacklevel=2,
                )
                continue
            arrays = values[module_path]
            check_concrete(*arrays.values(), name=module_path)
            saved[module_path] = {
                name: backend.to_stored(backend.whole(array)) for name, array in arrays.items()
            }
        tokens = {
            path: backend.to_stored(backend.whole(own.values)) for path, own in adaptation.tokens.items()
        }
    writer = {"adamss": __version__, "backend": backend.name, **backend.versions()}
    embeddings = {join_path(path, "weight") for path in tokens}
    shared = {
        name: others
        for name, others in backend.shared(model, [*saved, *tokens]).items()
        if name in embeddings or not name.startswith(tuple(f"{path}." for path in tokens))
    }
    ids = {path: own.ids for path, own in adaptation.tokens.items()} or None
    config = adaptation.config.unchecked(trained_tokens=ids)
    checkpoint = Checkpoint(config, layers, saved, writer, shared, tokens)

    def write(file: str) -> None:
        files.write(file, checkpoint, modules=len(modules))

    def write_folder() -> None:
        base = name_of(modules)
        settings = {"base_model_name_or_path": base, **checkpoint.config.to_dict(), "written_by": writer}
        folder.write_folder(path, settings, model_card(checkpoint, base), write)

    backend.once(model, write_folder if folder.is_folder(path) else lambda: write(path))


def push_to_hub(
    folder_or_model: Model | str | os.PathLike[str], repo_id: str, *, name: str | None = None, **kwargs: Any
) -> str:
    """Upload an adapter to a repository of the Hugging Face Hub, from where `load` takes it by its name.

    Parameters
    ----------
    folder_or_model
        A folder that `save` wrote, or an adapted model, which is saved to a temporary folder first.
    repo_id
        ``"user/name"``. The repository is made if it does not exist.
    name
        Name of the adapter of a model. None means the only one, or the active one.
    kwargs
        ``private`` and ``token``, as ``huggingface_hub.create_repo`` takes them, and everything that
        ``huggingface_hub.upload_folder`` takes, such as ``commit_message`` and ``revision``.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    CheckpointError
        If the folder has no valid adapter, or the hub refuses the upload.
    ConfigError
        If ``repo_id`` is no name of a repository.
    MissingBackendError
        If ``huggingface_hub`` is not installed.
    """
    if not isinstance(repo_id, str) or not folder.is_repository(repo_id):
        raise ConfigError(f"repo_id must be of the form 'user/name', found {shown(repo_id)}")
    if isinstance(folder_or_model, str | os.PathLike):
        path = checked_path(folder_or_model)
        if not os.path.isdir(path):
            raise CheckpointNotFoundError(f"push_to_hub: there is no folder {path!r}; adamss.save writes one")
        files.read(folder.adapter_file(path))
        return folder.push(path, repo_id, **kwargs)
    with tempfile.TemporaryDirectory() as temporary:
        save(folder_or_model, temporary, name=name)
        return folder.push(temporary, repo_id, **kwargs)


def load(
    base_model: Model,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    replace: bool = False,
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
        The model that the adapter was trained on, in any dtype, with or without others.
    path
        A file or folder that `save` wrote. Where nothing local has this name, a repository of the Hugging Face Hub,
        ``"user/name"`` or ``"user/name@revision"``, from which ``huggingface_hub`` fetches it (or from its cache).
    name
        Of the adapter in this model. On a model that has others, it becomes the one that is active (`activate`).
    replace
        Put the numbers of the file in the place of those of the adapter of that name, if it has the same settings and
        shapes: what is compiled, and what optimisers know, stays as it is. The flags of the adapter stay too.
    trainable
        Whether the adapter and ``modules_to_save`` are trained from now on. False: no parameter of a PyTorch model
        requires a gradient, and `trainable_parameters` has none. Of a portable file, True makes the basis
        ``A = orth([M, U])``, its first R columns, so that training can go on in the whole subspace; this decomposes
        the weights. False makes it ``A = orth(M)``, which is all that inference needs and quick.
    check_base
        Whether to compare the fingerprints of the base weights. Where a base is quantised, here or where the adapter
        was trained, they may differ by what its bits explain. Turn it off to put an adapter on a model other than its
        own on purpose.
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
        If there is no such file, folder or repository.
    MissingBackendError
        If the path may be the name of a repository, and ``huggingface_hub`` is not installed.
    CheckpointError
        If the file is damaged, foreign or of an unknown version, or does not fit the model; if its factors hold NaN
        or infinity (`save` keeps what a training that diverged has left, `load` does not take it up), or a number
        overflows the dtype that it gets in this model. The message says which. The model is unchanged.
    LayerError
        If a weight has no values, on the meta device, and they are needed.
    ConfigError
        If the name is none.
    StateError
        If an adapter of that name is attached already, and ``replace`` is False, or does not fit the file; if the
        weights hold the update of another.
    """
    backend = backend_for(base_model)
    with backend.exact(), backend.divided(base_model, enabled=divide) as division:
        bank = new_name(backend, base_model, name, "load", replace=replace)
        if name in bank.adapters:  # the flags stay, and with them the form of the basis
            trainable = bank.adapters[name].trainable
        modules = backend.modules(base_model)
        stored = files.read(folder.adapter_file(checked_path(path)), modules=len(modules))
        require_modules([*stored.layers, *stored.saved, *stored.tokens], modules)
        require_distinct([*stored.layers, *stored.saved, *stored.tokens], modules)
        require_shared(backend, base_model, stored.saved, stored.shared, modules)
        tokens = _loaded_rows(backend, base_model, stored, modules, bank)
        sites = {path: backend.site(modules[path], path) for path in stored.layers}
        parts = {path: part for site in sites.values() for path, part in site.split().items()}
        weights = Weights(parts, lambda path: base_weight(backend, parts[path], bank, values=False))
        stored_parts: dict[str, StoredLayer] = {}
        for layer_path, layer in stored.layers.items():
            own = sites[layer_path].split()
            base = weights[next(iter(own))]
            _check_base_shape(layer_path, layer, base, len(own))
            stored_parts |= zip(own, layer.split(len(own)), strict=True)
            decompose = trainable and layer.M is not None
            _check_base_present(backend, layer_path, base, needed=check_base or decompose)
        saved = {
            module_path: saved_arrays(backend, module_path, tensors, backend.arrays(modules[module_path]))
            for module_path, tensors in stored.saved.items()
        }

        layers: dict[str, Factors] = {}
        marks: dict[str, tuple[Fingerprint, Fingerprint]] = {}
        with progress(len(weights)) as count:
            # Said of the present batch: `each` is done with one before the next begins.
            batch: dict[str, BaseWeight] = {}

            def loaded(layer_path: str) -> Factors:
                base, layer = batch[layer_path], stored_parts[layer_path]
                if backend.has_values(base.W):
                    check_matrix(base.W, name=f"{layer_path}: weight")
                if check_base and layer_path in sites:
                    mark = fingerprint(base.W, backend.noise(sites[layer_path]))
                    _check_base_values(layer_path, layer.base, mark)
                    marks[layer_path] = layer.base, mark
                factors = _loaded_factors(
                    backend, layer, base, stored.config, path=layer_path, trainable=trainable
                )
                count()
                return factors

            for batch in batches(division.share(weights, _digest(stored, trainable, check_base))):
                with division.carrying() as go:
                    layers |= zip(batch, division.each(loaded, batch), strict=True) if go else {}
            with division.carrying() as go:
                _check_all_bases(marks if go else {})
            layers = division.gather(layers)
        if check_base:
            for path in sites.keys() - parts.keys():  # the fingerprint is of all blocks of a weight together
                whole_mark = fingerprint(base_weight(backend, sites[path], bank).W)
                _check_base_values(path, stored.layers[path].base, whole_mark)
        ordered = {path: core.join([layers[part] for part in site.split()]) for path, site in sites.items()}
        shapes = {path: layer.base.shape for path, layer in stored.layers.items()}
        # What a file has for patterns is not compiled: a hostile one can take hours.
        ranks = {
            rf"\A{re.escape(path)}\Z": {"rank": layer.rank}
            for path, layer in stored.layers.items()
            if layer.rank
        }
        config = stored.config.unchecked(overrides=ranks)
        if name in bank.adapters:
            new = Adaptation(config, ordered, shapes, tuple(saved), name, tokens, kept=saved)
            return replaced(backend, base_model, new)
        return put(
            backend,
            base_model,
            ordered,
            shapes,
            config=config,
            saved=saved,
            name=name,
            trained=trainable,
            tokens=tokens,
        )


def _loaded_rows(
    backend: Backend, model: Model, stored: Checkpoint, modules: Mapping[str, Any], bank: Bank
) -> dict[str, Rows]:
    """Return the rows of ``trained_tokens`` in the dtype that they are trained in."""
    found = {}
    asked: Any = stored.config.trained_tokens
    weights = {path: {"weight": rows} for path, rows in stored.tokens.items()}
    for path, rows in stored.tokens.items():
        ids = asked[path]
        try:
            site = embedding_of(backend, modules, path, ids)
        except (TargetError, LayerTypeError) as error:
            raise CheckpointError(str(error)) from error
        base = base_weight(backend, site, bank, values=False)
        if rows.shape[1] != base.W.shape[1]:
            raise CheckpointError(
                f"trained_tokens: the rows of {path} have {base.W.shape[1]} numbers, the file's {rows.shape[1]}: it "
                "was trained on another model"
            )
        dtype = factor_dtype(backend, base, stored.config.unchecked(factor_dtype=None))
        with np.errstate(over="ignore"):
            values = backend.from_stored(rows, like=base.W, dtype=dtype)
        if not backend.to_stored(values).is_finite():
            raise CheckpointError(
                f"trained_tokens: the rows of {path} are too large for {dtype}; load it into a model of a wider dtype"
            )
        found[path] = Rows(tuple(ids), values)
    require_shared(backend, model, weights, stored.shared, modules, setting="trained_tokens")
    return found


def _warn_of_a_budget_nobody_follows(backend: Backend, model: Model, adaptation: Adaptation) -> None:
    """Tell whoever has trained without a controller that the schedule of the config had no effect."""
    budget, layers = adaptation.config.budget, adaptation.layers
    if budget is None or backend.followed(model, adaptation.name):
        return
    active = np.concatenate([backend.to_stored(f.active).numpy() for f in layers.values()])
    started = any(bool(namespace(f.C).any(backend.whole(f.C) != 0)) for f in layers.values())
    if started and active.all() and budget.initial is None and budget.target < active.size:
        warnings.warn(
            f"save: the config has a budget of {budget.target} {budget.unit}, but all {active.size} subspaces are "
            "trained, and nothing in this process follows the schedule: put a controller on the optimiser "
            "(adamss_torch.BudgetController, AdamssCallback, adamss_jax.budgeted), or leave the budget out",
            AdamssWarning,
            stacklevel=3,
        )


def _fingerprint_of(backend: Backend, site: Site, bank: Bank) -> Fingerprint:
    """Return the fingerprint of a base weight; of one that nobody can read any more, one that fits no weight."""
    try:
        base = whole(backend, base_weight(backend, site, bank))
        with reading(site.path, base.W):
            return fingerprint(base.W, backend.noise(_base_site(backend, site, bank)))
    except LayerError as error:
        warnings.warn(
            f"save: the base weight of {site.path} cannot be read ({error}), so that the file cannot be compared "
            "with it: load it with check_base=False",
            AdamssWarning,
            stacklevel=3,
        )
        return unknown(
            next(each.shapes[site.path] for each in bank.adapters.values() if site.path in each.shapes)
        )


def _base_site(backend: Backend, site: Site, bank: Bank) -> Site:
    """Return the site of W0: that of the quantised layer, where a float one has taken its place."""
    layer = bank.layers.get(owner_of(site.path))
    return site if layer is None else backend.site(layer, site.path)


def _stored_layer(backend: Backend, factors: Factors, mark: Fingerprint, *, training: bool) -> StoredLayer:
    basis: dict[str, Any]
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
        base=mark,
        **basis,
    )


def _smallest(integers: np.ndarray[Any, Any]) -> StoredTensor:
    """Return non-negative integers in the smallest unsigned dtype that holds them."""
    return StoredTensor.of(integers.astype(np.min_scalar_type(int(integers.max()))))


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
    dtype = factor_dtype(backend, base, config, loading=True)
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
        W = with_bias_row(base) if M.shape[0] > base.W.shape[0] else base.W
        U = core.decompose(backend.decomposition_input(W), layer.rank or config.rank, seed=config.seed).U
        U = backend.cast(U, backend.dtype_name(M))
    factors = core.factors_from_directions(M, C, labels, ranks, active, U=U)
    return cast_factors(backend, factors, dtype)


def _check_base_shape(path: str, layer: StoredLayer, base: BaseWeight, blocks: int) -> None:
    shape = base.W.shape[0], base.W.shape[1] * blocks
    if shape != layer.base.shape:
        raise CheckpointError(
            f"{path}: the weight has shape {shape} (inputs, outputs), the file's {layer.base.shape}: "
            "it was trained on another model"
        )
    if blocks != layer.blocks:
        raise CheckpointError(
            f"{path}: the weight consists of {blocks} matrices, the file's of {layer.blocks}: it was trained on "
            "another model"
        )
    subspaces, bases = layer.ranks.shape[0], 1 if layer.A is None else layer.A.shape[0]
    if subspaces % blocks or (layer.A is not None and bases % blocks):
        raise CheckpointError(
            f"{path}: the layer has {blocks} matrices, among which the file's {subspaces} subspaces and {bases} "
            "bases cannot be divided: it was trained on another model"
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


def _check_base_values(path: str, stored: Fingerprint, present: Fingerprint) -> None:
    difference, tolerance = stored.difference(present), stored.tolerance(present)
    if not difference <= tolerance:
        raise CheckpointError(
            f"{path}: the base weight is not the one that the adapter was trained on (its fingerprint "
            f"differs by {difference:.0%}, where {tolerance:.0%} may be rounding); load the right base model, or "
            "pass check_base=False"
        )


def _check_all_bases(marks: Mapping[str, tuple[Fingerprint, Fingerprint]]) -> None:
    """Check weights of few bits together: each by itself may be any."""
    if unlikely(list(marks.values())):
        worst = max(marks, key=lambda path: marks[path][0].difference(marks[path][1]))
        raise CheckpointError(
            f"{worst}: the base weights are not those that the adapter was trained on (the fingerprints of "
            "quantised layers differ, together, by more than rounding explains); load the right base model, or pass "
            "check_base=False"
        )


def _digest(stored: Checkpoint, *choices: bool) -> str:
    """Return what tells whether two processes load the same, in the same way."""
    digest = hashlib.sha256(repr((stored.config, choices)).encode())
    for path, layer in stored.layers.items():
        for name, tensor in layer.tensors().items():
            digest.update(f"{path} {name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.data)
    return digest.hexdigest()
