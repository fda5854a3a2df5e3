"""The one door: packed form before files, missing pictures and odd captions of the asked split."""

import json
import logging
import os

import miniature
import numpy as np
import pytest
from etils import epath
from PIL import Image

from itself_jax.data import datasets, folders, packed, packing, records

SIZE = (24, 12)


def _arrays(split):
    return [split.images.load(index, SIZE) for index in range(len(split.images))]


def _same(first, second):
    """Whether two splits hold the same, down to the pixels."""
    for field in ("dataset", "split", "image_paths", "captions", "original_ids"):
        assert getattr(first, field) == getattr(second, field)
    for field in ("image_ids", "caption_ids", "caption_images"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    np.testing.assert_array_equal(_arrays(first), _arrays(second))


def _synthetic(folder, captions=("a man",), split="train", path="a.png"):
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    record = {"id": 1, "img_path": path, "captions": list(captions), "split": split}
    (folder / "data_captions.json").write_text(json.dumps([record]))
    return folder


@pytest.mark.parametrize("dataset", miniature.DATASETS)
@pytest.mark.parametrize("resize", [None, SIZE])
def test_packed_form_reads_as_the_files_do(dataset, resize, tmp_path):
    miniature.write(tmp_path / "files", dataset)
    name = "jsonl" if dataset == "csv" else dataset
    corpus = datasets.corpus(name, tmp_path / "files")
    packing.pack(corpus, tmp_path / "packed", resize=resize, log=lambda line: None)
    for split in records.SPLITS:
        read = [
            datasets.read(name, tmp_path / root, split, image_size=SIZE)
            for root in ("files", "packed")
        ]
        assert " in " in read[1].images.name(0) and " in " not in read[0].images.name(0)
        _same(*read)


def test_a_packed_form_goes_before_the_files(tmp_path):
    miniature.write(tmp_path, "rstp_reid")
    packing.pack(datasets.files("rstp_reid", tmp_path), tmp_path, log=lambda line: None)
    folder = tmp_path / "packed" / "rstp_reid-original" / packed.VERSION
    annotation = tmp_path / "RSTPReid" / "data_captions.json"
    assert datasets.corpus("rstp_reid", tmp_path).source == str(folder)
    assert datasets.files("rstp_reid", tmp_path).source == str(annotation)


def test_a_packed_form_of_another_size_is_passed_over_for_the_files(tmp_path, caplog):
    miniature.write(tmp_path, "rstp_reid")
    corpus = datasets.files("rstp_reid", tmp_path)
    packing.pack(corpus, tmp_path, resize=(8, 4), log=lambda line: None)
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        found = datasets.corpus("rstp_reid", tmp_path, SIZE)
    assert found.source == corpus.source
    assert "resized to 8x4, but image_size is 24x12" in caplog.text
    assert f"Reading the files below {tmp_path} instead." in caplog.text


def test_a_packed_form_of_another_size_without_files_names_the_sizes(tmp_path):
    miniature.write(tmp_path / "files", "rstp_reid")
    corpus = datasets.files("rstp_reid", tmp_path / "files")
    packing.pack(corpus, tmp_path / "out", resize=(8, 4), log=lambda line: None)
    with pytest.raises(records.DataError, match=r"resized to 8x4, but image_size is 24x12"):
        datasets.read("rstp_reid", tmp_path / "out", "train", image_size=SIZE)


def test_train_on_all_reaches_the_draw(tmp_path):
    miniature.write(tmp_path, "icfg_pedes")
    assert datasets.read("icfg_pedes", tmp_path, "train").num_identities == 5
    whole = datasets.read("icfg_pedes", tmp_path, "train", train_on_all=True)
    assert whole.num_identities == 6


def test_own_data_may_be_named_by_its_file(tmp_path):
    miniature.write(tmp_path, "csv")
    assert datasets.read("jsonl", tmp_path / "pictures.csv", "val").num_identities == 2


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
    _synthetic(tmp_path, captions)
    Image.new("RGB", (2, 4)).save(tmp_path / "imgs" / "a.png")
    Image.new("RGB", (2, 4)).save(tmp_path / "imgs" / "b.png")
    path = tmp_path / "data_captions.json"
    rows = json.loads(path.read_text())
    rows.append({"id": 2, "img_path": "b.png", "captions": "a man", "split": "train"})
    path.write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        split = datasets.read("synthetic", tmp_path, "train")
    assert split.captions[:7] == tuple(captions)
    assert [record.getMessage() for record in caplog.records] == [
        "synthetic train has 2 empty captions, 2 captions without a word, "
        "1 captions of more than 100 words (cut at text_length), "
        "2 captions with control characters or CLIP's special tokens, "
        "1 identities with one pair (drawn repeatedly); going on."
    ]


@pytest.mark.parametrize("dataset", miniature.DATASETS)
def test_good_data_logs_nothing_beyond_what_was_drawn(dataset, tmp_path, caplog):
    miniature.write(tmp_path, dataset)
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        datasets.read("jsonl" if dataset == "csv" else dataset, tmp_path, "train")
    assert len(caplog.records) == (dataset == "icfg_pedes")


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    folder = miniature.write(tmp_path, "rstp_reid", identities=(3, 1, 1))
    for name in ("0000_c1_0000.jpg", "0001_c1_0000.jpg", "0001_c2_0001.jpg", "0002_c1_0000.jpg"):
        (folder / "imgs" / name).unlink()
    with pytest.raises(
        records.DataError,
        match=r"4 of 6 images of split 'train' do not exist below .*/imgs: '0000_c1_0000\.jpg', "
        r"'0001_c1_0000\.jpg', '0001_c2_0001\.jpg', \.\.\.; complete the image folder",
    ):
        datasets.read("rstp_reid", tmp_path, "train")
    assert datasets.read("rstp_reid", tmp_path, "test").num_identities == 1


def test_image_path_with_nul_is_a_missing_image(tmp_path):
    _synthetic(tmp_path, path="a\x00/b.png")
    with pytest.raises(records.DataError, match=r"1 of 1 images .* do not exist"):
        datasets.read("synthetic", tmp_path, "train")


def test_another_spelling_that_exists_is_suggested(tmp_path):
    folder = miniature.write(tmp_path, "icfg_pedes", identities=(2, 0, 1))
    (folder / "imgs" / "train" / "0000").rename(folder / "imgs" / "train" / "0000A")
    (folder / "imgs" / "train").rename(folder / "imgs" / "Train")
    path = folder / "ICFG-PEDES.json"
    path.write_text(path.read_text().replace("train/0000/", "train/0000a/"))
    with pytest.raises(
        records.DataError,
        match=r"'train/0000a/0000_000_01_0303morning_0008_0\.jpg' \(there is "
        r"'Train/0000A/0000_000_01_0303morning_0008_0\.jpg'\)",
    ):
        datasets.read("icfg_pedes", tmp_path, "train", train_on_all=True)


def test_a_picture_behind_a_link_that_leaves_the_folder_is_refused(tmp_path):
    folder = miniature.write(tmp_path / "root", "rstp_reid")
    outside = (folder / "imgs" / "0001_c1_0000.jpg").rename(tmp_path / "secret.jpg")
    (folder / "imgs" / "0001_c1_0000.jpg").symlink_to(outside)
    with pytest.raises(
        records.DataError,
        match=r"1 of 12 images of split 'train' are links that lead out of .*/imgs \(such as "
        r"'0001_c1_0000\.jpg'\), which are refused; put the files there",
    ):
        datasets.read("rstp_reid", tmp_path / "root", "train")


def test_unknown_dataset_and_split_are_named(tmp_path):
    with pytest.raises(records.DataError, match="dataset='rstp' is not known; use one of cuhk_p"):
        datasets.read("rstp", tmp_path, "train")
    with pytest.raises(records.DataError, match="split='dev' is not known; use one of train"):
        datasets.read("synthetic", tmp_path, "dev")


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    miniature.write(tmp_path / "data", "rstp_reid")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.read("rstp_reid", "~/data", "train").num_identities == 6


# ------------------------------------------------------------------------------- folders.locate


@pytest.fixture
def tree(tmp_path):
    """imgs/a.jpg, imgs/sub/b.jpg, and beside imgs: far/c.jpg."""
    for name in ("imgs/a.jpg", "imgs/sub/b.jpg", "far/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def _locate(tree, *paths):
    return folders.locate(epath.Path(tree / "imgs"), paths)


def test_pictures_that_are_there_are_not_mentioned(tree):
    assert _locate(tree, "a.jpg", "sub/b.jpg", "./a.jpg") == ({}, ())


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("A.JPG", "a.jpg"),
        ("Sub/B.jpg", "sub/b.jpg"),
        ("sub\\b.jpg", "sub/b.jpg"),
        ("b.jpg", None),
        ("sub/a.jpg", None),
        ("gone/b.jpg", None),
        ("a.jpg/b.jpg", None),
        ("x" * 300, None),
    ],
)
def test_missing_pictures_come_with_their_other_spelling(tree, path, other):
    assert _locate(tree, "a.jpg", path) == ({1: other}, ())


def test_accents_may_be_encoded_differently(tree):
    (tree / "imgs" / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.jpg").touch()
    decomposed = "cafe\N{COMBINING ACUTE ACCENT}.jpg"
    found = _locate(tree, decomposed).missing
    assert found == {0: "caf\N{LATIN SMALL LETTER E WITH ACUTE}.jpg"}


def test_links_within_the_folder_are_fine_and_those_out_of_it_are_not(tree):
    imgs = tree / "imgs"
    (imgs / "in.jpg").symlink_to("sub/b.jpg")
    (imgs / "out.jpg").symlink_to("../far/c.jpg")
    (imgs / "broken.jpg").symlink_to("../far/none.jpg")
    (imgs / "far").symlink_to("../far")
    located = _locate(tree, "in.jpg", "out.jpg", "broken.jpg", "far/c.jpg")
    assert located.outside == (1, 3)
    assert list(located.missing) == [2]


def test_the_image_folder_itself_may_be_a_link(tree):
    os.symlink(tree / "imgs", tree / "linked")
    assert folders.locate(epath.Path(tree / "linked"), ["a.jpg", "sub/b.jpg"]) == ({}, ())


def test_a_neighbour_with_a_longer_name_is_outside(tree):
    (tree / "imgs2").mkdir()
    (tree / "imgs2" / "d.jpg").touch()
    (tree / "imgs" / "d.jpg").symlink_to(tree / "imgs2" / "d.jpg")
    assert _locate(tree, "d.jpg").outside == (0,)


def test_annotations_changed_since_packing_are_read_from_the_files_with_a_warning(tmp_path, caplog):
    folder = miniature.write(tmp_path, "rstp_reid")
    packing.pack(datasets.files("rstp_reid", tmp_path), tmp_path, log=lambda line: None)
    annotation = folder / "data_captions.json"
    rows = json.loads(annotation.read_text())
    rows[0]["captions"][0] = "a corrected sentence"
    annotation.write_text(json.dumps(rows))
    found = datasets.corpus("rstp_reid", tmp_path)
    assert found.records[0].captions[0] == "a corrected sentence"
    assert "was packed from another state of" in caplog.text
    packing.pack(datasets.files("rstp_reid", tmp_path), tmp_path, log=lambda line: None)
    caplog.clear()
    again = datasets.corpus("rstp_reid", tmp_path)
    assert again.records == found.records and "packed" in again.source
    assert not caplog.text


def test_a_damaged_annotation_file_is_not_hidden_by_the_packed_form(tmp_path):
    folder = miniature.write(tmp_path, "rstp_reid")
    packing.pack(datasets.files("rstp_reid", tmp_path), tmp_path, log=lambda line: None)
    annotation = folder / "data_captions.json"
    annotation.write_text(annotation.read_text()[:-20])
    with pytest.raises(records.DataError, match="not valid JSON"):
        datasets.corpus("rstp_reid", tmp_path)
    annotation.unlink()
    assert len(datasets.corpus("rstp_reid", tmp_path).records) == 22
