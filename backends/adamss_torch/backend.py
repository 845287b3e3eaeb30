"""`TorchBackend`: PyTorch's primitives for `adamss`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from adamss.backend import Adaptation, Backend, BaseWeight
from adamss.backend.interface import Division, without_folded
from adamss.backend.tensors import StoredTensor
from adamss.config import AdamssConfig
from adamss.core import Factors, Merged
from adamss.errors import LayerError, LayerTypeError, StateError, TargetError
from adamss_torch import sharding
from adamss_torch.absent import check_writable, execution_device, present
from adamss_torch.adapter import BUFFERS, CHILD, Adapter, OnLoan, refuse_compacted
from adamss_torch.kernel import Plan, make_layout, update
from adamss_torch.sharding import copy_into, is_sharded, local, rebuilt

__all__ = ["TorchBackend", "adapters_of"]

RECORD = "_adamss_record"

UNSYNCHRONISED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a module in which DistributedDataParallel looks for the names of what it is to leave alone."""


@dataclass
class _Record:
    """What an adapted model remembers; an attribute of the module that was adapted, copied with it.

    Attributes
    ----------
    config
        The settings.
    paths
        Paths of the adapted layers.
    originals
        Base values of ``modules_to_save``, by path and name.
    required_grad
        Which parameters required gradients before.
    guard
        Of the hook that looks at a state before it is loaded.
    unsynchronised
        The names that were added to `UNSYNCHRONISED`.
    disabled
        Whether the model is within a `TorchBackend.disabled` block.
    """

    config: AdamssConfig
    paths: tuple[str, ...]
    originals: dict[str, dict[str, Tensor]]
    required_grad: dict[str, bool]
    guard: RemovableHandle
    unsynchronised: frozenset[str] = frozenset()
    disabled: bool = False


class TorchBackend(Backend):
    """PyTorch: any `torch.nn.Module` with `torch.nn.Linear` layers, changed in place."""

    name = "torch"

    # ---- arrays -------------------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
        base = F.linear(x, weight.t(), bias)
        A, B, C, labels, ranks, active = factors
        layout = make_layout(labels, ranks, C.shape[0], B.shape[1], dtype=C.dtype)
        return update(base, x, B.t(), C, Plan(A, active, layout))

    def to_stored(self, array: Tensor) -> StoredTensor:
        flat = array.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return StoredTensor(self.dtype_name(array), tuple(array.shape), data)

    def from_stored(
        self, stored: StoredTensor, *, like: Tensor | None = None, dtype: str | None = None
    ) -> Tensor:
        kind = getattr(torch, stored.dtype)
        if stored.data:
            array = torch.frombuffer(bytearray(stored.data), dtype=kind).view(stored.shape)
        else:
            array = torch.empty(stored.shape, dtype=kind)
        # Beside a weight that has no values yet: on the CPU, where they can be.
        device = torch.device("cpu") if like is None or like.is_meta else like.device
        return array.to(device=device, dtype=kind if dtype is None else getattr(torch, dtype))

    def dtype_name(self, array: Tensor) -> str:
        return str(array.dtype).removeprefix("torch.")

    def cast(self, array: Tensor, dtype: str) -> Tensor:
        return array.to(getattr(torch, dtype))

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__}

    @contextmanager
    def exact(self) -> Iterator[None]:
        with (
            _full_matmul_precision(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield

    # ---- several processes ----------------------------------------------------------------------------

    def whole(self, array: Tensor) -> Tensor:
        return sharding.unshard(array)

    def spread(self, array: Tensor, like: Tensor) -> Tensor:
        return rebuilt(sharding.shard_like(array, like), like)

    def once(self, model: nn.Module, action: Callable[[], None]) -> None:
        sharding.once(model, action)

    def divided(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Division]:
        return sharding.divided(model, enabled=enabled)

    # ---- models -------------------------------------------------------------------------------------

    def handles(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        owner, _ = _owner(model)
        every = owner.named_modules(remove_duplicate=False)
        return {path: module for path, module in every if not isinstance(module, Adapter)}

    def weight(self, module: nn.Module, path: str) -> BaseWeight:
        path = path or "the model itself"
        if not isinstance(module, nn.Linear):
            raise LayerTypeError(
                f"{path} is a {type(module).__name__}, which has no weight to adapt; targets must name "
                "torch.nn.Linear layers"
            )
        if is_lazy(module.weight):
            raise LayerError(f"{path} is a lazy layer without weights; run the model once, then attach")
        if not isinstance(getattr(module, CHILD, None), Adapter | None):
            raise LayerError(
                f"{path} has an attribute {CHILD!r} of its own, where the adapter goes; rename it"
            )
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise LayerError(
                f"{path} is the output projection of torch.nn.MultiheadAttention, which reads the weight and never "
                "calls the layer: an adapter on it would have no effect; leave it out of targets"
            )
        if module.weight.is_meta and is_sharded(module.weight):
            raise LayerError(
                f"{path} is on the meta device: its weight has no values; load the weights first"
            )
        if hasattr(module.weight, "ds_id"):
            raise LayerError(
                f"{path}: DeepSpeed ZeRO-3 has taken its weight apart, so that no process can read it; use "
                "torch.distributed.fsdp.fully_shard instead"
            )
        tensors: Mapping[str, Tensor | None] = {name: present(module, name) for name in ("weight", "bias")}
        adapter = getattr(module, CHILD, None)
        if adapter is not None and adapter.base is not None:
            tensors = {**tensors, **adapter.base}
        elif adapter is not None and adapter.merged:
            raise StateError(f"{path}: the base weight was dropped by merge(keep_base=False)")
        W, b = (None if tensor is None else tensor.detach() for tensor in tensors.values())
        assert W is not None
        if adapter is not None and adapter.folded is not None and adapter.base is None:
            return without_folded(BaseWeight(W.t(), b), adapter.factors(), adapter.folded)
        return BaseWeight(W.t(), b)

    def has_values(self, array: Tensor) -> bool:
        return not array.is_meta

    def arrays(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in _tensors(module).items()}

    def shared(self, model: nn.Module, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        owner, _ = _owner(model)
        inside = tuple(f"{path}." if path else "" for path in saved)
        names: dict[int, list[str]] = {}
        for name, parameter in owner.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {
            name: frozenset(every) - {name}
            for every in names.values()
            for name in every
            if name.startswith(inside)
        }

    def insert(
        self,
        model: nn.Module,
        layers: Mapping[str, Factors],
        *,
        config: AdamssConfig,
        saved: Mapping[str, Mapping[str, Tensor] | None],
    ) -> nn.Module:
        owner, _ = _owner(model)
        modules = self.modules(owner)
        _check_parameters(owner, [modules[path] for path in layers], {path: modules[path] for path in saved})
        _check_wrappers(model)
        for path in layers:
            sharding.check_spread(model, _linear(modules[path]), path)
        adapters = {
            path: Adapter(factors, _linear(modules[path]).in_features).to(execution_device(modules[path]))
            for path, factors in layers.items()
        }
        originals = {
            path: {name: tensor.clone() for name, tensor in self.arrays(modules[path]).items()}
            for path in saved
        }
        # By every name: merging gives a layer that shares its weight one of its own.
        named = owner.named_parameters(remove_duplicate=False)
        required_grad = {name: parameter.requires_grad for name, parameter in named}
        # From here on nothing can fail.
        owner.requires_grad_(False)
        for path, values in saved.items():
            _copy_into(self.arrays(modules[path]), values or {})
            for parameter in modules[path].parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for path, adapter in adapters.items():
            adapter.install(modules[path])
            if is_sharded(weight := _linear(modules[path]).weight):
                sharding.shard_adapter(adapter, weight)
        names = _leave_unsynchronised(owner, layers)
        guard = owner.register_load_state_dict_pre_hook(refuse_compacted)  # type: ignore[no-untyped-call]
        setattr(owner, RECORD, _Record(config, tuple(layers), originals, required_grad, guard, names))
        return model

    def adaptation(self, model: nn.Module) -> Adaptation | None:
        sharding.check_not_flattened(model)
        sharding.reshard(model)
        owner, record = _owner(model)
        if record is None:
            return None
        layers = _adapted_layers(owner, record)
        adapters = {path: adapter for path, (_, adapter) in layers.items()}
        return Adaptation(
            config=record.config,
            layers={path: adapter.factors() for path, adapter in adapters.items()},
            shapes={path: (layer.in_features, layer.out_features) for path, (layer, _) in layers.items()},
            saved=tuple(record.originals),
            merged=any(adapter.merged for adapter in adapters.values()),
            base_kept=all(
                adapter.base is not None or not (adapter.merged or adapter.folded is not None)
                for adapter in adapters.values()
            ),
            disabled=record.disabled,
            folded={path: a.folded for path, a in adapters.items() if a.folded is not None},
        )

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        owner, record = _owner(model)
        if record is None:
            return []
        trained = [
            parameter
            for _, adapter in _adapted_layers(owner, record).values()
            for parameter in (adapter.B, adapter.C)
        ]
        for path in record.originals:
            trained += [p for p in owner.get_submodule(path).parameters() if p.requires_grad]
        # A parameter shared by two saved modules is handed out once: an optimiser refuses duplicates.
        return list({id(parameter): parameter for parameter in trained}.values())

    def set_active(self, model: nn.Module, active: Mapping[str, Tensor]) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        layers = _adapted_layers(owner, record)
        for path, mask in active.items():
            _check_thawed(path, layers[path][1], mask)
        for path, mask in active.items():
            layers[path][1].active.copy_(mask)
        return model

    def remove(self, model: nn.Module, *, restore: bool) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        if restore:
            _check_base_writable(owner, record)
            self.unfold(model)
        for layer, adapter in _adapted_layers(owner, record).values():
            adapter.uninstall(layer)
            # FSDP2 goes on managing them, and is not to wait for their gradients.
            adapter.requires_grad_(False)
        for path, values in record.originals.items():
            if restore:
                _copy_into(self.arrays(owner.get_submodule(path)), values)
            owner.get_submodule(path).zero_grad(set_to_none=True)
        for name, parameter in owner.named_parameters():
            if name in record.required_grad:
                parameter.requires_grad_(record.required_grad[name])
        left = [name for name in getattr(owner, UNSYNCHRONISED) if name not in record.unsynchronised]
        if left:
            setattr(owner, UNSYNCHRONISED, left)
        else:
            delattr(owner, UNSYNCHRONISED)
        record.guard.remove()
        delattr(owner, RECORD)
        for module in model.modules():
            OnLoan.give_back(module)
        return model

    def fold(self, model: nn.Module, merged: Mapping[str, Merged], *, keep_base: bool) -> nn.Module:
        for adapter in _replace_weights(model, merged, keep_base=keep_base).values():
            adapter.merged = True
        return model

    def consolidate(
        self,
        model: nn.Module,
        merged: Mapping[str, Merged],
        folded: Mapping[str, Tensor],
        *,
        keep_base: bool,
    ) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        if any(adapter.revive for _, adapter in _adapted_layers(owner, record).values()):
            raise StateError(
                "consolidate: the model has a budget with revive=True, under which frozen subspaces may return; call "
                "remove() on its controller first"
            )
        if all(adapter.base is not None for _, adapter in _adapted_layers(owner, record).values()):
            self.unfold(model)
        for path, adapter in _replace_weights(model, merged, keep_base=keep_base).items():
            adapter.fold(folded[path].clone())
        return model

    def unfold(self, model: nn.Module) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        _check_base_writable(owner, record, saved=False)
        for layer, adapter in _adapted_layers(owner, record).values():
            for name, tensor in (adapter.base or {}).items():
                if isinstance(tensor, nn.Parameter):
                    setattr(layer, name, tensor)
                else:
                    _copy_into({name: getattr(layer, name).detach()}, {name: tensor})
            adapter.merged = False
            adapter.base = None
            if adapter.folded is not None:
                adapter.fold(None)
        return model

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[nn.Module]:
        owner, record = _owner(model)
        assert record is not None
        if record.disabled:
            yield model
            return
        _check_base_writable(owner, record)
        adapters = [adapter for _, adapter in _adapted_layers(owner, record).values()]
        layers = [layer for layer, _ in _adapted_layers(owner, record).values()]
        before = [adapter.enabled for adapter in adapters]

        def swap() -> None:
            sharding.reshard(model)
            for path, originals in record.originals.items():
                _swap_values(_tensors(owner.get_submodule(path)), originals)
            for layer, adapter in zip(layers, adapters, strict=True):
                _swap_base(layer, adapter)

        for adapter in adapters:
            adapter.enabled = False
        record.disabled = True
        swap()
        try:
            yield model
        finally:
            swap()
            record.disabled = False
            for adapter, enabled in zip(adapters, before, strict=True):
                adapter.enabled = enabled


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of an adapted model by module path."""
    owner, record = _owner(model)
    layers = {} if record is None else _adapted_layers(owner, record)
    return {path: adapter for path, (_, adapter) in layers.items()}


def record_of(model: nn.Module) -> object:
    """Return what stands for the adapters of a model as a whole: another object after `detach` and `attach`."""
    return _owner(model)[1]


def _owner(model: nn.Module) -> tuple[nn.Module, _Record | None]:
    """Return the module that was adapted, and its record; the model itself, unwrapped, and None if none was.

    It may lie within the model (the encoder of a classifier), or be wrapped (DistributedDataParallel,
    `torch.compile`).
    """
    found = [module for module in model.modules() if RECORD in vars(module)]
    if len(found) > 1:
        raise StateError(
            f"{len(found)} parts of the model were adapted one by one; call adamss on each of them, not on the whole"
        )
    if found:
        return found[0], vars(found[0])[RECORD]
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise StateError(
            "this is a part of a model that was adapted as a whole: adapters are attached already; "
            "call adamss on the whole"
        )
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # a compiled module
            model = inner
        else:
            return model, None


@contextmanager
def _full_matmul_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, through whichever of PyTorch's two interfaces the user has chosen.

    Once the newer one has been used, the older one raises.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009
        before = [place.fp32_precision for place in places]
        for place in places:
            place.fp32_precision = "ieee"
        try:
            yield
        finally:
            for place, value in zip(places, before, strict=True):
                place.fp32_precision = value
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of a module; extra state that is no tensor is left out."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _check_parameters(owner: nn.Module, adapted: list[nn.Module], saved: Mapping[str, nn.Module]) -> None:
    """Check what would fail, or go wrong, after the first change has been made."""
    for name, parameter in owner.named_parameters():
        if is_lazy(parameter):
            raise LayerError(
                f"{name} belongs to a lazy layer without weights; run the model once, then attach"
            )
    frozen = {id(parameter) for layer in adapted for parameter in layer.parameters()}
    for path, module in saved.items():
        check_writable(_tensors(module), f"modules_to_save: {path}")
        if any(parameter.is_inference() for parameter in module.parameters()):
            raise LayerError(
                f"modules_to_save: {path} was made under torch.inference_mode, and cannot be trained; make it outside"
            )
        if any(id(parameter) in frozen for parameter in module.parameters()):
            raise TargetError(
                f"modules_to_save: {path} shares its weight with a layer that targets adapts, "
                "and would train it whole; leave one of them out"
            )


def _check_wrappers(model: nn.Module) -> None:
    """Check that nothing has taken stock of the Parameters already that would not notice the new ones."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise StateError(
            "DistributedDataParallel would not synchronise the gradients of adapters that come after it; attach or "
            "load first, and wrap the model then"
        )


def _leave_unsynchronised(owner: nn.Module, paths: Iterable[str]) -> frozenset[str]:
    """Ask DistributedDataParallel not to send the buffers of adapters with every forward; return their names.

    They never change but by what all processes decide alike. Sending A would cost more than all gradients, and make
    tensors that are saved for the backward out of date.
    """
    present = getattr(owner, UNSYNCHRONISED, ())
    names = {
        f"{prefix}{path}.{CHILD}.{name}"
        for prefix in ("", "_orig_mod.")  # within a compiled module
        for path in paths
        for name in BUFFERS
    } - set(present)
    setattr(owner, UNSYNCHRONISED, [*present, *sorted(names)])
    return frozenset(names)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _adapted_layers(owner: nn.Module, record: _Record) -> dict[str, tuple[nn.Linear, Adapter]]:
    layers = {path: _linear(owner.get_submodule(path)) for path in record.paths}
    return {path: (layer, getattr(layer, CHILD)) for path, layer in layers.items()}


def _check_base_writable(owner: nn.Module, record: _Record, *, saved: bool = True) -> None:
    """Check that the base values, which others have taken the place of, can be written back."""
    for path, (layer, adapter) in _adapted_layers(owner, record).items():
        check_writable({name: getattr(layer, name) for name in adapter.base or ()}, path)
    for path in record.originals if saved else ():
        check_writable(_tensors(owner.get_submodule(path)), path)


def _replace_weights(
    model: nn.Module, merged: Mapping[str, Merged], *, keep_base: bool
) -> dict[str, Adapter]:
    """Give the adapted layers other weights, and return the adapters, which keep the former ones if asked."""
    owner, record = _owner(model)
    assert record is not None
    layers = _adapted_layers(owner, record)
    for path, (layer, _) in layers.items():
        if not {"weight", "bias"} <= layer._parameters.keys():
            raise LayerError(
                f"{path}: its weight or bias is computed by a parametrization and cannot be replaced; "
                "remove the parametrization, or leave the adapter unmerged"
            )
        check_writable({"weight": layer.weight}, path)
    counts = _parameter_counts(owner)
    for path, (layer, _) in layers.items():
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if is_sharded(parameter) and counts[id(parameter)] > 1:
                raise LayerError(
                    f"{path}: its {name} is shared with another layer and spread by fully_shard, which cannot give "
                    "it one of its own; leave the adapter unmerged"
                )
    for path, (layer, adapter) in layers.items():
        values = {"weight": merged[path].W.t()}
        if merged[path].b is not None and adapter.A.shape[1] > adapter.d:
            values["bias"] = merged[path].b
        base = {}
        for name, value in values.items():
            parameter = getattr(layer, name)
            if counts[id(parameter)] > 1:
                # Other modules go on with the base weight: this layer gets a Parameter of its own.
                base[name] = parameter
                setattr(layer, name, nn.Parameter(value.contiguous(), requires_grad=False))
            else:
                kept = rebuilt(local(parameter.detach()).to("cpu", copy=True), parameter)
                base[name] = kept if keep_base else value
                _copy_into({name: parameter.detach()}, {name: value})
        adapter.base = base if keep_base else None
    return {path: adapter for path, (_, adapter) in layers.items()}


def _check_thawed(path: str, adapter: Adapter, mask: Tensor) -> None:
    """Check that no subspace is to be trained again whose update the weight holds."""
    folded = adapter.folded
    if folded is not None and bool((mask.to(folded.device) & folded).any()):
        raise StateError(f"{path}: a subspace that was consolidated into the weight cannot be trained again")


def _parameter_counts(owner: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in owner.named_parameters(remove_duplicate=False))


def _copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite tensors in place, so that Parameters stay the objects that an optimiser may hold."""
    with torch.no_grad():
        for name, value in values.items():
            copy_into(tensors[name], value)


def _swap_values(tensors: Mapping[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Exchange the values of tensors with those kept."""
    for name, tensor in tensors.items():
        other = kept[name]
        if is_sharded(tensor):
            # FSDP2 gathers from this memory, whatever `data` is; what the backward needs it gathers anew.
            kept[name] = rebuilt(local(tensor.detach()).to(local(other).device, copy=True), tensor)
            _copy_into({name: tensor}, {name: other})
            continue
        # Not a copy in place: what a forward before has saved for its backward must stay as it was.
        kept[name], tensor.data = tensor.data.to(other.device), other.to(tensor.device)


def _swap_base(layer: nn.Linear, adapter: Adapter) -> None:
    """Exchange merged tensors of a layer with the base ones that its adapter keeps."""
    for name, kept in (adapter.base or {}).items():
        present = getattr(layer, name)
        if isinstance(kept, nn.Parameter):
            setattr(layer, name, kept)
            adapter.base[name] = present  # type: ignore[index]
        else:
            _swap_values({name: present}, adapter.base)  # type: ignore[arg-type]
