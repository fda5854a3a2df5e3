"""Miniature data sets in the layouts of the benchmarks, and own data as JSONL and CSV.

    folder = miniature.write(tmp_path, "cuhk_pedes", identities=(6, 2, 3))

Pictures and captions of an identity share a colour, so that there is something to learn. The same
arguments give the same bytes.
"""

import csv
import json
import pathlib

import numpy as np
from PIL import Image

DATASETS = ("cuhk_pedes", "icfg_pedes", "rstp_reid", "jsonl", "csv")
FOLDERS = {"cuhk_pedes": "CUHK-PEDES", "icfg_pedes": "ICFG-PEDES", "rstp_reid": "RSTPReid"}
ANNOTATIONS = {
    "cuhk_pedes": "reid_raw.json",
    "icfg_pedes": "ICFG-PEDES.json",
    "rstp_reid": "data_captions.json",
    "jsonl": "pictures.jsonl",
    "csv": "pictures.csv",
}
_SPLITS = ("train", "val", "test")
_COLORS = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange", "pink", "brown")
_THINGS = ("coat", "shirt", "dress", "jacket", "skirt", "bag", "hat", "scarf", "umbrella")


def write(
    root,
    dataset: str,
    *,
    identities: tuple[int, int, int] = (6, 2, 3),
    images_per_identity: int = 2,
    captions_per_image: int = 2,
    image_size: tuple[int, int] = (24, 12),
    seed: int = 0,
) -> pathlib.Path:
    """Writes one data set below `root` and returns its own folder (own data: `root`).

    `root` is what `data_root` takes. ICFG-PEDES has no val: its count in `identities` is ignored.
    "csv" is dataset="jsonl" in its other form.
    """
    root = pathlib.Path(root)
    folder = root / FOLDERS.get(dataset, "")
    image_folder = folder / "imgs" if dataset in FOLDERS else folder
    records = []
    number = 0
    for split, count in zip(_SPLITS, identities, strict=True):
        if dataset == "icfg_pedes" and split == "val":
            continue
        for _ in range(count):
            for view in range(images_per_identity):
                path = _path(dataset, split, number, view)
                (image_folder / path).parent.mkdir(parents=True, exist_ok=True)
                _draw(image_folder / path, image_size, (seed, number, view))
                captions = [_caption(seed, number, view, n) for n in range(captions_per_image)]
                records.append(_record(dataset, split, number, path, captions))
            number += 1
    annotation = folder / ANNOTATIONS[dataset]
    if dataset == "jsonl":
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        annotation.write_text("".join(lines), encoding="utf-8")
    elif dataset == "csv":
        with annotation.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "caption", "id", "split"])
            writer.writeheader()
            for record in records:
                writer.writerows({**record, "caption": text} for text in record["caption"])
    else:
        annotation.write_text(json.dumps(records), encoding="utf-8")
    return folder


def _path(dataset: str, split: str, number: int, view: int) -> str:
    if dataset == "cuhk_pedes":
        if number % 3 == 0:
            return f"CUHK01/{number + 1:04d}{view + 1:03d}.png"
        if number % 3 == 1:
            return f"Market/{number + 1:04d}_c{view + 1}s1_000{view}51_03.jpg"
        return f"{'test' if split == 'test' else 'train'}_query/p{number}_s{view}.jpg"
    if dataset == "icfg_pedes":
        name = f"{number:04d}_{view:03d}_01_0303morning_0008_{view}.jpg"
        return f"{split}/{number:04d}/{name}"
    if dataset == "rstp_reid":
        return f"{number:04d}_c{view + 1}_{view:04d}.jpg"
    return f"pictures/person {number} \N{LATIN SMALL LETTER E WITH ACUTE}/{view}.jpg"


def _record(dataset: str, split: str, number: int, path: str, captions: list[str]) -> dict:
    if dataset in ("jsonl", "csv"):
        return {"image": path, "caption": captions, "id": f"person-{number}", "split": split}
    if dataset == "rstp_reid":
        return {"id": number, "img_path": path, "captions": captions, "split": split}
    return {
        "split": split,
        "captions": captions,
        "file_path": path,
        "processed_tokens": [caption.rstrip(".").lower().split() for caption in captions],
        "id": number + (dataset == "cuhk_pedes"),  # only CUHK-PEDES counts from 1
    }


def _caption(seed: int, number: int, view: int, n: int) -> str:
    color = _COLORS[(seed + number) % len(_COLORS)]
    thing = _THINGS[number // len(_COLORS) % len(_THINGS)]
    manner = ("walks", "stands", "waits")[view % 3]
    return f"A person in a {color} {thing} {manner} on floor {view}, side {n}, door {number}."


def _draw(path: pathlib.Path, size: tuple[int, int], key: tuple[int, int, int]) -> None:
    color = np.random.default_rng(key[:2]).integers(40, 216, 3)
    noise = np.random.default_rng(key).integers(-40, 40, (*size, 3))
    pixels = (color + noise).astype(np.uint8)
    Image.fromarray(pixels).save(path, **({"quality": 90} if path.suffix == ".jpg" else {}))
