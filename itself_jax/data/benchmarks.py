"""CUHK-PEDES, ICFG-PEDES, RSTPReid and the embedded data set: their files as they are downloaded.

    ROOT/CUHK-PEDES/reid_raw.json        and imgs/{CUHK01, CUHK03, Market, cam_a, ...}/NAME
    ROOT/ICFG-PEDES/ICFG-PEDES.json      and imgs/{train, test}/IDENTITY/NAME
    ROOT/RSTPReid/data_captions.json     and imgs/NAME
    ROOT/data_captions.json              and imgs/NAME (the embedded data set)

ROOT may also be the benchmark's own folder. Case, "-" and "_" make no difference in the names of
folders and annotation files; the annotation file may lie in a folder `annotations`.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from etils import epath

from itself_jax.data import folders, images, records


class Counts(NamedTuple):
    identities: int
    images: int
    captions: int


class _Layout(NamedTuple):
    folder: str  # "": the root itself
    annotations: tuple[str, ...]  # names met in the wild, the preferred one first
    path_field: str  # of the published file; the other one is read as well
    paths: re.Pattern[str]  # what all its published image paths look like


_PATH_FIELDS = ("file_path", "img_path")
_IMAGE_FOLDER = "imgs"
_RSTP_PATHS = re.compile(r"\d{4,}_c\d+_\d+\.\w+")
_LAYOUTS = {
    "cuhk_pedes": _Layout(
        "CUHK-PEDES",
        ("reid_raw.json", "caption_all.json", "CUHK-PEDES.json"),
        "file_path",
        re.compile(r"(?:CUHK01|CUHK03|Market|cam_a|cam_b|train_query|test_query)/.+"),
    ),
    "icfg_pedes": _Layout(
        "ICFG-PEDES",
        ("ICFG-PEDES.json", "ICFG_PEDES.json"),
        "file_path",
        re.compile(r"(?:train|test)/\d{4,}/[^/]+"),
    ),
    "rstp_reid": _Layout("RSTPReid", ("data_captions.json",), "img_path", _RSTP_PATHS),
    "synthetic": _Layout("", ("data_captions.json",), "img_path", _RSTP_PATHS),
}
DATASETS = tuple(_LAYOUTS)

# As their papers publish them, by split.
PUBLISHED = {
    "cuhk_pedes": {
        "train": Counts(11003, 34054, 68126),
        "val": Counts(1000, 3078, 6158),
        "test": Counts(1000, 3074, 6156),
    },
    "icfg_pedes": {
        "train": Counts(3102, 34674, 34674),
        "test": Counts(1000, 19848, 19848),
    },
    "rstp_reid": {
        "train": Counts(3701, 18505, 37010),
        "val": Counts(200, 1000, 2000),
        "test": Counts(200, 1000, 2000),
    },
}


def read(dataset: str, root: epath.PathLike) -> records.Corpus:
    """Reads the annotation file of a benchmark and finds its image folder.

    Whether the pictures exist is not looked at here. Captions are kept as written.

    Args:
      dataset: one of `DATASETS`.
      root: the folder that holds the benchmark's own folder, or that folder.

    Raises:
      records.DataError: there is no annotation file; it is damaged, malformed or another data
        set's. The message says where.
    """
    layout = _LAYOUTS[dataset]
    annotation = find(dataset, root)
    rows = _read_json(annotation)
    read_records = tuple(
        _read_record(row, f"{annotation}: record {number}", layout, annotation)
        for number, row in enumerate(rows)
    )
    _refuse_other(dataset, read_records, annotation)
    paths = [record.image for record in read_records]
    image_folder = _find_images(annotation, paths)
    return records.Corpus(
        dataset=dataset,
        source=str(annotation),
        records=read_records,
        images=images.ImageFiles(image_folder, paths),
        image_folder=str(image_folder),
    )


def counts(corpus: records.Corpus) -> dict[str, Counts]:
    """Identities, images and captions by split, as the file has them, in the order of SPLITS."""
    result = {}
    for split in dict.fromkeys((*records.SPLITS, "")):
        members = [record for record in corpus.records if record.split == split]
        if members:
            result[split] = Counts(
                identities=len({record.identity for record in members}),
                images=len(members),
                captions=sum(len(record.captions) for record in members),
            )
    return result


def find(dataset: str, root: epath.PathLike) -> epath.Path:
    """Finds the annotation file of a benchmark.

    Raises:
      records.MissingError: there is none; the message says which folders were seen.
    """
    layout, root = _LAYOUTS[dataset], epath.Path(root)
    if found := _annotations(dataset, root):
        return found[0]
    names = [f"{layout.folder}/{name}".lstrip("/") for name in layout.annotations]
    seen = [f"{place} {folders.content(place)}" for place in (root, *_own_folders(layout, root))]
    hint = ""
    for other in PUBLISHED:
        if found := _annotations(other, root):
            hint = f" ({found[0].name} there is {other}'s: is dataset={other!r} meant?)"
    raise records.MissingError(
        f"dataset={dataset!r} needs {' or '.join(names)}, which does not exist below "
        f"data_root={root}: {'; '.join(seen)}{hint}; point data_root at the folder that holds the "
        "benchmark."
    )


def _annotations(dataset: str, root: epath.Path) -> list[epath.Path]:
    """Annotation files of a benchmark, the preferred one first: in its folder, then in `root`."""
    layout = _LAYOUTS[dataset]
    found = []
    for folder in (*_own_folders(layout, root), root):
        for place in (folder, *folders.find(folder, ("annotations",))):
            found += [path for path in folders.find(place, layout.annotations) if path.is_file()]
    return found


def _own_folders(layout: _Layout, root: epath.Path) -> list[epath.Path]:
    if not layout.folder:
        return []
    outer = [path for path in folders.find(root, (layout.folder,)) if path.is_dir()]
    # Archives are often unpacked into a folder of their own name.
    inner = [path for own in outer for path in folders.find(own, (layout.folder,))]
    return outer + [path for path in inner if path.is_dir()]


def _find_images(annotation: epath.Path, paths: list[str]) -> epath.Path:
    """The folder in which most of the paths' first parts exist."""
    own = annotation.parent
    if own.name.casefold() == "annotations":
        own = own.parent
    outer = [path for path in folders.find(own, (_IMAGE_FOLDER, "images")) if path.is_dir()]
    inner = [path for one in outer for path in folders.find(one, (_IMAGE_FOLDER,))]
    candidates = [*outer, *(path for path in inner if path.is_dir()), own]
    if not outer and not paths:
        return own / _IMAGE_FOLDER
    first = {path.replace("\\", "/").removeprefix("./").partition("/")[0] for path in paths}
    found = [len(first & set(folders.names(candidate))) for candidate in candidates]
    if not outer and not max(found):
        raise records.DataError(
            f"{own / _IMAGE_FOLDER} does not exist: {annotation.name} needs this folder of "
            f"pictures, and {own} {folders.content(own)}; unpack the pictures there."
        )
    return candidates[found.index(max(found))]


def _read_json(path: epath.Path) -> list:
    text = folders.read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise records.DataError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "restore the file (an interrupted copy ends early)."
        ) from error
    except RecursionError as error:
        raise records.DataError(
            f"{path} is not an annotation file: its values are nested too deeply; restore it."
        ) from error
    if not isinstance(rows, list):
        raise records.DataError(
            f"{path} must hold a list of records, but its top level is {records.kind(rows)}; is "
            "this the benchmark's annotation file?"
        )
    return rows


def _read_record(
    row: object, where: str, layout: _Layout, annotation: epath.Path
) -> records.Record:
    if not isinstance(row, dict):
        raise records.DataError(
            f"{where} must be an object, but is {records.kind(row)}; correct this record."
        )
    path_field = next((field for field in _PATH_FIELDS if field in row), layout.path_field)
    for field in ("id", path_field, "captions", "split"):
        if field not in row:
            has = ", ".join(sorted(row)) or "no field"
            if field == "split" and layout.annotations[0] == "reid_raw.json":
                # The authors' own caption_all.json: it has no splits, and other ids.
                raise records.DataError(
                    f"{where} lacks the field 'split' (it has: {has}); put CUHK-PEDES's "
                    f"reid_raw.json, which has the splits, in the place of {annotation.name}."
                )
            raise records.DataError(f"{where} lacks the field {field!r} (it has: {has}); add it.")
    return records.Record(
        image=records.check_image_path(row[path_field], f"{where}: field {path_field!r}"),
        identity=_read_identity(row["id"], f"{where}: field 'id'"),
        captions=records.check_captions(row["captions"], f"{where}: field 'captions'"),
        split=records.check_split(row["split"], f"{where}: field 'split'"),
    )


def _read_identity(value: object, where: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]+\s*", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise records.DataError(f"{where} must be an integer, but is {records.kind(value)}.")
    if not -(2**31) <= value < 2**31:
        raise records.DataError(f"{where} is {value}, which does not fit 32 bits; renumber.")
    return str(value)


def _refuse_other(
    dataset: str, read_records: tuple[records.Record, ...], annotation: epath.Path
) -> None:
    """Refuses the file of another benchmark, which its image paths give away.

    All of them must fit the other and none this one: renamed pictures are nobody's.
    """
    paths = [record.image.removeprefix("./").removeprefix("imgs/") for record in read_records]
    if not paths or any(map(_LAYOUTS[dataset].paths.fullmatch, paths)):
        return
    for other in PUBLISHED:
        if all(map(_LAYOUTS[other].paths.fullmatch, paths)):
            raise records.DataError(
                f"{annotation} is the annotation file of another data set: all its image paths are "
                f"{other}'s (such as {paths[0]!r}); choose dataset={other!r} or put the right file "
                "there."
            )
