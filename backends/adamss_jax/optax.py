"""An optax transformation that holds the elements of frozen subspaces at their values."""

from __future__ import annotations

from typing import Any, NamedTuple

from adamss.errors import MissingBackendError, StateError

try:
    import optax
except ImportError as error:
    raise MissingBackendError("adamss_jax.optax needs Optax: pip install 'adamss[flax]'") from error

import jax
import jax.numpy as jnp

from adamss_jax.models import models_of

__all__ = ["HoldFrozenState", "hold_frozen"]


class HoldFrozenState(NamedTuple):
    """State of `hold_frozen`.

    Attributes
    ----------
    inner
        State of the wrapped transformation.
    trained
        Masks that broadcast against the parameters: True where an element is trained.
    """

    inner: Any
    trained: Any


def hold_frozen(tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that it holds the frozen elements of an adapted model at their values.

    A zero gradient does not hold an element: weight decay still moves it, and so does momentum from before it was
    frozen. The wrapper sets the final updates of frozen elements to zero, so everything else must be chained in `tx`.
    The masks are the model's at the time of the call, and are kept in the state. After the model gets other masks,
    update the state by ``state._replace(trained=adamss.backend.backend_for(model).trained_elements(model))``, which
    needs no new compilation. If a schedule chooses the masks during training, use `adamss_jax.budgeted` instead.

    Parameters
    ----------
    tx
        Optax transformation to wrap.
    model
        Adapted model whose parameters are trained (``wrt=nnx.LoRAParam``, or `adamss_jax.equinox.trainable_filter`).

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Transformation whose state is a `HoldFrozenState`. Extra arguments of its ``update`` are passed on to `tx`.

    Raises
    ------
    StateError
        If the model has no adapters.
    """
    backend = models_of(model)
    if not backend.bank(model):
        raise StateError("hold_frozen: the model has no adapters; call adamss.attach first")
    trained, tx = backend.trained_elements(model), optax.with_extra_args_support(tx)

    def init(params: Any) -> HoldFrozenState:
        return HoldFrozenState(tx.init(params), trained)

    def update(
        updates: Any, state: HoldFrozenState, params: Any = None, **extra: Any
    ) -> tuple[Any, HoldFrozenState]:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        held = jax.tree.map(
            lambda mask, step: jnp.where(mask, step, jnp.zeros_like(step)), state.trained, updates
        )
        return held, HoldFrozenState(inner, state.trained)

    return optax.GradientTransformationExtraArgs(init, update)
