"""Verbs that save adapters to files and folders, load them, and upload them to the Hugging Face Hub."""

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
    """Write an adapter, its ``modules_to_save`` and its rows of ``trained_tokens`` to a file or a folder.

    A folder gets ``adapter.safetensors``, ``adamss_config.json`` (the settings, for people and scripts) and a model
    card ``README.md`` unless it has one. If several processes hold parts of the model (PyTorch's ``fully_shard``),
    all of them must call `save`, and one of them writes.

    Parameters
    ----------
    model
        An adapted model, merged or not.
    path
        Path of the file or folder. It means a folder if a folder is there, or if nothing is there and the path
        ends in a separator or has no suffix. Otherwise it means a file, such as ``"adapter.safetensors"``. An
        existing file is replaced in one step.
    name
        Name of the adapter. None means the only one, or the active one.
    training
        Whether the file stores A and B, so that training can resume bit for bit. If False, it stores ``M = A B``,
        which is smaller.

    Raises
    ------
    StateError
        If the model has no such adapter, if several are active and none is named, if the adapter was merged with
        ``keep_base=False``, or if none of its layers is left in the model.
    CheckpointError
        If two tensors would have the same name, or if the names are so long in relation to the layers that `load`
        would refuse the file as hostile. Nothing is written.
    ConfigError
        If the path is empty.

    Warns
    -----
    AdamssWarning
        If an adapted layer or a module to save is no longer part of the model, so that the file lacks it; if a base
        weight cannot be read, so that the file has no fingerprint of it; or if the config has a budget that no
        controller follows.
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
    """Upload an adapter to a repository of the Hugging Face Hub, so that `load` can load it by the repository's name.

    Parameters
    ----------
    folder_or_model
        A folder that `save` wrote, or an adapted model, which is first saved to a temporary folder.
    repo_id
        Name of the repository, ``"user/name"``. The repository is created if it does not exist.
    name
        Name of the adapter if a model is given. None means the only one, or the active one.
    kwargs
        Arguments ``private`` and ``token`` of ``huggingface_hub.create_repo``, and all arguments of
        ``huggingface_hub.upload_folder``, such as ``commit_message`` and ``revision``.

    Returns
    -------
    str
        URL of the commit.

    Raises
    ------
    CheckpointNotFoundError
        If the folder does not exist or has no adapter.
    CheckpointError
        If the adapter in the folder is not valid, or the hub refuses the upload.
    ConfigError
        If ``repo_id`` is not the name of a repository.
    MissingBackendError
        If ``huggingface_hub`` is not installed.

    Examples
    --------
    The upload needs an account, so this example is not run with the others:

    >>> adamss.push_to_hub(model, "user/adapter", private=True)  # doctest: +SKIP
    'https://huggingface.co/user/adapter/commit/0123456789abcdef0123456789abcdef01234567'
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
    """Attach an adapter from a file. The file may come from any framework, device and dtype.

    Segmentation, factors and mask come from the file. A portable file stores no basis, so that a new one is computed,
    which all subspaces share. The update is the same, but R, and with it the number of trained parameters, may differ
    from those of the original.

    Parameters
    ----------
    base_model
        Model that the adapter was trained on, in any dtype, with or without other adapters.
    path
        File or folder that `save` wrote. If there is no local file or folder of this name, it is a repository of the
        Hugging Face Hub, ``"user/name"`` or ``"user/name@revision"``, which ``huggingface_hub`` downloads or takes
        from its cache.
    name
        Name of the adapter in this model. If the model has other adapters, the new one becomes the only one that is
        active (see `activate`).
    replace
        Whether to replace the values of an attached adapter of this name by those of the file, if it has the same
        layers and shapes. Compiled functions and optimisers remain valid. Whether the adapter is active and trained
        does not change.
    trainable
        Whether the adapter and its ``modules_to_save`` are trained from now on. If False, no parameter of a PyTorch
        model requires a gradient, and `trainable_parameters` returns none. For a portable file, True makes the first
        R columns of ``orth([M, U])`` the basis A, so that training can continue in the whole subspace. This needs a
        decomposition of the weights. False makes ``orth(M)`` the basis, which is fast and sufficient for inference.
    check_base
        Whether to compare the fingerprints of the base weights. If the base is quantised, here or where the adapter
        was trained, they may differ by the quantisation error. Set it to False to attach the adapter to another model
        on purpose.

        If it is False and no decomposition is needed (``trainable=False``, or a file that was saved with
        ``training=True``), the values of the weights are not read. A PyTorch model may then be on the meta device:
        the adapter is loaded on the CPU, and the weights are loaded afterwards by
        ``load_state_dict(..., strict=False, assign=True)``.
    divide
        Whether several processes divide the decompositions among themselves, as in `attach`. If True, all of them
        must call `load`.

    Returns
    -------
    Model
        The adapted model. It is the same object if the framework's models are mutable.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file, folder or repository.
    MissingBackendError
        If the path may be the name of a repository, and ``huggingface_hub`` is not installed.
    CheckpointError
        If the file is damaged, foreign or of an unknown version, or does not fit the model; if its factors hold NaN
        or infinity (which `save` writes all the same, so that nothing is lost); or if a number overflows the
        dtype that it gets in this model. The message says which. The model is unchanged.
    LayerError
        If the values of a weight are needed, but it has none because it is on the meta device.
    ConfigError
        If the name is not valid.
    StateError
        If the name is taken and ``replace`` is False, or the attached adapter does not fit the file; or if the
        weights hold the update of another adapter.
    """
    backend = backend_for(base_model)
    with backend.exact(), backend.divided(base_model, enabled=divide) as division:
        bank = new_name(backend, base_model, name, "load", replace=replace)
        if name in bank.adapters:
            # A replaced adapter keeps its flag, which decides the form of the basis.
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
            # `loaded` reads the current batch. `each` returns before the loop assigns the next one.
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
            for path in sites.keys() - parts.keys():  # a fingerprint covers all blocks of a weight together
                whole_mark = fingerprint(base_weight(backend, sites[path], bank).W)
                _check_base_values(path, stored.layers[path].base, whole_mark)
        ordered = {path: core.join([layers[part] for part in site.split()]) for path, site in sites.items()}
        shapes = {path: layer.base.shape for path, layer in stored.layers.items()}
        # Patterns from a file are not compiled, since a hostile regular expression can take hours. The ranks of the
        # layers replace them.
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
    """Return the rows of ``trained_tokens`` of a file, in the dtype in which they are trained."""
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
    """Warn that the budget of the config had no effect, if the model was trained without a controller.

    The evidence is that C has left zero while all subspaces are still trained.
    """
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
    """Return the fingerprint of a base weight. If the weight cannot be read, warn and return a placeholder."""
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
    """Return the site that contains W0. If `merge` replaced a quantised layer, it is the site of that layer."""
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
    """Return non-negative integers in the smallest unsigned dtype that can hold them."""
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
    """Return the factors of a layer of a file, in the dtype that they get in this model."""
    dtype = factor_dtype(backend, base, config, loading=True)
    # Overflow is detected below for all frameworks, so NumPy's own warning is not needed.
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
        assert layer.A is not None and layer.B is not None  # `checkpoint.read` has checked this
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
            "check_base=False, trainable=False to load only the adapter now and the weights later"
        )


def _check_base_values(path: str, stored: Fingerprint, present: Fingerprint) -> None:
    difference, tolerance = stored.difference(present), stored.tolerance(present)
    if not difference <= tolerance:
        raise CheckpointError(
            f"{path}: the base weight is not the one that the adapter was trained on (its fingerprint "
            f"differs by {difference:.0%}, but rounding explains at most {tolerance:.0%}); load the right base "
            "model, or pass check_base=False"
        )


def _check_all_bases(marks: Mapping[str, tuple[Fingerprint, Fingerprint]]) -> None:
    """Check the fingerprints of all quantised weights together.

    With few bits, the tolerance for a single weight is so large that another model may pass it.
    """
    if unlikely(list(marks.values())):
        worst = max(marks, key=lambda path: marks[path][0].difference(marks[path][1]))
        raise CheckpointError(
            f"{worst}: the base weights are not those that the adapter was trained on (the fingerprints of "
            "quantised layers differ, together, by more than rounding explains); load the right base model, or pass "
            "check_base=False"
        )


def _digest(stored: Checkpoint, *choices: bool) -> str:
    """Return a digest that is equal in two processes that load the same file with the same choices."""
    digest = hashlib.sha256(repr((stored.config, choices)).encode())
    for path, layer in stored.layers.items():
        for name, tensor in layer.tensors().items():
            digest.update(f"{path} {name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.data)
    return digest.hexdigest()
