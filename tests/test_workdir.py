"""The files of a run: whole lines, cut to the restored step, written by renaming."""

import json
import os
import resource
import signal

import pytest

from itself_jax import config as config_lib
from itself_jax import workdir

CONFIG = config_lib.Config()


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def directory(tmp_path):
    """Claimed, with six steps of metrics and a validation at 3 and 6."""
    directory = workdir.Workdir(tmp_path / "run")
    directory.claim(CONFIG, "float32", print)
    directory.describe(CONFIG, "float32")
    for at in range(1, 7):
        directory.write_metrics({"step": at, "epoch": 1, "loss": float(at)})
        if at % 3 == 0:
            directory.write_metrics({"step": at, "epoch": 1, "split": "val", "R1": 1.0})
    directory.close()
    directory.release()
    return directory


@pytest.mark.parametrize(
    ("step", "validated", "kept"),
    [
        (0, False, []),
        (2, True, [1, 2]),
        (3, False, [1, 2, 3]),
        (3, True, [1, 2, 3, "val"]),
        (4, True, [1, 2, 3, "val", 4]),
        (6, True, [1, 2, 3, "val", 4, 5, 6, "val"]),
    ],
)
def test_metrics_are_cut_to_the_restored_state(directory, step, validated, kept):
    directory.cut_metrics(step, validated=validated)
    assert [line.get("split", line["step"]) for line in lines(directory.path)] == kept


@pytest.mark.parametrize("tail", ['{"step": 7', '{"step": 7, "epoch": 1, "loss": 1.0', "\0\0\0"])
def test_half_a_last_line_is_cut(directory, tail):
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    directory.cut_metrics(6, validated=True)
    directory.write_metrics({"step": 7, "epoch": 1, "loss": 7.0})
    directory.close()
    assert [line["step"] for line in lines(directory.path)] == [1, 2, 3, 3, 4, 5, 6, 6, 7]


def test_metrics_that_do_not_exist_need_no_cut(tmp_path):
    workdir.Workdir(tmp_path).cut_metrics(3, validated=True)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_its_own_by_what_the_first_start_wrote(directory):
    again = workdir.Workdir(directory.path)
    said = []
    again.claim(CONFIG, "float32", said.append)
    assert said == []
    again.claim(CONFIG, "bfloat16", said.append)
    assert said == ["Going on in bfloat16 (was float32), as the device says."]


def test_two_runs_on_one_directory_are_refused_and_the_holder_is_named(directory):
    directory.claim(CONFIG, "float32", print)
    directory.claim(CONFIG, "float32", print)  # its own again
    with pytest.raises(workdir.WorkdirError, match="is in use by process"):
        workdir.Workdir(directory.path).describe(CONFIG, "float32")
    with pytest.raises(workdir.WorkdirError) as error:
        workdir.Workdir(directory.path).claim(CONFIG, "float32", print)
    assert f"{directory.path} is in use by process {os.getpid()} on " in str(error.value)
    directory.release()
    assert not (directory.path / ".lock").exists()
    # What a killed run leaves behind is no obstacle.
    (directory.path / ".lock").write_text("process 1 on moon")
    other = workdir.Workdir(directory.path)
    other.claim(CONFIG, "float32", print)
    other.release()
    with pytest.raises(workdir.WorkdirError, match="another configuration"):
        other.claim(config_lib.Config(batch_size=64), "float32", print)
    assert not (directory.path / ".lock").exists()


def test_a_directory_that_became_anothers_meanwhile_is_refused_before_it_is_touched(directory):
    """Two starts on one fresh directory: the slower one comes when the other has stopped again."""
    late = workdir.Workdir(directory.path)
    with pytest.raises(workdir.WorkdirError, match="batch_size was 256, now 64"):
        late.hold(config_lib.Config(batch_size=64), "float32")
    late.release()
    directory.claim(CONFIG, "float32", print)
    with pytest.raises(workdir.WorkdirError, match="is in use by"):
        late.hold(CONFIG, "float32")
    assert len(lines(directory.path)) == 8


def test_a_process_that_does_not_write_leaves_no_file(tmp_path):
    silent = workdir.Workdir(tmp_path, writes=False)
    silent.claim(CONFIG, "float32", print)
    silent.describe(CONFIG, "float32")
    silent.write_metrics({"step": 1, "epoch": 1})
    silent.cut_metrics(0, validated=False)
    silent.finish({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_was_killed_before_its_first_file_is_no_obstacle(tmp_path):
    (tmp_path / ".tmp-config.json").write_text('{"conf')
    workdir.Workdir(tmp_path).claim(CONFIG, "float32", print)


def test_keys_that_only_an_older_or_newer_version_has_are_listed(directory):
    path = directory.path / "config.json"
    saved = json.loads(path.read_text())
    saved["config"]["gone"] = 1
    del saved["config"]["batch_size"]
    path.write_text(json.dumps(saved))
    with pytest.raises(workdir.WorkdirError) as error:
        directory.claim(CONFIG, "float32", print)
    assert "batch_size was None, now 256" in str(error.value)
    assert "gone was 1, now None" in str(error.value)


def test_a_finished_mark_that_is_broken_counts_as_none(directory):
    assert directory.finished() is None
    directory.finish({"step": 6})
    assert directory.finished() == {"step": 6}
    directory.write_json("finished.json", [])
    assert directory.finished() is None
    (directory.path / "finished.json").write_text('{"st')
    assert directory.finished() is None


def test_a_file_is_replaced_whole_or_not_at_all(directory):
    directory.write_json("a.json", {"old": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(workdir.WorkdirError, match=r"cannot be written \(File too large\)"):
            directory.write_json("a.json", {"new": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert json.loads((directory.path / "a.json").read_text()) == {"old": 1}
    assert not list(directory.path.glob(".tmp-*"))
