"""Evaluation of a split: encode it, keep its embeddings, write and print its metrics.

Ranking itself is in `retrieval.py`. Nothing here knows the model: encoders are functions from a
batch on the device to a named result with `global_` and `local`.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np
from jaxtyping import Float

from itself_jax import files, retrieval

METRICS = ("R1", "R5", "R10", "mAP", "mINP", "rSum")
_DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}


def encode_corpus(
    encode_image: Callable[[jax.Array], Any],
    encode_text: Callable[[jax.Array], Any],
    image_batches: Iterable[tuple[np.ndarray, np.ndarray]],
    caption_batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    split,
    should_stop: Callable[[], None] = lambda: None,
    place: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> retrieval.Embeddings:
    """Encodes every image and every caption of a split once.

    The batches of one side should have few shapes, since its encoder compiles for each.

    Args:
        encode_image: uint8 images (b, H, W, 3) to a named tuple with `global_` (b, D) and `local`
            (b, M) or None.
        encode_text: int32 tokens (b, t) to the same.
        image_batches: pairs (images, indices): row i is image indices[i] of the split; rows behind
            those are padding.
        caption_batches: pairs (tokens, indices).
        split: has `dataset`, `split`, `image_ids` and `caption_ids`.
        should_stop: called before each batch; may raise to abandon the evaluation.
        place: moves a host batch to the device, or to the devices of a mesh.

    Raises:
        ValueError: the batches do not hold every row of the split once.
    """
    where = f"{split.dataset} {split.split}"
    image_global, image_local = _encode(
        encode_image,
        image_batches,
        len(split.image_ids),
        what=f"images of {where}",
        should_stop=should_stop,
        place=place,
    )
    text_global, text_local = _encode(
        encode_text,
        caption_batches,
        len(split.caption_ids),
        what=f"captions of {where}",
        should_stop=should_stop,
        place=place,
    )
    return retrieval.Embeddings(
        text_global=text_global,
        text_local=text_local,
        image_global=image_global,
        image_local=image_local,
        text_ids=np.asarray(split.caption_ids),
        image_ids=np.asarray(split.image_ids),
    )


def _encode(
    encode, batches, rows, *, what, should_stop, place
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n m"] | None]:
    times = np.zeros(rows, int)
    arrays: list[np.ndarray | None] = []

    def collect(output, indices):
        nonlocal arrays
        parts = jax.device_get((output.global_, output.local))
        if not arrays:
            arrays = [x if x is None else np.empty((rows, x.shape[1]), np.float32) for x in parts]
        if not 0 <= indices.min() <= indices.max() < rows:
            raise ValueError(f"expected {rows} {what}, but the batches hold more")
        for array, part in zip(arrays, parts, strict=True):
            if array is not None:
                array[indices] = part[: len(indices)]
        np.add.at(times, indices, 1)

    pending = None
    for batch, indices in batches:
        should_stop()
        # Dispatch is asynchronous: the result of a batch is fetched only after the next one is
        # decoded and queued, so host and device work at the same time.
        output = encode(place(batch))
        if pending is not None:
            collect(*pending)
        pending = output, indices
    if pending is not None:
        collect(*pending)
    if not rows or (times != 1).any():
        raise ValueError(
            f"expected each of {rows} {what} (at least one) once, but the batches lack "
            f"{(times == 0).sum()} and repeat {(times > 1).sum()}"
        )
    return arrays[0], arrays[1]


def results(
    rows: Sequence[retrieval.Row],
    *,
    dataset: str,
    split: str,
    queries: int,
    gallery: int,
    protocol: str,
    chosen_alpha: float,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `results/<dataset>-<split>.json`; metrics in percent.

    `queries` and `gallery` count captions and images. `skipped_queries` counts, per direction,
    those without a positive: they are not part of the means. `extra` adds keys.
    """
    summary = {
        "dataset": dataset,
        "split": split,
        "queries": int(queries),
        "gallery": int(gallery),
        "protocol": protocol,
        "chosen_alpha": float(chosen_alpha),
        "skipped_queries": {row.direction: row.metrics.skipped for row in rows},
        "rows": [
            {"direction": row.direction, "similarity": row.similarity}
            | {name: getattr(row.metrics, name) for name in METRICS}
            for row in rows
        ],
    }
    if taken := sorted(summary.keys() & (extra or {}).keys()):
        raise ValueError(f"extra results may not replace the keys {taken}")
    return summary | dict(extra or {})


def chance_rank1(split) -> dict[str, float]:
    """R@1 in percent of a random order, by direction, over the queries that have a positive."""
    people, captions = np.unique(split.caption_ids, return_counts=True)
    shown, pictures = np.unique(split.image_ids, return_counts=True)
    _, of_captions, of_images = np.intersect1d(people, shown, return_indices=True)
    captions, pictures = captions[of_captions], pictures[of_images]
    # A person with c captions and i pictures is asked for c times, with i right answers each.
    pairs = 100 * float((captions * pictures).sum())
    return {
        "t2i": pairs / float(captions.sum()) / len(split.image_ids),
        "i2t": pairs / float(pictures.sum()) / len(split.caption_ids),
    }


def write_results(workdir: str | os.PathLike, results: Mapping[str, Any]) -> files.Path:
    """Writes `results/<dataset>-<split>.json`; a reader sees the old file or the new one."""
    path = files.place(workdir) / "results" / f"{results['dataset']}-{results['split']}.json"
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    return _write(path, lambda file: file.write(text.encode()))


def dump_embeddings(
    workdir: str | os.PathLike, split, embeddings: retrieval.Embeddings
) -> files.Path:
    """Writes `embeddings-<dataset>-<split>.npz`: float32, not normalised, in annotation order.

    `text_local` and `image_local` are absent when the model has no local branch.
    """
    path = files.place(workdir) / f"embeddings-{split.dataset}-{split.split}.npz"
    arrays = {name: x for name, x in embeddings._asdict().items() if x is not None}
    # Fixed-width text, not objects: the file then loads without pickle.
    arrays["image_paths"] = np.asarray([str(p) for p in split.image_paths], dtype=np.str_)
    return _write(path, lambda file: np.savez(file, **arrays))


def format_table(results: Mapping[str, Any]) -> str:
    """Both directions as text, in percent; `>` marks the rows of the chosen weight."""
    chosen = retrieval.similarity_name(results["chosen_alpha"])
    width = max(len(row["similarity"]) for row in results["rows"])
    lines = [
        f"{results['dataset']} {results['split']}: {results['queries']} captions"
        f"{' (the first of each picture)' if results.get('captions') == 'single' else ''}, "
        f"{results['gallery']} images, protocol {results['protocol']}, chosen: {chosen}"
    ]
    for direction, title in _DIRECTIONS.items():
        rows = [row for row in results["rows"] if row["direction"] == direction]
        if not rows:
            continue
        skipped = results["skipped_queries"][direction]
        note = f" ({skipped} queries without a positive skipped)" if skipped else ""
        lines += ["", f"{title}{note}"]
        lines.append("  " + " " * width + "".join(f"{name:>8}" for name in METRICS))
        for row in rows:
            mark = ">" if row["similarity"] == chosen else " "
            cells = "".join(f"{row[name]:8.2f}" for name in METRICS)
            lines.append(f"{mark} {row['similarity']:<{width}}{cells}")
    return "\n".join(lines)


def _write(path: files.Path, content: Callable[[BinaryIO], Any]) -> files.Path:
    try:
        files.write(path, content)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; free space there or choose another "
            "--workdir"
        ) from error
    return path
