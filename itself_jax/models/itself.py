"""ITSELF: CLIP's dual encoder, the local branch on top of it, and the identity classifiers."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from itself_jax import config as config_lib
from itself_jax.models import clip, grab, saliency, transformer


class Embedding(NamedTuple):
    """Un-normalised float32 embeddings; `local` is None without the local branch."""

    global_: Float[Array, "b e"]
    local: Float[Array, "b m"] | None


class Encoded(NamedTuple):
    """An embedding and the bank that its local part was made from (None without one)."""

    embedding: Embedding
    bank: saliency.Bank | None


class BankLimits(NamedTuple):
    """Rows of the image and of the text bank: the k of a step, or the padded K_max."""

    image: Int[Array, ""] | int
    text: Int[Array, ""] | int


class IdentityHeads(nn.Module):
    """Classifiers of one branch over C identities and one further class (method section 5)."""

    classes: int  # C + 1
    width: int

    def setup(self) -> None:
        exact = transformer.matmul_precision(jnp.dtype(jnp.float32))
        classifier = {
            "kernel_init": nn.initializers.normal(1e-3),
            "dtype": jnp.float32,
            "precision": exact,
        }
        self.pair_mlp = nn.Dense(
            self.width,
            kernel_init=transformer.uniform_fan_in(2 * self.width),
            bias_init=transformer.uniform_fan_in(2 * self.width),
            dtype=jnp.float32,
            precision=exact,
        )
        self.pair_norm = nn.LayerNorm(1e-5, dtype=jnp.float32, use_fast_variance=False)
        self.pair_classifier = nn.Dense(self.classes, **classifier)
        self.identity_classifier = nn.Dense(self.classes, **classifier)

    def pair_logits(
        self, first: Float[Array, "p d"], second: Float[Array, "p d"]
    ) -> Float[Array, "p c"]:
        """CID: the classes of the concatenated pairs [first; second]."""
        hidden = self.pair_norm(self.pair_mlp(jnp.concatenate([first, second], axis=-1)))
        return self.pair_classifier(nn.gelu(hidden, approximate=False))

    def identity_logits(self, embedding: Float[Array, "b d"]) -> Float[Array, "b c"]:
        """ID: the classes of embeddings of either modality."""
        return self.identity_classifier(embedding)

    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b c"]:
        """Creates every parameter."""
        return self.identity_logits(embedding) + self.pair_logits(embedding, embedding)


class ITSELF(nn.Module):
    """The whole model. Methods are reached with `apply(variables, …, method="encode_image")`.

    Training selects tokens with `local.saliency` and takes the k of the step as an argument;
    inference selects with `local.inference_saliency` at the constant `local.ratio`.
    """

    model: config_lib.Model
    local: config_lib.Local
    num_identities: int
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        model = self.model
        activation = model.activation or config_lib.CLIP_ACTIVATION
        self.image_encoder = clip.ImageEncoder(
            image_size=model.image_size,
            patch_size=model.patch_size,
            stride=model.stride or model.patch_size,
            width=model.vision_width,
            depth=model.vision_depth,
            heads=model.vision_heads,
            embed_dim=model.embed_dim,
            activation=activation,
            dtype=self.dtype,
        )
        self.text_encoder = clip.TextEncoder(
            vocab_size=model.vocab_size,
            text_length=model.text_length,
            width=model.text_width,
            depth=model.text_depth,
            heads=model.text_heads,
            embed_dim=model.embed_dim,
            activation=activation,
            dtype=self.dtype,
        )
        classes = self.num_identities + 1
        self.global_heads = IdentityHeads(classes, model.embed_dim)
        if self.local.enabled:
            self.image_grab = grab.GRAB(self.local.dim, True, self.dtype)
            self.text_grab = grab.GRAB(self.local.dim, False, self.dtype)
            self.local_heads = IdentityHeads(classes, self.local.dim)

    def encode_image(
        self, images: Float[Array, "b y x 3"], k: Int[Array, ""] | None = None
    ) -> Encoded:
        """Normalised pictures → embedding. With `k` (traced, ≤ `bank_limits`) in training mode."""
        train = k is not None
        source = self._source(self.model.vision_depth, train)
        out = self.image_encoder(images, map_layers=source.layers if source else ())
        if source is None:
            return Encoded(Embedding(out.pooled, None), None)
        k_max = bank_limits(self.model, self.local, train).image
        scores = saliency.saliency(out.attention, source, out.pool_index)
        bank = saliency.image_bank(scores, k if train else k_max, k_max=k_max)
        local = self.image_grab(out.tokens, bank, train=train)
        return Encoded(Embedding(out.pooled, local), bank)

    def encode_text(self, ids: Int[Array, "b t"], k: Int[Array, ""] | None = None) -> Encoded:
        """Token ids → embedding. With `k` (traced, ≤ `bank_limits`) in training mode."""
        train = k is not None
        source = self._source(self.model.text_depth, train)
        out = self.text_encoder(ids, map_layers=source.layers if source else ())
        if source is None:
            return Encoded(Embedding(out.pooled, None), None)
        k_max = bank_limits(self.model, self.local, train).text
        scores = saliency.saliency(out.attention, source, out.pool_index)
        bank = saliency.text_bank(scores, ids, out.pool_index, k if train else k_max, k_max=k_max)
        local = self.text_grab(out.tokens, bank, train=train)
        return Encoded(Embedding(out.pooled, local), bank)

    def __call__(self, images: Float[Array, "b y x 3"], ids: Int[Array, "b t"]) -> None:
        """Creates every parameter: `init` runs this."""
        limits = bank_limits(self.model, self.local, True)
        for encoded in (
            self.encode_image(images, jnp.asarray(limits.image)),
            self.encode_text(ids, jnp.asarray(limits.text)),
        ):
            self.global_heads(encoded.embedding.global_)
            if encoded.embedding.local is not None:
                self.local_heads(encoded.embedding.local)

    def _source(self, depth: int, train: bool) -> saliency.Source | None:
        if not self.local.enabled:
            return None
        return saliency.parse_source(
            self.local.saliency if train else self.local.inference_saliency,
            depth,
            mars_layers=self.local.mars_layers,
            discard=self.local.mars_discard,
        )


def candidates(model: config_lib.Model) -> BankLimits:
    """Tokens that may enter a bank: all patches; all positions but SOT and EOT."""
    rows, columns = model.grid
    return BankLimits(rows * columns, model.text_length - 2)


def bank_limits(model: config_lib.Model, local: config_lib.Local, train: bool) -> BankLimits:
    """K_max, the padded number of bank rows, in training or at inference."""
    ratio = local.ratio
    if train and local.ats:
        ratio = max(local.ratio_start, local.ratio_end)
    return BankLimits(*(saliency.bank_size(n, ratio) for n in candidates(model)))
