"""Exceptions and warnings of `adamss`.

Every error derives from `AdamssError` and from the built-in exception that fits it, so that both
``except AdamssError`` and ``except ValueError`` work. A message names the argument or the layer, says
what was found, and says what to do about it.
"""

__all__ = [
    "AdamssError",
    "AdamssWarning",
    "ArrayTypeError",
    "ArrayValueError",
    "BackendError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConfigTypeError",
    "LayerError",
    "LayerTypeError",
    "MissingBackendError",
    "StateError",
    "TargetError",
]


class AdamssError(Exception):
    """Base class of all errors that `adamss` raises on purpose."""


class ConfigError(AdamssError, ValueError):
    """A setting has a value that cannot be used."""


class ConfigTypeError(AdamssError, TypeError):
    """A setting has a type that cannot be used."""


class ArrayValueError(AdamssError, ValueError):
    """An array has a shape or values that cannot be used (not 2-d, empty, NaN, infinite)."""


class ArrayTypeError(AdamssError, TypeError):
    """An array has a dtype or type that cannot be used (complex, integer, not an array)."""


class LayerError(AdamssError, ValueError):
    """A layer of the model cannot be adapted as asked."""


class LayerTypeError(AdamssError, TypeError):
    """A layer is of a kind that cannot be adapted, or exported in the requested form."""


class TargetError(AdamssError, ValueError):
    """A setting that names modules, such as ``targets``, matches no module of the model, or the wrong ones."""


class StateError(AdamssError, RuntimeError):
    """The model is not in the state that the call needs (for example, it has no adapters)."""


class CheckpointError(AdamssError, ValueError):
    """An adapter file is damaged, foreign, of an unknown version, or does not fit the model."""


class CheckpointNotFoundError(AdamssError, FileNotFoundError):
    """There is no adapter file at the path."""


class BackendError(AdamssError, TypeError):
    """No backend handles this kind of model, or a backend violates the interface."""


class MissingBackendError(AdamssError, ImportError):
    """The framework of the requested backend is not installed."""


class AdamssWarning(UserWarning):
    """Category of all warnings that `adamss` issues."""
