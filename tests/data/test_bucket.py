"""gs:// over HTTP: the commands and worker processes against an emulated bucket on this machine."""

import os
import pathlib
import subprocess
import sys

import bucket
import miniature
import pytest
import tiny

requests = bucket.requests

ROOT = pathlib.Path(__file__).parents[2]
OUT = "gs://bucket/data sets"
# A file, because worker processes import it.
STREAM = """
import hashlib
import sys

from absl import app, logging

from itself_jax.data import datasets, pipeline, tokenizer


def digest(root, num_workers):
    split = datasets.read("rstp_reid", root, "train", image_size=(24, 12))
    stream = pipeline.TrainStream(
        split,
        tokenizer.Tokenizer(16),
        image_size=(24, 12),
        batch_size=8,
        num_instances=2,
        num_epochs=3,
        seed=0,
        augment_image=True,
        augment_caption=True,
        num_workers=num_workers,
    )
    batches = stream.batches()
    found = hashlib.sha256()
    for batch in batches:
        for array in batch:
            found.update(array.tobytes())
    batches.close()
    assert stream.total_steps > 8 and not stream.replaced
    return found.hexdigest()


def main(argv):
    logging.set_verbosity(logging.WARNING)
    for root, num_workers in zip(argv[1::2], argv[2::2]):
        print(digest(root, int(num_workers)))


if __name__ == "__main__":
    app.run(main)
"""


@pytest.fixture
def data(tmp_path):
    miniature.write(tmp_path / "data", "rstp_reid", identities=(24, 4, 6))
    return tmp_path / "data"


def _run(*arguments):
    """Runs Python to a good end and returns what it said."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def _prepare(root, *arguments):
    command = ("-m", "itself_jax.prepare", "--dataset=rstp_reid", f"--root={root}", f"--out={OUT}")
    done = _run(*command, *arguments)
    assert done.stderr == ""
    return done.stdout


def test_a_set_packed_into_a_bucket_gives_workers_the_batches_of_the_files(
    data, requests, tmp_path
):
    out = _prepare(data)
    assert out.endswith(f"Train from it with --config.data_root={OUT}\n")
    script = tmp_path / "stream.py"
    script.write_text(STREAM)
    requests.clear()
    in_workers, here, of_files = _run(script, OUT, 2, OUT, 0, data, 0).stdout.split()
    assert in_workers == here == of_files
    copied = [line for line in requests if "alt=media" in line and "array_record" in line]
    assert len(copied) == 1, copied


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_command_trains_from_a_bucket_as_from_the_files(num_workers, data, requests, tmp_path):
    _prepare(data, "--resize=32x16")
    runs = []
    for root in (OUT, data):
        runs.append(tmp_path / f"run{len(runs)}")
        done = tiny.call(
            "--config.dataset=rstp_reid",
            f"--config.data_root={root}",
            f"--config.num_workers={num_workers}",
            f"--workdir={runs[-1]}",
            cache=tmp_path / "compiled",
        )
        assert done.returncode == 0, done.stderr
    for one, other in zip(*map(tiny.metrics, runs), strict=True):
        assert {**one, "pairs_per_second": 0} == {**other, "pairs_per_second": 0}
    assert tiny.results(runs[0], "rstp_reid-test") == tiny.results(runs[1], "rstp_reid-test")
    assert len([line for line in requests if "array_record" in line and "alt=media" in line]) == 3
