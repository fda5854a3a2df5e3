"""A work directory in a bucket: metrics, checkpoints, and a run that stops there and goes on."""

import json
import signal
import subprocess
import time

import bucket
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from itself_jax import checkpoint, evaluate, workdir
from itself_jax import config as config_lib

requests = bucket.requests
RUN = "gs://bucket/runs/a b"


def test_metrics_grow_by_whole_objects_and_are_cut(requests):
    directory = workdir.Workdir(RUN)
    directory.claim(config_lib.Config(), "float32", print)
    directory.describe(config_lib.Config(), "float32")
    for at in range(1, 5):
        directory.write_metrics({"step": at, "epoch": 1, "loss": float(at)})
    directory.write_metrics({"step": 4, "epoch": 1, "split": "val", "R1": 1.0})
    path = epath.Path(RUN) / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 5
    directory.write_metrics({"step": 5, "epoch": 2, "loss": 5.0})
    directory.close()
    again = workdir.Workdir(RUN)
    again.claim(config_lib.Config(), "float32", print)
    again.cut_metrics(4, validated=True)
    again.write_metrics({"step": 5, "epoch": 2, "loss": 5.5})
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5] and lines[-1]["loss"] == 5.5
    other = workdir.Workdir(RUN)
    with pytest.raises(workdir.WorkdirError, match="batch_size was 256, now 64"):
        other.claim(config_lib.Config(batch_size=64), "float32", print)


def test_results_and_dumps_arrive_whole(requests):
    summary = {"dataset": "synthetic", "split": "test", "rows": []}
    path = evaluate.write_results(RUN, summary)
    assert json.loads(path.read_text()) == summary
    assert str(path) == f"{RUN}/results/synthetic-test.json"


def test_checkpoints_are_kept_chosen_and_checked(requests):
    folder = epath.Path(RUN) / "checkpoints"
    state = {"a": jnp.arange(6, dtype=jnp.float32), "b": {"c": jnp.int32(3)}}
    said = []
    with checkpoint.Checkpoints(folder, log=said.append) as checkpoints:
        for step, score in ((1, 2.0), (2, 1.0), (3, 0.5), (4, 0.1)):
            checkpoints.save(
                step, jax.tree.map(lambda x, step=step: x + step, state), {"score": score}
            )
        checkpoints.save(4, jax.tree.map(lambda x: x + 40, state), {"score": 0.2})
    with checkpoint.Checkpoints(folder, log=said.append) as checkpoints:
        restored = checkpoints.restore_latest(state)
        assert (restored.step, int(restored.state["b"]["c"])) == (4, 43)
        best = checkpoints.restore_best(("a",))
        assert best.step == 1
        np.testing.assert_array_equal(best.state["a"], np.arange(6) + 1)
    names = {path.name for path in folder.iterdir()}
    assert names == {"1", "3", "4-1"}
    # What a killed save leaves behind has its final name here, but not the mark of completion.
    (folder / "4-1" / "commit_success.txt").unlink()
    with checkpoint.Checkpoints(folder, log=said.append) as checkpoints:
        assert checkpoints.restore_latest(state).step == 3
        checkpoints.save(5, state, {"score": None})
    assert {path.name for path in folder.iterdir()} == {"1", "3", "5"}


def test_a_bucket_that_is_not_there_or_not_ours_is_one_sentence(requests):
    with pytest.raises(workdir.WorkdirError) as error:
        workdir.Workdir("gs://elsewhere/run").describe(config_lib.Config(), "float32")
    assert str(error.value).startswith("Work directory gs://elsewhere/run cannot be written (")
    assert "role Storage Object User" in str(error.value)
    with pytest.raises(workdir.WorkdirError, match="--workdir=https://a/b is neither a local path"):
        workdir.Workdir("https://a/b")


@pytest.mark.slow
def test_the_command_stops_and_goes_on_in_a_bucket_as_on_a_disk(requests, tmp_path):
    """One run on a disk, one in a bucket that is stopped by SIGTERM: the same numbers."""
    cache = tmp_path / "compiled"
    data = f"--config.data_root={tmp_path / 'data'}"
    done = tiny.call(f"--workdir={tmp_path / 'run'}", data, cache=cache)
    assert done.returncode == 0, done.stderr
    arguments = (f"--workdir={RUN}", data)
    metrics = epath.Path(RUN) / "metrics.jsonl"
    with subprocess.Popen(
        tiny.command(*arguments), cwd=tiny.ROOT, env=tiny.environment(cache)
    ) as running:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and '"split"' in metrics.read_text()):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        assert running.wait(100) == 75
    done = tiny.call(*arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line, expected in zip(lines, tiny.metrics(tmp_path / "run"), strict=True):
        line.pop("pairs_per_second", None)
        expected.pop("pairs_per_second", None)
        assert line == expected
    result = json.loads((epath.Path(RUN) / "results/synthetic-test.json").read_text())
    assert result == tiny.results(tmp_path / "run")
