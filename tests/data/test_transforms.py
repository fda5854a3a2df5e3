"""Augmentation: hand-worked examples, the reference's numbers, properties."""

import json
import pathlib
import random

import numpy as np
import pytest

from itself_jax.data import tokenizer, transforms

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "txt_aug.json").read_text())
SOT, EOT, MASK = tokenizer.SOT, tokenizer.EOT, tokenizer.MASK


class Scripted(np.random.Generator):
    """A generator that returns the given values and checks the ranges asked for."""

    def __init__(self, *values):
        super().__init__(np.random.PCG64())
        self.values = list(values)

    def random(self):
        return self.values.pop(0)

    def integers(self, low, high):
        value = self.values.pop(0)
        assert low <= value < high
        return value

    def uniform(self, low, high):
        value = self.values.pop(0)
        assert low <= value <= high
        return value


class PythonRandom(np.random.Generator):
    """The reference's generator, Python's `random`, behind the interface of NumPy's."""

    def __init__(self, seed):
        super().__init__(np.random.PCG64())
        self._random = random.Random(seed)

    def random(self):
        return self._random.random()

    def integers(self, low, high):
        return self._random.choice(range(low, high))


def _gray(rows):
    return np.repeat(np.asarray(rows, np.uint8)[:, :, None], 3, axis=2)


NO_FLIP, FLIP, NO_ERASE, ERASE = 0.5, 0.49, 0.5, 0.49


def test_centre_crop_without_flip_is_the_image():
    image = _gray([[1, 2, 3], [4, 5, 6]])
    out = transforms.augment_image(Scripted(NO_FLIP, 10, 10, NO_ERASE), image)
    np.testing.assert_array_equal(out.pixels, image)
    np.testing.assert_array_equal(out.erase, [0, 0, 0, 0])
    assert out.erase.dtype == np.int32 and out.pixels.flags["C_CONTIGUOUS"]


def test_flip_then_shift_into_the_black_border():
    # Flipped: 3 2 1 / 6 5 4. Padded by one pixel to 4 x 5; cropping 2 x 3 at top 0, left 2 gives
    # the black border row, then the padded row 1 = 0 3 2 1 0 from column 2: 2 1 0.
    image = _gray([[1, 2, 3], [4, 5, 6]])
    out = transforms.augment_image(Scripted(FLIP, 0, 2, NO_ERASE), image, pad=1)
    np.testing.assert_array_equal(out.pixels, _gray([[0, 0, 0], [2, 1, 0]]))
    np.testing.assert_array_equal(image, _gray([[1, 2, 3], [4, 5, 6]]))  # the input is untouched


@pytest.mark.parametrize("pad", [0, 3, 10])
@pytest.mark.parametrize("shape", [(24, 12, 3), (7, 5, 3), (1, 1, 3)])
def test_shifts_are_crops_of_the_padded_picture(shape, pad):
    # By the definition; pads may be larger than the picture.
    image = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    padded = {
        flip: np.pad(im, ((pad, pad), (pad, pad), (0, 0)))
        for flip, im in ((NO_FLIP, image), (FLIP, image[:, ::-1]))
    }
    for flip in padded:
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                rng = Scripted(flip, top, left, NO_ERASE)
                pixels = transforms.augment_image(rng, image, pad=pad).pixels
                wanted = padded[flip][top : top + shape[0], left : left + shape[1]]
                np.testing.assert_array_equal(pixels, wanted)


def test_erase_box_of_a_known_area_and_ratio():
    # 20 x 10 pixels, area 0.25 -> 50, ratio 2 -> height sqrt(100) = 10, width sqrt(25) = 5.
    image = np.full((20, 10, 3), 9, np.uint8)
    rng = Scripted(NO_FLIP, 10, 10, ERASE, 0.25, np.log(2), 10, 5)
    out = transforms.augment_image(rng, image)
    np.testing.assert_array_equal(out.erase, [10, 5, 10, 5])  # top 0..10 and left 0..5 possible
    np.testing.assert_array_equal(out.pixels, image)  # the box is painted on the device


def test_box_that_touches_both_edges_is_drawn_again():
    # 10 x 40 pixels, area 0.3 -> 120, ratio 3.2 -> height 19.6 does not fit 10;
    # second try area 0.1 -> 40, ratio 1 -> 6.3 x 6.3, rounded to 6 x 6.
    rng = Scripted(NO_FLIP, 10, 10, ERASE, 0.3, np.log(3.2), 0.1, 0.0, 4, 34)
    out = transforms.augment_image(rng, np.zeros((10, 40, 3), np.uint8))
    np.testing.assert_array_equal(out.erase, [4, 34, 6, 6])


def test_box_as_high_or_as_wide_as_the_image_is_drawn_again():
    # 10 x 40 pixels: area 0.25 -> 100, ratio 1 -> 10 x 10 is as high as the image. Turned round,
    # 40 x 10, it is as wide. The second try as above.
    for shape, place in (((10, 40, 3), (4, 34)), ((40, 10, 3), (34, 4))):
        rng = Scripted(NO_FLIP, 10, 10, ERASE, 0.25, 0.0, 0.1, 0.0, *place)
        out = transforms.augment_image(rng, np.zeros(shape, np.uint8))
        np.testing.assert_array_equal(out.erase, [*place, 6, 6])


def test_ten_misfits_erase_nothing():
    # 4 x 100 pixels, area 0.4 -> 160, ratio 1 -> 13 x 13 never fits a height of 4.
    rng = Scripted(NO_FLIP, 10, 10, ERASE, *[0.4, 0.0] * 10)
    out = transforms.augment_image(rng, np.zeros((4, 100, 3), np.uint8))
    np.testing.assert_array_equal(out.erase, [0, 0, 0, 0])
    assert not rng.values  # ten tries, no more and no fewer


def test_erase_statistics_and_bounds():
    rng = np.random.default_rng(0)
    image = np.zeros((96, 32, 3), np.uint8)
    boxes = np.stack([transforms.augment_image(rng, image).erase for _ in range(4000)])
    drawn = boxes[boxes[:, 2] > 0]
    # p = 0.5, less the few that never fit 32 columns.
    assert 0.46 < len(drawn) / len(boxes) < 0.52
    top, left, height, width = drawn.T
    assert (height < 96).all() and (width < 32).all() and (width > 0).all()
    assert (top >= 0).all() and (top + height).max() == 96
    assert (left >= 0).all() and (left + width).max() == 32
    share = height * width / (96 * 32)
    assert 0.015 < share.min() < 0.03 and 0.35 < share.max() < 0.42
    assert (boxes[boxes[:, 2] == 0] == 0).all()


def test_flip_and_shift_statistics():
    rng = np.random.default_rng(0)
    image = np.zeros((30, 40, 3), np.uint8)
    image[15, 12] = 255  # flipped it is at column 27; offsets move it by -10..10
    at = [np.argwhere(transforms.augment_image(rng, image).pixels[:, :, 0])[0] for _ in range(3000)]
    rows, columns = np.asarray(at).T
    assert set(rows) == set(range(5, 26))
    assert set(columns) == set(range(2, 38))  # 12 +- 10 and 27 +- 10
    # Left of column 17 only without a flip and at 15 of the 21 offsets: 0.5 * 15 / 21 = 0.357.
    assert 0.33 < np.mean(columns < 17) < 0.385


def test_same_generator_state_same_image():
    image = np.random.default_rng(1).integers(0, 255, (24, 12, 3), np.uint8)
    first, second = (
        transforms.augment_image(np.random.default_rng([7, 1, 3]), image) for _ in range(2)
    )
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.erase, second.erase)


@pytest.mark.parametrize("example", GOLDEN["seeded_examples_python_random"])
def test_caption_augmentation_equals_the_reference(example):
    ids = transforms.augment_caption(
        PythonRandom(example["seed"]), np.asarray(example["before"], np.int32)
    )
    np.testing.assert_array_equal(ids, example["after"])


def test_caption_augmentation_rates():
    # 40000 words; three standard errors of a 12 % rate are 0.5 points.
    rng = np.random.default_rng(0)
    words = np.full(40, 320, np.int32)
    masked = replaced = deleted = 0
    for _ in range(1000):
        ids = transforms.augment_caption(rng, words)
        masked += np.sum(ids == MASK)
        deleted += np.sum(ids == tokenizer.PAD)
        replaced += np.sum((ids != MASK) & (ids != tokenizer.PAD) & (ids != 320))
    for kind, count in {"mask": masked, "replace": replaced, "delete": deleted}.items():
        assert abs(count / 40000 - GOLDEN["expected"][kind]) < 0.005, kind
        assert abs(count / 40000 - GOLDEN["empirical_rates"][kind]) < 0.005, kind


def test_masked_replaced_kept_and_deleted_words():
    # Draws: 0.1 -> .5 of the chosen: mask; 0.13 -> .65: replace by 777; 0.2: kept; 0.17 -> .85:
    # deleted, and what follows shifts left.
    ids = np.asarray([SOT, 11, 12, 13, 14, 15, EOT, 0], np.int32)
    out = transforms.augment_caption(Scripted(0.1, 0.13, 777, 0.2, 0.17, 0.9), ids)
    np.testing.assert_array_equal(out, [SOT, MASK, 777, 13, 15, EOT, 0, 0])
    np.testing.assert_array_equal(ids, [SOT, 11, 12, 13, 14, 15, EOT, 0])
    assert out.dtype == np.int32


def test_all_words_deleted_leaves_sot_and_eot():
    ids = np.asarray([SOT, 11, 12, EOT, 0], np.int32)
    out = transforms.augment_caption(Scripted(0.19, 0.17), ids)
    np.testing.assert_array_equal(out, [SOT, EOT, 0, 0, 0])


def test_special_tokens_and_pads_take_no_draw():
    ids = np.asarray([SOT, MASK, 0, EOT, EOT, 0], np.int32)
    np.testing.assert_array_equal(transforms.augment_caption(Scripted(), ids), ids)


def test_replacements_are_words():
    # Extremes of the range the reference draws from: 1 and 49404.
    ids = np.asarray([SOT, 11, 12, EOT], np.int32)
    out = transforms.augment_caption(Scripted(0.14, 1, 0.14, 49404), ids)
    np.testing.assert_array_equal(out, [SOT, 1, 49404, EOT])
    with pytest.raises(AssertionError):
        transforms.augment_caption(Scripted(0.14, 49405), ids)
