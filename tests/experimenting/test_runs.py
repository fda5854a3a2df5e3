"""Which runs an experiment needs, and what remains of one."""

import json
import os
import sys

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


_THREE_LAYERS = {"model.vision_depth": 3, "model.text_depth": 3}


@pytest.mark.parametrize("name", plans.EXPERIMENTS)
@pytest.mark.parametrize(
    "base",
    [
        _THREE_LAYERS,
        {},  # of twelve
        {**_THREE_LAYERS, "local.mars_discard": 0.45, "local.ratio_end": 0.3},
        {**_THREE_LAYERS, "local.saliency": "layer:0", "local.mars_layers": [0, 1]},
        {**_THREE_LAYERS, "local.enabled": False, "local.ats": False},
    ],
)
def test_every_arm_is_a_configuration_of_its_own(tmp_path, name, base):
    base = config_lib.replace(config_lib.Config(), base)
    experiment = plans.EXPERIMENTS[name]
    planned = [runs.plan(base, arm, 0, tmp_path) for arm in experiment.arms]
    assert len({str(runs.settings(run.config)) for run in planned}) == len(planned)
    assert len({run.workdir for run in planned}) == len(planned)
    if not experiment.asks:
        assert experiment.reference in [arm.name for arm in experiment.arms]


@pytest.mark.parametrize(
    ("experiment", "arm", "depth", "key", "value"),
    [
        ("layers", "E+M+L", 3, "mars_layers", (0, 1, 2)),
        ("layers", "E+M+L", 12, "mars_layers", (2, 4, 11)),
        ("layers", "M+L", 12, "mars_layers", None),
        ("variants", "sl", 3, "saliency", "layer:0"),
        ("variants", "sl", 12, "saliency", "layer:2"),
        ("variants", "itself", 3, "saliency", "mars"),
        ("discard", "0.25", 3, "mars_discard", 0.25),
    ],
)
def test_an_arm_is_what_its_name_says_whatever_it_starts_from(
    tmp_path, experiment, arm, depth, key, value
):
    changes = {"model.vision_depth": depth, "model.text_depth": depth, "local.mars_discard": 0.45}
    base = config_lib.replace(config_lib.Config(), {**changes, "local.saliency": "std"})
    found = next(a for a in plans.EXPERIMENTS[experiment].arms if a.name == arm)
    local = runs.plan(base, found, 0, tmp_path).config.local
    assert getattr(local, key) == value and local.enabled


@pytest.mark.parametrize(
    "changes", [{"eval.protocol": "paper"}, {"train_on_all": True}, {"eval.alpha": 0.5}]
)
def test_only_what_is_chosen_on_val_is_compared(tmp_path, changes):
    more = {"dataset": "icfg_pedes", "eval.alpha": 0.5} if "train_on_all" in changes else {}
    base = config_lib.replace(config_lib.Config(), {**changes, **more})
    with pytest.raises(config_lib.ConfigError, match="on val: eval.protocol must be 'val'"):
        runs.plan(base, plans.Arm("itself", {}), 0, tmp_path)


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


def test_a_record_of_another_format_is_refused(tmp_path):
    run = runs.plan(config_lib.Config(), plans.Arm("itself", {}), 0, tmp_path)
    runs.keep(run, {**record_samples.record(12.0, config=run.config), "format": 1})
    with pytest.raises(runs.ExperimentError, match=r"seed-0\.json has format 1, not 2: remove it"):
        runs.read(run)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"seed": 1}', '{"format": 2, "settings": {}, "test": {}}']
)
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


def test_people_are_counted_with_their_queries():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    arrays = {
        "text_global": np.array([right, wrong, right, right, wrong], np.float32),
        "text_local": None,
        "image_global": np.array([right, wrong], np.float32),
        "image_local": None,
        "text_ids": np.array([7, 7, 7, 9, 9], np.int32),
        "image_ids": np.array([7, 9], np.int32),
    }
    assert runs.found_first(arrays, 1.0) == {"found": [2, 1], "queries": [3, 2]}


def test_a_process_of_its_own_answers_or_is_missed(tmp_path):
    run = runs.plan(config_lib.Config(), plans.Arm("itself", {}), 0, tmp_path)
    assert runs.alone(run, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        runs.alone(run, divmod, 7, 0)
    with pytest.raises(runs.ExperimentError, match=r"evaluates \S+seed-0 was killed, perhaps"):
        runs.alone(run, os._exit, 3)


def test_a_finished_run_that_is_not_whole_is_told(tmp_path):
    run = runs.plan(config_lib.Config(), plans.Arm("itself", {}), 0, tmp_path)
    with pytest.raises(runs.ExperimentError, match=r"seed-0 is not whole .*json.*: remove that"):
        runs.results(run)


def test_a_run_that_fails_says_why_in_its_own_sentence(tmp_path):
    config = tiny.settings(tmp_path / "none", dataset="rstp_reid")
    run = runs.plan(config, plans.Arm("itself", {}), 0, tmp_path)
    with pytest.raises(runs.ExperimentError, match=r"seed-0 failed: itself_jax: .*none"):
        runs.finished(run, lambda line: None)
    assert not run.record.exists()


def test_a_run_that_is_killed_is_told_apart(tmp_path, monkeypatch):
    run = runs.plan(config_lib.Config(), plans.Arm("itself", {}), 0, tmp_path)
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(runs.ExperimentError, match=r"seed-0 was ended by SIGKILL, .*memory"):
        runs.train(run, lambda line: None)
