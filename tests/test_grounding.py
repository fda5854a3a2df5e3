"""Measured saliency, on maps and masks made by hand."""

import numpy as np
import pytest

from itself_jax import grounding

# Two pictures of four patches. Labels: 1 body, 2 hat, 3 shoes.
PATCHES = np.zeros((2, 4, 256), bool)
PATCHES[0, 0, [0, 2]] = True  # background and hat
PATCHES[0, 1, [1, 3]] = True  # body and shoes
PATCHES[0, 2, [0]] = True
PATCHES[0, 3, [0]] = True
PATCHES[1, 0, [0, 1]] = True
PATCHES[1, 1, [3]] = True
PATCHES[1, 2, [3]] = True
PATCHES[1, 3, [1]] = True
REGIONS = {"sex": [1, 2, 3], "hat": [2], "shoes": [3], "boots": [3], "bag": [9]}
NAMED = [{"hat": "cap", "sex": "man"}, {"shoes": "boots"}, {"sex": "man"}, {"shoes": "trainers"}]
CAPTION_IMAGES = np.asarray([0, 0, 1, 1])
# Source "a" keeps patches 0 and 1 of both; "b" keeps 2 and 3 (tokens are counted behind CLS).
IMAGES = grounding.Kept(np.asarray([[[1, 2], [1, 2]], [[3, 4], [4, 3]]]), np.ones((2, 2, 2), bool))
WORDS = np.zeros((4, 6), bool)
WORDS[0, [1, 2]] = True
WORDS[1, 3] = True
WORDS[3, [1, 2, 3, 4]] = True
LENGTHS = np.asarray([4, 3, 2, 4])
CAPTIONS = grounding.Kept(
    np.asarray([[[1, 3], [3, 1], [1, 2], [1, 2]], [[3, 4], [1, 2], [2, 1], [3, 4]]]),
    np.asarray([[[1, 1], [1, 1], [1, 0], [1, 1]], [[1, 1], [1, 1], [1, 1], [1, 1]]], bool),
)


@pytest.fixture(scope="module")
def measured():
    return grounding.measure(
        ("a", "b"),
        images=IMAGES,
        captions=CAPTIONS,
        patches=PATCHES,
        words=WORDS,
        lengths=LENGTHS,
        caption_images=CAPTION_IMAGES,
        regions=REGIONS,
        named=NAMED,
    )


def of(measured, name):
    sources = ("a", "b", "chance")
    return [measured[f"saliency/{name}/{source}"] for source in sources]


def test_patches_on_the_person(measured):
    # "a": both of picture 0 (hat; body), both of picture 1. "b": none of 0, both of 1.
    # By chance: two of four patches of picture 0, all of picture 1.
    assert of(measured, "patches_on_person") == [1.0, 0.5, 0.75]


def test_patches_on_what_the_caption_names(measured):
    """Captions 0 (the hat: patch 0), 1 (shoes: patch 1) and 3 (shoes: patches 1 and 2 of picture
    1); what is said of the whole figure does not count, so caption 2 names nothing."""
    assert of(measured, "patches_on_named") == pytest.approx(
        [(1 / 2 + 1 / 2 + 1 / 2) / 3, (0 + 0 + 1 / 2) / 3, (1 / 4 + 1 / 4 + 2 / 4) / 3]
    )


def test_the_pointing_game(measured):
    # The hat is seen in picture 0 alone: "a" points at patch 0, which shows it, "b" at 2.
    assert of(measured, "pointing_hat") == [1.0, 0.0, 0.25]
    # Shoes in both: "a" points at patches 0 and 0; "b" at patches 2 and 3.
    assert of(measured, "pointing_shoes") == [0.0, 0.0, (0.25 + 0.5) / 2]
    assert of(measured, "pointing") == pytest.approx([0.5, 0.0, (0.25 + 0.375) / 2])
    # Equal labels are one attribute; what is seen nowhere is none.
    assert not any("boots" in key or "bag" in key or "sex" in key for key in measured)


def test_words_that_name_an_attribute(measured):
    # "a" keeps: words 1, 3 of caption 0 (half), 3, 1 (half), 1 of caption 2 (none), 1, 2 (all).
    assert of(measured, "words_on_named") == pytest.approx(
        [(0.5 + 0.5 + 0 + 1) / 4, (0 + 0 + 0 + 1) / 4, (2 / 4 + 1 / 3 + 0 + 4 / 4) / 4]
    )


def test_a_caption_without_words_is_left_out():
    found = grounding.measure(
        ("a",),
        images=grounding.Kept(IMAGES.indices[:1], IMAGES.valid[:1]),
        captions=grounding.Kept(CAPTIONS.indices[:1], CAPTIONS.valid[:1]),
        patches=PATCHES,
        words=WORDS,
        lengths=np.asarray([4, 0, 2, 4]),
        caption_images=CAPTION_IMAGES,
        regions={},
        named=[{}] * 4,
    )
    assert of_one(found, "words_on_named") == pytest.approx((0.5 + 0 + 1) / 3)
    assert set(found) == {
        f"saliency/{name}/{source}"
        for name in ("patches_on_person", "words_on_named")
        for source in ("a", "chance")
    }


def of_one(measured, name):
    return measured[f"saliency/{name}/a"]
