"""Own data (`dataset="jsonl"`): one JSONL or CSV file beside its pictures.

    {"image": "shop/4.jpg", "caption": "a man in a red coat", "id": "anna", "split": "train"}

    image,caption,id,split
    shop/4.jpg,"a man, in a red coat",anna,train

`image` is relative to the file's folder. A picture with several captions has a list of them or
several lines (`captions` is read as well as `caption`). `id` is any text or integer. `split` is
"train", "val" or "test", or absent everywhere: `records.assign` then draws it by identity.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from itself_jax.data import folders, images, records

_SUFFIXES = (".jsonl", ".csv")
_EXAMPLE = '{"image": "a.jpg", "caption": "a man in a red coat", "id": "7", "split": "train"}'


class _Line(NamedTuple):
    where: str  # file and line, for messages
    image: str  # "": none
    captions: tuple[str, ...]
    identity: str
    split: str


def read(root: epath.PathLike) -> records.Corpus:
    """Reads own data; lines of one picture become one record, at the place of the first.

    Whether the pictures exist is not looked at here. Captions are kept as written.

    Args:
      root: the file, or the folder that holds it (and no second one).

    Raises:
      records.DataError: no file or several; a line is malformed or contradicts another one; a
        caption has no picture. The message names the line.
    """
    path = find(root)
    parse = _jsonl_lines if path.suffix.casefold() == ".jsonl" else _csv_lines
    lines = list(parse(path, folders.read_text(path)))
    if not lines:
        raise records.DataError(f"{path} holds no record; write one line per caption.")
    _check_all_or_none_split(lines)
    _check_queries(lines)
    pictures = _merge(lines)
    paths = [record.image for record in pictures]
    return records.Corpus(
        dataset="jsonl",
        source=str(path),
        records=pictures,
        images=images.ImageFiles(path.parent, paths),
        image_folder=str(path.parent),
    )


def find(root: epath.PathLike) -> epath.Path:
    """Finds the JSONL or CSV file.

    Raises:
      records.MissingError: there is none.
      records.DataError: there are several, or `root` is another file.
    """
    root = epath.Path(root)
    if root.is_file():
        if root.suffix.casefold() not in _SUFFIXES:
            raise records.DataError(
                f"data_root={root} is a file that is neither .jsonl nor .csv; own data is read "
                "from these."
            )
        return root
    found = [
        root / name
        for name in folders.names(root)
        if not name.startswith(".") and epath.Path(name).suffix.casefold() in _SUFFIXES
    ]
    if not found:
        raise records.MissingError(
            f"dataset='jsonl' needs one .jsonl or .csv file in data_root={root}, which "
            f"{folders.content(root)}; write it there, one line such as {_EXAMPLE}."
        )
    if len(found) > 1:
        raise records.DataError(
            f"data_root={root} holds several files of own data "
            f"({', '.join(path.name for path in found)}); point data_root at the one to read."
        )
    return found[0]


def _jsonl_lines(path: epath.Path, text: str) -> Iterator[_Line]:
    # Not splitlines: JSON strings may hold U+2028, which it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise records.DataError(
                f"{where} is not valid JSON: {error.msg} at column {error.colno}; write one object "
                "per line (an interrupted copy ends early)."
            ) from error
        except RecursionError as error:
            raise records.DataError(f"{where} is nested too deeply; restore the file.") from error
        if not isinstance(row, dict):
            raise records.DataError(
                f"{where} must be an object, but is {records.kind(row)}; write {_EXAMPLE}."
            )
        captions = "captions" if "captions" in row and "caption" not in row else "caption"
        for field in ("image", captions, "id"):
            if field not in row:
                raise records.DataError(
                    f"{where} lacks the field {field!r} (it has: "
                    f"{', '.join(sorted(row)) or 'no field'}); add it."
                )
        image, identity, split = row["image"], row["id"], row.get("split")
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        if not isinstance(identity, str) or not identity.strip():
            raise records.DataError(
                f"{where}: field 'id' must be a text or an integer, but is "
                f"{records.kind(identity)}."
            )
        yield _Line(
            where=where,
            image="" if image in (None, "") else _image(image, where),
            captions=records.check_captions(row[captions], f"{where}: field {captions!r}"),
            identity=identity,
            split=""
            if split in (None, "")
            else records.check_split(split, f"{where}: field 'split'"),
        )


def _csv_lines(path: epath.Path, text: str) -> Iterator[_Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    columns: list[str] = []
    try:
        for cells in reader:
            where, start = f"{path}: line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(cells, path)
                continue
            if len(cells) != len(columns):
                raise records.DataError(
                    f"{where} has {len(cells)} values, but the header has {len(columns)} columns; "
                    "put values with commas in double quotes."
                )
            row = dict(zip(columns, cells, strict=True))
            identity, split = row["id"].strip(), row.get("split", "").strip()
            if not identity:
                raise records.DataError(f"{where}: column 'id' is empty; name the identity.")
            image = row["image"].strip()
            yield _Line(
                where=where,
                image=_image(image, where) if image else "",
                captions=(row["caption"],),
                identity=identity,
                split=records.check_split(split, f"{where}: column 'split'") if split else "",
            )
    except csv.Error as error:
        raise records.DataError(
            f"{path}: line {start} is not valid CSV: {error}; double quotes must come in pairs."
        ) from error


def _columns(cells: list[str], path: epath.Path) -> list[str]:
    columns = [cell.strip().casefold() for cell in cells]
    columns = ["caption" if column == "captions" else column for column in columns]
    for column in ("image", "caption", "id"):
        if column not in columns:
            odd = next((sign for sign in ";\t" if sign in cells[0]), None)
            hint = f"; columns are separated by commas, not by {odd!r}" if odd else ""
            raise records.DataError(
                f"{path}: the header lacks the column {column!r} (it has: {', '.join(cells)}); "
                f"its first line must be image,caption,id,split (split may be absent){hint}."
            )
    if len(set(columns)) < len(columns):
        raise records.DataError(
            f"{path}: the header names a column twice ({', '.join(cells)}); rename one."
        )
    return columns


def _image(value: object, where: str) -> str:
    return records.check_image_path(value, f"{where}: field 'image'")


def _check_all_or_none_split(lines: list[_Line]) -> None:
    without = [line for line in lines if not line.split]
    if without and len(without) < len(lines):
        raise records.DataError(
            f"{without[0].where} has no split, as {len(without)} of {len(lines)} lines, but the "
            "others have one; give it to all lines or to none."
        )


def _check_queries(lines: list[_Line]) -> None:
    """Refuses captions without a picture: they are no pair, and no ranking could place them."""
    gallery = {(line.split, line.identity) for line in lines if line.image}
    for line in lines:
        if line.image:
            continue
        place = f" of split {line.split!r}" if line.split else ""
        if (line.split, line.identity) not in gallery:
            raise records.DataError(
                f"{line.where}: the query's identity {line.identity!r} never occurs in the "
                f"gallery{place}: field 'image' is empty and no other line shows this identity; "
                "add its picture or remove the line."
            )
        raise records.DataError(
            f"{line.where}: field 'image' is empty; name the picture that the caption describes."
        )


def _merge(lines: list[_Line]) -> tuple[records.Record, ...]:
    pictures: dict[str, list[_Line]] = {}
    for line in lines:
        same = pictures.setdefault(line.image, [])
        same.append(line)
        for field in ("identity", "split"):
            if getattr(line, field) != getattr(same[0], field):
                name = "id" if field == "identity" else field
                raise records.DataError(
                    f"{line.where}: {line.image!r} has {name} {getattr(line, field)!r}, but "
                    f"{getattr(same[0], field)!r} at {same[0].where.rpartition(': ')[2]}; correct "
                    "one of them."
                )
    return tuple(
        records.Record(
            image=image,
            identity=same[0].identity,
            captions=tuple(caption for line in same for caption in line.captions),
            split=same[0].split,
        )
        for image, same in pictures.items()
    )
