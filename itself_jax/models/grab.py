"""GRAB: the local embedding of a bank of selected tokens (paper, section 3.3)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from itself_jax import sharding
from itself_jax.models import saliency, transformer

_MOMENTUM = 0.1  # PyTorch's


class Moments(NamedTuple):
    """Mean and biased variance over `count` rows."""

    mean: Float[Array, " f"]
    var: Float[Array, " f"]
    count: Float[Array, ""]


class BankBatchNorm(nn.Module):
    """BatchNorm over exactly the batch's B·k kept bank rows, valid or not.

    Rows beyond k are masked out of the statistics. Normalises with the biased variance and keeps
    the *unbiased* one with PyTorch's momentum 0.1, which is why `nn.BatchNorm` does not serve.
    With `moments` the statistics are known already and the running ones stay as they are.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b k f"],
        kept: Bool[Array, " k"],
        *,
        train: bool,
        moments: Moments | None = None,
    ) -> Float[Array, "b k f"]:
        f = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (f,))
        bias = self.param("bias", nn.initializers.zeros, (f,))
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, (f,)),
            "var": self.variable("batch_stats", "var", jnp.ones, (f,)),
            "batches": self.variable("batch_stats", "batches", jnp.zeros, (), jnp.int32),
        }
        x = x.astype(jnp.float32)
        mean, var = running["mean"].value, running["var"].value
        if moments is not None:
            mean, var = moments.mean, moments.var
        elif train:
            moments = measure(x, kept)
            mean, var = moments.mean, moments.var
            if not self.is_initializing():
                after = move(jax.tree.map(lambda v: v.value, running), moments)
                for name, value in after.items():
                    running[name].value = value
        normalised = (x - mean[None, None]) / jnp.sqrt(var + self.epsilon)[None, None]
        return normalised * scale[None, None] + bias[None, None]


def measure(x: Float[Array, "b k f"], kept: Bool[Array, " k"]) -> Moments:
    """Mean and variance over the kept rows."""
    weight = kept.astype(jnp.float32)[None, :, None]
    count = x.shape[0] * weight.sum()
    mean = (x * weight).sum(axis=(0, 1)) / count
    var = (jnp.square(x - mean[None, None]) * weight).sum(axis=(0, 1)) / count
    return Moments(mean, var, count)


def move(running: dict[str, Array], moments: Moments) -> dict[str, Array]:
    """Running statistics (`mean`, `var`, `batches`) after one more batch."""
    unbiased = moments.var * moments.count / jnp.maximum(moments.count - 1, 1)
    return {
        "mean": running["mean"] + _MOMENTUM * (moments.mean - running["mean"]),
        "var": running["var"] + _MOMENTUM * (unbiased - running["var"]),
        "batches": running["batches"] + 1,
    }


class GRAB(nn.Module):
    """Rows of the attentive bank → local embedding: max over valid rows of Linear(x) + MLP(x).

    `unused_skip` and `unused_norm` are tensors that the published checkpoints own and the published
    code never uses. They receive no gradient and are never moved; they are kept so that a
    published checkpoint survives a round trip.
    """

    dim: int
    owns_unused_skip: bool  # the image side does
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        rows: Float[Array, "b k e"],
        bank: saliency.Bank,
        *,
        train: bool,
        moments: Moments | None = None,
    ) -> Float[Array, "b m"]:
        e = rows.shape[-1]
        x = _normalised(rows).astype(self.dtype)
        skip = self._linear("skip", e, self.dim)(x)
        hidden = self._linear("mlp_in", e, self.dim // 2)(x)
        hidden = sharding.constrain(hidden, "batch", None, "hidden")
        hidden = BankBatchNorm(name="norm")(hidden, bank.kept, train=train, moments=moments)
        hidden = nn.relu(hidden).astype(self.dtype)
        rows = skip + self._linear("mlp_out", self.dim // 2, self.dim)(hidden)
        self._declare_unused(e)
        rows = sharding.constrain(rows, "batch", None, "width")
        pooled = jnp.max(jnp.where(bank.valid[:, :, None], rows, -jnp.inf), axis=1)
        return pooled.astype(jnp.float32)

    def _linear(self, name: str, fan_in: int, features: int):
        init = transformer.uniform_fan_in(fan_in)
        return transformer.dense(features, self.dtype, name, kernel_init=init, bias_init=init)

    def _declare_unused(self, e: int) -> None:
        if self.owns_unused_skip:
            self.param("unused_skip_kernel", transformer.uniform_fan_in(e), (e, self.dim))
            self.param("unused_skip_bias", transformer.uniform_fan_in(e), (self.dim,))
        self.param("unused_norm_scale", nn.initializers.ones, (self.dim,))
        self.param("unused_norm_bias", nn.initializers.zeros, (self.dim,))
        self.variable("batch_stats", "unused_norm_mean", jnp.zeros, (self.dim,))
        self.variable("batch_stats", "unused_norm_var", jnp.ones, (self.dim,))
        self.variable("batch_stats", "unused_norm_batches", jnp.zeros, (), jnp.int32)


def embed_in_chunks(
    head: GRAB, variables: Any, rows: Float[Array, "b k e"], bank: saliency.Bank, chunks: int
) -> tuple[Float[Array, "b m"], Any]:
    """A training pass of GRAB over a batch whose hidden rows do not fit the memory at once.

    The same mathematics: BatchNorm's statistics are those of the whole batch, gathered chunk by
    chunk; then every chunk is embedded. The backward pass computes each chunk once more.

    Returns:
      The local embeddings, and `batch_stats` after this batch.
    """
    params, stats = variables["params"], variables["batch_stats"]
    linear = transformer.Linear(head.dim // 2, head.dtype, nn.initializers.zeros)
    weight = bank.kept.astype(jnp.float32)[None, :, None]
    count = rows.shape[0] * weight.sum()
    parts = (sharding.split_rows(rows, chunks), sharding.split_rows(bank.valid, chunks))

    def hidden(params: Any, rows: Array) -> Array:
        x = linear.apply({"params": params["mlp_in"]}, _normalised(rows).astype(head.dtype))
        return sharding.constrain(x, "batch", None, "hidden").astype(jnp.float32) * weight

    def mean_over_chunks(of: Any) -> Array:
        def add(total: Array, rows: Array) -> tuple[Array, None]:
            return total + of(params, rows).sum(axis=(0, 1)), None

        return jax.lax.scan(jax.checkpoint(add), jnp.zeros(head.dim // 2), parts[0])[0] / count

    mean = mean_over_chunks(hidden)
    var = mean_over_chunks(
        lambda params, rows: jnp.square(hidden(params, rows) - mean[None, None]) * weight
    )
    moments = Moments(mean, var, count)

    def embed(part: tuple[Array, Array]) -> Array:
        chunk = bank._replace(indices=jnp.zeros(part[1].shape, jnp.int32), valid=part[1])
        return head.apply(variables, part[0], chunk, train=True, moments=moments)

    local = sharding.join_rows(jax.lax.map(jax.checkpoint(embed), parts))
    return local, {**stats, "norm": move(stats["norm"], moments)}


def _normalised(rows: Float[Array, "b k e"]) -> Float[Array, "b k e"]:
    rows = rows.astype(jnp.float32)
    return rows / (jnp.linalg.norm(rows, axis=-1, keepdims=True) + 1e-8)
