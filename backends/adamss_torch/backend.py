"""`TorchBackend`: PyTorch's primitives for `adamss`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import get_ident
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from adamss.backend import Adaptation, Backend, Bank, Division, Kind, Ledger, Site
from adamss.backend.bank import Route, Rows, State
from adamss.backend.sites import Fragment, LoraForm
from adamss.backend.stores import exchange_all
from adamss.backend.tensors import StoredTensor, join_path
from adamss.config import AdamssConfig
from adamss.core import Factors
from adamss.errors import ArrayValueError, LayerError, LayerTypeError, StateError, TargetError
from adamss_torch import sharding
from adamss_torch.adapter import Adapter
from adamss_torch.bank import (
    CHILD,
    HOOK,
    LayerBank,
    Off,
    OffWithGradients,
    OnLoan,
    PartBanks,
    TokenBank,
    check_state,
)
from adamss_torch.division import divided
from adamss_torch.in_place import readable, readers, restore
from adamss_torch.kernel import Plan, is_transformed, make_layout, trained_elements, update
from adamss_torch.kinds import (
    PROJECTIONS,
    Embedding,
    OwnParameter,
    Part,
    fragments,
    kinds,
    parameter_refusal,
    refusal,
)
from adamss_torch.paths import named_parameters, unwrapped, walk
from adamss_torch.quantised import PACKING, QuantisedStore, float_layer, packing_layers, unpack
from adamss_torch.routing import LayerRoute
from adamss_torch.sharding import is_partitioned, is_sharded, local, rebuilt, shape_of
from adamss_torch.stores import ParameterStore, exchanged, execution_device, stores, writing_refused
from adamss_torch.tokens import TrainedRows, is_known
from adamss_torch.watch import Seen, Watch, seems_to_read

__all__ = ["TorchBackend", "adapters_of", "kinds"]

RECORD = "_adamss_record"

WATCH, WATCH_KEY = "_adamss_watch", -3
"""Attribute of an adapted model that holds the `Watch` on its present forward, and key of the hooks that start it."""

KEPT = "adamss_kept"
"""First component of the state-dict keys of the ``modules_to_save`` of inactive adapters."""

WATCHED: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()
"""The adapted model to which each watched module belongs: a forward may begin at an inner module."""

UNSYNCHRONISED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a module in which DistributedDataParallel looks up the names of tensors not to synchronise."""


@dataclass
class _Own:
    """Record that an adapted model keeps of one adapter.

    Attributes
    ----------
    config
        Settings of the adapter.
    paths
        Paths of the adapted layers.
    saved
        Paths of the modules to save.
    tokens
        Paths of the embeddings with trained rows.
    state
        Weight, training flags and kept values of the adapter.
    """

    config: AdamssConfig
    paths: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: tuple[str, ...]
    state: State


@dataclass
class _Record:
    """Record of all adapters of a model, kept as an attribute of the adapted module and copied with it.

    Attributes
    ----------
    required_grad
        Whether each parameter required gradients before the first adapter came, by name.
    guards
        Handles of the hooks on loading and writing state dicts.
    adapters
        Records of the adapters, by name.
    originals
        Base values of ``modules_to_save``, by module path and then by name.
    unsynchronised
        Names that were added to `UNSYNCHRONISED`.
    disabled
        Whether the model is within an `adamss.disabled` block.
    route
        Route of the rows of a batch, as in `Bank`.
    seen
        Findings of the `Watch` on the forwards of the model.
    """

    required_grad: dict[str, bool]
    guards: tuple[RemovableHandle, ...]
    adapters: dict[str, _Own] = field(default_factory=dict)
    originals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unsynchronised: frozenset[str] = frozenset()
    disabled: bool = False
    route: Route | None = None
    seen: Seen = field(default_factory=Seen)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of everything that has a bank: adapted layers, and embeddings with trained rows."""
        every = (path for own in self.adapters.values() for path in own.paths + own.tokens)
        return tuple(dict.fromkeys(every))


class _Layers(Mapping[str, Factors]):
    """Factors of adapters by path, made when they are looked up."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters

    def __getitem__(self, path: str) -> Factors:
        return self._adapters[path].factors()

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)


class TorchBackend(Backend):
    """Backend for PyTorch, which changes any `torch.nn.Module` in place.

    Examples
    --------
    >>> import torch
    >>> from adamss.backend import backend_for
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> backend = backend_for(model)
    >>> backend.name, backend.site(model[0], "0").view.shape(model[0].weight.shape)
    ('torch', (8, 6))
    """

    name = "torch"
    kinds = kinds
    stores = stores
    trains_rows = True

    # ---- arrays -------------------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Factors) -> Tensor:
        y = F.linear(x, weight.t(), bias)
        for A, B, C, labels, ranks, active in factors:
            layout = make_layout(labels, ranks, C.shape[0], B.shape[1], dtype=C.dtype)
            rows, columns = trained_elements(active, labels, layout.groups)
            B, C = torch.where(rows, B.t(), B.t().detach()), torch.where(columns, C, C.detach())
            y = update(y, x, B, C, Plan(A, layout))
        return y

    def to_stored(self, array: Tensor) -> StoredTensor:
        flat = array.detach().cpu().contiguous().view(-1)
        if flat.untyped_storage().nbytes() > flat.nbytes:
            flat = flat.clone()  # a NumPy view of FSDP1's flat memory would keep FSDP1 from ever freeing it
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
        # A weight on the meta device has no values yet. Stored values need a real device, so they go to the CPU.
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

    def has_values(self, array: Tensor) -> bool:
        return not array.is_meta

    def peft_grouping(self, *arguments: Any, device: str) -> tuple[Any, Any]:
        """Call `adamss_torch.peft.find_grouping`, which needs scikit-learn."""
        from adamss_torch.peft import find_grouping

        return find_grouping(*arguments, device=device)

    def shapes_in_config(self, file: Path) -> dict[str, tuple[int, int]]:
        """Return the shapes (d, n) of the linear layers of the model that a ``config.json`` describes, by path.

        `adamss_torch.configs.model_without_values` builds the model, which needs transformers.
        """
        from adamss_torch.configs import model_without_values

        modules = model_without_values(file).named_modules()
        linear = [
            (path, layer, kind) for path, layer in modules if (kind := self.kinds.find(layer)) and kind.linear
        ]
        return {
            path: kind.view(layer, path).shape(getattr(layer, kind.weight).shape)
            for path, layer, kind in linear
        }

    # ---- several processes ----------------------------------------------------------------------------

    def whole(self, array: Tensor) -> Tensor:
        return sharding.unshard(array)

    def spread(self, array: Tensor, like: Tensor) -> Tensor:
        return rebuilt(sharding.shard_like(array, like), like)

    def once(self, model: nn.Module, action: Callable[[], None]) -> None:
        sharding.once(model, action)

    def divided(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Division]:
        return divided(model, enabled=enabled)

    # ---- models -------------------------------------------------------------------------------------

    def handles(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        owner, _ = _owner(model)
        found: dict[str, Any] = {}
        parts: dict[int, dict[str, Part]] = {}
        for path, module in walk(owner):
            found[path] = module
            # A module that appears twice yields the same parts at both paths.
            for name, part in parts.setdefault(id(module), dict(fragments(module))).items():
                found[join_path(path, name)] = part
        return found

    def members(self, module: Any) -> tuple[str, ...]:
        return PROJECTIONS if isinstance(module, nn.MultiheadAttention) else ()

    def unadaptable(self, model: nn.Module) -> dict[str, str]:
        owner, _ = _owner(model)
        known, found = self.modules(owner), {}
        for path, module in walk(owner, parametrizations=True):
            for name, parameter in module._parameters.items():
                place, kind = join_path(path, name), kinds.find(module)
                beside = kind is None or name not in (kind.weight, kind.bias)
                if parameter is not None and parameter.ndim > 1 and beside and place not in known:
                    found[place] = parameter_refusal(module, parameter)
        return found

    def heads(self, model: nn.Module) -> list[str]:
        owner, _ = _owner(model)
        try:
            head = owner.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return []
        return [path for path, module in walk(owner) if module is head]

    def input_embedding(self, model: nn.Module) -> nn.Module | None:
        owner, _ = _owner(model)
        try:
            embedding: nn.Module = owner.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None
        return embedding

    def rows_refusal(self, model: nn.Module, path: str) -> str | None:
        owner, record = _owner(model)
        assert record is not None
        modules = self.modules(owner)
        layer: Any = modules[path]
        others = [module for module, _ in _banks(owner, record)[path].sharing if module is not layer]
        ties = getattr(getattr(owner, "config", None), "tie_word_embeddings", False)
        if not is_known(layer) and not hasattr(layer, "embed_scale"):
            return f"PEFT does not know {type(layer).__name__}, and treats it as a torch.nn.Embedding"
        follows = ties and layer is self.input_embedding(model)
        if bool(others) != bool(follows and (others or self.heads(model))):
            return (
                f"the weight is shared by {len(others)} other modules, but PEFT decides by the input embedding and "
                f"by tie_word_embeddings of the model's config, which is {ties}"
            )
        if not all(type(other) is nn.Linear and other.bias is None for other in others):
            return "PEFT treats every module that shares the weight as a linear layer without a bias"
        if twin := next((other for other in modules if other != path and other.endswith(path)), None):
            return f"PEFT would also train rows of {twin}, whose path ends with this one's"
        return None

    def site(self, module: nn.Module | Fragment, path: str) -> Site:
        if why := refusal(module):
            raise LayerError(
                f"{path or 'the model itself'} is a {type(module).__name__}, {why}; leave it out of targets"
            )
        own = [name for name, part in fragments(module) if isinstance(part, OwnParameter)]
        if own:
            raise LayerTypeError(
                f"{path or 'the model itself'} is a {type(module).__name__}, which reads its own Parameters; name "
                f"these as targets: {', '.join(join_path(path, name) for name in own[:4])}"
            )
        site, name = super().site(module, path), path or "the model itself"
        weight: Any = getattr(module, site.kind.weight, None)
        if is_lazy(weight):
            raise LayerError(f"{name} is a lazy layer without weights; run the model once, then attach")
        if isinstance(weight, Tensor) and not all(shape_of(weight)):
            raise ArrayValueError(f"{name}: weight must not be empty, found shape {tuple(weight.shape)}")
        if isinstance(weight, Tensor) and weight.is_inference():
            raise LayerError(
                f"{name} was made under torch.inference_mode, and nothing can be trained through it; make it outside"
            )
        owner = module.module if isinstance(module, Part) else module
        if not isinstance(getattr(owner, CHILD, None), LayerBank | PartBanks | None):
            raise LayerError(
                f"{name} has an attribute {CHILD!r} of its own, where the adapter goes; rename it"
            )
        if isinstance(module, Part) and not readable(weight) and not weight.is_meta:
            raise LayerError(
                f"{name} is a {type(weight).__name__} of {weight.dtype}, which W + delta cannot replace while a "
                "forward runs; leave it out of targets, or attach before the weight is spread or quantised"
            )
        if is_sharded(weight) and weight.is_meta:
            raise LayerError(
                f"{name} is on the meta device: its weight has no values; load the weights first"
            )
        if is_partitioned(weight) and not site.kind.linear:
            raise LayerError(
                f"{name} is a {type(module).__name__} whose weight DeepSpeed ZeRO-3 has taken apart; with ZeRO-3 "
                "only linear layers can be adapted; leave it out of targets, or use "
                "torch.distributed.fsdp.fully_shard"
            )
        return site

    def lora_form(self, model: nn.Module, site: Site) -> LoraForm:
        form = super().lora_form(model, site)
        reader = readers(model).get(id(site.layer))
        if reader is None and (guess := self._unseen_reader(model, site)) is not None:
            raise LayerTypeError(
                f"{site.path}: by its source, {type(guess).__name__} reads its weight itself, where PEFT's LoRA "
                "would have no effect; run the model once, so that adamss sees whether it does"
            )
        if isinstance(site.layer, Part) or reader is None:
            return form
        if reader is not site.layer or form == "convolution":
            raise LayerTypeError(
                f"{site.path}: its weight is read by {type(reader).__name__}, where PEFT's LoRA would have no "
                "effect; adamss.save takes it, or merge the model and save that"
            )
        return "parameter"  # PEFT also replaces a Parameter by W + delta

    def _unseen_reader(self, model: nn.Module, site: Site) -> nn.Module | None:
        """Return the module that, by its source, reads the weight of a layer, if no forward has shown its reader."""
        owner, record = _owner(model)
        if record is None or isinstance(site.layer, Part) or site.path in record.seen.every:
            return None
        outer, _, child = site.path.rpartition(".")
        module = self.modules(owner).get(outer)
        return module if seems_to_read(module, child, site.kind.weight) else None

    def arrays(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in _tensors(module).items()}

    def shared(self, model: nn.Module, saved: Iterable[str]) -> Mapping[str, frozenset[str]]:
        owner, _ = _owner(model)
        inside = tuple(f"{path}." if path else "" for path in saved)
        names: dict[int, list[str]] = {}
        for name, parameter in named_parameters(owner):
            names.setdefault(id(parameter), []).append(name)
        return {
            name: frozenset(every) - {name}
            for every in names.values()
            for name in every
            if name.startswith(inside)
        }

    def bank(self, model: nn.Module) -> Bank:
        sharding.check_not_flattened(model)
        sharding.reshard(model)
        owner, record = _owner(model)
        if record is None:
            return Bank()
        restore(owner)
        lost, every = self.lost(model), _banks(owner, record)
        banks: dict[str, Any] = {path: bank for path, bank in every.items() if path not in lost}
        adapters = {}
        for name, own in record.adapters.items():
            layers = {path: banks[path]._modules[name] for path in own.paths if path in banks}
            adapters[name] = Adaptation(
                config=own.config,
                layers=_Layers(layers),
                shapes={path: (each.d, each.labels.numel()) for path, each in layers.items()},
                saved=own.saved,
                name=name,
                tokens={path: banks[path].rows[name].value() for path in own.tokens if path in banks},
                revives=any(adapter.revive for adapter in layers.values()),
                held={path: each.held.numpy() for path, each in layers.items() if each.held is not None},
                **own.state._asdict(),
            )
        return Bank(
            adapters,
            record.originals,
            {path: bank.base for path, bank in banks.items() if bank.holds},
            {path: layer for path, bank in banks.items() for layer in bank.put_away},
            record.disabled,
            record.route,
        )

    def followed(self, model: nn.Module, name: str) -> bool:
        return any(adapter.followed for adapter in adapters_of(model, name).values())

    def controlled(self, model: nn.Module, name: str) -> bool:
        return any(adapter.controlled for adapter in adapters_of(model, name).values())

    def probed(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor] | str]:
        owner, record = _owner(model)
        assert record is not None
        modules, found = self.modules(owner), {}
        for path, bank in _banks(owner, record).items():
            outputs = _outputs(modules[path], bank)
            if outputs is not None:
                found[path] = outputs
        return found

    def lost(self, model: nn.Module) -> dict[str, str]:
        owner, record = _owner(model)
        if record is None:
            return {}
        modules, banks, found = self.modules(owner), _banks(owner, record), {}
        for path in record.paths:
            if path not in modules:
                found[path] = "is not in the model any more"
            elif path not in banks:
                found[path] = "has been replaced by another module, without its adapter"
            else:
                adapters: Any = banks[path]._modules.values()
                if (why := _why_it_does_not_fit(modules[path], banks[path].kind, adapters)) is not None:
                    found[path] = why
        return found

    def insert(
        self, model: nn.Module, adaptation: Adaptation, originals: Mapping[str, Mapping[str, Tensor]]
    ) -> nn.Module:
        owner, record = _owner(model)
        modules, name = self.modules(owner), adaptation.name
        adapted = {path: modules[path] for path in adaptation.layers}
        _check_parameters(owner, list(adapted.values()), {path: modules[path] for path in adaptation.saved})
        _check_wrappers(model)
        present = {} if record is None else _banks(owner, record)
        banks: dict[str, LayerBank] = {}
        sites, new = {}, {}
        for path, layer in adapted.items():
            sites[path] = site = self.site(layer, path)
            sharding.check_spread(model, layer, getattr(layer, site.kind.weight, None), path)
            adapter = Adapter(adaptation.layers[path], adaptation.shapes[path][0], site.blocks)
            new[path] = adapter.to(execution_device(layer))
            banks[path] = present.get(path) or LayerBank(site.kind)
            if isinstance(banks[path], TokenBank):
                raise TargetError(
                    f"{path}: another adapter trains rows of it by trained_tokens; leave it out of targets"
                )
        tokens = _token_banks(owner, modules, adaptation, present)
        kept = {path: {n: array.clone() for n, array in values.items()} for path, values in originals.items()}
        # A shared parameter is recorded under every name, since merging may give one of its layers a separate one.
        required_grad = {n: parameter.requires_grad for n, parameter in named_parameters(owner)}
        # Nothing below can fail, so the model is changed completely or not at all.
        if record is None:
            owner.requires_grad_(False)
            guards = (
                owner.register_load_state_dict_pre_hook(check_state),  # type: ignore[no-untyped-call]
                owner.register_state_dict_pre_hook(restore),  # type: ignore[no-untyped-call]
                owner.register_load_state_dict_pre_hook(_load_kept),  # type: ignore[no-untyped-call]
                owner._register_state_dict_hook(_add_kept),  # type: ignore[no-untyped-call]
            )
            record = _Record(required_grad, guards)
            setattr(owner, RECORD, record)
        for path, adapter in new.items():
            banks[path]._modules[name] = adapter  # `register_module` refuses names of attributes and methods
            banks[path].install(adapted[path], _reader_of(adapted[path], path, modules), sites[path].view)
            weight = getattr(adapted[path], banks[path].kind.weight, None)
            if is_sharded(weight):
                sharding.shard_adapter(adapter, weight)
            adapter.requires_grad_(False)
        for path, (bank, rows) in tokens.items():
            bank._modules[name] = rows
            bank.install(modules[path], None, self.site(modules[path], path).view)
            rows.requires_grad_(False)
        record.adapters[name] = _Own(
            adaptation.config,
            tuple(adapted),
            adaptation.saved,
            tuple(tokens),
            State(None, adaptation.trainable, False, adaptation.kept),
        )
        record.originals = {**kept, **record.originals}
        record.unsynchronised |= _leave_unsynchronised(owner)
        for _, module in walk(owner):
            if isinstance(module, nn.TransformerEncoder) and vars(module).get("use_nested_tensor"):
                OffWithGradients(module, "use_nested_tensor")
        return model

    def activated(self, model: nn.Module, states: Mapping[str, State]) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        sharding.reshard(model)
        before = {name for name, own in record.adapters.items() if own.state.trained}
        former = {path: name for name in before for path in record.adapters[name].saved}
        trained = {name for name, state in states.items() if state.trained}
        if trained - before:
            _check_wrappers(model)
        banks, modules = _banks(owner, record), self.modules(owner)
        for name, state in states.items():
            own = record.adapters[name]
            own.state = state._replace(
                kept={path: _detached(values) for path, values in state.kept.items()},
            )
            for path in own.paths + own.tokens:
                adapter: Any = banks[path]._modules[name] if path in banks else None
                for parameter in () if adapter is None else adapter._parameters.values():
                    parameter.requires_grad = state.trained
                    if not state.trained:
                        parameter.grad = None
                if isinstance(adapter, Adapter):
                    adapter.scale = 1.0 if state.weight is None else state.weight
        active = frozenset(name for name, state in states.items() if state.weight is not None)
        for bank in banks.values():
            bank.active = active
            bank.look()
        trained_paths = {path: name for name in trained for path in record.adapters[name].saved}
        for path in record.originals:
            for parameter in modules[path].parameters() if path in modules else ():
                parameter.requires_grad_(False)
                if trained_paths.get(path) != former.get(path):
                    parameter.grad = None  # the gradient belongs to the values of another adapter
        for path in trained_paths.keys() & modules.keys():
            for parameter in modules[path].parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        if trained - before:
            for layer in packing_layers(owner):
                unpack(layer)
                Off(layer, PACKING)
            for _, module in walk(owner):
                # The Trainer of transformers refuses models that are quantised and have no adapters of a form that it
                # knows. It recognises them by this attribute.
                if vars(module).get("is_quantized"):
                    Off(module, "is_quantized")
        _watch_from_now_on(owner, record, modules)
        return model

    def remove(self, model: nn.Module, names: Iterable[str]) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        modules, banks, names = self.modules(owner), _banks(owner, record), list(names)
        for path, bank in banks.items():
            for name in names:
                if (adapter := bank._modules.pop(name, None)) is not None:
                    # FSDP2 keeps managing the removed adapter, and must not wait for its gradients.
                    adapter.requires_grad_(False)
            bank.look()
            if not bank._modules:
                bank.uninstall(modules[path])
        for name in names:
            del record.adapters[name]
        left = {path for own in record.adapters.values() for path in own.saved}
        for path in record.originals.keys() - left:
            modules[path].zero_grad(set_to_none=True)
            modules[path].requires_grad_(False)
        record.originals = {path: values for path, values in record.originals.items() if path in left}
        if record.adapters:
            return model
        _forget_watch(owner)
        for name, parameter in named_parameters(owner):
            if name in record.required_grad:
                parameter.requires_grad_(record.required_grad[name])
        unsynchronised = [
            name for name in getattr(owner, UNSYNCHRONISED) if name not in record.unsynchronised
        ]
        if unsynchronised:
            setattr(owner, UNSYNCHRONISED, unsynchronised)
        else:
            delattr(owner, UNSYNCHRONISED)
        for guard in record.guards:
            guard.remove()
        delattr(owner, RECORD)
        for module in model.modules():
            OnLoan.give_back(module)
        return model

    def parameters(self, model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
        owner, record = _owner(model)
        modules, trained = self.modules(owner), list[nn.Parameter]()
        for name in names if record is not None else ():
            own = record.adapters[name]  # type: ignore[union-attr]
            if own.state.trained:
                trained += [
                    p for adapter in adapters_of(owner, name).values() for p in (adapter.B, adapter.C)
                ]
                banks: Any = _banks(owner, record)  # type: ignore[arg-type]
                trained += [banks[path].rows[name].rows for path in own.tokens if path in banks]
                trained += [p for path in own.saved for p in modules[path].parameters() if p.requires_grad]
        # A parameter shared by two saved modules is returned once, since optimisers warn of duplicates.
        return list({id(parameter): parameter for parameter in trained}.values())

    def with_factors(self, model: nn.Module, name: str, layers: Mapping[str, Factors]) -> nn.Module:
        sharding.reshard(model)
        adapters = adapters_of(model, name)
        for path, factors in layers.items():
            adapter = adapters[path]
            state = {**factors._asdict(), "B": factors.B.t()}
            whole = {n: sharding.shard_like(state[n], getattr(adapter, n)) for n in "ABC"}
            adapter.load_state_dict({**state, **whole})
            adapter.look()
        return model

    def with_rows(self, model: nn.Module, name: str, tokens: Mapping[str, Rows]) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        banks: Any = _banks(owner, record)
        with torch.no_grad():
            for path, rows in tokens.items():
                banks[path].rows[name].rows.copy_(rows.values)
        return model

    def with_masks(self, model: nn.Module, name: str, active: Mapping[str, Tensor]) -> nn.Module:
        adapters = adapters_of(model, name)
        for path, mask in active.items():
            adapters[path].look()
            adapters[path].active.copy_(mask)
            adapters[path].look()
        return model

    def check_writable(self, model: nn.Module, layers: Iterable[str], saved: Iterable[str] = ()) -> None:
        layers, saved = list(layers), list(saved)
        if not layers and not saved:
            return
        super().check_writable(model, layers, saved)
        owner, record = _owner(model)
        counts, modules = _parameter_counts(owner), self.modules(owner)
        banks = {} if record is None else _banks(owner, record)
        for path in layers:
            site = self.site(modules[path], path)
            heads = set() if record is None else record.seen.heads
            bank = banks.get(path)
            embeds = isinstance(site.kind, Embedding) and isinstance(bank, LayerBank) and not bank.holds
            embeds = embeds and not isinstance(bank, TokenBank)
            if embeds and (path in heads or self._unseen_reader(model, site)):
                raise LayerError(
                    f"{path}: another module uses the weight of this embedding as a head, and merging would change "
                    "that head too; leave the adapter unmerged"
                    + ("" if path in heads else ", or run the model once, so that it is seen whether it does")
                )
            for name, parameter in _own_parameters(modules[path]).items():
                tokens = record is not None and any(path in own.tokens for own in record.adapters.values())
                if is_sharded(parameter) and tokens:
                    raise LayerError(
                        f"{path}: its {name} is spread by fully_shard, and single rows of it cannot be written; "
                        "leave the adapter unmerged"
                    )
                if is_sharded(parameter) and counts[id(parameter)] > 1:
                    raise LayerError(
                        f"{path}: its {name} is shared with another layer and spread by fully_shard, which cannot "
                        "give it one of its own; leave the adapter unmerged"
                    )
        for path in saved:
            _check_saved_writable(path, modules[path])

    def exchange(
        self, model: nn.Module, arrays: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        sharding.reshard(model)
        owner, record = _owner(model)
        counts, modules = _parameter_counts(owner), self.modules(owner)
        # A Parameter that is kept as the W0 of one of the layers that shared it still counts as shared.
        banks = {} if record is None else _banks(owner, record)
        counts.update(id(t) for bank in banks.values() for t in (bank.base or {}).values())

        def exchange(path: str, name: str, value: Any) -> Any:
            layer = modules[path]
            former: Any = getattr(layer, name, None)
            if isinstance(value, Rows):
                ids, new = torch.tensor(value.ids, device=former.device), former.detach().clone()
                rows = Rows(value.ids, new[ids])
                exchanged(former, new.index_copy_(0, ids, value.values.to(new)))
                return rows
            if not isinstance(value, nn.Parameter) and counts[id(former)] < 2:
                former = self.stores.exchange(layer, name, value)
            else:
                # Other modules keep computing with the shared base weight. This layer gets a Parameter of its own,
                # and the shared one is put back when the update is taken out again.
                own = isinstance(value, nn.Parameter)
                setattr(layer, name, value if own else nn.Parameter(value.contiguous(), requires_grad=False))
            result: Tensor = former
            return result

        with torch.no_grad():
            return model, exchange_all(arrays, exchange)

    def exchange_saved(
        self, model: nn.Module, arrays: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        sharding.reshard(model)
        modules = self.modules(model)
        tensors = {path: _tensors(modules[path]) for path in arrays}
        former: dict[int, Tensor] = {}

        def exchange(path: str, name: str, value: Tensor) -> Tensor:
            tensor = tensors[path][name]
            # Copy the value, because a module may write into its tensors, as batch normalisation does into its
            # statistics.
            before = exchanged(tensor, value.clone())
            # A tensor that two saved modules share is exchanged twice. Both get the values from before the first
            # time.
            return former.setdefault(id(tensor), before)

        with torch.no_grad():
            return model, exchange_all(arrays, exchange)

    def dequantised(self, model: nn.Module) -> dict[str, nn.Module]:
        owner, record = _owner(model)
        assert record is not None
        modules, found = self.modules(owner), dict[str, nn.Module]()
        for path in _banks(owner, record):
            site = self.site(modules[path], path)
            if not (site.kind.linear and self.noise(site)):
                continue
            if site.layer is owner:
                raise LayerError(
                    f"{path or 'the model itself'} is the whole model: no other can take its place"
                )
            own = vars(site.layer)
            if "forward" in own and "_hf_hook" not in own:
                raise LayerError(
                    f"{path}: another forward was assigned to the layer, which a float layer in its place would "
                    "not have; remove it first"
                )
            store = self.stores.of(site.layer, site.kind.weight)
            casts = isinstance(store, QuantisedStore) and store.casts
            found[path] = float_layer(*site.weight(self.own_arrays(site)), casts=casts)
            if "_hf_hook" in own:
                # accelerate's hook moves inputs to the device of the layer.
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(found[path], own["_hf_hook"])
        return found

    def exchange_layers(
        self, model: nn.Module, layers: Mapping[str, nn.Module]
    ) -> tuple[nn.Module, dict[str, nn.Module]]:
        owner, record = _owner(model)
        assert record is not None
        modules, banks = self.modules(owner), _banks(owner, record)
        former = {path: modules[path] for path in layers}
        others = {id(former[path]): layer for path, layer in layers.items()}
        for path, layer in layers.items():
            banks[path].move(former[path], layer, self.kinds.of(layer, path))
        for module in list(model.modules()):
            # A layer may be a child of several modules, so it is replaced in all of them.
            for name, child in module._modules.items():
                module._modules[name] = others.get(id(child), child)
        return model, former

    def enter(self, model: nn.Module, ledger: Ledger) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        base = {path: None if own is None else _on_host(own) for path, own in ledger.base.items()}
        merged = frozenset(
            name
            for name, held in ledger.held.items()
            if all(path in held and held[path].all() for path in record.adapters[name].paths)
        )
        for path, bank in _banks(owner, record).items():
            for name, adapter in bank.adapters.items():
                mask = ledger.held.get(name, {}).get(path)
                adapter.hold(None if mask is None else torch.from_numpy(mask.copy()))
            bank.base = base.get(path)
            bank.holds = path in base
            bank.put_away = (ledger.layers[path],) if path in ledger.layers else ()
            bank.merged = merged
            bank.look()
        return model

    def routed(self, model: nn.Module, route: Route | None) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        banks, modules, found = _banks(owner, record), self.modules(owner), dict[str, LayerRoute]()
        used = set() if route is None else {route.names[row] for row in route.rows if row >= 0}
        for path, bank in banks.items() if route is not None else ():
            assert route is not None
            own = [name for name in route.names if name in bank.adapters]
            site = self.site(modules[path], path)
            if not bank.hooked or bank.places or self._unseen_reader(model, site) is not None:
                if used & {*own}:
                    raise LayerError(
                        f"{path}: its weight is read by a module that uses one weight for all rows (experts, "
                        "attentions, a forward of its own); rows cannot be routed through it, leave it out of targets"
                    )
            elif own:
                numbers = {number: own.index(name) for number, name in enumerate(route.names) if name in own}
                rows = [numbers.get(row, len(own)) for row in route.rows]
                axis = _axis_of_rows(path, modules, route.axis)
                weight: Any = getattr(site.layer, site.kind.weight)
                dtype = weight.dtype if weight.is_floating_point() else torch.float32
                adapters = [bank.adapters[name] for name in own]
                found[path] = LayerRoute(path, adapters, rows, axis, dtype)
        record.route = route
        for path, bank in banks.items():
            bank.route, bank.routing = found.get(path), route is not None
            bank.look()
        return model

    def switched(self, model: nn.Module, *, on: bool) -> nn.Module:
        owner, record = _owner(model)
        assert record is not None
        record.disabled = not on
        for bank in _banks(owner, record).values():
            bank.off = not on
            bank.look()
        return model


def _axis_of_rows(path: str, modules: Mapping[str, Any], axis: int) -> int:
    """Return the axis of a layer's input along which the rows of a batch lie.

    It is 1 within a module that puts the sequence first (``batch_first=False``), and `axis` everywhere else.
    """
    outer = [modules.get(path[: at.start()]) for at in re.finditer(r"\.", path)]
    for module in [modules.get(""), *outer]:
        first = getattr(
            module, "batch_first", getattr(getattr(module, "self_attn", None), "batch_first", None)
        )
        if first is False:
            return 1
    return axis


def adapters_of(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """Return the `Adapter` of each layer for the adapter `name`, by module path. None means the only name."""
    owner, record = _owner(model)
    if record is None:
        return {}
    if name is None:
        (name,) = record.adapters
    banks = _banks(owner, record)
    found: Any = {path: banks[path]._modules[name] for path in record.adapters[name].paths if path in banks}
    return dict(found)


def record_of(model: nn.Module) -> object:
    """Return an object that identifies the adapters of a model as a whole; after `detach` and `attach` it differs."""
    return _owner(model)[1]


def _owner(model: nn.Module) -> tuple[nn.Module, _Record | None]:
    """Return the module that was adapted, and its record; if none was, the unwrapped model and None.

    The adapted module may lie within the model (the encoder of a classifier), or be wrapped
    (DistributedDataParallel, `torch.compile`).
    """
    if RECORD in vars(model):
        return model, vars(model)[RECORD]
    found = [module for module in model.modules() if RECORD in vars(module)]
    if len(found) > 1:
        raise StateError(
            f"{len(found)} parts of the model were adapted one by one; call adamss on each of them, not on the whole"
        )
    if found:
        return found[0], vars(found[0])[RECORD]
    if any(isinstance(module, LayerBank) for module in model.modules()):
        raise StateError(
            "this is a part of a model that was adapted as a whole: adapters are attached already; "
            "call adamss on the whole"
        )
    return unwrapped(model), None


@contextmanager
def _full_matmul_precision() -> Iterator[None]:
    """Return a context in which float32 matrices are multiplied in full float32 precision.

    PyTorch has two interfaces for this setting. Once a user has used the newer one, the older one raises, so the
    context works through whichever is in use.
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
    """Return the parameters and buffers of a module. Extra state that is not a tensor is left out."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _check_parameters(owner: nn.Module, adapted: list[nn.Module], saved: Mapping[str, nn.Module]) -> None:
    """Check, before the first change, for Parameters with which attaching would fail or compute something wrong."""
    for name, parameter in owner.named_parameters():
        if is_lazy(parameter):
            raise LayerError(
                f"{name} belongs to a lazy layer without weights; run the model once, then attach"
            )
    frozen = {id(parameter) for layer in adapted for parameter in _own_parameters(layer).values()}
    for path, module in saved.items():
        _check_saved_writable(path, module)
        if any(parameter.is_inference() for parameter in module.parameters()):
            raise LayerError(
                f"modules_to_save: {path} was made under torch.inference_mode, and cannot be trained; make it outside"
            )
        if any(id(parameter) in frozen for parameter in module.parameters()):
            raise TargetError(
                f"modules_to_save: {path} shares its weight with a layer that targets adapts, "
                "and would train it whole; leave one of them out"
            )


def _token_banks(
    owner: nn.Module, modules: Mapping[str, Any], adaptation: Adaptation, present: Mapping[str, LayerBank]
) -> dict[str, tuple[TokenBank, TrainedRows]]:
    """Return the banks and rows of embeddings with trained rows, after checking that nothing else uses their weights.

    Raises
    ------
    TargetError
        If the weight is also adapted, saved as a whole, or that of another embedding with trained rows.
    LayerError
        If single rows of the weight cannot be replaced.
    """
    adapted = [p for path in adaptation.layers for p in _own_parameters(modules[path]).values()]
    taken = {id(p): "a layer that targets adapts" for p in adapted}
    taken |= {
        id(p): "one of modules_to_save" for path in adaptation.saved for p in modules[path].parameters()
    }
    found: dict[str, tuple[TokenBank, TrainedRows]] = {}
    for path, rows in adaptation.tokens.items():
        layer, bank = modules[path], present.get(path)
        weight = layer._parameters.get("weight")
        other = taken.get(id(weight))
        if not isinstance(bank, TokenBank | None):
            other = "a layer that another adapter adapts"
        if other:
            raise TargetError(
                f"trained_tokens: {path} shares its weight with {other}; leave one of them out, or untie them in the "
                "base model (tie_word_embeddings)"
            )
        sharing = [(m, name) for m in owner.modules() for name, p in m._parameters.items() if p is weight]
        later = weight is not None and weight.is_meta and all(execution_device(m) is None for m, _ in sharing)
        if not readable(weight) and not later:
            raise LayerError(
                f"trained_tokens: the weight of {path} is a {type(weight).__name__} that is computed, quantised, "
                "offloaded or spread over processes, so that single rows of it cannot be trained; attach before, or "
                "train no tokens"
            )
        taken[id(weight)] = f"{path}, whose rows trained_tokens trains too"
        own = bank if isinstance(bank, TokenBank) else TokenBank(kinds.of(layer, path), sharing)
        found[path] = own, TrainedRows(rows)
    return found


def _check_saved_writable(path: str, module: nn.Module) -> None:
    for name, tensor in _tensors(module).items():
        if (why := writing_refused(tensor)) is not None:
            raise LayerError(f"modules_to_save: {path}: its {name} {why}")


def _check_wrappers(model: nn.Module) -> None:
    """Check that no wrapper has already collected the Parameters, since it would miss the new ones."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise StateError(
            "DistributedDataParallel would not synchronise the gradients of adapters that are added, or trained, "
            "after it has wrapped the model; attach, load or activate first, and wrap the model then"
        )


def _leave_unsynchronised(owner: nn.Module) -> frozenset[str]:
    """Tell DistributedDataParallel not to send the bases of adapters with every forward; return the added names.

    Bases never change. Sending them would cost more than sending all gradients, and would invalidate tensors that are
    saved for the backward.
    """
    present = getattr(owner, UNSYNCHRONISED, ())
    own = [
        path for path, module in owner.named_modules(remove_duplicate=False) if isinstance(module, Adapter)
    ]
    # The bases are listed by their present names, and by the names that they have within a compiled module.
    names = {f"{prefix}{path}.A" for prefix in ("", "_orig_mod.") for path in own} - set(present)
    setattr(owner, UNSYNCHRONISED, [*present, *sorted(names)])
    return frozenset(names)


def _outputs(layer: nn.Module, bank: LayerBank) -> tuple[Tensor, Tensor] | str | None:
    """Return the entry of `TorchBackend.probed` for one layer, or None if the layer needs none."""
    kind = bank.kind
    if not kind.linear or HOOK not in layer._forward_hooks:
        return None  # W + delta replaces the weight, or the forward is known to be that of the layer's kind
    own = "forward" not in vars(layer) and kind.defines(type(layer), "forward")
    weight: Any = getattr(layer, kind.weight, None)
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks) + len(_global_forward_hooks)
    if (own and hooks == 1) or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return None
    d, _ = kind.view(layer, "").shape(weight.shape)
    x = torch.randn(2, d, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    modes, off = [(module, module.training) for module in layer.modules()], bank.off
    try:
        layer.eval()
        outputs = [layer(x), layer(x)]
        bank.off = True
        bank.look()
        outputs.append(layer(x))
    except Exception as error:
        return f"could not be tried on an input of {d} numbers ({error})"
    finally:
        bank.off = off
        bank.look()
        for module, training in modes:
            module.training = training
    return (outputs[0], outputs[2]) if torch.equal(*outputs[:2]) else None


def _why_it_does_not_fit(layer: nn.Module, kind: Kind, adapters: Iterable[Any]) -> str | None:
    """Return, as a clause, how a layer was changed so that its adapters no longer fit; None if they fit."""
    weight: Any = getattr(layer, kind.weight, None)
    bias = getattr(layer, kind.bias, None)
    adapter, *others = adapters  # all have the same d and n
    if isinstance(adapter, TrainedRows):
        (V, E), own = shape_of(weight), adapter.value()
        fits = own.ids[-1] < V and shape_of(adapter.rows)[1] == E
        return (
            None
            if fits
            else f"has a weight of shape {(V, E)} now, which the rows of trained_tokens do not fit"
        )
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        view, shape = kind.view(layer, ""), shape_of(weight)
        if len(shape) != len(view.axes) or view.shape(shape) != (adapter.d, adapter.labels.numel()):
            return f"has a weight of shape {shape} now, which its adapter does not fit"
    if bias is None and any(each.A.shape[1] > each.d for each in (adapter, *others)):
        return "has no bias any more, which its adapter moves"
    return None


def _own_parameters(layer: Any) -> dict[str, Tensor]:
    if isinstance(layer, Part):
        return {"weight": layer.weight}
    return dict(layer.named_parameters(recurse=False))


def _reader_of(layer: Any, path: str, modules: Mapping[str, Any]) -> nn.Module | None:
    """Return the module during whose forward W + delta replaces the weight of a layer.

    None means that the update is added to the output of the layer instead. That is done wherever the layer's forward
    is known, and where its weight cannot be replaced.
    """
    name = kinds.of(layer, path).weight
    if isinstance(layer, Part) or not readable(getattr(layer, name, None)):
        return None
    if type(stores.of(layer, name)) is not ParameterStore:
        return None  # the forward of a quantised layer would round the update away
    parent = modules.get(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return parent
    known = kinds.of(layer, path).defines(type(layer), "forward") or "forward" in vars(layer)
    return None if known else layer


def _watch_from_now_on(owner: nn.Module, record: _Record, modules: Mapping[str, Any]) -> None:
    """Add hooks that watch the next forwards of the model and of the modules around its adapted layers."""
    record.seen.forwards = {True: 0, False: 0}
    paths = record.paths
    inner = {path[: at.start()] for path in paths for at in re.finditer(r"\.", path)} & modules.keys()
    for module in [] if "" in paths else [owner, *(modules[path] for path in inner)]:
        WATCHED[module] = ref(owner)
        module._forward_pre_hooks[WATCH_KEY] = _watch
        module._forward_hooks[WATCH_KEY] = _stop_watching
        module._forward_hooks_always_called[WATCH_KEY] = True


def _watch(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of an adapted model and of modules within it: start a `Watch` on the first forwards."""
    if is_transformed() or getattr(module, "_is_replica", False):
        return
    owner = _watched(module)
    if owner is None or vars(owner).get(WATCH) is not None:
        return
    record: _Record = vars(owner)[RECORD]
    banks = _computed(owner, record)
    if not banks or record.seen.done(owner.training, banks.keys()):
        return
    modules = TorchBackend().modules(owner)
    layers = {path: (modules[path], bank) for path, bank in banks.items() if path in modules}
    watch = Watch(layers, record.seen, owner.training, module)
    # Compiled parts run eagerly while they are watched, so `Watch.end` counts one such forward as enough.
    watch.compiled = any(
        m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in owner.modules()
    )
    setattr(owner, WATCH, watch.__enter__())


def _stop_watching(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook that ends the `Watch`, and removes the hooks once all layers were seen in both modes."""
    if torch.compiler.is_compiling():
        return
    owner = _watched(module)
    watch: Watch | None = None if owner is None else vars(owner).get(WATCH)
    if owner is None or watch is None or watch.began is not module or watch.thread != get_ident():
        return
    del vars(owner)[WATCH]
    watch.__exit__(None, None, None)
    record: _Record = vars(owner)[RECORD]
    watch.end()
    paths = _computed(owner, record).keys()
    if all(record.seen.done(mode, paths) for mode in (True, False)):
        _forget_watch(owner)


def _computed(owner: nn.Module, record: _Record) -> dict[str, LayerBank]:
    """Return the banks of layers whose adapters are active."""
    return {path: bank for path, bank in _banks(owner, record).items() if bank.computed}


def _watched(module: nn.Module) -> nn.Module | None:
    """Return the adapted model that a module is or belongs to; None for a part that was copied without its model."""
    if RECORD in vars(module):
        return module
    owner = WATCHED.get(module, lambda: None)()
    return owner if owner is not None and RECORD in vars(owner) else None


def _forget_watch(owner: nn.Module) -> None:
    watch: Watch | None = vars(owner).pop(WATCH, None)  # present only if a forward was interrupted
    top = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
    if watch is not None and top is watch:
        watch.__exit__(None, None, None)
    for module in owner.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
            table.pop(WATCH_KEY, None)


def _banks(owner: nn.Module, record: _Record) -> dict[str, LayerBank]:
    """Return the banks of the adapted layers that are still in the model, by path."""
    found: dict[str, Any] = {}
    for path, module in walk(owner):
        child = module._modules.get(CHILD)
        parts = child._modules if isinstance(child, PartBanks) else {"": child}
        found |= {join_path(path, name) if name else path: bank for name, bank in parts.items()}
    return {path: bank for path in record.paths if isinstance(bank := found.get(path), LayerBank)}


def _add_kept(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """State-dict hook: add the values that inactive adapters keep for ``modules_to_save`` to the state."""
    state_dict.update({f"{prefix}{name}": tensor for name, tensor in _kept(vars(owner)[RECORD]).items()})


def _load_kept(
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _: Any,
    __: Any,
    ___: Any,
    ____: Any,
    errors: list[str],
) -> None:
    """Load the values that `_add_kept` has written, before the rest of a state is loaded.

    Raises
    ------
    StateError
        If the state has values for the ``modules_to_save`` of an adapter that is active here and was not when the
        state was written, or the other way round.
    """
    record: _Record = vars(owner)[RECORD]
    here = {f"{prefix}{name}": tensor for name, tensor in _kept(record).items()}
    for name, own in record.adapters.items():
        kept = any(key.startswith(f"{prefix}{KEPT}.{name}.") for key in state_dict)
        factors = any(f".{CHILD}.{name}." in f".{key}" for key in state_dict)
        saved = tuple(f"{prefix}{path}." for path in own.saved)
        values = any(key.startswith(saved) for key in state_dict) if saved else False
        if factors and values and kept != bool(own.state.kept):
            raise StateError(
                f"the state has values for modules_to_save from when {name!r} was {'not ' * kept}active, and it is "
                f"{'' if kept else 'not '}active here; call adamss.activate as it was then, and load it again"
            )
    for key in here.keys() & state_dict.keys():
        tensor = state_dict.pop(key)
        if tensor.shape != here[key].shape:
            errors.append(
                f"size mismatch for {key}: the state has shape {tuple(tensor.shape)}, this model "
                f"{tuple(here[key].shape)}."
            )
            continue
        here[key].copy_(tensor)


def _kept(record: _Record) -> dict[str, Tensor]:
    return {
        f"{KEPT}.{name}.{path}.{own}": tensor
        for name, each in record.adapters.items()
        for path, values in each.state.kept.items()
        for own, tensor in values.items()
    }


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in values.items()}


def _parameter_counts(owner: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in named_parameters(owner))


def _on_host(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors in the host's memory. A Parameter stays where it is, because other modules use it."""

    def moved(tensor: Any) -> Any:
        if isinstance(tensor, Rows):
            return Rows(tensor.ids, tensor.values.cpu())
        return tensor if isinstance(tensor, nn.Parameter) else rebuilt(local(tensor).cpu(), tensor)

    return {name: moved(tensor) for name, tensor in tensors.items()}
