"""Pictures of which parts are left."""

import dataclasses

import numpy as np

from itself_jax import config as config_lib
from itself_jax.data import records
from itself_jax.experimenting import questions


class _Pictures:
    def __init__(self, pixels):
        self._pixels = pixels

    def __len__(self):
        return len(self._pixels)

    def name(self, index):
        return f"{index}.jpg"

    def load(self, index, size):
        assert self._pixels[index].shape[:2] == size
        return self._pixels[index].copy()


def test_a_picture_shows_its_patches_and_the_mean_colour_elsewhere():
    model = dataclasses.replace(
        config_lib.Model(), image_size=(6, 4), patch_size=2
    )  # 3 x 2 patches
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), np.uint8)
    empty = np.zeros(0, np.int32)
    split = records.Split(
        *("any", "test", _Pictures(pixels), ("a", "b"), empty, (), empty, empty, ()),
    )
    shown = questions.parts(split, np.array([[0, 5], [3, 3]]), model).images
    assert (len(shown), shown.name(1)) == (2, "1.jpg")
    mean = np.array([123, 117, 104])  # 255 times CLIP's mean
    first = shown.load(0, (6, 4))
    assert (first[:2, :2] == pixels[0][:2, :2]).all() and (first[4:, 2:] == pixels[0][4:, 2:]).all()
    assert (first[2:4] == mean).all() and (first[:2, 2:] == mean).all()
    second = shown.load(1, (6, 4))
    assert (second[2:4, 2:] == pixels[1][2:4, 2:]).all() and (second[:2] == mean).all()
    assert (pixels != mean).any()


def test_overlapping_patches_show_what_any_of_them_shows():
    model = dataclasses.replace(config_lib.Model(), image_size=(6, 4), patch_size=4, stride=2)
    pixels = np.full((1, 6, 4, 3), 7, np.uint8)
    empty = np.zeros(0, np.int32)
    split = records.Split("any", "test", _Pictures(pixels), ("a",), empty, (), empty, empty, ())
    shown = questions.parts(split, np.array([[1]]), model).images.load(0, (6, 4))
    assert (shown[2:] == 7).all() and (shown[:2] != 7).all()
