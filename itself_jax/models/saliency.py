"""Which tokens the model itself looks at (MARS and its rivals), and how many to keep (ATS).

Everything is a pure function of attention maps. Selection is by index, so nothing here carries a
gradient. Letters: b batch, n tokens, r rows of a map, k kept tokens.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from itself_jax import sharding

_EXACT = jax.lax.Precision.HIGHEST


class Source(NamedTuple):
    """A parsed saliency source: its kind, the layers whose maps it reads, MARS's discard share."""

    kind: str  # "mars", "layer", "mean", "std", "min_mean" or "min_std"
    layers: tuple[int, ...]
    discard: float


class Bank(NamedTuple):
    """The attentive bank: the tokens that were selected, most salient first.

    indices: positions among the encoder's tokens.
    kept: of the K_max rows, the first k; the same for every sample. BatchNorm sees these rows.
    valid: the kept rows that hold a real token and may enter the pooled embedding.
    """

    indices: Int[Array, "b k"]
    kept: Bool[Array, " k"]
    valid: Bool[Array, "b k"]


def take(tokens: Float[Array, "b n e"], indices: Int[Array, "b k"]) -> Float[Array, "b k e"]:
    """The tokens of a bank."""
    return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)


def parse_source(
    name: str, depth: int, *, mars_layers: tuple[int, ...] | None = None, discard: float = 0.25
) -> Source:
    """Reads `local.saliency`: `mars`, `last`, `layer:K`, `mean`, `std`, `min_mean`, `min_std`.

    `mars_layers=None` means (depth // 3, depth - 1), a middle and the last layer: the paper's
    (4, 11) of 12 (section 4.4).

    Raises:
      ValueError: an unknown name, or a layer that the encoder does not have.
    """
    kind, _, number = name.partition(":")
    if name == "mars":
        layers = (depth // 3, depth - 1) if mars_layers is None else tuple(mars_layers)
        layers = tuple(sorted(set(layers)))
    elif name == "last":
        kind, layers = "layer", (depth - 1,)
    elif kind == "layer" and number.isdigit():
        layers = (int(number),)
    elif name in ("mean", "std", "min_mean", "min_std"):
        layers = tuple(range(depth))
    else:
        raise ValueError(f"saliency source {name!r} is unknown")
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(f"saliency {name!r} reads layer {layer} of 0..{depth - 1}")
    return Source(kind, layers, discard)


def discard_lowest(attention: Float[Array, "b n n"], share: float) -> Float[Array, "b n n"]:
    """Sets the lowest floor(share·n²) entries of each map to 0 (paper, Eq. 3; flat index 0 stays).

    The lowest are taken over the whole map, not per row; among equals the lower flat index goes
    first. Flat index 0 (CLS→CLS) counts among the lowest if it is one of them, but keeps its value.
    Entries must be ≥ 0.
    """
    b, n, _ = attention.shape
    count = _discarded(n, share)
    if count == 0:
        return attention
    flat = attention.reshape(b, n * n).astype(jnp.float32)
    dropped = lowest(flat, count).at[:, 0].set(False)
    return jnp.where(dropped, 0.0, flat).reshape(b, n, n)


def _discarded(n: int, share: float) -> int:
    return int(n * n * share)


def discards_zeros(share: float, n: int) -> bool:
    """Whether `discard_lowest` of n² causal entries takes none but the zeros of the future."""
    return _discarded(n, share) <= n * (n - 1) // 2


@jax.jit
def lowest(values: Float[Array, "b s"], count: Int[Array, ""] | int) -> Bool[Array, "b s"]:
    """Marks the `count` lowest of each row, among equals the lower index first.

    Values must be ≥ 0: the bits of such floats order like integers, so that the threshold is found
    by bisection over 31 bits instead of a sort over n² entries (37,249 of them at full size).
    Compiled under its own name, by which `onnx_graph` knows it: ONNX has one operator for it.
    """
    # Adding 0.0 turns -0.0 into 0.0, whose bits would otherwise sort below everything.
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.int32)

    def refine(i: Int[Array, ""], threshold: Int[Array, "b 1"]) -> Int[Array, "b 1"]:
        candidate = threshold | (jnp.int32(1) << (30 - i))
        below = jnp.sum(bits < candidate, axis=1, keepdims=True)
        return jnp.where(below < count, candidate, threshold)

    # The count-th lowest value: the largest threshold with fewer than `count` entries below it.
    threshold = jax.lax.fori_loop(0, 31, refine, jnp.zeros((values.shape[0], 1), jnp.int32))
    below = bits < threshold
    level = bits == threshold
    room = count - jnp.sum(below, axis=1, keepdims=True)
    return below | (level & (jnp.cumsum(level, axis=1) <= room))


def rollout(
    attention: Mapping[int, Float[Array, "b n n"]],
    layers: tuple[int, ...],
    discard: float,
    rows: Float[Array, "b r n"] | None = None,
) -> Float[Array, "b r n"]:
    """MARS: attention rollout over the chosen layers (paper, section 3.2).

        A_l ← (discard(A_l) + I)/2 with rows normalised to 1;   R = A_last · … · A_first

    `rows` picks rows of R (one-hot vectors): only these vector-matrix products are then computed.
    None gives the full map.
    """
    b, n, _ = attention[layers[0]].shape
    identity = jnp.eye(n, dtype=jnp.float32)[None]
    result = jnp.broadcast_to(identity, (b, n, n)) if rows is None else rows
    for layer in sorted(layers, reverse=True):
        mixed = (discard_lowest(attention[layer], discard) + identity) / 2
        mixed = mixed / mixed.sum(axis=-1, keepdims=True)
        result = jnp.einsum("brm,bmn->brn", result, mixed, precision=_EXACT)
    return result


def saliency(
    attention: Mapping[int, Float[Array, "b n n"]],
    source: Source,
    query: Int[Array, " b"],
    *,
    causal: bool = False,
) -> Float[Array, "b n"]:
    """How much the token at `query` (CLS, or EOT) looks at each token; ≥ 0, larger is kept first.

    `causal`: no token of these maps looks at those behind it, so that what MARS discards, up to
    0.49 of a map, is 0 already, and need not be looked for.

    `min_mean` and `min_std` (paper's comparison, lowest first) are returned as 1 - value, which
    keeps them positive: attention is at most 1 and its deviation at most 1/2.
    """
    if source.kind == "mars":
        n = attention[source.layers[0]].shape[-1]
        rows = jax.nn.one_hot(query, n)[:, None, :]
        discard = 0.0 if causal and discards_zeros(source.discard, n) else source.discard
        result = rollout(attention, source.layers, discard, rows)[:, 0]
    else:
        maps = jnp.stack([attention[layer] for layer in source.layers])
        rows = jnp.take_along_axis(maps, query[None, :, None, None], axis=2)[:, :, 0]
        if source.kind in ("mean", "min_mean"):
            result = rows.mean(axis=0)
        elif source.kind in ("std", "min_std"):
            result = rows.std(axis=0)  # population deviation, as the reference
        else:
            result = rows[0]
        if source.kind.startswith("min_"):
            result = 1.0 - result
    return jax.lax.stop_gradient(result)


def entropy(rows: Float[Array, "... n"]) -> Float[Array, "..."]:
    """Entropy of rows of attention, in nats (paper, Fig. 7): 0 of one token, ln n of all alike."""
    return -jnp.sum(jax.scipy.special.xlogy(rows, rows), axis=-1)


def bank_size(candidates: int, ratio: float) -> int:
    """k at a constant ratio (paper, Eq. 4), e.g. 76 of 192 patches and 30 of 75 words at 0.4."""
    return int(candidates * ratio)


def bank_schedule(
    candidates: int, *, start: float, end: float, horizon: int
) -> Int[np.ndarray, " s"]:
    """ATS (paper, Eq. 4): k after each step 0..horizon, shrinking geometrically from start to end.

    Computed on the host in float64 and in the reference's order of operations: at 14 candidates
    another order gives 7 where the reference gives 6. Step 0 is treated as step 1; steps beyond the
    horizon keep its last value (index with min(step, horizon)).
    """
    steps = (max(1, step) / horizon for step in range(horizon + 1))
    return np.array([int(candidates * start * (end / start) ** t) for t in steps], np.int32)


def _highest(values: Float[Array, "b n"], k: int) -> Int[Array, "b k"]:
    # By rows: the compilers would gather those of the whole batch for it.
    return sharding.by_rows(lambda own: jax.lax.top_k(own, k)[1], values)


def image_bank(saliency: Float[Array, "b n"], k: Int[Array, ""] | int, *, k_max: int) -> Bank:
    """Top-k patches without CLS (token 0). Ties: the lower index first.

    `k` may be traced; shapes depend on `k_max` alone, so that one compilation serves a whole run.
    """
    candidates = saliency.at[:, 0].set(-1.0)  # below every real saliency
    indices = _highest(candidates, k_max)
    kept = jnp.arange(k_max) < k
    return Bank(indices, kept, jnp.broadcast_to(kept, indices.shape))


def text_bank(
    saliency: Float[Array, "b t"],
    ids: Int[Array, "b t"],
    eot: Int[Array, " b"],
    k: Int[Array, ""] | int,
    *,
    k_max: int,
) -> Bank:
    """Top-k words without SOT and EOT. Pads have saliency 0: they fill the bank, but are not valid.

    The pads matter all the same, because the BatchNorm of GRAB sees every kept row (method section
    4). A caption without words keeps its EOT token as its one valid row, where the reference gives
    NaN for it and for all rows after it. Token id 0 inside a caption counts as padding, as there.
    """
    t = ids.shape[1]
    position = jnp.arange(t)
    candidates = jnp.where(ids == 0, 0.0, saliency)
    excluded = (position == 0)[None] | (position[None] == eot[:, None])
    candidates = jnp.where(excluded, -1.0, candidates)
    indices = _highest(candidates, k_max)
    words = jnp.sum(ids != 0, axis=1) - 2
    wordless = words < 1
    indices = indices.at[:, 0].set(jnp.where(wordless, eot, indices[:, 0]))
    kept = jnp.arange(k_max) < k
    limit = jnp.minimum(jnp.maximum(words, 1), k)
    return Bank(indices, kept, jnp.arange(k_max)[None] < limit[:, None])
