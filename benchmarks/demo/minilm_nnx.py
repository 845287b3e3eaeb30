"""BERT as a sentence encoder in Flax NNX, loaded from a folder in which transformers saves a PyTorch model.

The modules have the same paths as in PyTorch (``encoder.layer.0.attention.self.query``). So one
`adamss.AdamssConfig` names the same layers in both frameworks, and an adapter file fits both models. The module was
written for MiniLM-L6, and loads any encoder of the same architecture::

    encoder = load_encoder(bundled_model(), rngs=nnx.Rngs(0))
    vectors = encoder(input_ids, attention_mask)  # (batch, tokens, hidden)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

# Tensors that are not loaded: the pooler comes after the token vectors, which the encoder returns, and the position
# ids are simply 0, 1, 2, ...
UNREAD = ("pooler.", "embeddings.position_ids")

# Settings that change the computation, with the values that this module implements.
IMPLEMENTED = {
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "quantization_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The settings of ``config.json`` that the encoder depends on, under the same names."""

    vocab_size: int
    type_vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float

    @classmethod
    def read(cls, folder: Path) -> BertConfig:
        """Read ``config.json``.

        Raises
        ------
        ValueError
            If a setting is missing or has a value that is not implemented.
        """
        path = folder / "config.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, values in IMPLEMENTED.items():
            if found.get(name) not in values:
                known = " or ".join(repr(value) for value in values if value is not None) or "nothing"
                raise ValueError(f"{path}: {name} is {found.get(name)!r}; implemented is {known}")
        missing = [field.name for field in fields(cls) if field.name not in found]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        config = cls(**{field.name: found[field.name] for field in fields(cls)})
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"{path}: hidden_size {config.hidden_size} is no multiple of "
                f"num_attention_heads {config.num_attention_heads}"
            )
        return config


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear layer of zeros, since the file replaces all values."""
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)


def embedding(rows: int, config: BertConfig, rngs: nnx.Rngs) -> nnx.Embed:
    """Return an embedding of zeros, since the file replaces all values."""
    return nnx.Embed(rows, config.hidden_size, embedding_init=nnx.initializers.zeros_init(), rngs=rngs)


def layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a layer norm over the hidden size."""
    # Flax's fast variance, E[x^2] - E[x]^2, loses digits to cancellation, which PyTorch's variance does not.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """Return a dropout layer that is off until ``model.train()``."""
    return nnx.Dropout(rate, deterministic=True, rngs=rngs)


class Embeddings(nnx.Module):
    """Layer norm of the sum of word, position and token type embeddings."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.word_embeddings = embedding(config.vocab_size, config, rngs)
        self.position_embeddings = embedding(config.max_position_embeddings, config, rngs)
        self.token_type_embeddings = embedding(config.type_vocab_size, config, rngs)
        self.LayerNorm = layer_norm(config, rngs)
        self.dropout = dropout(config.hidden_dropout_prob, rngs)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Return (batch, tokens, hidden) for ids and types of shape (batch, tokens)."""
        positions = self.position_embeddings(jnp.arange(input_ids.shape[1]))
        summed = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids) + positions
        return self.dropout(self.LayerNorm(summed))


class SelfAttention(nnx.Module):
    """``softmax(Q K^T / sqrt(d) + mask) V`` in each head; the heads' outputs are concatenated."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.query = linear(config.hidden_size, config.hidden_size, rngs)
        self.key = linear(config.hidden_size, config.hidden_size, rngs)
        self.value = linear(config.hidden_size, config.hidden_size, rngs)
        self.dropout = dropout(config.attention_probs_dropout_prob, rngs)

    def __call__(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the concatenated heads, (batch, tokens, hidden); no token attends where the mask is False."""

        def by_head(vectors: jax.Array) -> jax.Array:
            return vectors.reshape(*vectors.shape[:-1], self.heads, -1)

        query, key, value = (by_head(f(hidden)) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1]).astype(query.dtype)
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        attention = self.dropout(jax.nn.softmax(scores, axis=-1))
        return jnp.einsum("bhqk,bkhd->bqhd", attention, value).reshape(hidden.shape)


class Output(nnx.Module):
    """The end of the attention block and of the dense block: ``LayerNorm(x W + b + residual)``."""

    def __init__(self, inputs: int, config: BertConfig, rngs: nnx.Rngs):
        self.dense = linear(inputs, config.hidden_size, rngs)
        self.LayerNorm = layer_norm(config, rngs)
        self.dropout = dropout(config.hidden_dropout_prob, rngs)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """Return an array of the shape of ``residual``."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nnx.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.self = SelfAttention(config, rngs)
        self.output = Output(config.hidden_size, config, rngs)

    def __call__(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the input of the dense block, (batch, tokens, hidden)."""
        return self.output(self.self(hidden, mask), hidden)


class Intermediate(nnx.Module):
    """``gelu(x W + b)``, with the exact error function."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.dense = linear(config.hidden_size, config.intermediate_size, rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return an array (batch, tokens, intermediate)."""
        return jax.nn.gelu(self.dense(hidden), approximate=False)


class Layer(nnx.Module):
    """A transformer layer: attention, then two dense layers."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.intermediate = Intermediate(config, rngs)
        self.output = Output(config.intermediate_size, config, rngs)

    def __call__(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the token vectors after this layer."""
        attended = self.attention(hidden, mask)
        return self.output(self.intermediate(attended), attended)


class Encoder(nnx.Module):
    """The stack of transformer layers."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.layer = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the token vectors after the last layer."""
        for layer in self.layer:
            hidden = layer(hidden, mask)
        return hidden


class Bert(nnx.Module):
    """BERT without its pooler.

    Parameters
    ----------
    config : BertConfig
    rngs : nnx.Rngs
        Random streams of the dropout, which is off until ``model.train()``.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Return token vectors (batch, tokens, hidden), the ``last_hidden_state`` of transformers.

        Parameters
        ----------
        input_ids : (batch, tokens) integer array
        attention_mask : (batch, tokens) array, optional
            0 at padding, else 1. Default: no padding.
        token_type_ids : (batch, tokens) integer array, optional
            Default: 0 everywhere.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} tokens, but the model has {self.config.max_position_embeddings} positions"
            )
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.encoder(self.embeddings(input_ids, types), mask.astype(bool))


class SentenceClassifier(nnx.Module):
    """Mean of the encoder's token vectors, then a linear head: ``classifier(mean_t h_t)``.

    Parameters
    ----------
    encoder : Bert
    classes : int
        Number of classes.
    rngs : nnx.Rngs
        Random streams of the head's initial values.
    """

    def __init__(self, encoder: Bert, classes: int, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.classifier = nnx.Linear(encoder.config.hidden_size, classes, rngs=rngs)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Return logits (batch, classes) for token ids and mask of shape (batch, tokens)."""
        hidden = self.encoder(input_ids, attention_mask)
        mask = attention_mask[..., None].astype(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / jnp.maximum(mask.sum(1), 1))


def parameters(model: nnx.Module) -> dict[str, tuple[nnx.Param, bool]]:
    """Return the parameters by their names in PyTorch, each with whether PyTorch stores it transposed."""
    found = {}
    for path, module in nnx.iter_modules(model):
        prefix = ".".join(map(str, path))
        if isinstance(module, nnx.Linear):
            found[f"{prefix}.weight"] = module.kernel, True
            found[f"{prefix}.bias"] = module.bias, False
        elif isinstance(module, nnx.Embed):
            found[f"{prefix}.weight"] = module.embedding, False
        elif isinstance(module, nnx.LayerNorm):
            found[f"{prefix}.weight"] = module.scale, False
            found[f"{prefix}.bias"] = module.bias, False
    return found


def load_encoder(folder: str | Path, *, rngs: nnx.Rngs) -> Bert:
    """Load an encoder in float32 from a folder with ``config.json`` and ``model.safetensors``.

    Parameters
    ----------
    folder : str or Path
    rngs : nnx.Rngs
        Random streams of the dropout.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a setting has a value that is not implemented, or if a tensor is missing, has another shape than the
        settings imply, or belongs to no parameter of the model.
    """
    model = Bert(BertConfig.read(Path(folder)), rngs=rngs)
    path = Path(folder) / "model.safetensors"
    wanted = parameters(model)
    with safe_open(path, "np") as file:
        names = {name for name in file.keys() if not name.startswith(UNREAD)}  # noqa: SIM118
        if missing := sorted(wanted.keys() - names):
            raise ValueError(f"{path} lacks the tensors {', '.join(missing)}")
        if unused := sorted(names - wanted.keys()):
            raise ValueError(f"{path} has tensors with no place in the model: {', '.join(unused)}")
        for name, (parameter, transposed) in wanted.items():
            values = file.get_tensor(name).astype(np.float32)
            values = values.T if transposed else values
            if values.shape != parameter.shape:
                order = " (transposed)" if transposed else ""
                raise ValueError(
                    f"{path}: {name}{order} has shape {values.shape}, config.json asks for {parameter.shape}"
                )
            parameter.set_value(jnp.asarray(values))
    return model
