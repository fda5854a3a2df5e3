"""ITSELF: CLIP's dual encoder, the local branch on top of it, and the identity classifiers."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from itself_jax import config as config_lib
from itself_jax.models import clip, grab, saliency, transformer

HEADS = ("global_heads", "local_heads")  # parameters that work on embeddings, in training alone


class Embedding(NamedTuple):
    """Un-normalised float32 embeddings; `local` is None without the local branch."""

    global_: Float[Array, "b e"]
    local: Float[Array, "b m"] | None


class Encoded(NamedTuple):
    """An embedding and the bank that its local part was made from (None without one)."""

    embedding: Embedding
    bank: saliency.Bank | None


class Selected(NamedTuple):
    """What is left of a tower's tokens: the global embedding and the rows of the bank."""

    global_: Float[Array, "b e"]
    rows: Float[Array, "b k e"] | None
    bank: saliency.Bank | None


class Attended(NamedTuple):
    """What one tower looks at, as each of several saliency sources has it (`s` sources).

    The banks are those of inference: `BankLimits` of `local.ratio`, whether the local branch is
    enabled or not. `entropy` is that of the pooled token's row of attention, in nats.
    """

    saliency: Float[Array, "s b n"]
    indices: Int[Array, "s b k"]
    valid: Bool[Array, "s b k"]
    entropy: Float[Array, "b l"]


class BankLimits(NamedTuple):
    """Rows of the image and of the text bank: the k of a step, or the padded K_max."""

    image: Int[Array, ""] | int
    text: Int[Array, ""] | int


class IdentityHeads(nn.Module):
    """Classifiers of one branch over C identities and one further class (method section 5)."""

    classes: int  # C + 1
    width: int

    def setup(self) -> None:
        exact = jnp.dtype(jnp.float32)
        first = transformer.uniform_fan_in(2 * self.width)
        self.pair_mlp = transformer.Linear(self.width, exact, kernel_init=first, bias_init=first)
        self.pair_norm = transformer.LayerNorm()
        small = nn.initializers.normal(1e-3)
        self.pair_classifier = transformer.Linear(self.classes, exact, kernel_init=small)
        self.identity_classifier = transformer.Linear(self.classes, exact, kernel_init=small)

    def pair_logits(
        self, first: Float[Array, "*p d"], second: Float[Array, "*p d"]
    ) -> Float[Array, "*p c"]:
        """CID: the classes of the concatenated pairs [first; second]."""
        hidden = self.pair_norm(self.pair_mlp(jnp.concatenate([first, second], axis=-1)))
        return self.pair_classifier(nn.gelu(hidden, approximate=False))

    def identity_logits(self, embedding: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
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
    remat: str = "none"
    attention: str = "plain"

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
            remat=self.remat,
            attention=self.attention,
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
            remat=self.remat,
            attention=self.attention,
        )
        classes = self.num_identities + 1
        self.global_heads = IdentityHeads(classes, model.embed_dim)
        if self.local.enabled:
            self.image_grab = grab_head(self.local, self.dtype, image=True)
            self.text_grab = grab_head(self.local, self.dtype, image=False)
            self.local_heads = IdentityHeads(classes, self.local.dim)

    def encode_image(
        self, images: Float[Array, "b y x 3"], k: Int[Array, ""] | None = None
    ) -> Encoded:
        """Normalised pictures → embedding. With `k` (traced, ≤ `bank_limits`) in training mode."""
        return self._embed(self.select_image(images, k), "image", train=k is not None)

    def encode_text(self, ids: Int[Array, "b t"], k: Int[Array, ""] | None = None) -> Encoded:
        """Token ids → embedding. With `k` (traced, ≤ `bank_limits`) in training mode."""
        return self._embed(self.select_text(ids, k), "text", train=k is not None)

    def select_image(
        self,
        images: Float[Array, "b y x 3"],
        k: Int[Array, ""] | None = None,
        bank: saliency.Bank | None = None,
    ) -> Selected:
        """Normalised pictures → global embedding and bank; a `bank` that is known is kept."""
        source = self._source("image", k, bank)
        out = self.image_encoder(images, map_layers=source.layers if source else ())
        if source is not None:
            k_max = bank_limits(self.model, self.local, k is not None).image
            scores = saliency.saliency(out.attention, source, out.pool_index)
            bank = saliency.image_bank(scores, k_max if k is None else k, k_max=k_max)
        return _select(out, bank)

    def select_text(
        self,
        ids: Int[Array, "b t"],
        k: Int[Array, ""] | None = None,
        bank: saliency.Bank | None = None,
    ) -> Selected:
        """Token ids → global embedding and bank; a `bank` that is known is kept."""
        source = self._source("text", k, bank)
        out = self.text_encoder(ids, map_layers=source.layers if source else ())
        if source is not None:
            k_max = bank_limits(self.model, self.local, k is not None).text
            scores = saliency.saliency(out.attention, source, out.pool_index, causal=True)
            k = k_max if k is None else k
            bank = saliency.text_bank(scores, ids, out.pool_index, k, k_max=k_max)
        return _select(out, bank)

    def attend_image(
        self, images: Float[Array, "b y x 3"], sources: tuple[saliency.Source, ...]
    ) -> Attended:
        """Normalised pictures → what the image encoder looks at, by each of `sources`."""
        out = self.image_encoder(images, map_layers=tuple(range(self.model.vision_depth)))
        k = max(1, bank_limits(self.model, self.local, False).image)
        return _attended(out, sources, lambda x: saliency.image_bank(x, k, k_max=k), causal=False)

    def attend_text(self, ids: Int[Array, "b t"], sources: tuple[saliency.Source, ...]) -> Attended:
        """Token ids → what the text encoder looks at, by each of `sources`."""
        out = self.text_encoder(ids, map_layers=tuple(range(self.model.text_depth)))
        k = max(1, bank_limits(self.model, self.local, False).text)
        return _attended(
            out,
            sources,
            lambda x: saliency.text_bank(x, ids, out.pool_index, k, k_max=k),
            causal=True,
        )

    def _embed(self, selected: Selected, side: str, *, train: bool) -> Encoded:
        local = None
        if selected.bank is not None:
            head = self.image_grab if side == "image" else self.text_grab
            local = head(selected.rows, selected.bank, train=train)
        return Encoded(Embedding(selected.global_, local), selected.bank)

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

    def _source(
        self, side: str, k: Int[Array, ""] | None, bank: saliency.Bank | None
    ) -> saliency.Source | None:
        """Where the bank comes from; None: there is no local branch, or it is known."""
        if not self.local.enabled or bank is not None:
            return None
        local, model = self.local, self.model
        return saliency.parse_source(
            local.inference_saliency if k is None else local.saliency,
            model.vision_depth if side == "image" else model.text_depth,
            mars_layers=local.mars_layers,
            discard=local.mars_discard,
        )


def _select(out: clip.TowerOutput, bank: saliency.Bank | None) -> Selected:
    rows = None if bank is None else saliency.take(out.tokens, bank.indices)
    return Selected(out.pooled, rows, bank)


def _attended(
    out: clip.TowerOutput,
    sources: tuple[saliency.Source, ...],
    select: Callable[[Float[Array, "b n"]], saliency.Bank],
    *,
    causal: bool,
) -> Attended:
    found = [
        saliency.saliency(out.attention, source, out.pool_index, causal=causal)
        for source in sources
    ]
    banks = [select(x) for x in found]
    maps = jnp.stack([out.attention[layer] for layer in sorted(out.attention)])
    rows = jnp.take_along_axis(maps, out.pool_index[None, :, None, None], axis=2)[:, :, 0]
    return Attended(
        jnp.stack(found),
        jnp.stack([bank.indices for bank in banks]),
        jnp.stack([bank.valid for bank in banks]),
        saliency.entropy(rows).T,
    )


def attention_sources(
    model: config_lib.Model, local: config_lib.Local
) -> dict[str, tuple[saliency.Source, saliency.Source]]:
    """The sources that are compared on any model: name → (of images, of texts).

    MARS as `local` sets it, the last layer, each layer that both encoders have, mean and deviation
    over all layers; and what `local` names.
    """
    shared = min(model.vision_depth, model.text_depth)
    layers = (f"layer:{layer}" for layer in range(shared))
    names = ("mars", "last", *layers, "mean", "std", local.saliency, local.inference_saliency)
    settings = {"mars_layers": local.mars_layers, "discard": local.mars_discard}
    return {
        name: (
            saliency.parse_source(name, model.vision_depth, **settings),
            saliency.parse_source(name, model.text_depth, **settings),
        )
        for name in dict.fromkeys(names)
    }


def grab_head(local: config_lib.Local, dtype: jnp.dtype, *, image: bool) -> grab.GRAB:
    """GRAB of one side, also for use outside of the model."""
    return grab.GRAB(local.dim, image, dtype)


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


def caption_lengths(model: config_lib.Model, local: config_lib.Local) -> tuple[int, ...]:
    """Lengths, ascending, to which inference may cut its captions: about half, and `text_length`.

    A caption that ends within the shorter one has the same embedding at both, since no token sees
    those behind it, and its pads have no part in an embedding at inference. Two lengths, since
    each is a compilation. Where the result would differ, there is only `text_length`.
    """
    whole = model.text_length
    half = -(-whole // 16) * 8
    if local.enabled:
        # The bank is padded to k rows, SOT and EOT come last of all.
        half = max(half, bank_limits(model, local, False).text + 2)
        source = saliency.parse_source(
            local.inference_saliency,
            model.text_depth,
            mars_layers=local.mars_layers,
            discard=local.mars_discard,
        )
        if source.kind == "mars" and not all(
            saliency.discards_zeros(source.discard, n) for n in (half, whole)
        ):
            return (whole,)
    return (half, whole) if half < whole else (whole,)
