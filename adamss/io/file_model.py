"""A model whose weights stay in their files, and its backend.

It cannot be run, but an adapter can be loaded onto it, compared and exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from adamss.backend.bank import Bank
from adamss.backend.numpy import NumpyBackend
from adamss.backend.sites import Kind, Kinds, LinearKind, Site
from adamss.backend.tensors import StoredTensor
from adamss.backend.views import View
from adamss.io.checkpoint import LINEAR
from adamss.io.weights import WeightFiles, match_names

__all__ = ["FileBackend", "FileLayer", "FileModel", "file_model"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FileLayer:
    """One module, whose tensors are read from the files when they are needed.

    Attributes
    ----------
    files
        Files of the model.
    names
        Name of each tensor in the files, by its name within the module.
    own
        Arrays that replace those of the files, or that the files lack.
    view
        View of the weight as a matrix.
    name_or_path
        Name of the base model for exports. Only the root module has it.
    """

    files: WeightFiles
    names: Mapping[str, str]
    own: Mapping[str, Array] = field(default_factory=dict)
    view: View = LINEAR
    name_or_path: str | None = None

    def arrays(self) -> dict[str, Array]:
        """Read all tensors and return them by name. Those in bfloat16 are widened to float32."""
        read = {name: full for name, full in self.names.items() if name not in self.own}
        return {**{name: self.files.read(full).numpy() for name, full in read.items()}, **self.own}


class FileConvolution(FileLayer):
    """A layer whose weight has more than two axes according to the view in the adapter file."""


@dataclass(frozen=True)
class FileModel:
    """An immutable model: its modules by path, and the bank of its adapters."""

    layers: Mapping[str, FileLayer]
    bank: Bank = field(default_factory=Bank)


class Linear(LinearKind):
    """Kind of a `FileLayer`."""

    classes = (FileLayer,)


class Convolution(Kind):
    """Kind of a `FileConvolution`."""

    classes = (FileConvolution,)
    in_place = True
    lora = "convolution"

    def view(self, layer: FileConvolution, path: str) -> View:
        """Return the view from the adapter file."""
        return layer.view


class FileBackend(NumpyBackend):
    """Backend of `FileModel`. It is not registered permanently; use `adamss.backend.registry.using`."""

    name = "files"
    kinds = Kinds(Linear(), Convolution())

    def handles(self, model: Any) -> bool:
        return isinstance(model, FileModel)

    def modules(self, model: FileModel) -> dict[str, FileLayer]:  # type: ignore[override]
        return dict(model.layers)

    def arrays(self, module: FileLayer) -> dict[str, Array]:  # type: ignore[override]
        return module.arrays()

    def own_arrays(self, site: Site) -> dict[str, Array | None]:
        return dict(self.arrays(site.layer))

    def bank(self, model: FileModel) -> Bank:  # type: ignore[override]
        return model.bank

    def with_bank(self, model: FileModel, bank: Bank) -> FileModel:  # type: ignore[override]
        return replace(model, bank=bank)

    def with_arrays(  # type: ignore[override]
        self, model: FileModel, values: Mapping[str, Mapping[str, Array]]
    ) -> FileModel:
        changed = {path: replace(model.layers[path], own=arrays) for path, arrays in values.items()}
        return replace(model, layers={**model.layers, **changed})


def file_model(
    files: WeightFiles,
    layers: Iterable[str],
    *,
    views: Mapping[str, View] | None = None,
    saved: Mapping[str, Mapping[str, StoredTensor]] | None = None,
) -> FileModel:
    """Return a model for weight files, whose module paths are those of an adapter.

    Parameters
    ----------
    files
        Weights of the base model.
    layers
        Module paths of the adapted layers.
    views
        Views of their weights as matrices, by path, for layers that are not linear.
    saved
        Tensors of ``modules_to_save``. Tensors that the files lack, such as those of a new head, are added to the
        model.

    Raises
    ------
    CheckpointError
        If the files lack a layer: see `adamss.io.weights.match_names`.
    """
    spelling = match_names(layers, files)
    views = views or {}
    names: dict[str, dict[str, str]] = {"": {}}
    for full in files:
        path, _, name = spelling.in_model(full).rpartition(".")
        names.setdefault(path, {})[name] = full
    found = {}
    for path, own in names.items():
        view = views.get(path, LINEAR)
        kind = FileLayer if len(view.axes) == 2 else FileConvolution
        found[path] = kind(files, own, view=view, name_or_path=None if path else str(files.path))
    known = {f"{path}.{name}": full for path, own in names.items() for name, full in own.items()}
    for path, tensors in (saved or {}).items():
        # A module with submodules becomes one module here, whose tensors have dots in their names.
        present = {name: known[f"{path}.{name}"] for name in tensors if f"{path}.{name}" in known}
        missing = {name: tensor.numpy() for name, tensor in tensors.items() if name not in present}
        found[path] = FileLayer(files, present, missing)
    return FileModel(found)
