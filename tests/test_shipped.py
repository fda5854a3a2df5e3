"""The weights that come with the package."""

import numpy as np
import pytest

from itself_jax import assessment, interrupt, weights
from tests import tiny

NAME = "synthetic_clip"


@pytest.fixture(scope="module")
def shipped():
    return weights.open_(NAME, print)


def test_they_are_small_and_whole(shipped):
    assert weights.SHIPPED[NAME].stat().st_size <= 6_000_000
    assert (shipped.config.model.grid, shipped.config.model.vision_depth) == ((12, 5), 3)
    assert not shipped.has_local and shipped.num_identities is None
    for name, array in shipped.arrays.items():
        assert np.isfinite(weights.read(shipped, name, array)).all(), name


def test_words_that_no_caption_had_are_zero(shipped):
    words = shipped.arrays["params/text_encoder/token_embedding/embedding"].read()
    known = np.abs(words).sum(axis=1) > 0
    assert 150 < known.sum() < 2000
    assert known[[49405, 49406, 49407]].all()  # <|mask|>, SOT, EOT


def test_they_find_people_that_they_never_met(tmp_path):
    config = tiny.settings(
        tmp_path / "data",
        init_from=NAME,
        synthetic__identities=(6, 10, 40),
        model__image_size=(48, 20),
        model__patch_size=4,
        model__text_length=48,
        local__enabled=False,
    )
    assessment.evaluate_only(config, tmp_path / "run", interrupt.Interrupts())
    results = tiny.results(tmp_path / "run")
    rank1 = {row["direction"]: row["R1"] for row in results["rows"]}
    assert rank1["t2i"] > 10 * results["chance_R1"]["t2i"]
    assert rank1["i2t"] > 10 * results["chance_R1"]["i2t"]
