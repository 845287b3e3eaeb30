"""Choice of the layers, modules and embeddings of a model that a config names."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from adamss.backend.interface import Backend, Model
from adamss.backend.sites import Fragment, Site, StackedLayer, owner_of
from adamss.backend.targets import DEFAULT_TARGETS, match
from adamss.backend.tensors import join_path
from adamss.config import ALL_LINEAR, AdamssConfig
from adamss.errors import (
    AdamssWarning,
    ArrayValueError,
    ConfigError,
    ConfigTypeError,
    LayerError,
    LayerTypeError,
    TargetError,
)
from adamss.verbs.common import embedding_of

__all__ = ["Choice", "choose"]


class Choice(NamedTuple):
    """The parts of a model that an adapter changes.

    Attributes
    ----------
    config
        The given config, with default targets filled in if it names none, and with ``trained_tokens`` by path of the
        embedding.
    sites
        Sites of the layers to adapt, by path, in the order of the model.
    saved
        Paths of ``modules_to_save``.
    tokens
        Sites of the embeddings of ``trained_tokens``, by path.
    """

    config: AdamssConfig
    sites: dict[str, Site]
    saved: list[str]
    tokens: dict[str, Site]


def choose(backend: Backend, model: Model, config: AdamssConfig) -> Choice:
    """Return the parts of a model that a config names, after checking that they can be adapted.

    Raises
    ------
    TargetError
        If nothing matches ``targets`` or ``modules_to_save``, a layer is matched by two settings, or an embedding has
        no row for an id of ``trained_tokens``.
    LayerTypeError, LayerError, ArrayValueError
        If a layer that a list of names matches cannot be adapted, or no layer that an expression matches can.
    ConfigError, ConfigTypeError
        If ``overrides`` give a layer settings that do not fit together, or the backend cannot train rows.

    Warns
    -----
    AdamssWarning
        If an expression matches layers that cannot be adapted and are left out, if an entry of ``overrides`` changes
        nothing, or if ``include_bias`` has no effect on a layer.
    """
    modules = backend.modules(model)
    saved = []
    if config.modules_to_save:
        whole = {path: module for path, module in modules.items() if not isinstance(module, Fragment)}
        saved = _once(match(config.modules_to_save, whole, name="modules_to_save"), whole)
    if config.targets is None:
        config = replace(config, targets=_default_targets(modules))
    assert config.targets is not None
    wide = isinstance(config.targets, str)
    if wide and str(config.targets).lower() == ALL_LINEAR:
        found = _all_linear(backend, model, modules, saved)
    else:
        found = _matched(backend, model, config.targets, modules)
    paths = _members(backend, found, modules)
    if config.exclude:
        excluded = match(config.exclude, modules, name="exclude", required=False)
        inside = tuple(f"{path}." for path in excluded)
        paths = [path for path in paths if not f"{path}.".startswith(inside)]
        if not paths:
            raise TargetError(f"exclude = {config.exclude!r} leaves nothing of targets = {config.targets!r}")
    paths = _once(paths, modules)
    tokens = _tokens(backend, model, modules, config)
    _require_disjoint(paths, saved)
    for path in tokens:
        if outer := next((each for each in saved if f"{path}.".startswith(join_path(each, ""))), None):
            raise TargetError(
                f"trained_tokens trains rows of {path!r}, which lies within {outer!r} that modules_to_save trains "
                "whole; leave one of them out"
            )
    if both := sorted({*paths} & {*tokens}):
        raise TargetError(
            f"{both[0]!r} is adapted by targets, and trained_tokens trains rows of it; leave it out of one of them"
        )
    if wide:  # modules inside another adapted layer are parts of that layer
        layers = tuple(f"{path}." for path in paths if backend.kinds.find(modules[path]) is not None)
        paths = [path for path in paths if not path.startswith(layers)]
    sites = _adaptable(backend, paths, modules) if wide else {p: backend.site(modules[p], p) for p in paths}
    _tell_of_biases(config, sites)
    for path in sites if config.overrides else ():
        try:
            replace(config.for_layer(path))  # validates the settings that several patterns give together
        except (ConfigError, ConfigTypeError) as error:
            raise type(error)(f"overrides: {path}: {error}") from error
    for pattern, settings in config.overrides.items():
        alone = replace(config, overrides={pattern: settings})
        if all(alone.for_layer(path) == replace(config, overrides={}) for path in sites):
            warnings.warn(
                f"overrides: {pattern!r} changes nothing of any adapted layer", AdamssWarning, stacklevel=4
            )
    if tokens:
        config = replace(config, trained_tokens={path: ids for path, (_, ids) in tokens.items()})
    return Choice(config, sites, saved, {path: site for path, (site, _) in tokens.items()})


def _matched(
    backend: Backend, model: Model, targets: str | Iterable[str], modules: Mapping[str, Any]
) -> list[str]:
    """Return the paths of modules that the targets match, and warn about matched Parameters that are left out."""
    others = backend.unadaptable(model)
    both = match(targets, [*modules, *others], name="targets")
    found = [path for path in both if path in modules]
    # A Parameter of a module that is matched itself needs no mention.
    left = [path for path in both if path not in modules and path.rpartition(".")[0] not in {*found} - {""}]
    if not found:
        raise TargetError(f"targets: {left[0]} is {others[left[0]]}; leave it out")
    if left:
        more = f" (and {len(left) - 1} more Parameters)" if len(left) > 1 else ""
        warnings.warn(f"targets: left out: {left[0]} is {others[left[0]]}{more}", AdamssWarning, stacklevel=5)
    return found


def _tell_of_biases(config: AdamssConfig, sites: Mapping[str, Site]) -> None:
    """Warn, once for each type of layer, about biases that are not adapted although ``include_bias`` is set."""
    left: dict[str, list[str]] = {}
    for path, site in sites.items():
        biased = isinstance(site.layer, Fragment) or getattr(site.layer, site.kind.bias, None) is not None
        if biased and not site.kind.linear and config.for_layer(path).include_bias:
            left.setdefault(type(site.layer).__name__, []).append(path)
    for kind, paths in left.items():
        more = f" (and {len(paths) - 1} more of {kind})" if len(paths) > 1 else ""
        warnings.warn(
            f"include_bias: {paths[0]} is a {kind}{more}, and only the biases of linear layers are adapted",
            AdamssWarning,
            stacklevel=4,
        )


def _tokens(
    backend: Backend, model: Model, modules: Mapping[str, Any], config: AdamssConfig
) -> dict[str, tuple[Site, tuple[int, ...]]]:
    """Return the site and the trained ids of each embedding of ``trained_tokens``, by path."""
    asked: Any = config.trained_tokens
    if asked is None:
        return {}
    if not isinstance(asked, Mapping):
        embedding = backend.input_embedding(model)
        path = next((path for path, module in modules.items() if module is embedding), None)
        if path is None and backend.trains_rows:
            raise TargetError(
                f"trained_tokens: the input embedding of this {type(model).__name__} is not known (it has no "
                "get_input_embeddings()); name it: trained_tokens={'embed_tokens': [...]}"
            )
        named = [(path or "", asked)]
    else:
        whole = {path: module for path, module in modules.items() if not isinstance(module, Fragment)}
        names = {name: _once(match([name], whole, name="trained_tokens"), whole) for name in asked}
        named = [(path, asked[name]) for name, paths in names.items() for path in paths]
    found = {}
    for path, ids in named:
        if path in found:
            raise TargetError(f"trained_tokens names {path!r} twice; give it all its ids under one name")
        found[path] = embedding_of(backend, modules, path, ids), ids
    return found


def _default_targets(modules: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Return the default targets for the type of a model."""
    kind = getattr(getattr(modules.get(""), "config", None), "model_type", None)
    names = DEFAULT_TARGETS.get(str(kind))
    if names is not None:
        ends = {path.rpartition(".")[2] for path in modules}
        return names if isinstance(names, str) else tuple(name for name in names if name in ends) or names
    raise TargetError(
        f"there are no default targets for a model of type {kind!r}; name some, such as "
        "targets=['query', 'value'], or take targets='all-linear'"
    )


def _all_linear(
    backend: Backend, model: Model, modules: Mapping[str, Any], saved: Iterable[str]
) -> list[str]:
    """Return the paths of all linear layers except output heads and layers inside ``modules_to_save``."""
    inside = tuple(f"{path}." for path in saved)
    heads = set(backend.heads(model))
    found = []
    for path, module in modules.items():
        kind = backend.kinds.find(module.module if isinstance(module, StackedLayer) else module)
        left_out = path in heads or f"{path}.".startswith(inside)
        if kind is not None and kind.all_linear and not left_out:
            found.append(path)
    if not found:
        raise TargetError("targets = 'all-linear' matches no layer; the model has none but its output head")
    return found


def _adaptable(backend: Backend, paths: list[str], modules: Mapping[str, Any]) -> dict[str, Site]:
    """Return the sites of the modules that can be adapted.

    Modules without weights that could be adapted, such as containers, are skipped. Warn about layers that cannot be
    adapted for another reason, once for each type of layer.
    """
    sites: dict[str, Site] = {}
    left: Counter[str] = Counter()
    example: dict[str, str] = {}
    first: Exception | None = None
    for path in paths:
        try:
            sites[path] = backend.site(modules[path], path)
        except LayerTypeError as error:
            first = first or error  # a container or an activation, which needs no warning
        except (LayerError, ArrayValueError) as error:
            first = first or error
            kind = type(modules[path]).__name__
            left[kind] += 1
            example.setdefault(kind, str(error))
    if not sites and first is not None:
        raise first
    for kind, count in left.items():
        more = f" (and {count - 1} more of {kind})" if count > 1 else ""
        warnings.warn(f"targets: left out: {example[kind]}{more}", AdamssWarning, stacklevel=5)
    return sites


def _members(backend: Backend, paths: list[str], modules: Mapping[str, Any]) -> list[str]:
    """Return the paths, where a module with members is replaced by its members: see `Models.members`."""
    found = []
    for path in paths:
        parts = {join_path(path, name) for name in backend.members(modules[path])}
        found += [place for place in modules if owner_of(place) in parts] if parts else [path]
    return found


def _once(paths: list[str], modules: Mapping[str, Any]) -> list[str]:
    """Return the first path of each named module, so that a module that appears twice is adapted once."""
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    return list(dict.fromkeys(first[id(modules[path])] for path in paths))


def _require_disjoint(targets: list[str], saved: list[str]) -> None:
    for outer in saved:
        for inner in (*targets, *(path for path in saved if path != outer)):
            if inner == outer or inner.startswith(f"{outer}." if outer else ""):
                raise TargetError(
                    f"{inner!r} is matched for adapting or saving and lies within {outer!r}, which "
                    "modules_to_save trains whole; leave one of them out"
                )
