"""The weights that come with the package."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from itself_jax import assessment, interrupt, weights, workdir
from itself_jax import config as config_lib
from tests import tiny

NAME = "synthetic_clip"
WORDS = "params/text_encoder/token_embedding/embedding"
# docs/experiments is what was found with these very weights: with other ones it is to be made anew.
SHA256 = "bce67be134a6a77516c95a87f082a24520c6829d5a213eca8871a60b5f3f0563"


@pytest.fixture(scope="module")
def shipped():
    return weights.open_(NAME, print)


def test_they_are_small_and_whole(shipped):
    assert weights.SHIPPED[NAME].stat().st_size <= 6_000_000
    assert hashlib.sha256(weights.SHIPPED[NAME].read_bytes()).hexdigest() == SHA256
    assert not shipped.has_local and shipped.num_identities is None
    for name, array in shipped.arrays.items():
        assert np.isfinite(weights.read(shipped, name, array)).all(), name


def test_words_that_no_caption_had_are_zero(shipped):
    words = shipped.arrays[WORDS].read()
    known = np.abs(words).sum(axis=1) > 0
    assert 150 < known.sum() < 2000
    assert known[[49405, 49406, 49407]].all()  # <|mask|>, SOT, EOT


def test_they_are_what_the_embedded_run_is_configured_for(shipped):
    asked = config_lib.from_dict(tiny.configs("synthetic").get_config()).model
    activation = shipped.config.model.activation
    assert dataclasses.replace(asked, activation=activation) == shipped.config.model


def test_a_run_is_tested_itself_whatever_start_the_configuration_names(tmp_path):
    directory = workdir.Workdir(tmp_path, writes=False)
    assert not assessment.started_from(directory, NAME)
    (tmp_path / "config.json").write_text(json.dumps({"config": {"init_from": None}}))
    assert assessment.started_from(directory, NAME)
    assert not assessment.started_from(directory, "best.pth")


def test_a_misspelt_name_is_told_the_right_ones():
    with pytest.raises(weights.WeightsError, match=r"^synthetic_clp is no file here.*_clip\.$"):
        weights.open_("synthetic_clp", print)


def test_they_find_people_that_they_never_met(tmp_path, capsys):
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
    assert "holds no run: the weights that come with the package" in capsys.readouterr().out
    results = tiny.results(tmp_path / "run")
    rank1 = {row["direction"]: row["R1"] for row in results["rows"]}
    assert rank1["t2i"] > 10 * results["chance_R1"]["t2i"]
    assert rank1["i2t"] > 10 * results["chance_R1"]["i2t"]


@pytest.mark.slow
def test_a_run_becomes_such_a_file(tmp_path):
    """What `benchmarks/slim.py` writes is the run's encoders, and the words that it has seen."""
    settings = tiny.settings(tmp_path / "data", local__enabled=False, num_epochs=2)
    tiny.run(settings, tmp_path / "run")
    target = tmp_path / "slim.npz"
    done = slim_down(tmp_path / "run", target)
    assert done.returncode == 0, done.stderr
    assert "words, R@1 on val" in done.stdout
    whole, slim = weights.open_(tmp_path / "run", print), weights.open_(target, print)
    assert not slim.has_local and slim.num_identities is None
    assert slim.arrays.keys() == {
        name for name in whole.arrays if not name.startswith(weights.HEADS)
    }
    for name, array in slim.arrays.items():
        before, after = whole.arrays[name].read(), array.read()
        if name == WORDS:
            seen = np.abs(after).sum(axis=1) > 0
            assert 20 < seen.sum() < 1000
            before, after = before[seen], after[seen]
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-6)


def test_what_holds_no_run_is_refused_in_one_sentence(tmp_path):
    done = slim_down(tmp_path / "none", tmp_path / "slim.npz")
    assert done.returncode == 2 and "holds no run: train there first" in done.stderr
    assert not (tmp_path / "slim.npz").exists()


def slim_down(run, target):
    return subprocess.run(
        [sys.executable, "benchmarks/slim.py", run, target],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
