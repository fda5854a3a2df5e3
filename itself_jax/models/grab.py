"""GRAB: the local embedding of a bank of selected tokens (paper, section 3.3)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from itself_jax.models import saliency, transformer


class BankBatchNorm(nn.Module):
    """BatchNorm over exactly the batch's B·k kept bank rows, valid or not.

    Rows beyond k are masked out of the statistics. Normalises with the biased variance and keeps
    the *unbiased* one with PyTorch's momentum 0.1, which is why `nn.BatchNorm` does not serve.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b k f"], kept: Bool[Array, " k"], *, train: bool
    ) -> Float[Array, "b k f"]:
        f = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (f,))
        bias = self.param("bias", nn.initializers.zeros, (f,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (f,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (f,))
        batches = self.variable("batch_stats", "batches", jnp.zeros, (), jnp.int32)
        x = x.astype(jnp.float32)
        if train:
            weight = kept.astype(jnp.float32)[None, :, None]
            count = x.shape[0] * weight.sum()
            mean = (x * weight).sum(axis=(0, 1)) / count
            var = (jnp.square(x - mean[None, None]) * weight).sum(axis=(0, 1)) / count
            if not self.is_initializing():
                unbiased = var * count / jnp.maximum(count - 1, 1)
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
                batches.value += 1
        else:
            mean, var = running_mean.value, running_var.value
        normalised = (x - mean[None, None]) / jnp.sqrt(var + self.epsilon)[None, None]
        return normalised * scale[None, None] + bias[None, None]


class GRAB(nn.Module):
    """Attentive bank → local embedding: max over valid rows of Linear(x) + MLP(x).

    `unused_skip` and `unused_norm` are tensors that the published checkpoints own and the published
    code never uses. They receive no gradient and are never moved; they are kept so that a
    published checkpoint survives a round trip.
    """

    dim: int
    owns_unused_skip: bool  # the image side does
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b n e"], bank: saliency.Bank, *, train: bool
    ) -> Float[Array, "b m"]:
        e = tokens.shape[-1]
        x = jnp.take_along_axis(tokens, bank.indices[:, :, None], axis=1).astype(jnp.float32)
        x = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
        x = x.astype(self.dtype)
        skip = self._linear("skip", e, self.dim)(x)
        hidden = self._linear("mlp_in", e, self.dim // 2)(x)
        hidden = BankBatchNorm(name="norm")(hidden, bank.kept, train=train)
        hidden = nn.relu(hidden).astype(self.dtype)
        rows = skip + self._linear("mlp_out", self.dim // 2, self.dim)(hidden)
        self._declare_unused(e)
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
