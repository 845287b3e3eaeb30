"""A model whose weights stay in their files: enough of one to load an adapter onto, to compare and to export it."""

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
from adamss.io.weights import WeightFiles, match_names

__all__ = ["FileBackend", "FileLayer", "FileModel", "file_model"]

Array = np.ndarray[Any, Any]
LINEAR = View(rows=(1,), columns=(0,))


@dataclass(frozen=True)
class FileLayer:
    """One module: the tensors that the files have below its path, read when they are asked for.

    Attributes
    ----------
    files
        Where they are.
    names
        Name of each tensor in the files, by its name within the module.
    own
        Arrays that take the place of those of the files, or that the files lack.
    view
        How the weight is a matrix.
    name_or_path
        What exports call the base model; only the model itself has it.
    """

    files: WeightFiles
    names: Mapping[str, str]
    own: Mapping[str, Array] = field(default_factory=dict)
    view: View = LINEAR
    name_or_path: str | None = None

    def arrays(self) -> dict[str, Array]:
        """Read all tensors; bfloat16 is widened to float32."""
        read = {name: full for name, full in self.names.items() if name not in self.own}
        return {**{name: self.files.read(full).numpy() for name, full in read.items()}, **self.own}


class FileConvolution(FileLayer):
    """A layer whose weight has more than two axes, as the adapter's view of it says."""


@dataclass(frozen=True)
class FileModel:
    """Modules by path, and what is attached to them; immutable."""

    layers: Mapping[str, FileLayer]
    bank: Bank = field(default_factory=Bank)


class Linear(LinearKind):
    """`FileLayer`."""

    classes = (FileLayer,)


class Convolution(Kind):
    """`FileConvolution`."""

    classes = (FileConvolution,)
    in_place = True
    lora = "convolution"

    def view(self, layer: FileConvolution, path: str) -> View:
        """Return the view that the adapter's file has."""
        return layer.view


class FileBackend(NumpyBackend):
    """The backend of `FileModel`. It is not registered: `adamss.backend.registry.using` makes verbs find it."""

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
    """Return the model of some files, with the module paths that an adapter has for it.

    Parameters
    ----------
    files
        Weights of the base model.
    layers
        Module paths of adapted layers.
    views
        How their weights are matrices, where that is not as in a linear layer.
    saved
        Tensors of ``modules_to_save``. What the files lack of them, such as a new head, becomes part of the model.

    Raises
    ------
    CheckpointError
        If the files lack a layer: see `adamss.io.weights.match_names`.
    """
    ours, theirs = match_names(layers, files)
    views = views or {}
    names: dict[str, dict[str, str]] = {"": {}}
    for full in files:
        path, _, name = (ours + full.removeprefix(theirs)).rpartition(".")
        names.setdefault(path, {})[name] = full
    found = {}
    for path, own in names.items():
        view = views.get(path, LINEAR)
        kind = FileLayer if len(view.axes) == 2 else FileConvolution
        found[path] = kind(files, own, view=view, name_or_path=None if path else str(files.path))
    known = {f"{path}.{name}": full for path, own in names.items() for name, full in own.items()}
    for path, tensors in (saved or {}).items():
        # A module that consists of others is a unit here, with dots in the names of its tensors.
        present = {name: known[f"{path}.{name}"] for name in tensors if f"{path}.{name}" in known}
        missing = {name: tensor.numpy() for name, tensor in tensors.items() if name not in present}
        found[path] = FileLayer(files, present, missing)
    return FileModel(found)
