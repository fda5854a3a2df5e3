"""Masks and named attributes of a data set: what patches touch, which words name something."""

import json

import numpy as np
import pytest
from PIL import Image

from itself_jax.data import masks, records, synthetic, tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    return synthetic.ensure(
        root, identities=(2, 2, 2), images_per_identity=2, log=lambda line: None
    )


def read(folder, split="val"):
    from itself_jax.data import datasets

    return datasets.read("synthetic", folder, split)


def test_patches_touch_the_labels_of_their_own_pixels():
    labels = np.zeros((8, 4), np.uint8)
    labels[0, 3] = 5  # the last column of the first row: patch 1
    labels[7, 0] = 9  # the last row: patch 6
    found = masks.touched(labels, grid=(4, 2), stride=2, patch=2, image_size=(8, 4))
    assert found.shape == (8, 256)
    assert np.flatnonzero(found[:, 5]).tolist() == [1]
    assert np.flatnonzero(found[:, 9]).tolist() == [6]
    assert found[:, 0].all()


def test_a_mask_of_another_resolution_and_overlapping_patches():
    """The picture has 8 x 8 pixels, the mask 16 x 16: a patch of 4 covers 8 of its pixels."""
    labels = np.zeros((16, 16), np.uint8)
    labels[8, 8] = 1
    found = masks.touched(labels, grid=(3, 3), stride=2, patch=4, image_size=(8, 8))
    # Patches start at 0, 4, 8 of the mask and are 8 wide: those from 4 and 8 reach pixel 8.
    assert np.flatnonzero(found[:, 1]).tolist() == [4, 5, 7, 8]
    # A mask coarser than the patches: each pixel serves the patches it reaches into.
    coarse = masks.touched(
        np.asarray([[1, 0], [0, 0]], np.uint8),
        grid=(4, 4),
        stride=2,
        patch=2,
        image_size=(8, 8),
    )
    assert np.flatnonzero(coarse[:, 1]).tolist() == [0, 1, 4, 5]


def test_a_patch_that_ends_between_two_pixels_has_the_cut_one_and_no_more():
    """Masks of 100 rows for pictures of 48: a patch of 4 rows is 8 1/3 rows of the mask."""
    labels = np.arange(100, dtype=np.uint8)[:, None].repeat(5, 1)
    found = masks.touched(labels, grid=(12, 1), stride=4, patch=4, image_size=(48, 4))
    assert np.flatnonzero(found[0]).tolist() == list(range(9))
    assert np.flatnonzero(found[2]).tolist() == list(range(16, 25))  # 16 2/3 to 25, exactly
    assert np.flatnonzero(found[11]).tolist() == list(range(91, 100))


def test_words_that_name_an_attribute_are_marked_wherever_they_stand():
    words = tokenizer.Tokenizer(24)
    ids = words.encode("A man in a red jacket. The man wears no hat.")
    marked = masks.word_positions(ids, {"sex": "man", "upper": "red jacket"}, words)
    pieces = words.tokens(ids)
    assert [p.strip() for p, m in zip(pieces, marked, strict=False) if m] == [
        *("man", "red", "jacket", "man")
    ]
    assert not masks.word_positions(ids, {"hat": "blue cap"}, words).any()


def test_the_embedded_data_set_says_what_is_where(folder):
    split = read(folder)
    truth = masks.find(folder, split)
    assert truth.names == split.image_paths
    assert len(truth.named) == len(split.captions) == 8
    about = json.loads((folder / "attributes.json").read_text())["pictures"]
    assert truth.named[1] == about[split.image_paths[0]]["named"][1]
    for caption, named in zip(split.captions, truth.named, strict=True):
        assert all(words.lower() in caption.lower() for words in named.values())
    labels = truth.labels(0)
    assert labels.shape == (192, 80)
    assert {1, 3} <= set(np.unique(labels)) <= set(range(12))
    # One caption a picture: the first one's attributes.
    single = masks.find(folder, split.single_caption())
    assert single.named == truth.named[::2]


def test_a_folder_without_masks_has_none(tmp_path, folder):
    assert masks.find(tmp_path, read(folder)) is None


def test_damage_is_one_sentence(tmp_path, folder):
    split = read(folder)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks.json").write_text('{"regions": {}}')
    with pytest.raises(records.DataError, match=r"attributes\.json cannot be read .*without masks"):
        masks.find(tmp_path, split)
    (tmp_path / "attributes.json").write_text('{"pictures": {}}')
    with pytest.raises(records.DataError, match="do not describe the pictures .* synthetic val"):
        masks.find(tmp_path, split)
    truth = masks.find(folder, split)._replace(folder=tmp_path)
    path = tmp_path / "masks" / f"{split.image_paths[0].removesuffix('.jpg')}.png"
    with pytest.raises(records.DataError, match=r"\.png is no readable mask"):
        truth.labels(0)
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(records.DataError, match="3 channels"):
        truth.labels(0)
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(path)
    with pytest.raises(records.DataError, match="its largest label is 300"):
        truth.labels(0)


def test_captions_and_their_own_pictures_are_a_split(folder):
    split = read(folder)
    chosen = split.pairs(np.asarray([5, 0]))
    assert chosen.captions == (split.captions[5], split.captions[0])
    assert chosen.image_paths == (split.image_paths[2], split.image_paths[0])
    assert chosen.caption_images.tolist() == [0, 1]
    assert chosen.caption_ids.tolist() == chosen.image_ids.tolist()
    size = tiny.get_config().model.image_size
    np.testing.assert_array_equal(
        chosen.images.load(0, tuple(size)), split.images.load(2, tuple(size))
    )
