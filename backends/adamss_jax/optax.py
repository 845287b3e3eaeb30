"""Frozen means frozen: an optax transformation that leaves the elements of frozen subspaces where they are."""

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
        State of the transformation within.
    trained
        Booleans that broadcast against the parameters: True where an element is trained.
    """

    inner: Any
    trained: Any


def hold_frozen(tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformationExtraArgs:
    """Keep the frozen elements of an adapted model where they are, whatever the optimiser does.

    Weight decay, and momentum from before an element was frozen, move it although its gradient is zero. The updates
    of frozen elements are zero here, so that `tx`, with all that is chained in it, belongs inside. The mask is that
    of the model when this is called, and part of the state. After another one is set, take it over with
    ``state._replace(trained=adamss.backend.backend_for(model).trained_elements(model))``, which compiles nothing
    anew. Where a schedule chooses the masks while training, use `adamss_jax.budgeted`.

    Parameters
    ----------
    tx
        Any optax transformation.
    model
        The adapted model whose parameters (``wrt=nnx.LoRAParam``, or those of `trainable_filter`) it gets.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is a `HoldFrozenState`; more arguments of its ``update`` go to `tx`.

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
