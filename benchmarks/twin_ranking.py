"""Ranking in PyTorch, to go with the twin: `itself_jax.retrieval.rank` is timed beside it.

Written from the description of the evaluation, like `twin.py`, in the same two modes:

- `lean`: blocks of queries against the gallery, both similarities once a block, one sort for each
  fused row, everything after it vectorised.
- `published`: the work that the published code does. All similarity matrices first, a full sort of
  each, Python loops over ranks (for mAP) and queries (for mINP).

Both rank both directions, as we do; the published code ranks pictures for texts only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Metrics(NamedTuple):
    """Percentages over all queries."""

    R1: float
    R5: float
    R10: float
    mAP: float
    mINP: float


class Side(NamedTuple):
    """Embeddings of texts or pictures (n, d) and (n, m) or None, and their identities (n,)."""

    global_: Tensor
    local: Tensor | None
    ids: Tensor


@torch.no_grad()
def rank(
    texts: Side,
    images: Side,
    alphas: Sequence[float],
    mode: str,
    *,
    block_bytes: int = 64 << 20,
) -> list[Metrics]:
    """Text→image under every weight of the global cosine, then image→text. Every query has a match.

    block_bytes: memory of one similarity block in mode `lean`.
    """
    texts, images = (
        Side(F.normalize(s.global_), None if s.local is None else F.normalize(s.local), s.ids)
        for s in (texts, images)
    )
    ranked = _published if mode == "published" else _lean
    return [
        metrics
        for queries, gallery in ((texts, images), (images, texts))
        for metrics in ranked(queries, gallery, alphas, block_bytes)
    ]


def _lean(queries: Side, gallery: Side, alphas: Sequence[float], block_bytes: int) -> list[Metrics]:
    rows = max(1, block_bytes // (4 * len(gallery.ids)))
    positions = torch.arange(1, len(gallery.ids) + 1, device=gallery.ids.device)
    sums = torch.zeros(len(alphas), 5, dtype=torch.float64)
    for start in range(0, len(queries.ids), rows):
        chosen = slice(start, start + rows)
        of_global = queries.global_[chosen] @ gallery.global_.T
        of_local = None if queries.local is None else queries.local[chosen] @ gallery.local.T
        for row, alpha in enumerate(alphas):
            fused = _fused(of_global, of_local, alpha)
            order = fused.sort(dim=1, descending=True, stable=True).indices
            found = gallery.ids[order] == queries.ids[chosen, None]
            hits, count = found.cumsum(dim=1), found.sum(dim=1)
            precision = (hits / positions * found).sum(dim=1) / count
            hardest = (positions * found).amax(dim=1)
            parts = [found[:, :k].any(dim=1) for k in (1, 5, 10)] + [precision, count / hardest]
            sums[row] += torch.stack([part.double().sum() for part in parts]).cpu()
    return [Metrics(*row) for row in (100 * sums / len(queries.ids)).tolist()]


def _published(
    queries: Side, gallery: Side, alphas: Sequence[float], block_bytes: int
) -> list[Metrics]:
    del block_bytes
    of_global = queries.global_ @ gallery.global_.T
    of_local = None if queries.local is None else queries.local @ gallery.local.T
    matrices = [_fused(of_global, of_local, alpha) for alpha in alphas]
    return [_of_matrix(matrix, queries.ids, gallery.ids) for matrix in matrices]


def _of_matrix(similarity: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Metrics:
    order = similarity.argsort(dim=1, descending=True)
    found = gallery_ids[order] == query_ids[:, None]
    recalls = [found[:, :k].any(dim=1).double().mean().item() for k in (1, 5, 10)]
    hits = found.cumsum(dim=1)
    at_each = [hits[:, i] / (i + 1.0) for i in range(hits.shape[1])]
    precision = (torch.stack(at_each, dim=1) * found).sum(dim=1) / found.sum(dim=1)
    hardest = []
    for row, hit in zip(found, hits, strict=True):
        last = row.nonzero()[-1]
        hardest.append(hit[last] / (last + 1.0))
    values = [*recalls, precision.double().mean().item(), torch.cat(hardest).double().mean().item()]
    return Metrics(*(100 * value for value in values))


def _fused(of_global: Tensor, of_local: Tensor | None, alpha: float) -> Tensor:
    if of_local is None or alpha == 1:
        return of_global
    return of_local if alpha == 0 else alpha * of_global + (1 - alpha) * of_local
