"""CLIP's pre-LN transformer, one module for both towers."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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


def all_first(values: Any) -> Any:
    """The same pytree; a CPU goes on with none of it before it has all of it.

    Other devices stay free to compute while gradients are on their way between them.
    """
    return jax.lax.platform_dependent(
        values, cpu=jax.lax.optimization_barrier, default=lambda free: free
    )


@jax.custom_vjp
def together(*values: Any) -> tuple[Any, ...]:
    """All as they are; a CPU goes on with none of their gradients before it has all of them.

    Left free, XLA's CPU compiler puts the gradients of parameters off, and keeps all that they are
    made of; and as it cannot tell that a parameter is read before it is updated, it copies it.
    """
    return values


def _together(*values: Any) -> tuple[tuple[Array, ...], tuple]:
    # The gradient of what is frozen is not wanted, and the barrier would ask for it.
    wanted = tuple(() if value.perturbed else None for value in values)
    return tuple(value.value for value in values), wanted


def _gradients_together(wanted: tuple, gradients: Any) -> tuple[Any, ...]:
    symbolic = jax.custom_derivatives.SymbolicZero
    held = [
        at
        for at, gradient in enumerate(gradients)
        if wanted[at] is not None and not isinstance(gradient, symbolic)
    ]
    result = list(gradients)
    if len(held) > 1:
        ready = all_first([gradients[at] for at in held])
        for at, gradient in zip(held, ready, strict=True):
            result[at] = gradient
    return tuple(result)


together.defvjp(_together, _gradients_together, symbolic_zeros=True)


class LayerNorm(nn.Module):
    """CLIP's LayerNorm, always in float32. The fast variance would cost parity (cancellation)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        x, scale, bias = together(x.astype(jnp.float32), scale, bias)
        scale, bias = (v.reshape(*[1] * (x.ndim - 1), d) for v in (scale, bias))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return centred * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias


class Linear(nn.Module):
    """A linear layer over the last axis, whose precision follows the compute type."""

    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead f"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel, bias = together(*(value.astype(self.dtype) for value in (x, kernel, bias)))
        product = jnp.dot(x, kernel, precision=matmul_precision(self.dtype))
        return product + bias.reshape(*[1] * (x.ndim - 1), self.features)


def dense(features: int, dtype: jnp.dtype, name: str, **init: nn.initializers.Initializer):
    """A linear layer over the last axis, computed on (rows, features) whatever the leading axes.

    The gradient of a three-axis product takes XLA's CPU compiler 1.6 times as long.
    """
    layer = Linear(features, dtype, name=name, **init)

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
        rows, kernel, bias = together(x.reshape(-1, d), kernel, bias)
        flat = jnp.dot(rows, kernel, precision=matmul_precision(self.dtype))
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
        )(LayerNorm(name="ln_1")(x).astype(self.dtype))
        x = x + attended
        init = nn.initializers.normal((2 * d) ** -0.5)
        h = LayerNorm(name="ln_2")(x).astype(self.dtype)
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
