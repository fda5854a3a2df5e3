"""Retrieval metrics: R@k, mAP and mINP from the ranks of the positives, in bounded memory.

No ranking is ever sorted. The rank of a positive `p` of query `q` is a count,

    rank = 1 + #{i: s_qi > s_qp} + #{i: s_qi == s_qp and i < p},

so equal similarities keep gallery order and the result does not depend on a backend's argsort
(the reference's does). The ranks of its positives determine every metric of a query.

Letters: `q` queries, `g` gallery, `d` embedding, `m` local embedding, `p` positives of a query
padded to the most that any query has, `a` fusion weights.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from itself_jax import sharding

# The weights the reference prints, in its order; `global` (1) and `local` (0) come before them.
FUSION_ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.68, 0.32)

# Blocks near a CPU's cache: with many positives a query, four times this took 1.5 to 1.9 as long.
CHUNK_BYTES = 16 * 2**20

_UNRANKED = np.iinfo(np.int32).max


class Embeddings(NamedTuple):
    """An encoded split, not normalised, float32, in annotation order; both locals may be None."""

    text_global: Float[np.ndarray, "q d"]
    text_local: Float[np.ndarray, "q m"] | None
    image_global: Float[np.ndarray, "g d"]
    image_local: Float[np.ndarray, "g m"] | None
    text_ids: Int[np.ndarray, " q"]
    image_ids: Int[np.ndarray, " g"]


class Metrics(NamedTuple):
    """Percentages over `queries` ranked queries; `skipped` more had no positive in the gallery."""

    R1: float
    R5: float
    R10: float
    mAP: float
    mINP: float
    rSum: float
    queries: int
    skipped: int


class Row(NamedTuple):
    """One line of the result table: `direction` is "t2i" or "i2t"."""

    direction: str
    similarity: str
    alpha: float
    metrics: Metrics


def similarity_name(alpha: float) -> str:
    """The name of alpha·cos(global) + (1-alpha)·cos(local): global, local or, say, fused@0.68."""
    return {1.0: "global", 0.0: "local"}.get(float(alpha), f"fused@{alpha:g}")


def rank(
    embeddings: Embeddings,
    *,
    alphas: Sequence[float] = FUSION_ALPHAS,
    chunk_bytes: int = CHUNK_BYTES,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Row]:
    """Ranks both directions under the global, the local and every fused similarity.

    Args:
        alphas: weights of the global cosine in the fused rows, each in [0, 1]. Adding a weight
            adds a row; 0, 1 and repeated weights add none.
        chunk_bytes: a device's working memory of one block of queries against the whole gallery,
            on top of the embeddings. It sets the number of queries of a block, at least one.
        mesh: devices that share the queries of a block; each has the whole gallery, and ranks are
            the same whatever their number. None: one device.

    Returns:
        The rows of t2i, then those of i2t: global, local, fused in the order of `alphas`. Without
        local embeddings the global row alone.

    Raises:
        ValueError: shapes disagree, a value is not finite, or no query has a positive.
    """
    _check_embeddings(embeddings)
    if bad := [alpha for alpha in alphas if not 0.0 <= alpha <= 1.0]:
        raise ValueError(f"fusion weights must lie in [0, 1], got {bad}")

    weights = [1.0]
    if embeddings.text_local is not None:
        weights = list(dict.fromkeys([1.0, 0.0, *map(float, alphas)]))

    texts = (embeddings.text_global, embeddings.text_local)
    images = (embeddings.image_global, embeddings.image_local)
    text_ids, image_ids = embeddings.text_ids, embeddings.image_ids
    t2i = _rank_side(texts, images, text_ids, image_ids, weights, chunk_bytes, mesh)
    i2t = _rank_side(images, texts, image_ids, text_ids, weights, chunk_bytes, mesh)
    return [
        Row(direction, similarity_name(alpha), alpha, metrics)
        for direction, side in (("t2i", t2i), ("i2t", i2t))
        for alpha, metrics in zip(weights, side, strict=True)
    ]


def metrics_from_similarity(
    similarity: Float[np.ndarray, "q g"],
    query_ids: Sequence[int] | np.ndarray,
    gallery_ids: Sequence[int] | np.ndarray,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Metrics:
    """Metrics of a float32 similarity matrix that is already there; `rank` never holds one."""
    similarity = np.asarray(similarity)
    if similarity.shape != (len(query_ids), len(gallery_ids)):
        raise ValueError(
            f"similarity has shape {similarity.shape}, but there are {len(query_ids)} query ids "
            f"and {len(gallery_ids)} gallery ids"
        )
    _check_finite("similarity", similarity)

    def ranks_of(chosen, padded, limit):
        block = jax.device_put(_padded_rows(similarity, chosen, len(padded)))
        return _positive_ranks(block, *jax.device_put((padded, limit)))[None]

    return _metrics(ranks_of, query_ids, gallery_ids, chunk_bytes, weights=1, width=0)[0]


def choose_alpha(rows: Sequence[Row]) -> float:
    """The weight with the best t2i R@1; then the best mAP; then the larger weight.

    The candidates are the rows' own weights: by default {0, .1, ..., 1, .32, .68}, where 1 is the
    global and 0 the local similarity.
    """
    candidates = [row for row in rows if row.direction == "t2i"]
    if not candidates:
        raise ValueError("choosing a fusion weight needs at least one t2i row, got none")
    return max(candidates, key=lambda row: (row.metrics.R1, row.metrics.mAP, row.alpha)).alpha


def block_rows(
    queries: int, gallery: int, positives: int, *, weights: int, width: int, chunk_bytes: int
) -> int:
    """Queries per block, so that one block's arrays stay within `chunk_bytes`.

    `width` is that of the global and the local embedding together.
    """
    # Per query: the global, local and fused similarities to the gallery and one temporary; its
    # embeddings, raw on the host, then raw and normalised on the device; the ranks of every
    # weight and, one weight at a time on the host, their sort and precisions.
    similarities = 4 * 4 * gallery
    features = 3 * 4 * width
    ranks = 4 * (2 * weights + 2) * positives + 3 * 8 * positives
    blocks = -(-queries // max(1, chunk_bytes // (similarities + features + ranks)))
    return -(-queries // blocks)  # Equal blocks: the last one is padded as little as possible.


@jax.jit
def fused_ranks(
    queries: tuple[Float[Array, "q d"], Float[Array, "q m"] | None],
    gallery: tuple[Float[Array, "g d"], Float[Array, "g m"] | None],
    fusion: Float[Array, "a 2"],
    positives: Int[Array, "q p"],
    limit: Int[Array, ""],
) -> Int[Array, "a q p"]:
    """Ranks of the first `limit` positives under every row (alpha, 1-alpha) of `fusion`.

    Embeddings are normalised. `positives` holds gallery indices; entries past a query's own
    positives get a meaningless rank.
    """
    global_block, local_block = (
        None if query is None else _similarity(query, item)
        for query, item in zip(queries, gallery, strict=True)
    )

    def ranks_of(weight):
        if local_block is None:
            return _positive_ranks(global_block, positives, limit)
        fused = weight[0] * global_block + weight[1] * local_block
        return _positive_ranks(fused, positives, limit)

    return jax.lax.map(ranks_of, fusion)


@jax.jit
def _positive_ranks(
    block: Float[Array, "q g"], positives: Int[Array, "q p"], limit: Int[Array, ""]
) -> Int[Array, "q p"]:
    # A positive's score must be the very bits it is compared with. Without the barrier the
    # compiler may compute the fused block twice, once with other roundings for the gather.
    block = jax.lax.optimization_barrier(block)

    def count(j, ranks):
        index = jax.lax.broadcasted_iota(jnp.int32, block.shape, 1)
        positive = jax.lax.dynamic_slice_in_dim(positives, j, 1, axis=1)
        score = jnp.take_along_axis(block, positive, axis=1)
        ahead = (block > score) | ((block == score) & (index < positive))
        rank_j = 1 + jnp.sum(ahead, axis=1, keepdims=True, dtype=jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(ranks, rank_j, j, axis=1)

    # One positive at a time keeps memory at (q, g); the bound is traced, so blocks of queries
    # with few positives stop early without another compilation.
    return jax.lax.fori_loop(0, limit, count, jnp.full(positives.shape, _UNRANKED, jnp.int32))


def _similarity(left: Float[Array, "q d"], right: Float[Array, "g d"]) -> Float[Array, "q g"]:
    # Full float32 products: TF32 or bfloat16 passes would move ranks.
    return jnp.einsum("qd,gd->qg", left, right, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _to(place: jax.sharding.Sharding):
    return jax.jit(lambda x: x, out_shardings=place)


@jax.jit
def _normalise(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    # The evaluator's rule, max(norm, 1e-12); the model's own l2norm adds 1e-8 instead.
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _rank_side(
    queries, gallery, query_ids, gallery_ids, weights, chunk_bytes, mesh
) -> list[Metrics]:
    whole = rows = None
    if mesh is not None:
        whole, rows = sharding.replicated(mesh), sharding.batch(mesh)
    # The complement is taken in double precision: 1 - float32(.9) is not float32(.1).
    fusion = sharding.put(np.array([(a, 1.0 - a) for a in weights], np.float32), whole)
    gallery = jax.tree.map(lambda x: _normalise(sharding.put(_float32(x), whole)), gallery)

    def ranks_of(chosen, padded, limit):
        block = jax.tree.map(
            lambda x: _normalise(sharding.put(_padded_rows(x, chosen, len(padded)), rows)), queries
        )
        ranks = fused_ranks(
            block, gallery, fusion, sharding.put(padded, rows), sharding.put(limit, whole)
        )
        # Every host needs all ranks, also those of the devices that it cannot reach.
        return ranks if whole is None else _to(whole)(ranks)

    width = sum(x.shape[1] for x in jax.tree.leaves(queries))
    return _metrics(
        ranks_of,
        query_ids,
        gallery_ids,
        chunk_bytes,
        weights=len(weights),
        width=width,
        shares=1 if mesh is None else mesh.shape["data"],
    )


def _metrics(
    ranks_of, query_ids, gallery_ids, chunk_bytes, *, weights, width, shares=1
) -> list[Metrics]:
    """Runs `ranks_of(queries, positives, limit) -> (weights, rows, p)` over all blocks.

    A block has a multiple of `shares` rows.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    # Gallery indices grouped by identity, ascending within one: a query's positives are a slice.
    grouped = np.argsort(gallery_ids, kind="stable")
    sorted_ids = gallery_ids[grouped]
    start = np.searchsorted(sorted_ids, query_ids, side="left")
    count = np.searchsorted(sorted_ids, query_ids, side="right") - start

    ranked = np.flatnonzero(count)
    if not ranked.size:
        raise ValueError(
            f"none of the {len(query_ids)} queries has a positive among the {len(gallery_ids)} "
            "gallery entries: do the identities of texts and images come from the same split?"
        )
    # Queries with equally many positives share a block; the counting loop is as long as the most.
    ranked = ranked[np.argsort(count[ranked], kind="stable")]
    most = int(count.max())
    rows = block_rows(
        len(ranked),
        len(gallery_ids),
        most,
        weights=weights,
        width=width,
        chunk_bytes=chunk_bytes * shares,
    )
    rows = -(-rows // shares) * shares

    first = np.zeros((weights, len(query_ids)), np.int64)
    average_precision = np.zeros((weights, len(query_ids)))
    inverse_penalty = np.zeros((weights, len(query_ids)))
    steps = np.arange(1, most + 1)
    for begin in range(0, len(ranked), rows):
        chosen = ranked[begin : begin + rows]
        valid = steps <= count[chosen, None]
        padded = np.zeros((rows, most), np.int32)
        padded[: len(chosen)] = np.where(
            valid, grouped[np.minimum(start[chosen, None] + steps - 1, len(grouped) - 1)], 0
        )
        limit = np.array(count[chosen].max(), np.int32)
        ranks = jax.device_get(ranks_of(chosen, padded, limit))
        for a in range(weights):
            # Padding sorts last, so position j holds the rank of the j-th positive found.
            found = np.sort(np.where(valid, ranks[a, : len(chosen)], _UNRANKED), axis=1)
            precision = np.where(valid, steps / found, 0.0)
            first[a, chosen] = found[:, 0]
            average_precision[a, chosen] = precision.sum(axis=1) / count[chosen]
            last = np.take_along_axis(found, count[chosen, None] - 1, axis=1)[:, 0]
            inverse_penalty[a, chosen] = count[chosen] / last

    result = []
    ranked.sort()  # Sums in query order, so that the size of a block cannot change a bit of them.
    for a in range(weights):
        r1, r5, r10 = (100.0 * float(np.mean(first[a, ranked] <= k)) for k in (1, 5, 10))
        mean_ap = 100.0 * float(np.mean(average_precision[a, ranked]))
        mean_inp = 100.0 * float(np.mean(inverse_penalty[a, ranked]))
        skipped = len(query_ids) - len(ranked)
        total = r1 + r5 + r10
        result.append(Metrics(r1, r5, r10, mean_ap, mean_inp, total, len(ranked), skipped))
    return result


def _padded_rows(x, chosen, rows):
    block = np.zeros((rows, x.shape[1]), np.float32)
    block[: len(chosen)] = x[chosen]
    return block


def _float32(x):
    return np.asarray(x, np.float32)


def _check_embeddings(embeddings: Embeddings) -> None:
    if (embeddings.text_local is None) != (embeddings.image_local is None):
        raise ValueError("texts and images must both have local embeddings, or neither")
    for kind in ("global", "local"):
        text = getattr(embeddings, f"text_{kind}")
        image = getattr(embeddings, f"image_{kind}")
        if text is None:
            continue
        if text.ndim != 2 or image.ndim != 2 or text.shape[1] != image.shape[1]:
            raise ValueError(
                f"{kind} embeddings must be (texts, d) and (images, d) with the same d, got "
                f"{text.shape} and {image.shape}"
            )
        for side, x, ids in (
            ("text", text, embeddings.text_ids),
            ("image", image, embeddings.image_ids),
        ):
            if len(x) != len(ids):
                raise ValueError(
                    f"{side}_{kind} has {len(x)} rows, but there are {len(ids)} {side}_ids"
                )
            _check_finite(f"{side}_{kind}", x)


def _check_finite(name, x) -> None:
    # Every comparison with NaN is false, so a NaN positive would count as rank 1.
    if bad := sum(not np.isfinite(row).all() for row in x):
        raise ValueError(
            f"{name} has NaN or infinite values in {bad} of {len(x)} rows: the weights or the "
            "inputs that produced it are broken, so it cannot be ranked"
        )
