"""Retrieval metrics: R@k, mAP and mINP from the ranks of the positives, in bounded memory.

No ranking is ever sorted. The rank of a positive `p` of query `q` is a count,

    rank = 1 + #{i: s_qi > s_qp} + #{i: s_qi == s_qp and i < p},

so equal similarities keep gallery order and the result does not depend on a backend's argsort
(the reference's does). The ranks of its positives determine every metric of a query. Counts of
parts of a gallery add up, so that it may be larger than the memory.

Letters: `q` queries, `g` gallery, `d` embedding, `m` local embedding, `p` positives of a query
padded to the most that any query has, `a` fusion weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from itself_jax import sharding

# The weights the reference prints, in its order; `global` (1) and `local` (0) come before them.
FUSION_ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.68, 0.32)

# Blocks near a CPU's cache: with many positives a query, four times this took 1.5 to 1.9 as long.
CHUNK_BYTES = 16 * 2**20
DIRECTIONS = ("t2i", "i2t")

_UNRANKED = np.iinfo(np.int32).max
_CHECKED_ROWS = 4096  # at a time
# Normalised embeddings, and counts, that stay on a device, in chunks: many queries share a block of
# the gallery.
_QUERY_CHUNKS, _GALLERY_CHUNKS = 8, 4


class Embeddings(NamedTuple):
    """An encoded split, not normalised, float32, in annotation order; both locals may be None.

    `rank` reads slices of rows and, of queries, chosen rows: anything with a shape that gives
    these will do, e.g. `np.load(file, mmap_mode="r")`.
    """

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
    directions: Sequence[str] = DIRECTIONS,
    chunk_bytes: int = CHUNK_BYTES,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Row]:
    """Ranks both directions under the global, the local and every fused similarity.

    Args:
        alphas: weights of the global cosine in the fused rows, each in [0, 1]. Adding a weight
            adds a row; 0, 1 and repeated weights add none.
        directions: "t2i" (a text ranks the images), "i2t", or both.
        chunk_bytes: a device's working memory for one block of queries against one block of the
            gallery; normalised embeddings and counts of many such blocks take up to twelve times
            as much. At least one query is worked on by each device. The embeddings themselves come
            on top. Products of other blocks may round otherwise: similarities that differ in the
            last bit may then change places.
        mesh: devices that share the queries of a block; each has the whole block of the gallery,
            and ranks are the same whatever their number. None: one device.

    Returns:
        The rows of each direction: global, local, fused in the order of `alphas`. Without local
        embeddings the global row alone.

    Raises:
        ValueError: shapes disagree, a value is not finite, or no query has a positive.
    """
    _check_embeddings(embeddings)
    if bad := [alpha for alpha in alphas if not 0.0 <= alpha <= 1.0]:
        raise ValueError(f"fusion weights must lie in [0, 1], got {bad}")
    if unknown := [name for name in directions if name not in DIRECTIONS]:
        raise ValueError(f"directions must be some of {DIRECTIONS}, got {unknown}")

    weights = [1.0]
    if embeddings.text_local is not None:
        weights = list(dict.fromkeys([1.0, 0.0, *map(float, alphas)]))

    texts = _Side((embeddings.text_global, embeddings.text_local), embeddings.text_ids)
    images = _Side((embeddings.image_global, embeddings.image_local), embeddings.image_ids)
    rows = []
    for direction in directions:
        sides = (texts, images) if direction == "t2i" else (images, texts)
        for alpha, metrics in zip(
            weights, _rank_side(*sides, weights, chunk_bytes, mesh), strict=True
        ):
            rows.append(Row(direction, similarity_name(alpha), alpha, metrics))
    return rows


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

    tally = _Tally(query_ids, gallery_ids, weights=1)
    shape = Blocks.fit(tally, weights=1, width=0, chunk_bytes=chunk_bytes, whole_gallery=True)
    for chosen in tally.blocks(shape):
        positives, limit = tally.positives(chosen, shape.queries)
        block = jax.device_put(_padded_rows(similarity, chosen, shape.queries))
        tally.add(chosen, jax.device_get(_ranks(block, *jax.device_put((positives, limit)))))
    return tally.metrics()[0]


def choose_alpha(rows: Sequence[Row]) -> float:
    """The weight with the best t2i R@1; then the best mAP; then the larger weight.

    The candidates are the rows' own weights: by default {0, .1, ..., 1, .32, .68}, where 1 is the
    global and 0 the local similarity.
    """
    candidates = [row for row in rows if row.direction == "t2i"]
    if not candidates:
        raise ValueError("choosing a fusion weight needs at least one t2i row, got none")
    return max(candidates, key=lambda row: (row.metrics.R1, row.metrics.mAP, row.alpha)).alpha


class Blocks(NamedTuple):
    """Rows of queries and of the gallery that are worked on at a time."""

    queries: int
    gallery: int

    @classmethod
    def fit(
        cls,
        tally: "_Tally",
        *,
        weights: int,
        width: int,
        chunk_bytes: int,
        shares: int = 1,
        whole_gallery: bool = False,
    ) -> "Blocks":
        """Blocks whose arrays stay within `chunk_bytes` on each device.

        `width` is that of the global and the local embedding together; `shares`: devices that
        share the queries of a block, whose number is a multiple of it.
        """
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
        size = len(tally.gallery_ids)
        gallery = size
        if not whole_gallery:  # as read and normalised, on the host and on the device
            gallery = _equal_parts(size, _GALLERY_CHUNKS * chunk_bytes // (3 * 4 * width))
        # Per query: the global, local and fused similarities to the gallery and one temporary; its
        # embeddings, raw on the host, then raw and normalised on the device; scores and counts of
        # every weight and, one weight at a time on the host, their sort and precisions.
        similarities = 4 * 4 * gallery
        features = 3 * 4 * width
        ranks = 4 * (4 * weights + 2) * tally.most + 3 * 8 * tally.most
        each = max(1, chunk_bytes // (similarities + features + ranks))
        queries = _equal_parts(-(-len(tally.ranked) // shares), each)
        return cls(queries * shares, gallery)


def _equal_parts(total: int, most: int) -> int:
    """The size of parts of at most `most`: the last one is padded as little as possible."""
    return -(-total // -(-total // max(1, most)))


def count_ahead(
    queries: tuple[Float[Array, "q d"], Float[Array, "q m"] | None],
    gallery: tuple[Float[Array, "g d"], Float[Array, "g m"] | None],
    fusion: Float[Array, "a 2"],
    positives: Int[Array, "q p"],
    scores: Float[Array, "q a p"],
    ahead: Int[Array, "q a p"],
    bounds: Int[Array, " 3"],
) -> tuple[Float[Array, "q a p"], Int[Array, "q a p"]]:
    """How much of one block of the gallery is ahead of the positives of one block of queries.

    Under every row (alpha, 1-alpha) of `fusion`. Embeddings are normalised. `positives` holds
    places in the whole gallery; entries past a query's own positives get meaningless numbers.

    Args:
        scores: similarities of the positives, as far as they are known.
        ahead: counts of the blocks before.
        bounds: the block is [start, stop) of the gallery, and its further rows are padding; the
            first `limit` positives are counted for. Traced: one compilation serves all blocks.

    Returns:
        `scores` with those of the positives inside the block, and `ahead` with this block's counts.
    """
    start, stop, limit = bounds
    global_block, local_block = (
        None if query is None else _similarity(query, item)
        for query, item in zip(queries, gallery, strict=True)
    )

    def of_weight(
        given: tuple[Float[Array, "2"], Float[Array, "q p"], Int[Array, "q p"]],
    ) -> tuple[Float[Array, "q p"], Int[Array, "q p"]]:
        weight, scores, ahead = given
        fused = global_block
        if local_block is not None:
            fused = weight[0] * global_block + weight[1] * local_block
        scores, counts = _count(fused, positives, scores, start, stop, limit)
        return scores, ahead + counts

    by_weight = (jnp.moveaxis(x, 1, 0) for x in (scores, ahead))
    found = jax.lax.map(of_weight, (fusion, *by_weight))
    return tuple(jnp.moveaxis(x, 0, 1) for x in found)


@functools.cache
def _counting(rows: jax.sharding.Sharding | None) -> Callable[..., Any]:
    """`count_ahead`, compiled; results stay with their queries."""
    return jax.jit(count_ahead, out_shardings=rows)


@jax.jit
def _ranks(
    block: Float[Array, "q g"], positives: Int[Array, "q p"], limit: Int[Array, ""]
) -> Int[Array, "q 1 p"]:
    """Ranks of a similarity that is there already, in a whole gallery."""
    nothing = jnp.zeros(positives.shape)
    return 1 + _count(block, positives, nothing, 0, block.shape[1], limit)[1][:, None]


def _count(
    block, positives, scores, start, stop, limit
) -> tuple[Float[Array, "q p"], Int[Array, "q p"]]:
    """Scores of the positives inside the block, and how many of its entries are ahead of each."""
    # A positive's score must be the very bits it is compared with. Without the barrier the
    # compiler may compute the fused block twice, once with other roundings for the gather.
    block = jax.lax.optimization_barrier(block)
    inside = (positives >= start) & (positives < start + block.shape[1])
    place = jnp.where(inside, positives - start, 0)
    scores = jnp.where(inside, jnp.take_along_axis(block, place, axis=1), scores)

    def count(j, counts):
        index = jax.lax.broadcasted_iota(jnp.int32, block.shape, 1)
        positive = jax.lax.dynamic_slice_in_dim(positives, j, 1, axis=1)
        score = jax.lax.dynamic_slice_in_dim(scores, j, 1, axis=1)
        ahead = (block > score) | ((block == score) & (index < positive - start))
        count_j = jnp.sum(ahead & (index < stop - start), axis=1, keepdims=True, dtype=jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(counts, count_j, j, axis=1)

    # One positive at a time keeps memory at (q, g); the bound is traced, so blocks of queries
    # with few positives stop early without another compilation.
    return scores, jax.lax.fori_loop(0, limit, count, jnp.zeros(positives.shape, jnp.int32))


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


class _Side(NamedTuple):
    """Queries, or a gallery."""

    features: tuple[Any, Any | None]
    ids: Any


@dataclasses.dataclass
class _Block:
    """A block of queries on the device, and what was counted for it.

    Attributes:
        chosen: places of the queries. positives: of theirs in the gallery, padded; placed: the
            same on the device. limit: the most positives of any of these queries.
        features, scores, ahead: as `count_ahead` takes them.
    """

    chosen: np.ndarray
    positives: np.ndarray
    features: Any
    scores: Any
    ahead: Any
    placed: Any
    limit: np.ndarray

    def has_positives(self, start: int, stop: int) -> bool:
        return bool(((self.positives >= start) & (self.positives < stop)).any())


def _rank_side(queries: _Side, gallery: _Side, weights, chunk_bytes, mesh) -> list[Metrics]:
    whole = rows = None
    if mesh is not None:
        whole, rows = sharding.replicated(mesh), sharding.batch(mesh)
    shares = 1 if mesh is None else mesh.shape["data"]
    width = sum(x.shape[1] for x in queries.features if x is not None)
    tally = _Tally(queries.ids, gallery.ids, weights=len(weights))
    shape = Blocks.fit(
        tally, weights=len(weights), width=width, chunk_bytes=chunk_bytes, shares=shares
    )
    # The complement is taken in double precision: 1 - float32(.9) is not float32(.1).
    fusion = sharding.put(np.array([(a, 1.0 - a) for a in weights], np.float32), whole)
    count = _counting(rows)

    def prepared(chosen: np.ndarray) -> _Block:
        positives, limit = tally.positives(chosen, shape.queries)
        counters = shape.queries, len(weights), tally.most
        return _Block(
            chosen,
            positives,
            _placed(queries, chosen, shape.queries, rows),
            scores=sharding.put(np.zeros(counters, np.float32), rows),
            ahead=sharding.put(np.zeros(counters, np.int32), rows),
            placed=sharding.put(positives, rows),
            limit=limit,
        )

    size = len(gallery.ids)
    starts = range(0, size, shape.gallery)
    blocks = tally.blocks(shape)
    # Many blocks of queries share a reading of the gallery, unless it can stay.
    together, only = 2, None
    if len(starts) == 1:
        only = _placed(gallery, slice(0, size), shape.gallery, whole)
    else:
        per_query = 4 * (width + (2 * len(weights) + 1) * tally.most)
        together = max(1, _QUERY_CHUNKS * chunk_bytes * shares // (per_query * shape.queries))
    for begin in range(0, len(blocks), together):
        group = [prepared(chosen) for chosen in blocks[begin : begin + together]]
        # A positive's score must be known before the first block is counted: where the gallery is
        # more than one, those with positives are computed twice.
        for counts in (False, True) if len(starts) > 1 else (True,):
            before = None
            for start in starts:
                bounds = start, min(start + shape.gallery, size)
                wanted = [x for x in group if counts or x.has_positives(*bounds)]
                if not wanted:
                    continue
                part = only or _placed(gallery, slice(*bounds), shape.gallery, whole)
                for x in wanted:
                    limited = np.array([*bounds, x.limit if counts else 0], np.int32)
                    x.scores, x.ahead = count(
                        x.features,
                        part,
                        fusion,
                        x.placed,
                        x.scores,
                        x.ahead,
                        sharding.put(limited, whole),
                    )
                # Dispatch is asynchronous: one block may be read ahead, not the whole gallery.
                jax.block_until_ready(before)
                before = wanted[-1].ahead
        for x in group:
            # Every host needs all ranks, also those of the devices that it cannot reach.
            ahead = x.ahead if whole is None else _to(whole)(x.ahead)
            tally.add(x.chosen, 1 + jax.device_get(ahead))
    return tally.metrics()


def _placed(side: _Side, chosen: Any, rows: int, where: jax.sharding.Sharding | None) -> Any:
    """Chosen rows of both embeddings, padded and normalised, on the device."""
    return tuple(
        None if x is None else _normalise(sharding.put(_padded_rows(x, chosen, rows), where))
        for x in side.features
    )


class _Tally:
    """Who the positives of each query are, and what their ranks make of it.

    Attributes:
        ranked: queries with a positive.
        count: positives of each query; most: of any.
    """

    def __init__(self, query_ids: Any, gallery_ids: Any, *, weights: int):
        query_ids, self.gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
        # Gallery places by identity, ascending within one: a query's positives are a slice.
        self._grouped = np.argsort(self.gallery_ids, kind="stable")
        sorted_ids = self.gallery_ids[self._grouped]
        self._start = np.searchsorted(sorted_ids, query_ids, side="left")
        self.count = np.searchsorted(sorted_ids, query_ids, side="right") - self._start
        self.ranked = np.flatnonzero(self.count)
        if not self.ranked.size:
            raise ValueError(
                f"none of the {len(query_ids)} queries has a positive among the "
                f"{len(self.gallery_ids)} gallery entries: do the identities of texts and images "
                "come from the same split?"
            )
        self.most = int(self.count.max())
        self._first = np.zeros((weights, len(query_ids)), np.int64)
        self._average_precision = np.zeros((weights, len(query_ids)))
        self._inverse_penalty = np.zeros((weights, len(query_ids)))

    def blocks(self, shape: Blocks) -> list[np.ndarray]:
        """The queries with a positive, in blocks.

        Those whose first positives are in one block of the gallery come together, so that few
        blocks are computed for the scores alone; and those with equally many, since the counting
        loop is as long as the most of a block.
        """
        first = self._grouped[self._start[self.ranked]] // shape.gallery
        order = self.ranked[np.lexsort((self.count[self.ranked], first))]
        return [order[i : i + shape.queries] for i in range(0, len(order), shape.queries)]

    def positives(self, chosen: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a block, padded to `rows`: places in the gallery (rows, most), and the most of any."""
        padded = np.zeros((rows, self.most), np.int32)
        places = self._start[chosen, None] + np.arange(self.most)
        places = self._grouped[np.minimum(places, len(self._grouped) - 1)]
        padded[: len(chosen)] = np.where(self._valid(chosen), places, places[:, :1])
        padded[len(chosen) :] = padded[0]  # nothing new to look for
        return padded, np.array(self.count[chosen].max(), np.int32)

    def add(self, chosen: np.ndarray, ranks: Int[np.ndarray, "rows a p"]) -> None:
        """Takes in the ranks of a block's positives."""
        count, valid = self.count[chosen], self._valid(chosen)
        for a in range(ranks.shape[1]):
            # Padding sorts last, so position j holds the rank of the j-th positive found.
            found = np.sort(np.where(valid, ranks[: len(chosen), a], _UNRANKED), axis=1)
            precision = np.where(valid, np.arange(1, self.most + 1) / found, 0.0)
            self._first[a, chosen] = found[:, 0]
            self._average_precision[a, chosen] = precision.sum(axis=1) / count
            last = np.take_along_axis(found, count[:, None] - 1, axis=1)[:, 0]
            self._inverse_penalty[a, chosen] = count / last

    def metrics(self) -> list[Metrics]:
        """Of each weight, over all queries that have a positive."""
        result, ranked = [], self.ranked
        skipped = len(self.count) - len(ranked)
        for first, precision, penalty in zip(
            self._first, self._average_precision, self._inverse_penalty, strict=True
        ):
            r1, r5, r10 = (100.0 * float(np.mean(first[ranked] <= k)) for k in (1, 5, 10))
            mean_ap = 100.0 * float(np.mean(precision[ranked]))
            mean_inp = 100.0 * float(np.mean(penalty[ranked]))
            total = r1 + r5 + r10
            result.append(Metrics(r1, r5, r10, mean_ap, mean_inp, total, len(ranked), skipped))
        return result

    def _valid(self, chosen: np.ndarray) -> np.ndarray:
        return np.arange(self.most) < self.count[chosen, None]


def _padded_rows(x, chosen, rows):
    found = x[chosen]
    block = np.zeros((rows, x.shape[1]), np.float32)
    block[: len(found)] = found
    return block


def _check_embeddings(embeddings: Embeddings) -> None:
    if (embeddings.text_local is None) != (embeddings.image_local is None):
        raise ValueError("texts and images must both have local embeddings, or neither")
    for kind in ("global", "local"):
        text = getattr(embeddings, f"text_{kind}")
        image = getattr(embeddings, f"image_{kind}")
        if text is None:
            continue
        if len(text.shape) != 2 or len(image.shape) != 2 or text.shape[1] != image.shape[1]:
            raise ValueError(
                f"{kind} embeddings must be (texts, d) and (images, d) with the same d, got "
                f"{text.shape} and {image.shape}"
            )
        for side, x, ids in (
            ("text", text, embeddings.text_ids),
            ("image", image, embeddings.image_ids),
        ):
            if x.shape[0] != len(ids):
                raise ValueError(
                    f"{side}_{kind} has {x.shape[0]} rows, but there are {len(ids)} {side}_ids"
                )
            _check_finite(f"{side}_{kind}", x)


def _check_finite(name, x) -> None:
    # Every comparison with NaN is false, so a NaN positive would count as rank 1.
    size, bad = x.shape[0], 0
    for start in range(0, size, _CHECKED_ROWS):
        bad += int((~np.isfinite(x[start : min(start + _CHECKED_ROWS, size)])).any(axis=1).sum())
    if bad:
        raise ValueError(
            f"{name} has NaN or infinite values in {bad} of {size} rows: the weights or the "
            "inputs that produced it are broken, so it cannot be ranked"
        )
