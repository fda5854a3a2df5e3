"""CLIP's image and text encoders: every token out, attention maps of the layers asked for."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from itself_jax.models import transformer

# Text positions that stay as they are when the others are stretched.
KEPT_POSITIONS = 20


class TowerOutput(NamedTuple):
    """What an encoder returns.

    tokens: all tokens in the shared embedding space.
    pooled: the global feature, un-normalised (CLS token, or the token at EOT).
    pool_index: position of that token, whose attention row is the saliency.
    attention: head-averaged float32 maps by layer, only of the layers asked for.
    """

    tokens: Float[Array, "b n e"]
    pooled: Float[Array, "b e"]
    pool_index: Int[Array, " b"]
    attention: Mapping[int, Float[Array, "b n n"]]


def end_of_text(ids: Int[Array, "b t"]) -> Int[Array, " b"]:
    """Position of EOT: CLIP gives it the largest id; the first one counts."""
    return jnp.argmax(ids, axis=-1)


def resize_position_embedding(
    embedding: Float[Array, "n d"],
    grid: tuple[int, int],
    source_grid: tuple[int, int] | None = None,
) -> Float[Array, "m d"]:
    """Resizes patch positions from their grid to (rows, columns); the CLS row is kept.

    Bilinear with half-pixel centres and *no* antialias, as `torch.nn.functional.interpolate`
    (method section 1): `jax.image.resize` antialiases by default, which is 41 % off here.

    Args:
      embedding: CLS and the patches, row by row.
      grid: the one wanted.
      source_grid: the one that `embedding` has; None: a square, as in pre-training.

    Raises:
      ValueError: the patches of `embedding` do not form the source grid.
    """
    n, d = embedding.shape
    side = round((n - 1) ** 0.5)
    rows, columns = source_grid or (side, side)
    if rows * columns != n - 1:
        shape = "a square" if source_grid is None else f"a {rows}x{columns}"
        raise ValueError(f"{n - 1} patch positions do not form {shape} grid.")
    if (rows, columns) == tuple(grid):
        return embedding
    resized = jax.image.resize(
        embedding[1:].reshape(rows, columns, d),
        (*grid, d),
        "bilinear",
        antialias=False,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.concatenate([embedding[:1], resized.reshape(-1, d)])


def resize_text_positions(embedding: Float[Array, "t d"], length: int) -> Float[Array, "u d"]:
    """Positions for captions of another length than the weights were trained with.

    Shorter: cut. Longer: the first 20 rows, which nearly every caption has trained, stay; the tail
    is stretched by linear interpolation (half-pixel centres), an idea of Long-CLIP.

    Raises:
      ValueError: there is no tail to stretch.
    """
    t = embedding.shape[0]
    if length <= t:
        return embedding[:length]
    if t <= KEPT_POSITIONS:
        raise ValueError(f"{t} text positions have no tail behind {KEPT_POSITIONS} to stretch")
    tail = jax.image.resize(
        embedding[KEPT_POSITIONS:],
        (length - KEPT_POSITIONS, embedding.shape[1]),
        "linear",
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.concatenate([embedding[:KEPT_POSITIONS], tail])


class ImageEncoder(nn.Module):
    """CLIP's vision transformer over normalised pictures (b, height, width, 3)."""

    image_size: tuple[int, int]
    patch_size: int
    stride: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    remat: str = "none"
    attention: str = "plain"

    @nn.compact
    def __call__(
        self, images: Float[Array, "b y x 3"], *, map_layers: Collection[int] = ()
    ) -> TowerOutput:
        if images.shape[1:] != (*self.image_size, 3):
            raise ValueError(f"pictures have shape {images.shape[1:]}, expected {self.image_size}")
        precision = transformer.matmul_precision(self.dtype)
        patch = self.patch_size
        # VALID: at stride 12 SAME would add a row and a column of padding.
        x = nn.Conv(
            self.width,
            (patch, patch),
            strides=self.stride,
            padding="VALID",
            use_bias=False,
            kernel_init=transformer.uniform_fan_in(3 * patch * patch),
            dtype=self.dtype,
            precision=precision,
            name="patch_embedding",
        )(images.astype(self.dtype))
        b, rows, columns, d = x.shape
        n = rows * columns + 1
        init = nn.initializers.normal(d**-0.5)
        class_embedding = self.param("class_embedding", init, (d,))
        positions = self.param("position_embedding", init, (n, d))
        cls = jnp.broadcast_to(class_embedding.astype(x.dtype), (b, 1, d))
        x = jnp.concatenate([cls, x.reshape(b, n - 1, d)], axis=1) + positions[None].astype(x.dtype)
        x = transformer.LayerNorm(name="ln_pre")(x).astype(self.dtype)
        out = transformer.Transformer(
            self.depth,
            self.heads,
            self.activation,
            self.dtype,
            remat=self.remat,
            attention=self.attention,
            name="transformer",
        )(x, map_layers=map_layers)
        projection = self.param("projection", init, (d, self.embed_dim))
        tokens = _project(transformer.LayerNorm(name="ln_post")(out.tokens), projection, self.dtype)
        return TowerOutput(tokens, tokens[:, 0], jnp.zeros((b,), jnp.int32), out.attention)


class TextEncoder(nn.Module):
    """CLIP's causal text transformer over token ids (b, t): SOT, words, EOT (largest id), pads.

    t is at most `text_length`: no token sees the pads that are left out.
    """

    vocab_size: int
    text_length: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    activation: str
    dtype: jnp.dtype
    remat: str = "none"
    attention: str = "plain"

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], *, map_layers: Collection[int] = ()) -> TowerOutput:
        b, t = ids.shape
        if t > self.text_length:
            raise ValueError(f"captions have {t} positions, at most {self.text_length} expected")
        x = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="token_embedding",
        )(ids)
        init = nn.initializers.normal(0.01)
        positions = self.param("position_embedding", init, (self.text_length, self.width))
        x = x + positions[None, :t].astype(x.dtype)
        out = transformer.Transformer(
            self.depth,
            self.heads,
            self.activation,
            self.dtype,
            causal=True,
            remat=self.remat,
            attention=self.attention,
            name="transformer",
        )(x, map_layers=map_layers)
        init = nn.initializers.normal(self.width**-0.5)
        projection = self.param("projection", init, (self.width, self.embed_dim))
        tokens = _project(
            transformer.LayerNorm(name="ln_final")(out.tokens), projection, self.dtype
        )
        eot = end_of_text(ids)
        pooled = jnp.take_along_axis(tokens, eot[:, None, None], axis=1)[:, 0]
        return TowerOutput(tokens, pooled, eot, out.attention)


def _project(
    tokens: Float[Array, "b n d"], projection: Float[Array, "d e"], dtype: jnp.dtype
) -> Float[Array, "b n e"]:
    flat = jnp.einsum(
        "rd,de->re",
        tokens.astype(dtype).reshape(-1, tokens.shape[-1]),
        projection.astype(dtype),
        precision=transformer.matmul_precision(dtype),
        preferred_element_type=jnp.float32,  # losses and similarities are float32
    )
    return flat.reshape(*tokens.shape[:-1], -1)
