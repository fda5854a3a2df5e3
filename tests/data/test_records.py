"""Reading a benchmark: order, labels, and one clear sentence for every kind of bad input."""

import json
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from itself_jax.data import records


def _record(identity, path, captions=("a man",), split="train"):
    return {"id": identity, "img_path": path, "captions": list(captions), "split": split}


def _write(folder, content, *, images=True):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "data_captions.json").write_text(text, encoding="utf-8")
    (folder / "imgs").mkdir(exist_ok=True)
    if images and isinstance(content, list):
        for record in content:
            path = folder / "imgs" / record["img_path"]
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (2, 4)).save(path)
    return folder


RECORDS = [
    _record(30, "c.png", ["caption 0", "caption 1"]),
    _record(7, "sub/a.png", ["caption 2"]),
    _record(50, "t.png", ["test caption"], split="test"),
    _record(30, "b.png", ["caption 3", "caption 3"]),
]


def test_train_split_in_annotation_order_with_labels(tmp_path):
    split = records.read("synthetic", _write(tmp_path, RECORDS), "train")
    assert split.image_paths == ("c.png", "sub/a.png", "b.png")
    assert split.captions == ("caption 0", "caption 1", "caption 2", "caption 3", "caption 3")
    # Sorted original ids 7, 30 get labels 0, 1.
    assert split.original_ids == (7, 30) and split.num_identities == 2
    np.testing.assert_array_equal(split.image_ids, [1, 0, 1])
    np.testing.assert_array_equal(split.caption_ids, [1, 1, 0, 1, 1])
    np.testing.assert_array_equal(split.caption_images, [0, 0, 1, 2, 2])
    for array in (split.image_ids, split.caption_ids, split.caption_images):
        assert array.dtype == np.int32
    assert (split.image_root / split.image_paths[1]).is_file()
    assert (split.dataset, split.split) == ("synthetic", "train")


def test_test_split_keeps_original_ids(tmp_path):
    split = records.read("synthetic", _write(tmp_path, RECORDS), "test")
    np.testing.assert_array_equal(split.image_ids, [50])
    np.testing.assert_array_equal(split.caption_ids, [50])
    assert split.num_identities == 1


def test_rstp_reid_lies_in_its_own_folder(tmp_path):
    _write(tmp_path / "RSTPReid", RECORDS)
    assert records.read("rstp_reid", tmp_path, "train").image_paths[0] == "c.png"
    assert records.read("rstp_reid", str(tmp_path), "test").dataset == "rstp_reid"


def test_captions_may_be_one_text(tmp_path):
    content = [dict(_record(1, "a.png"), captions="one text")]
    split = records.read("synthetic", _write(tmp_path, content), "train")
    assert split.captions == ("one text",)


def test_odd_captions_go_on_with_one_counted_line(tmp_path, caplog):
    captions = [
        "",
        "  ",
        "...",
        "\N{SLIGHTLY SMILING FACE}",
        "jekyll <|mask|>",
        "a\x00b",
        "x " * 500,
    ]
    content = [_record(1, "a.png", captions), _record(2, "b.png", ["a man"])]
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        split = records.read("synthetic", _write(tmp_path, content), "train")
    assert split.captions[:7] == tuple(captions)
    assert [record.getMessage() for record in caplog.records] == [
        "synthetic train has 2 empty captions, 2 captions without a word, "
        "1 captions of more than 100 words (cut at text_length), "
        "2 captions with control characters or CLIP's special tokens, "
        "1 identities with one pair (drawn repeatedly); going on."
    ]


def test_good_data_logs_nothing(tmp_path, caplog):
    content = [_record(1, "a.png", ["a man", "his bag"])]
    records.read("synthetic", _write(tmp_path, content), "train")
    assert not caplog.records


def _without(field):
    record = _record(1, "b.png")
    del record[field]
    return record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1,\n "img_path" 2}]', r"not valid JSON: Expecting ':' .* line 2, column 13"),
        ("", r"not valid JSON: Expecting value at line 1, column 1"),
        ('{"train": []}', r"must hold a list of records, but its top level is an object"),
        ("[[]]", r"record 0 must be an object, but is an empty list"),
        ("[]", r"no record has split='train' \(records by split: none\)"),
        (
            [_record(1, "a.png", split="test")],
            r"no record has split='train' \(records by split: test 1\)",
        ),
        *(
            ([_record(1, "a.png"), _without(field)], rf"record 1 lacks the field '{field}' \(it")
            for field in ("id", "img_path", "captions", "split")
        ),
        ([_record("7", "a.png")], r"record 0: field 'id' must be an integer, but is '7'"),
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
    folder = _write(tmp_path, content, images=False)
    with pytest.raises(records.DataError, match=message) as error:
        records.read("synthetic", folder, "train")
    assert str(folder / "data_captions.json") in str(error.value)


def test_missing_annotation_says_what_to_do(tmp_path):
    with pytest.raises(
        records.DataError, match=r"RSTPReid/data_captions\.json does not exist.*data_root"
    ):
        records.read("rstp_reid", tmp_path, "train")


def test_annotation_that_is_no_text_is_named(tmp_path):
    (tmp_path / "data_captions.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(records.DataError, match=r"data_captions\.json cannot be read as UTF-8"):
        records.read("synthetic", tmp_path, "train")


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    content = [_record(1, f"{n}.png") for n in range(4)] + [_record(1, "no/such.png")]
    _write(tmp_path, content, images=False)
    Image.new("RGB", (2, 2)).save(tmp_path / "imgs" / "1.png")
    with pytest.raises(
        records.DataError,
        match=r"4 of 5 images of split 'train' do not exist .*imgs: '0\.png', '2\.png', '3\.png', "
        r"\.\.\.; complete",
    ):
        records.read("synthetic", tmp_path, "train")


def test_image_path_with_nul_is_a_missing_image(tmp_path):
    _write(tmp_path, [_record(1, "a\x00/b.png")], images=False)
    with pytest.raises(records.DataError, match=r"1 of 1 images .* do not exist"):
        records.read("synthetic", tmp_path, "train")


def test_only_the_asked_split_needs_its_images(tmp_path):
    _write(tmp_path, [_record(1, "gone.png", split="test")], images=False)
    content = [_record(1, "a.png")]
    _write(tmp_path, content)
    content.append(_record(2, "gone.png", split="test"))
    _write(tmp_path, content, images=False)
    assert records.read("synthetic", tmp_path, "train").image_paths == ("a.png",)


@pytest.mark.parametrize("dataset", ["cuhk_pedes", "icfg_pedes", "jsonl"])
def test_datasets_without_a_reader_say_so(tmp_path, dataset):
    with pytest.raises(records.DataError, match=rf"dataset='{dataset}' cannot be read yet"):
        records.read(dataset, tmp_path, "train")


def test_unknown_dataset_and_split_are_named(tmp_path):
    with pytest.raises(records.DataError, match="dataset='rstp' is not known; use one of"):
        records.read("rstp", tmp_path, "train")
    with pytest.raises(records.DataError, match="split='dev' is not known; use one of train"):
        records.read("synthetic", tmp_path, "dev")


@pytest.mark.parametrize("module", ["records", "tokenizer", "transforms"])
def test_module_imports_without_grain(module):
    block = "import sys; sys.modules['grain'] = sys.modules['jax'] = None; "
    command = [sys.executable, "-c", block + f"import itself_jax.data.{module}"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
