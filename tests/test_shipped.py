"""The weights that come with the package."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import slim
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.shared(tmp_path_factory) / "data"


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
    whole, slimmed = weights.open_(tmp_path / "run", print), weights.open_(target, print)
    assert not slimmed.has_local and slimmed.num_identities is None
    assert slimmed.arrays.keys() == {
        name for name in whole.arrays if not name.startswith(weights.HEADS)
    }
    for name, array in slimmed.arrays.items():
        before, after = whole.arrays[name].read(), array.read()
        if name == WORDS:
            seen = np.abs(after).sum(axis=1) > 0
            assert 20 < seen.sum() < 1000
            before, after = before[seen], after[seen]
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("saved", "code", "message"),
    [
        (None, 1, "holds no run: train there first"),
        ("{", 1, "config.json is not a configuration of itself_jax"),
        ('{"config": {"gone": 1}}', 2, "config key 'gone' does not exist"),
        ('{"config": {"dataset": "jsonl", "data_root": "/none"}}', 1, "/none"),
        (
            '{"config": {"dataset": "synthetic", "data_root": "DATA", '
            '"synthetic": {"identities": [24, 6, 6], "images_per_identity": 2}}}',
            *(1, "no validated checkpoint"),
        ),
    ],
)
def test_what_is_no_whole_run_is_refused_in_one_sentence(tmp_path, data, saved, code, message):
    if saved is not None:
        saved = saved.replace("DATA", str(data))
        (tmp_path / "config.json").write_text(saved)
    done = slim_down(tmp_path, tmp_path / "slim.npz")
    assert done.returncode == code and message in done.stderr, done.stderr
    assert done.stderr.startswith("itself_jax: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "slim.npz").exists()


def test_what_half_precision_or_the_disk_cannot_hold_is_refused(
    tmp_path, data, shipped, monkeypatch
):
    """Weights that are the package's own, but for one value."""
    saved = {"config": config_lib.to_dict(tiny.settings(data))}
    file = workdir.Workdir(tmp_path).write_json("config.json", saved)
    monkeypatch.setattr(weights, "of_run", lambda run, log: shipped)
    with pytest.raises(OSError, match=r"config\.json/a\.npz cannot be written \(.+ give another"):
        slim.write(tmp_path, file / "a.npz")
    large = np.full(shipped.arrays[WORDS].shape, 7e4, np.float32)
    arrays = {**shipped.arrays, WORDS: weights._Held(large)}
    monkeypatch.setattr(weights, "of_run", lambda run, log: shipped._replace(arrays=arrays))
    with pytest.raises(weights.WeightsError, match="token_embedding.weight holds 70000, which fl"):
        slim.write(tmp_path, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def slim_down(run, target):
    return subprocess.run(
        [sys.executable, "benchmarks/slim.py", run, target],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
