"""From records to one split's arrays: order, labels, drawn splits, and what is refused."""

import logging
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from itself_jax.data import images, records


def _corpus(rows, dataset="synthetic"):
    """Rows are (identity, image, captions, split)."""
    found = tuple(
        records.Record(image, identity, tuple(captions), split)
        for identity, image, captions, split in rows
    )
    pictures = images.ImageFiles("/nowhere", [record.image for record in found])
    return records.Corpus(dataset, "FILE", found, pictures)


def _people(counts, dataset, captions=("a man",)):
    """A corpus of numbered identities with two pictures each; `counts` by split."""
    rows = []
    for split, count in counts.items():
        for _ in range(count):
            number = len(rows) // 2
            rows += [(str(number), f"{number}-{view}.jpg", captions, split) for view in range(2)]
    return _corpus(rows, dataset)


ROWS = [
    ("30", "c.png", ["caption 0", "caption 1"], "train"),
    ("7", "sub/a.png", ["caption 2"], "train"),
    ("50", "t.png", ["test caption"], "test"),
    ("30", "b.png", ["caption 3", "caption 3"], "train"),
]


def test_train_split_in_annotation_order_with_labels():
    split = records.select(_corpus(ROWS), "train")
    assert split.image_paths == ("c.png", "sub/a.png", "b.png")
    assert split.captions == ("caption 0", "caption 1", "caption 2", "caption 3", "caption 3")
    # Sorted original ids 7, 30 get labels 0, 1.
    assert split.original_ids == (7, 30) and split.num_identities == 2
    np.testing.assert_array_equal(split.image_ids, [1, 0, 1])
    np.testing.assert_array_equal(split.caption_ids, [1, 1, 0, 1, 1])
    np.testing.assert_array_equal(split.caption_images, [0, 0, 1, 2, 2])
    for array in (split.image_ids, split.caption_ids, split.caption_images):
        assert array.dtype == np.int32
    assert (split.dataset, split.split) == ("synthetic", "train")


def test_pictures_are_those_of_the_split_in_its_order():
    split = records.select(_corpus(ROWS), "train")
    names = [split.images.name(index) for index in range(len(split.images))]
    assert names == ["/nowhere/c.png", "/nowhere/sub/a.png", "/nowhere/b.png"]


def test_test_split_keeps_original_ids():
    split = records.select(_corpus(ROWS), "test")
    np.testing.assert_array_equal(split.image_ids, [50])
    np.testing.assert_array_equal(split.caption_ids, [50])
    assert split.original_ids == (50,) and split.num_identities == 1


def test_a_split_can_be_sent_to_a_worker_process():
    split = pickle.loads(pickle.dumps(records.select(_corpus(ROWS), "train")))
    assert split.images.name(2) == "/nowhere/b.png"
    np.testing.assert_array_equal(split.caption_images, [0, 0, 1, 2, 2])


def test_single_caption_keeps_the_first_of_every_picture():
    split = records.select(_corpus(ROWS), "train").single_caption()
    assert split.captions == ("caption 0", "caption 2", "caption 3")
    np.testing.assert_array_equal(split.caption_ids, [1, 0, 1])
    np.testing.assert_array_equal(split.caption_images, [0, 1, 2])
    assert split.image_paths == ("c.png", "sub/a.png", "b.png")


def test_text_ids_are_numbered_by_split():
    rows = [
        ("zoe", "z.png", ["x"], "train"),
        ("adam", "a.png", ["x"], "train"),
        ("zoe", "y.png", ["x"], "train"),
        ("mia", "m.png", ["x"], "test"),
        ("lea", "l.png", ["x"], "test"),
    ]
    train = records.select(_corpus(rows), "train")
    assert train.original_ids == ("adam", "zoe")
    np.testing.assert_array_equal(train.image_ids, [1, 0, 1])
    test = records.select(_corpus(rows), "test")
    assert test.original_ids == ("lea", "mia")
    np.testing.assert_array_equal(test.caption_ids, [1, 0])


@pytest.mark.parametrize(
    ("ids", "numeric"),
    [
        (("0010", "9"), {"0010": 10, "9": 9}),
        (("-1", "0"), {"-1": -1, "0": 0}),
        (("7", "007"), None),  # as numbers they would be one identity
        (("7", "8a"), None),
        (("1", "2147483648"), None),
        (("1", "\N{ARABIC-INDIC DIGIT ONE}"), None),
    ],
)
def test_ids_are_numbers_only_if_all_are_and_stay_distinct(ids, numeric):
    corpus = _corpus([(identity, f"{identity}.png", ["x"], "train") for identity in ids])
    assert records.numbers(corpus.records) == numeric


def test_numbers_are_sorted_as_numbers_even_if_padded():
    corpus = _corpus([(i, f"{i}.png", ["x"], "train") for i in ("0010", "9", "100")])
    assert records.select(corpus, "train").original_ids == (9, 10, 100)


def test_icfg_holds_out_a_tenth_of_its_train_identities(caplog):
    corpus = _people({"train": 3102, "test": 3}, "icfg_pedes")
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        train = records.select(corpus, "train")
        val = records.select(corpus, "val")
        test = records.select(corpus, "test")
    assert (train.num_identities, val.num_identities) == (2792, 310)
    drawn = np.random.default_rng(0).choice(3102, 310, replace=False)
    assert val.original_ids == tuple(sorted(drawn.tolist()))
    assert not set(train.original_ids) & set(val.original_ids)
    assert test.original_ids == (3102, 3103, 3104)
    assert train.image_ids.max() == 2791 and val.image_ids.max() < 3102
    reason = (
        "FILE has no val split, so 310 of its 3102 train identities, drawn with seed 0, are val"
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"icfg_pedes train: {reason}.",
        f"icfg_pedes val: {reason}.",
    ]


def test_the_held_out_identities_do_not_depend_on_the_order_of_the_file():
    corpus = _people({"train": 40, "test": 3}, "icfg_pedes")
    turned = corpus._replace(records=corpus.records[::-1])
    assert records.select(corpus, "val").original_ids == records.select(turned, "val").original_ids


def test_train_on_all_keeps_the_same_val_and_says_so(caplog):
    corpus = _people({"train": 40, "test": 3}, "icfg_pedes")
    val = records.select(corpus, "val")
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        train = records.select(corpus, "train", train_on_all=True)
    assert train.original_ids == tuple(range(40))
    assert records.select(corpus, "val", train_on_all=True).original_ids == val.original_ids
    assert "trained on too (train_on_all), so figures on val are not unseen" in caplog.text


def test_train_on_all_is_refused_where_the_file_has_a_val_of_its_own():
    corpus = _people({"train": 5, "val": 2, "test": 3}, "icfg_pedes")
    with pytest.raises(records.DataError, match="has a val split of its own, so train_on_all"):
        records.select(corpus, "train", train_on_all=True)
    assert records.select(corpus, "val", train_on_all=True).original_ids == (5, 6)


def test_own_data_without_splits_is_drawn_by_identity_and_says_so(caplog):
    corpus = _people({"": 57}, "jsonl")
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        splits = [set(records.select(corpus, name).original_ids) for name in records.SPLITS]
    assert [len(found) for found in splits] == [47, 5, 5]
    assert set.union(*splits) == set(range(57))
    said = "has no splits, so its identities were drawn with seed 0 (train 47, val 5, test 5)"
    assert [said in record.getMessage() for record in caplog.records] == [True] * 3


def test_three_identities_are_enough_for_three_splits():
    corpus = _people({"": 3}, "jsonl")
    assert [records.select(corpus, name).num_identities for name in records.SPLITS] == [1, 1, 1]


def test_own_data_without_val_holds_out_train_identities():
    corpus = _people({"train": 20, "test": 4}, "jsonl")
    assert records.select(corpus, "val").num_identities == 2
    assert records.select(corpus, "test").num_identities == 4


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"": 2}, "FILE has 2 identities and no split: at least 3 are needed to draw one"),
        ({"train": 1, "test": 1}, "FILE has 1 train identities and no val split: at least 2 are"),
    ],
)
def test_too_few_identities_to_draw_from_are_counted(counts, message):
    with pytest.raises(records.DataError, match=message):
        records.select(_people(counts, "jsonl"), "train")


def test_a_benchmark_with_a_published_val_is_never_drawn():
    with pytest.raises(
        records.DataError,
        match=r"FILE: no record has split='val' \(records by split: test 4, train 10\); choose",
    ):
        records.select(_people({"train": 5, "test": 2}, "cuhk_pedes"), "val")


def test_empty_corpus_and_unknown_split_are_named():
    with pytest.raises(records.DataError, match=r"no record has split='train' .*split: none\)"):
        records.select(_corpus([]), "train")
    with pytest.raises(records.DataError, match="split='dev' is not known; use one of train"):
        records.select(_corpus(ROWS), "dev")


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/a.png", "../a.png", "a/../../b.png", "C:\\a.png", "\\a.png", "a\\..\\..\\b.png"),
        *("gs://bucket/a.png", "file:///etc/passwd"),
    ],
)
def test_a_path_that_leaves_the_image_folder_is_refused(path):
    with pytest.raises(records.DataError, match=r"^X is .*; paths must be relative .*'\.\.'"):
        records.check_image_path(path, "X")


@pytest.mark.parametrize("path", ["a b.png", "\N{LATIN SMALL LETTER E WITH ACUTE}/..x.png", "a\\b"])
def test_spaces_and_letters_of_any_kind_are_fine_in_a_path(path):
    assert records.check_image_path(path, "X") == path


@pytest.mark.parametrize("module", ["records", "tokenizer", "transforms", "benchmarks", "doctor"])
def test_module_imports_without_grain(module):
    block = "import sys; sys.modules['grain'] = sys.modules['jax'] = None; "
    command = [sys.executable, "-c", block + f"import itself_jax.data.{module}"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
