"""The benchmarks as they are met in the wild, and one clear sentence for every kind of bad file."""

import json

import miniature
import pytest

from itself_jax.data import benchmarks, records

BENCHMARKS = tuple(miniature.FOLDERS)


def _record(identity, path, captions=("a man",), split="train"):
    return {"id": identity, "img_path": path, "captions": list(captions), "split": split}


def _write(folder, content, name="data_captions.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "imgs").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def _edit(folder, dataset, change):
    """Rewrites a miniature's annotation file; `change` alters its list of records."""
    path = folder / miniature.ANNOTATIONS[dataset]
    rows = json.loads(path.read_text(encoding="utf-8"))
    change(rows)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_records_are_those_of_the_file_in_its_order(dataset, tmp_path):
    folder = miniature.write(tmp_path, dataset)
    rows = json.loads((folder / miniature.ANNOTATIONS[dataset]).read_text(encoding="utf-8"))
    corpus = benchmarks.read(dataset, tmp_path)
    assert len(corpus.records) == len(rows) == len(corpus.images)
    for index, (record, row) in enumerate(zip(corpus.records, rows, strict=True)):
        path = row.get("file_path") or row["img_path"]
        assert record == records.Record(path, str(row["id"]), tuple(row["captions"]), row["split"])
        assert corpus.images.name(index) == str(folder / "imgs" / path)
    assert corpus.source == str(folder / miniature.ANNOTATIONS[dataset])
    assert corpus.image_folder == str(folder / "imgs")


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_counts_by_split(dataset, tmp_path):
    miniature.write(tmp_path, dataset, identities=(5, 2, 1), images_per_identity=3)
    expected = {
        "train": benchmarks.Counts(5, 15, 30),
        "val": benchmarks.Counts(2, 6, 12),
        "test": benchmarks.Counts(1, 3, 6),
    }
    if dataset == "icfg_pedes":
        del expected["val"]
    assert benchmarks.counts(benchmarks.read(dataset, tmp_path)) == expected


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_the_root_may_be_the_own_folder(dataset, tmp_path):
    folder = miniature.write(tmp_path, dataset)
    outer, inner = benchmarks.read(dataset, str(tmp_path)), benchmarks.read(dataset, folder)
    assert (outer.source, outer.records) == (inner.source, inner.records)
    assert outer.image_folder == inner.image_folder


@pytest.mark.parametrize(
    ("dataset", "folder_name", "annotation"),
    [
        ("cuhk_pedes", "cuhk_pedes", "caption_all.json"),
        ("cuhk_pedes", "CUHK_PEDES", "CUHK-PEDES.json"),
        ("cuhk_pedes", "Cuhk-Pedes", "cuhk_pedes.json"),
        ("icfg_pedes", "icfg-pedes", "ICFG_PEDES.json"),
        ("icfg_pedes", "ICFG_PEDES", "icfg-pedes.json"),
        ("rstp_reid", "rstpreid", "Data_Captions.json"),
        ("rstp_reid", "RSTP-Reid", "data_captions.json"),
        ("rstp_reid", "RSTPReid/RSTPReid", "data_captions.json"),
        ("cuhk_pedes", "CUHK-PEDES", "annotations/reid_raw.json"),
    ],
)
def test_names_met_in_the_wild(dataset, folder_name, annotation, tmp_path):
    written = miniature.write(tmp_path / "original", dataset)
    folder = tmp_path / "root" / folder_name
    folder.parent.mkdir(parents=True)
    written.rename(folder)
    (folder / annotation).parent.mkdir(exist_ok=True)
    (folder / miniature.ANNOTATIONS[dataset]).rename(folder / annotation)
    corpus = benchmarks.read(dataset, tmp_path / "root")
    assert corpus.source == str(folder / annotation)
    assert corpus.images.load(0, (4, 2)).shape == (4, 2, 3)


def test_reid_raw_is_preferred_to_caption_all(tmp_path):
    folder = miniature.write(tmp_path, "cuhk_pedes")
    (folder / "caption_all.json").write_text("[]")
    assert benchmarks.read("cuhk_pedes", tmp_path).source == str(folder / "reid_raw.json")


@pytest.mark.parametrize("dataset", BENCHMARKS)
@pytest.mark.parametrize("place", ["imgs/imgs", "Imgs", "images", "."])
def test_image_folders_met_in_the_wild(dataset, place, tmp_path):
    folder = miniature.write(tmp_path, dataset)
    pictures = (folder / "imgs").rename(folder / "pictures")
    (folder / place).mkdir(parents=True, exist_ok=True)
    for entry in pictures.iterdir():
        entry.rename(folder / place / entry.name)
    corpus = benchmarks.read(dataset, tmp_path)
    assert corpus.image_folder == str(folder / place)
    assert corpus.images.load(0, (4, 2)).shape == (4, 2, 3)


def test_image_paths_may_begin_with_imgs(tmp_path):
    folder = miniature.write(tmp_path, "icfg_pedes")

    def change(rows):
        for row in rows:
            row["file_path"] = f"imgs/{row['file_path']}"

    _edit(folder, "icfg_pedes", change)
    corpus = benchmarks.read("icfg_pedes", tmp_path)
    assert corpus.image_folder == str(folder)
    assert corpus.images.load(0, (4, 2)).shape == (4, 2, 3)


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_ids_as_text_other_path_field_and_single_caption(dataset, tmp_path):
    folder = miniature.write(tmp_path, dataset)
    plain = benchmarks.read(dataset, tmp_path)

    def change(rows):
        for row in rows:
            row["id"] = f"{row['id']:05d}"
            row["captions"] = row["captions"][0]
            if "img_path" in row:
                row["file_path"] = row.pop("img_path")
            else:
                row["img_path"] = row.pop("file_path")

    _edit(folder, dataset, change)
    for old, new in zip(plain.records, benchmarks.read(dataset, tmp_path).records, strict=True):
        assert new == records.Record(old.image, old.identity, old.captions[:1], old.split)


def test_a_byte_order_mark_is_no_error(tmp_path):
    _write(tmp_path, "\N{ZERO WIDTH NO-BREAK SPACE}" + json.dumps([_record(1, "a.png")]))
    assert benchmarks.read("synthetic", tmp_path).records[0].image == "a.png"


def test_captions_are_kept_as_written(tmp_path):
    captions = ["", "  ", "...", "caf\N{LATIN SMALL LETTER E WITH ACUTE}\x00", "x " * 500, "\ud800"]
    _write(tmp_path, [_record(1, "a.png", captions)])
    assert benchmarks.read("synthetic", tmp_path).records[0].captions == tuple(captions)


def _without(field):
    record = _record(1, "b.png")
    del record[field]
    return record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1,\n "img_path" 2}]', r"not valid JSON: Expecting ':' .* line 2, column 13"),
        ('[{"id": 1},\n {"id": 2, "capt', r"not valid JSON: Unterminated .* line 2, column 12; re"),
        ("", r"not valid JSON: Expecting value at line 1, column 1"),
        ("[" * 100_000, r"not an annotation file: its values are nested too deeply"),
        ('{"train": []}', r"must hold a list of records, but its top level is an object"),
        ("[[]]", r"record 0 must be an object, but is an empty list"),
        *(
            ([_record(1, "a.png"), _without(field)], rf"record 1 lacks the field '{field}' \(it")
            for field in ("id", "img_path", "captions", "split")
        ),
        ([_record("7a", "a.png")], r"record 0: field 'id' must be an integer, but is '7a'"),
        ([_record("", "a.png")], r"record 0: field 'id' must be an integer, but is ''"),
        ([_record(True, "a.png")], r"field 'id' must be an integer, but is True"),
        ([_record(1.5, "a.png")], r"field 'id' must be an integer, but is 1\.5"),
        ([_record(2**31, "a.png")], r"field 'id' is 2147483648, which does not fit 32 bits"),
        ([_record(1, "")], r"field 'img_path' must be the image's path as text, but is ''"),
        ([_record(1, None)], r"field 'img_path' must be .* but is null"),
        ([_record(1, "/etc/a.png")], r"'img_path' is '/etc/a\.png'; paths must be relative"),
        ([_record(1, "../a.png")], r"'img_path' is '\.\./a\.png'; .* must not contain '\.\.'"),
        ([_record(1, "a.png", [])], r"'captions' must be a text or a list .* but is an empty list"),
        ([dict(_record(1, "a.png"), captions=3)], r"'captions' must be a text .* but is 3"),
        ([_record(1, "a.png", ["x", None])], r"'captions' must contain only text, but has null"),
        ([_record(1, "a.png", split="dev")], r"field 'split' is 'dev'; it must be one of train"),
        ([dict(_record(1, "a.png"), split=[])], r"field 'split' is \[\]; it must be one of"),
    ],
)
def test_malformed_annotation_is_named(tmp_path, content, message):
    folder = _write(tmp_path, content)
    with pytest.raises(records.DataError, match=message) as error:
        benchmarks.read("synthetic", folder)
    assert str(folder / "data_captions.json") in str(error.value)


def test_a_wrong_type_far_into_the_file_is_named(tmp_path):
    rows = [_record(n, f"{n}.png") for n in range(1300)]
    rows[1234]["captions"] = {"en": "a man"}
    with pytest.raises(
        records.DataError,
        match=r"data_captions\.json: record 1234: field 'captions' must be a text or a list of at "
        r"least one text, but is an object\.$",
    ):
        benchmarks.read("synthetic", _write(tmp_path, rows))


def test_annotation_that_is_no_text_is_named(tmp_path):
    _write(tmp_path, "")
    (tmp_path / "data_captions.json").write_bytes(b'[{\n"id":\n\xff\xfe')
    with pytest.raises(
        records.DataError,
        match=r"data_captions\.json cannot be read as UTF-8 text: .* in line 3, at byte 9; save",
    ):
        benchmarks.read("synthetic", tmp_path)


def test_wrong_root_says_what_was_seen_and_what_was_expected(tmp_path):
    (tmp_path / "Downloads").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        records.DataError,
        match=r"dataset='rstp_reid' needs RSTPReid/data_captions\.json, which does not exist below "
        rf"data_root={tmp_path}: {tmp_path} holds Downloads/, notes\.txt; point data_root at",
    ):
        benchmarks.read("rstp_reid", tmp_path)


def test_own_folder_without_annotation_is_listed(tmp_path):
    (tmp_path / "cuhk-pedes" / "imgs").mkdir(parents=True)
    with pytest.raises(
        records.DataError,
        match=r"needs CUHK-PEDES/reid_raw\.json or CUHK-PEDES/caption_all\.json or .*"
        r"holds cuhk-pedes/; .*/cuhk-pedes holds imgs/; point",
    ):
        benchmarks.read("cuhk_pedes", tmp_path)


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: path.touch(), "is a file"),
    ],
)
def test_root_that_is_no_filled_folder_is_described(make, seen, tmp_path):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(records.DataError, match=rf"{root} {seen}; point data_root"):
        benchmarks.read("icfg_pedes", root)


def test_root_of_another_benchmark_is_recognised(tmp_path):
    miniature.write(tmp_path, "icfg_pedes")
    with pytest.raises(
        records.DataError,
        match=r"\(ICFG-PEDES\.json there is icfg_pedes's: is dataset='icfg_pedes' meant\?\)",
    ):
        benchmarks.read("cuhk_pedes", tmp_path)


@pytest.mark.parametrize("dataset", BENCHMARKS)
@pytest.mark.parametrize("other", BENCHMARKS)
def test_annotation_file_of_another_data_set_is_recognised(dataset, other, tmp_path):
    written = miniature.write(tmp_path / "other", other)
    folder = written.rename(tmp_path / miniature.FOLDERS[dataset])
    (folder / miniature.ANNOTATIONS[other]).rename(folder / miniature.ANNOTATIONS[dataset])
    if dataset == other:
        assert benchmarks.read(dataset, tmp_path).records
        return
    with pytest.raises(
        records.DataError,
        match=rf"is the annotation file of another data set: all its image paths are {other}'s "
        rf"\(such as '.*'\); choose dataset='{other}'",
    ):
        benchmarks.read(dataset, tmp_path)


def test_renamed_pictures_are_not_taken_for_another_data_set(tmp_path):
    _write(tmp_path, [_record(1, "a.png"), _record(2, "0002_c1_0001.jpg")])
    assert len(benchmarks.read("cuhk_pedes", _as_cuhk(tmp_path)).records) == 2


def _as_cuhk(folder):
    (folder / "data_captions.json").rename(folder / "reid_raw.json")
    return folder


def test_the_authors_caption_all_without_splits_says_which_file_has_them(tmp_path):
    folder = miniature.write(tmp_path, "cuhk_pedes")

    def change(rows):
        for row in rows:
            del row["split"]

    path = _edit(folder, "cuhk_pedes", change)
    path.rename(folder / "caption_all.json")
    with pytest.raises(
        records.DataError,
        match=r"caption_all\.json: record 0 lacks the field 'split' .*put CUHK-PEDES's "
        r"reid_raw\.json, which has the splits, in the place of caption_all\.json",
    ):
        benchmarks.read("cuhk_pedes", tmp_path)


def test_missing_image_folder_is_named(tmp_path):
    folder = miniature.write(tmp_path, "icfg_pedes")
    (folder / "imgs").rename(tmp_path / "elsewhere")
    with pytest.raises(
        records.DataError,
        match=rf"{folder}/imgs does not exist: .*{folder} holds ICFG-PEDES\.json; unpack",
    ):
        benchmarks.read("icfg_pedes", tmp_path)
