"""Which runs an experiment needs, and what remains of one."""

import json

import numpy as np
import pytest

from itself_jax import config as config_lib
from itself_jax.experimenting import plans, runs
from tests import tiny
from tests.experimenting import record_samples


def test_arms_with_equal_changes_share_a_run_and_seeds_do_not(tmp_path):
    base = config_lib.Config()
    itself, other = plans.Arm("itself", {}), plans.Arm("extra class", {}, 12.0)
    without = plans.Arm("baseline", {"local.enabled": False})
    first = runs.plan(base, itself, 0, tmp_path)
    assert runs.plan(base, other, 0, tmp_path) == first
    assert runs.plan(base, itself, 1, tmp_path).workdir != first.workdir
    assert runs.plan(base, without, 0, tmp_path).record != first.record
    assert (first.config.seed, first.config.local.enabled) == (0, True)
    assert runs.plan(base, without, 3, tmp_path).config.seed == 3
    assert not runs.plan(base, without, 3, tmp_path).config.local.enabled


def test_the_seed_leaves_data_and_start_alone(tmp_path):
    base = config_lib.replace(config_lib.Config(), {"init_from": "synthetic_clip"})
    config = runs.plan(base, plans.Arm("itself", {}), 5, tmp_path).config
    assert (config.synthetic.seed, config.init_from) == (0, "synthetic_clip")


@pytest.mark.parametrize("name", plans.EXPERIMENTS)
def test_every_arm_is_a_configuration_of_its_own(tmp_path, name):
    base = config_lib.replace(config_lib.Config(), {"model.vision_depth": 3, "model.text_depth": 3})
    experiment = plans.EXPERIMENTS[name]
    planned = [runs.plan(base, arm, 0, tmp_path) for arm in experiment.arms]
    assert len({str(runs.settings(run.config)) for run in planned}) == len(planned)
    assert len({run.workdir for run in planned}) == len(planned)
    if not experiment.asks:
        assert experiment.reference in [arm.name for arm in experiment.arms]


def test_a_record_is_kept_and_found_again(tmp_path):
    run = runs.plan(config_lib.Config(), plans.Arm("itself", {}), 0, tmp_path)
    assert runs.read(run) is None
    record = record_samples.record(12.0, config=run.config)
    runs.keep(run, record)
    assert runs.read(run) == json.loads(json.dumps(record))
    assert [path.name for path in run.record.parent.iterdir()] == ["seed-0.json"]


def test_a_record_of_another_configuration_is_refused(tmp_path):
    arm = plans.Arm("itself", {})
    old = runs.plan(config_lib.Config(), arm, 0, tmp_path)
    runs.keep(old, record_samples.record(12.0, config=old.config))
    run = runs.plan(config_lib.replace(config_lib.Config(), {"batch_size": 64}), arm, 0, tmp_path)
    with pytest.raises(runs.ExperimentError, match=r"batch_size was 256, now 64.*--workdir"):
        runs.read(run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 1}', '{"settings": 3}'])
def test_a_damaged_record_is_named(tmp_path, content):
    run = runs.plan(config_lib.Config(), plans.Arm("itself", {}), 0, tmp_path)
    run.record.parent.mkdir(parents=True)
    run.record.write_text(content)
    with pytest.raises(runs.ExperimentError, match=r"seed-0\.json is no record of a run"):
        runs.read(run)


def test_where_it_runs_does_not_make_another_run():
    base = config_lib.Config()
    elsewhere = config_lib.replace(base, {"data_root": "/mnt/x", "num_workers": 2, "log_every": 3})
    assert runs.settings(elsewhere) == runs.settings(base)


def test_the_bootstrap_draws_identities_not_queries():
    # Two people with two queries each: one is always found, the other never. Drawn twice with
    # replacement, R@1 is 0, 50 or 100 with 1/4, 1/2, 1/4: a standard deviation of 35.4 points.
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    arrays = {
        "text_global": np.array([right, right, right, right], np.float32),
        "text_local": None,
        "image_global": np.array([right, wrong], np.float32),
        "image_local": None,
        "text_ids": np.array([0, 0, 1, 1], np.int32),
        "image_ids": np.array([0, 1], np.int32),
    }
    assert runs.bootstrap_error(arrays, 1.0, 0) == pytest.approx(35.4, abs=1.5)
    arrays["text_ids"] = np.array([0, 0, 0, 0], np.int32)
    arrays["image_ids"] = np.array([0, 1], np.int32)
    assert runs.bootstrap_error(arrays, 1.0, 0) == 0.0


def test_a_run_that_fails_says_why_in_its_own_sentence(tmp_path):
    config = tiny.settings(tmp_path / "none", dataset="rstp_reid")
    run = runs.plan(config, plans.Arm("itself", {}), 0, tmp_path)
    with pytest.raises(runs.ExperimentError, match=r"seed-0 failed: itself_jax: .*none"):
        runs.finished(run, lambda line: None)
    assert not run.record.exists()
