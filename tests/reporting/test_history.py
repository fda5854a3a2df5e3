"""What a run wrote comes back as it was written, also of a run that goes on or was killed."""

import dataclasses
import functools
import json
import os

import bucket
import numpy as np
import pytest
import report_samples
from etils import epath

from itself_jax import config as config_lib
from itself_jax import workdir
from itself_jax.reporting import history as history_lib

requests = bucket.requests


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(report_samples.make_run, tmp_path / "run")


def append(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_a_finished_run_is_told_in_whole(make_run):
    history = history_lib.read(make_run())
    assert history.finished and not history.running
    assert (history.step, history.epoch, history.epochs, history.best_epoch) == (60, 3, 3, 2)
    np.testing.assert_array_equal(history.training["loss"].at, [10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(history.training["loss"].value, [80, 70, 60, 50, 40, 30])
    assert set(history.training) == {
        *("loss", "loss_tal", "loss_cid", "grad_norm", "learning_rate"),
        *("bank_image", "bank_text", "pairs_per_second"),
    }
    np.testing.assert_array_equal(history.validation["val"]["R1"].at, [1, 2, 3])
    np.testing.assert_array_equal(history.validation["val"]["mAP"].value, [5, 20, 15])
    np.testing.assert_array_equal(
        history.measured["patches_on_person"]["mars"].value, [0.25, 0.5, 0.75]
    )
    assert history.compute_dtype == "float32" and "jax" in history.versions
    assert history.notes == ()
    assert history_lib.state(history) == "finished"


def test_only_settings_that_differ_are_listed_as_a_person_writes_them(make_run):
    assert dict((key, rest) for key, *rest in history_lib.read(make_run()).differences) == {
        "eval_datasets": ["()", "('jsonl',)"],
        "batch_size": ["256", "64"],
        "num_epochs": ["60", "3"],
        "warmup_epochs": ["5", "1"],
    }


def test_settings_of_other_versions_are_named_or_left_out(make_run):
    folder = make_run()
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["gone"] = True
    del saved["config"]["model"]["stride"]
    (folder / "config.json").write_text(json.dumps(saved))
    found = {key: rest for key, *rest in history_lib.read(folder).differences}
    assert found["gone"] == ["no such key", "True"]
    assert "model.stride" not in found


@pytest.mark.parametrize("tail", ['{"step": 70, "ep', "\0\0\0", '{"step": 70, "epoch": 4\n'])
def test_a_half_written_last_line_is_left_out_and_noted(make_run, tail):
    folder = make_run(finished=False)
    append(folder, tail)
    history = history_lib.read(folder)
    assert history.step == 60
    assert history.notes == (
        "The last line of metrics.jsonl (line 10) is half-written and left out: the run was "
        "writing it, or was killed.",
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"step": 7', "line 10 is damaged"),
        ("[1]", "line 10 is damaged .it is no JSON object.: restore the file"),
        ('{"step": 7.5, "epoch": 1}', "line 10: step is 7.5 and should be a whole number"),
        ('{"step": 7, "loss": 1.0}', "line 10: epoch is None and should be a whole number"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(make_run, line, what):
    folder = make_run(finished=False)
    append(folder, line + '\n{"step": 70, "epoch": 4, "loss": 1.0}\n')
    with pytest.raises(history_lib.ReportError, match=f"metrics.jsonl, {what}"):
        history_lib.read(folder)


def test_numbers_that_are_not_finite_and_text_are_left_out(make_run):
    folder = make_run(finished=False)
    append(folder, '{"step": 70, "epoch": 4, "loss": NaN, "grad_norm": "x", "further": 2}\n')
    history = history_lib.read(folder)
    assert len(history.training["loss"].at) == len(history.training["grad_norm"].at) == 6
    assert history.training["further"].at.tolist() == [70]


def test_what_is_no_run_is_refused_with_one_sentence(make_run, tmp_path):
    with pytest.raises(history_lib.ReportError, match=r"nowhere/config.json does not exist: give"):
        history_lib.read(tmp_path / "nowhere")
    folder = make_run(finished=False)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(history_lib.ReportError, match=r"metrics.jsonl does not exist: the run has"):
        history_lib.read(folder)
    (folder / "config.json").write_text('{"config": 3}')
    with pytest.raises(history_lib.ReportError, match="config.json is not a configuration"):
        history_lib.read(folder)
    with pytest.raises(history_lib.ReportError, match="neither a local path nor a bucket's"):
        history_lib.read("https://example.org/run")


def test_a_run_that_works_is_told_from_one_that_was_killed(make_run):
    folder = make_run(finished=False, epochs=2)
    assert history_lib.state(history_lib.read(folder)) == "epoch 2 of 3, stopped"
    (folder / ".lock").write_text("process 1 on moon")  # nobody holds it any more
    assert history_lib.state(history_lib.read(folder)) == "epoch 2 of 3, stopped"
    run = workdir.Workdir(folder)
    run.claim(report_samples.CONFIG, "float32", print)
    assert history_lib.state(history_lib.read(folder)) == "epoch 2 of 3, still running"
    run.finish({"step": 40, "best_epoch": 1})  # its last words, before it lets go
    assert history_lib.state(history_lib.read(folder)) == "finished"
    run.release()


def test_a_run_without_a_line_yet_has_empty_series(make_run):
    folder = make_run(finished=False)
    (folder / "metrics.jsonl").write_text("")
    history = history_lib.read(folder)
    assert history.training == history.validation == history.measured == {}
    assert history.best_epoch is None
    assert history_lib.state(history) == "no step logged yet, stopped"


def test_the_best_epoch_is_the_first_of_equals_or_the_last_of_a_run_on_everyone(make_run):
    folder = make_run(finished=False)
    append(folder, '{"step": 80, "epoch": 4, "split": "val", "R1": 40.0}\n')
    assert history_lib.read(folder).best_epoch == 2
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["train_on_all"] = True
    (folder / "config.json").write_text(json.dumps(saved))
    assert history_lib.read(folder).best_epoch == 4


def test_tables_run_from_local_to_global_and_point_out_the_chosen_weight(make_run):
    table, back = history_lib.tables(history_lib.read(make_run()))
    assert [row[:2] for row in table.rows] == [
        ("local", "20.00"),
        ("fused@0.68", "30.00"),
        ("global", "10.00"),
        ("chance", "0.75"),
        ("oracle", "83.25"),
    ]
    assert table.marked == back.marked == 1
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.caption == (
        "synthetic test, text → image: 1,200 captions rank 600 pictures; percent, protocol val"
    )
    assert [row[0] for row in back.rows] == ["local", "fused@0.68", "global"]
    assert "600 pictures rank 1,200 captions" in back.caption
    assert back.caption.endswith("3 queries without a right answer are left out")


def test_the_runs_own_data_set_comes_first_and_a_broken_result_is_noted(make_run):
    folder = make_run()
    write = workdir.Workdir(folder).write_json
    write("results/a-test.json", report_samples.result("a", oracle_R1=None, chance_R1=None))
    write("results/b-test.json", {"dataset": "b"})
    (folder / "results" / ".tmp-c-test.json-1").write_text("{")
    history = history_lib.read(folder)
    assert [result.dataset for result in history.results] == ["synthetic", "a"]
    assert history.results[1].oracle == history.results[1].chance == {}
    (note,) = history.notes
    assert note.startswith("results/b-test.json cannot be read (KeyError(")


def test_results_of_other_weights_are_left_out_and_noted(make_run):
    folder = make_run()
    other = report_samples.result("jsonl", weights={"source": "other.pt", "step": None})
    workdir.Workdir(folder).write_json("results/jsonl-test.json", other)
    history = history_lib.read(folder)
    assert [result.dataset for result in history.results] == ["synthetic"]
    assert history.notes == (
        "results/jsonl-test.json is of the weights other.pt and left out; --mode=eval with the "
        "run's configuration tests its own.",
    )
    evaluated = dataclasses.replace(report_samples.CONFIG, init_from="other.pt")
    history = history_lib.read(folder, evaluated)
    assert [result.dataset for result in history.results] == ["jsonl"]
    assert history.notes[1:] == (
        "results/synthetic-test.json is of this directory's own run and left out.",
    )


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "synthetic, MARS + ATS"),
        ({"local.ats": False}, "synthetic, MARS"),
        ({"local.saliency": "layer:2"}, "synthetic, saliency layer:2 + ATS"),
        ({"local.enabled": False}, "synthetic, global branch only"),
    ],
)
def test_a_title_names_data_and_method(make_run, changes, title):
    config = config_lib.replace(report_samples.CONFIG, changes)
    assert history_lib.title(history_lib.read(make_run(config))) == title


def test_facts_begin_with_what_the_run_reached(make_run):
    facts = dict(history_lib.facts(history_lib.read(make_run())))
    assert facts["R@1, synthetic test"] == "30.00 % text → image, 15.00 % image → text (α = 0.68)"
    assert facts["Tested epoch"] == "2"
    assert facts["Speed"] == "200 pairs per second (median)"
    assert facts["Steps"] == "60, in epoch 3 of 3"


def test_a_shorter_run_counts_its_own_epochs(make_run):
    config = dataclasses.replace(report_samples.CONFIG, last_epoch=2)
    assert history_lib.read(make_run(config, finished=False, epochs=1)).epochs == 2


def test_a_run_in_a_bucket_reads_the_same(make_run, requests):
    here = make_run(finished=False)
    there = epath.Path("gs://bucket/run")
    for name in ("config.json", "metrics.jsonl"):
        (there / name).write_text((here / name).read_text())
    history = history_lib.read(os.fspath(there))
    assert history.training["loss"].value.tolist() == [80, 70, 60, 50, 40, 30]
    assert history_lib.state(history) == "epoch 3 of 3, not finished"
    with pytest.raises(history_lib.ReportError, match="nothing/config.json does not exist"):
        history_lib.read("gs://bucket/nothing")
