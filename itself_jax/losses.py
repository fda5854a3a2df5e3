"""The losses of ITSELF as pure functions of embeddings and logits, all in float32.

Embeddings enter un-normalised. `pids` are identity labels 0..C-1; pairs are aligned, row i of the
images belongs to row i of the texts. On a mesh every device has all features but computes its own
rows: no device ever holds a whole b x b matrix.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from itself_jax import sharding

_EXACT = jax.lax.Precision.HIGHEST
Logits = Callable[..., Float[Array, "p c"]]


class HardNegatives(NamedTuple):
    """Most similar element of another identity: an image for each text, a text for each image."""

    image: Int[Array, " b"]
    text: Int[Array, " b"]


class BranchLosses(NamedTuple):
    """Loss terms of one branch (global or local)."""

    tal: Float[Array, ""]
    cid: Float[Array, ""]
    id: Float[Array, ""]


def tal(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    pids: Int[Array, " b"],
    *,
    temperature: float = 0.015,
    margin: float = 0.1,
) -> Float[Array, ""]:
    """Triplet alignment loss, *summed* over the batch and over both directions (method section 5).

        ℓ = max(0, margin − Σ_P α·S + τ·log Σ_neg exp(S/τ)),   α = softmax over positives of S/τ

    No gradient flows through α. A row without negatives (a batch of one identity) has loss 0.
    """
    return jnp.sum(
        sharding.by_rows(
            lambda *own: _tal(*_everyone(*own), temperature=temperature, margin=margin),
            *(image, text, pids),
        )
    )


class _Rows(NamedTuple):
    """Rows of the batch twice: a device's own, and everyone's."""

    own: Array
    everyone: Array

    def map(self, function: Callable[[Array], Array]) -> "_Rows":
        return _Rows(function(self.own), function(self.everyone))


def _everyone(*arrays: Array) -> tuple[_Rows, ...]:
    """Only inside of `sharding.by_rows`: each of the arrays as `_Rows`."""
    return tuple(_Rows(x, sharding.gather_rows(x)) for x in arrays)


def _tal(
    image: _Rows, text: _Rows, pids: _Rows, *, temperature: float, margin: float
) -> Float[Array, " b"]:
    """The loss of each of a device's own rows, both directions."""
    # Plain division, unlike CID's normalisation: three of them coexist in the reference.
    image, text = (
        x.map(lambda rows: rows / jnp.linalg.norm(rows, axis=-1, keepdims=True))
        for x in (image, text)
    )
    positive = _same(pids)
    return sum(
        _tal_rows(_similarity(*pair), positive, temperature, margin)
        for pair in ((text, image), (image, text))
    )


def _similarity(rows: _Rows, columns: _Rows) -> Float[Array, "r b"]:
    return jnp.einsum("rd,cd->rc", rows.own, columns.everyone, precision=_EXACT)


def _same(pids: _Rows) -> Bool[Array, "r b"]:
    """Which pairs are of one identity."""
    return pids.own[:, None] == pids.everyone[None, :]


def _tal_rows(similarity, positive, temperature, margin):
    scaled = similarity / temperature
    alpha = jax.nn.softmax(jnp.where(positive, scaled, -jnp.inf), axis=1)
    attraction = jnp.sum(jax.lax.stop_gradient(alpha) * similarity, axis=1)
    has_negative = jnp.any(~positive, axis=1)
    # Rows without negatives are masked before the logarithm, so that no NaN enters the gradient.
    negatives = jnp.where(positive & has_negative[:, None], -jnp.inf, scaled)
    repulsion = temperature * jax.nn.logsumexp(negatives, axis=1)
    rows = jnp.maximum(0.0, margin - attraction + repulsion)
    return jnp.where(has_negative, rows, 0.0)


def hard_negatives(
    image: Float[Array, "b d"], text: Float[Array, "b d"], pids: Int[Array, " b"]
) -> HardNegatives:
    """Highest cosine among other identities; ties → lower index; index 0 when there is none."""
    return sharding.by_rows(lambda *own: _hard_negatives(*_everyone(*own)), image, text, pids)


def _hard_negatives(image: _Rows, text: _Rows, pids: _Rows) -> HardNegatives:
    def normalised(x: Array) -> Array:
        x = jax.lax.stop_gradient(x)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    image, text = image.map(normalised), text.map(normalised)
    same = _same(pids)

    def negatives(of: _Rows, among: _Rows) -> Float[Array, "r b"]:
        return jnp.where(same, -jnp.inf, _similarity(of, among))

    of_texts = negatives(text, image)
    if image.own.shape == image.everyone.shape:
        # A device that has every row needs one product for both directions.
        return HardNegatives(image=_hardest(of_texts, 1), text=_hardest(of_texts, 0))
    return HardNegatives(image=_hardest(of_texts, 1), text=_hardest(negatives(image, text), 1))


def _hardest(similarity: Float[Array, "r c"], axis: int) -> Int[Array, " n"]:
    """The first of the largest, as argmax; two plain reductions are faster on a CPU."""
    largest = jnp.max(similarity, axis=axis, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, axis)
    return jnp.min(jnp.where(similarity == largest, places, similarity.shape[axis] - 1), axis=axis)


def mismatch_label(pids: Int[Array, " b"], num_identities: int, rule: str) -> Int[Array, ""]:
    """The class of a mismatched pair.

    `batch_max` is the reference's: largest pid *in the batch* + 1, which is often the class of a
    real identity. `extra_class` is the class C that no identity has.
    """
    if rule == "batch_max":
        return jnp.max(pids) + 1
    return jnp.asarray(num_identities, pids.dtype)


def cross_entropy(
    logits: Float[Array, "*p c"],
    labels: Int[Array, "*p"],
    weights: Float[Array, "*p"] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats; with weights, their weighted mean."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    if weights is None:
        return losses.mean()
    return jnp.sum(losses * weights) / jnp.sum(weights)


def cid(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    pids: Int[Array, " b"],
    pair_logits: Logits,
    *,
    mismatch: Int[Array, ""],
) -> Float[Array, ""]:
    """Cross-modal identity loss over 3B pairs (paper, Eq. 5): matched, hard image, hard text.

    `pair_logits(first, second)` classifies concatenated pairs; both orders are classified and their
    cross-entropies averaged. Gradients flow through the negatives. In a batch of one identity,
    which has no negatives, the matched pairs alone count.
    """
    negatives = sharding.by_rows(lambda *own: _negatives(*_everyone(*own)), image, text, pids)
    return _cid(image, text, negatives, pids, pair_logits, mismatch)


class _Negatives(NamedTuple):
    """The embeddings behind `HardNegatives`."""

    image: Float[Array, "b d"]
    text: Float[Array, "b d"]


def _negatives(image: _Rows, text: _Rows, pids: _Rows) -> _Negatives:
    indices = _hard_negatives(image, text, pids)
    return _Negatives(image.everyone[indices.image], text.everyone[indices.text])


def _cid(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    negatives: _Negatives,
    pids: Int[Array, " b"],
    pair_logits: Logits,
    mismatch: Int[Array, ""],
) -> Float[Array, ""]:
    images = [image, negatives.image, image]
    texts = [text, text, negatives.text]
    mismatched = jnp.full_like(pids, mismatch)
    labels = [pids, mismatched, mismatched]
    has_negative = jnp.any(pids != pids[0]).astype(jnp.float32)
    some = jnp.full(len(pids), has_negative)
    weights = [jnp.ones(len(pids)), some, some]
    # Both orders in one product: as large classifiers go, each gradient is written once.
    logits = pair_logits(_stack(images + texts), _stack(texts + images))
    return cross_entropy(logits, _stack(2 * labels), _stack(2 * weights))


def _stack(parts: Sequence[Array]) -> Shaped[Array, "s b ..."]:
    """Along an axis of its own: the rows of a device stay on it."""
    return sharding.constrain(jnp.stack(parts), None, "batch", *[None] * (parts[0].ndim - 1))


def branch(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    pids: Int[Array, " b"],
    *,
    pair_logits: Logits,
    identity_logits: Logits,
    mismatch: Int[Array, ""],
    temperature: float = 0.015,
    margin: float = 0.1,
) -> BranchLosses:
    """All terms of one branch; the total loss is the plain sum over terms and branches."""
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)

    def across(*own: Array) -> tuple[Float[Array, " r"], _Negatives]:
        rows = _everyone(*own)  # gathered once, for both terms
        return _tal(*rows, temperature=temperature, margin=margin), _negatives(*rows)

    tal_rows, negatives = sharding.by_rows(across, image, text, pids)
    return BranchLosses(
        tal=jnp.sum(tal_rows),
        cid=_cid(image, text, negatives, pids, pair_logits, mismatch),
        id=2 * cross_entropy(identity_logits(_stack([image, text])), _stack([pids, pids])),
    )
