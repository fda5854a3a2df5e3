"""What each query is answered with: the first right answer, the first ten, similarities of pairs.

`retrieval.rank` gives the metrics and keeps no answer; a report wants to show some.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from itself_jax import retrieval

BINS = 80  # of similarities in [-1, 1]
_BLOCK = 256  # queries at a time


class Answers(NamedTuple):
    """Per query, in the order of the queries; ranks count from 1.

    first_right: rank of the best right answer, 0 where the gallery has none.
    right: which gallery item that is, and its similarity.
    top: the first ten (or all) gallery items, and their similarities.
    matched, unmatched: how many pairs of each kind lie in each of `BINS` equal parts of [-1, 1].
    """

    first_right: Shaped[np.ndarray | Array, " q"]
    right: Shaped[np.ndarray | Array, " q"]
    right_similarity: Shaped[np.ndarray | Array, " q"]
    top: Shaped[np.ndarray | Array, "q r"]
    top_similarity: Shaped[np.ndarray | Array, "q r"]
    matched: Shaped[np.ndarray | Array, " c"]
    unmatched: Shaped[np.ndarray | Array, " c"]


def find(
    embeddings: retrieval.Embeddings,
    alpha: float,
    direction: str,
    *,
    top: int = 10,
    should_stop: Callable[[], None] = lambda: None,
) -> Answers:
    """Ranks by alpha·cos(global) + (1-alpha)·cos(local); ties keep the order of the gallery.

    should_stop: called before each block of queries; may raise.
    """
    sides = [
        (embeddings.text_global, embeddings.text_local, embeddings.text_ids),
        (embeddings.image_global, embeddings.image_local, embeddings.image_ids),
    ]
    if direction == "i2t":
        sides.reverse()
    (*queries, query_ids), (*gallery, gallery_ids) = sides
    weights = [alpha, 1.0 - alpha] if queries[1] is not None else [1.0]
    parts = [
        (w, q, g) for w, q, g in zip(weights, queries, gallery, strict=False) if w and q is not None
    ]
    gallery = [jax.device_put(w * _normalised(g)) for w, _, g in parts]
    found = []
    for start in range(0, len(query_ids), _BLOCK):
        should_stop()
        rows = slice(start, start + _BLOCK)
        block = [_normalised(q[rows]) for _, q, _ in parts]
        most = min(top, len(gallery_ids))
        found.append(jax.device_get(_block(block, gallery, query_ids[rows], gallery_ids, most)))
    return Answers(
        *(
            np.sum(x, axis=0, dtype=np.int64) if name.endswith("matched") else np.concatenate(x)
            for name, x in zip(Answers._fields, zip(*found, strict=True), strict=True)
        )
    )


def _normalised(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@jax.jit(static_argnums=4)
def _block(
    queries: list[Float[Array, "q _"]],
    gallery: list[Float[Array, "g _"]],
    query_ids: Int[Array, " q"],
    gallery_ids: Int[Array, " g"],
    top: int,
) -> "Answers":
    exact = jax.lax.Precision.HIGHEST
    similarity = sum(
        jnp.matmul(q, g.T, precision=exact) for q, g in zip(queries, gallery, strict=True)
    )
    is_right = query_ids[:, None] == gallery_ids[None]
    candidates = jnp.where(is_right, similarity, -jnp.inf)
    right = jnp.argmax(candidates, axis=1)  # the first of equal ones
    best = jnp.take_along_axis(candidates, right[:, None], axis=1)
    earlier = jnp.arange(len(gallery_ids))[None] < right[:, None]
    ahead = (similarity > best) | ((similarity == best) & earlier)
    first_right = jnp.where(is_right.any(axis=1), 1 + ahead.sum(axis=1), 0)
    top_similarity, top_index = jax.lax.top_k(similarity, top)
    bins = jnp.clip((similarity + 1) * (BINS / 2), 0, BINS - 1).astype(jnp.int32)
    everything = jnp.bincount(bins.ravel(), length=BINS)
    matched = jnp.bincount(bins.ravel(), weights=is_right.ravel().astype(jnp.int32), length=BINS)
    return Answers(
        first_right=first_right,
        right=right,
        right_similarity=best[:, 0],
        top=top_index,
        top_similarity=top_similarity,
        matched=matched,
        unmatched=everything - matched,
    )


def spread(answers: Answers, owners: Int[np.ndarray, " q"], count: int) -> dict[str, list[int]]:
    """Some queries of each kind, no person twice in a kind: "best", "median", "worst".

    By the rank of the first right answer, among equal ranks the more similar one first; queries
    without a right answer are left out.
    """
    ranked = np.flatnonzero(answers.first_right > 0)
    order = ranked[
        np.lexsort((-answers.right_similarity[ranked], answers.first_right[ranked]))
    ].tolist()
    middle = len(order) // 2
    around = sorted(range(len(order)), key=lambda at: (abs(at - middle), at))
    return {
        "best": _of_different(order, owners, count),
        "median": _of_different([order[at] for at in around], owners, count),
        "worst": _of_different(order[::-1], owners, count),
    }


def _of_different(order: list[int], owners: Int[np.ndarray, " q"], count: int) -> list[int]:
    chosen: dict[int, int] = {}
    for query in order:
        if len(chosen) < count:
            chosen.setdefault(int(owners[query]), query)
    return list(chosen.values())
