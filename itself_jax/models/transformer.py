"""CLIP's pre-LN transformer, one module for both towers."""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from itself_jax import sharding

# Computed again in the backward pass: one array of a layer's widest part is kept instead of two.
ACTIVATIONS = {
    "quick_gelu": jax.checkpoint(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "gelu": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=False)),
}

# What a layer keeps for the backward pass: everything; its input; what its linear layers return.
REMAT = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TransformerOutput(NamedTuple):
    """Tokens after the last layer, and the attention maps of the layers that were asked for."""

    tokens: Float[Array, "b n d"]
    attention: Mapping[int, Float[Array, "b n n"]]


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(±1/√fan_in): PyTorch's default for linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 compute means true float32 everywhere: no TF32 on GPU, no bfloat16 passes on TPU."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def layer_norm(name: str) -> nn.LayerNorm:
    """CLIP's LayerNorm, always in float32. The fast variance would cost parity (cancellation)."""
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)


def dense_layer(
    features: int, dtype: jnp.dtype, name: str | None = None, **init: nn.initializers.Initializer
) -> nn.Dense:
    """A linear layer whose precision follows the compute type."""
    return nn.Dense(features, dtype=dtype, precision=matmul_precision(dtype), name=name, **init)


def dense(features: int, dtype: jnp.dtype, name: str, **init: nn.initializers.Initializer):
    """A linear layer over the last axis, computed on (rows, features) whatever the leading axes.

    The gradient of a three-axis product takes XLA's CPU compiler 1.6 times as long.
    """
    layer = dense_layer(features, dtype, name, **init)

    def apply(x: Float[Array, "*lead d"]) -> Float[Array, "*lead f"]:
        return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)

    return apply


class InProjection(nn.Module):
    """Query, key and value of every head. Parameters lie side by side, CLIP's own layout."""

    heads: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b h n e"], ...]:
        b, n, d = x.shape
        kernel = self.param("kernel", self.kernel_init, (d, 3 * d)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * d,)).astype(self.dtype)
        parts = (3, self.heads, d // self.heads)
        # Where heads are spread over devices, a device's columns must hold whole heads.
        spread = sharding.shards("heads") > 1
        if spread:
            kernel = kernel.reshape(d, *parts).swapaxes(1, 2).reshape(d, 3 * d)
            bias = bias.reshape(*parts).swapaxes(0, 1).reshape(3 * d)
        flat = jnp.dot(x.reshape(-1, d), kernel, precision=matmul_precision(self.dtype))
        flat = flat + bias[None]
        if spread:
            projected = flat.reshape(b, n, parts[1], 3, parts[2])
            projected = sharding.constrain(projected, "batch", None, "heads", None, None)
            projected = projected.swapaxes(2, 3)
        else:
            projected = flat.reshape(b, n, *parts)
        return tuple(projected[:, :, i].swapaxes(1, 2) for i in range(3))


def fused_attention(
    q: Float[Array, "b h n e"],
    k: Float[Array, "b h n e"],
    v: Float[Array, "b h n e"],
    *,
    causal: bool,
    implementation: str = "cudnn",
) -> Float[Array, "b n h e"]:
    """softmax(q·kᵀ/√e)·v by a kernel that never has the probabilities of a layer in memory.

    implementation: of `jax.nn.dot_product_attention`. cuDNN's takes 16-bit numbers.
    """
    b, _, n, _ = q.shape
    # cuDNN refuses odd lengths, and CLIP's are odd (CLS beside a grid; 77 words): one token more,
    # which nobody looks at. Behind a causal mask it is that by itself.
    odd = n % 2
    padding = ((0, 0), (0, odd), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q, k, v))
    lengths = jnp.full((b,), n, jnp.int32) if odd and not causal else None
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=implementation
    )
    return out[:, :n]


class Attention(nn.Module):
    """Multi-head self-attention that can also return its head-averaged probabilities.

    `fused`: by a kernel where no probabilities are wanted.
    """

    heads: int
    width_std: float
    output_std: float
    keep_map: bool
    dtype: jnp.dtype
    causal: bool
    fused: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n n"] | None]:
        b, n, d = x.shape
        init = nn.initializers.normal(self.width_std)
        q, k, v = InProjection(self.heads, self.dtype, init, name="in_proj")(x)
        if self.fused and not self.keep_map:
            out, attention = fused_attention(q, k, v, causal=self.causal), None
        else:
            out, attention = self._plain(q, k, v)
        out = sharding.constrain(out, "batch", None, "heads", None).reshape(b, n, d)
        init = nn.initializers.normal(self.output_std)
        out = dense(d, self.dtype, "out_proj", kernel_init=init)(out)
        return out, attention

    def _plain(
        self, q: Float[Array, "b h n e"], k: Float[Array, "b h n e"], v: Float[Array, "b h n e"]
    ) -> tuple[Float[Array, "b n h e"], Float[Array, "b n n"] | None]:
        precision = matmul_precision(self.dtype)
        n, e = q.shape[2:]
        logits = jnp.einsum(
            "bhqd,bhkd->bhqk",
            q * jnp.asarray(e**-0.5, self.dtype),
            k,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if self.causal:
            mask = jnp.tril(jnp.ones((n, n), bool))
            logits = jnp.where(mask[None, None], logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)  # float32, whatever the compute type
        # No gradient flows through the maps: they only choose tokens (paper, section 3.2).
        attention = jax.lax.stop_gradient(probabilities).mean(axis=1) if self.keep_map else None
        out = jnp.einsum(
            "bhqk,bhkd->bhqd", probabilities.astype(self.dtype), v, precision=precision
        )
        return out.swapaxes(1, 2), attention


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)) with an MLP of 4x the width."""

    heads: int
    depth: int  # of the whole transformer: CLIP's initialisation shrinks with it
    activation: str
    keep_map: bool
    dtype: jnp.dtype
    causal: bool
    fused: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n n"] | None]:
        d = x.shape[-1]
        width_std = d**-0.5
        output_std = width_std * (2 * self.depth) ** -0.5
        attended, attention = Attention(
            self.heads,
            width_std,
            output_std,
            self.keep_map,
            self.dtype,
            self.causal,
            self.fused,
            name="attention",
        )(layer_norm("ln_1")(x).astype(self.dtype))
        x = x + attended
        init = nn.initializers.normal((2 * d) ** -0.5)
        h = layer_norm("ln_2")(x).astype(self.dtype)
        h = dense(4 * d, self.dtype, "mlp_in", kernel_init=init)(h)
        h = sharding.constrain(h, "batch", None, "hidden")
        h = ACTIVATIONS[self.activation](h)
        init = nn.initializers.normal(output_std)
        h = dense(d, self.dtype, "mlp_out", kernel_init=init)(h)
        return sharding.constrain(x + h, "batch", None, "width"), attention


class Transformer(nn.Module):
    """A stack of blocks; in a `causal` one no token attends to those behind it.

    A plain Python loop rather than `nn.scan`: only the maps in `map_layers` are ever kept.
    `remat` is a key of `REMAT`; `attention` is "plain" or, in the layers without a map, "cudnn".
    """

    depth: int
    heads: int
    activation: str
    dtype: jnp.dtype
    causal: bool = False
    remat: str = "none"
    attention: str = "plain"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        map_layers: Collection[int] = (),
    ) -> TransformerOutput:
        maps = {}
        make = Block
        if self.remat != "none":
            make = nn.remat(Block, policy=REMAT[self.remat])
        for layer in range(self.depth):
            block = make(
                self.heads,
                self.depth,
                self.activation,
                layer in map_layers,
                self.dtype,
                self.causal,
                self.attention == "cudnn",
                name=f"layer_{layer}",
            )
            x, attention = block(x)
            if attention is not None:
                maps[layer] = attention
        return TransformerOutput(x, maps)
